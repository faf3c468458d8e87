"""`Idempotency-Key`: the same request sent again is answered with what it made first."""

import hashlib
from typing import Annotated

from fastapi import Header
from pydantic import BaseModel
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, select

from service.db.tables import IdempotencyRow, now
from service.problems import ApiError

# A parameter called `idempotency_key`: its name is the header's.
Key = Annotated[str | None, Header(min_length=1, max_length=200, description="Makes a retry safe.")]


def made_before(session: Session, key: str | None, body: BaseModel) -> IdempotencyRow | None:
    """What an earlier request with this key has made. Raises ApiError if that was another request."""
    known = session.exec(select(IdempotencyRow).where(IdempotencyRow.key == key)).first() if key else None
    if known and known.body_sha256 != _sha256(body):
        raise ApiError(422, "idempotency_key_reused", "This Idempotency-Key came with another request before: use a new one.")
    return known


def commit(session: Session, key: str | None, body: BaseModel, job_id: str | None = None, sweep_id: str | None = None) -> None:
    """Commits what a request has made, and under which key."""
    if key:
        session.add(IdempotencyRow(key=key, body_sha256=_sha256(body), job_id=job_id, sweep_id=sweep_id, created_at=now()))
    try:
        session.commit()
    except IntegrityError as error:
        detail = "Another request with this Idempotency-Key is being answered: send it again in a moment."
        raise ApiError(409, "request_in_progress", detail) from error


def _sha256(body: BaseModel) -> str:
    return hashlib.sha256(body.model_dump_json().encode()).hexdigest()
