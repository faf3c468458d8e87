"""Lists, newest first: ids sort by time, so a cursor is the last id that was seen."""

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import Query
from sqlmodel import Session, col

from service.api.schemas import Page

T = TypeVar("T")

CURSOR = r"^[a-z]+_[0-9a-z]+$"
Cursor = Annotated[str | None, Query(max_length=60, pattern=CURSOR, description="`next_cursor` of the page before.")]
Limit = Annotated[int, Query(ge=1, le=100, description="How many, at most.")]
DIGEST = "^[0-9a-f]{64}$"
Sha256 = Annotated[str | None, Query(pattern=DIGEST, description="Only what has this digest.")]


def page(session: Session, statement: Any, table: Any, cursor: str | None, limit: int, read: Callable[[Any], T]) -> Page[T]:
    if cursor:
        statement = statement.where(col(table.id) < cursor)
    rows = list(session.exec(statement.order_by(col(table.id).desc()).limit(limit + 1)))
    return Page(data=[read(row) for row in rows[:limit]], next_cursor=rows[limit - 1].id if len(rows) > limit else None)
