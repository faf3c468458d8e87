"""What the service says of itself: lines on stderr, for people or (`NARROW_LOG=json`) for programs.

A line knows the request or job that it belongs to: who begins one says so in `about`, and everything that is logged within it has
it. Headers, bodies and queries are never logged, so no key and no text of a user is.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

about: ContextVar[dict[str, Any] | None] = ContextVar("about", default=None)


@contextmanager
def concerning(**fields: Any) -> Iterator[None]:
    """Everything that is logged inside has these fields."""
    token = about.set({**(about.get() or {}), **fields})
    try:
        yield
    finally:
        about.reset(token)


def configure(form: Literal["text", "json"]) -> None:
    handler = logging.StreamHandler()
    handler.addFilter(_attach)
    handler.setFormatter(Json() if form == "json" else Text("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)


def _attach(record: logging.LogRecord) -> bool:
    record.fields = {**(about.get() or {}), **getattr(record, "fields", {})}
    return True


class Text(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        told = super().formatMessage(record)
        line = " ".join([told, *(f"{name}={value}" for name, value in record.fields.items())])  # type: ignore[attr-defined]
        # A path may have line breaks and commands to a terminal in it.
        return line if line.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


class Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **record.fields,  # type: ignore[attr-defined]
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)
