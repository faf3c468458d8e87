"""Who is asking: API keys, the tenant that each belongs to, and what its role may do.

A key is `nrw_` and 256 random bits. The database has its SHA-256 alone: what is random needs no slow hash, and what is not
there cannot leak. Every request comes through `caller`; what it may do follows from method and path, so no route can forget
to ask. Whose rows it sees follows from its session (`db.session`), so no query can forget either.
"""

import hashlib
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from math import ceil
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import bindparam
from sqlalchemy import select as sql_select
from sqlmodel import Session, col, select

from service.api.schemas import NewKey, Role
from service.db.session import open_session, reading
from service.db.tables import DEFAULT_TENANT, KeyRow, new_id, now
from service.problems import ApiError

ROLES: tuple[Role, ...] = ("read", "write", "admin")
"""Each may do what those before it may."""
SEEN_EVERY = timedelta(hours=1)
"""How exactly a key's last use is known: writing it down costs a request the write lock."""

_bearer = HTTPBearer(auto_error=False, description="An API key. Not needed where the service says so at its start: on loopback.")


@dataclass(frozen=True)
class Caller:
    tenant: str
    role: Role
    key: str | None = None
    """Its id, if there is one."""


def caller(request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> Caller:
    """The tenant and role behind a request. Raises ApiError: 401 without a key that counts, 403 where its role is not enough."""
    if credentials is not None:
        found = _holder(request, credentials.credentials)
        _take(request, credentials.credentials)
    elif request.app.state.keys_needed:
        raise _unknown("key_needed", "This service needs an API key: send it as `Authorization: Bearer nrw_...`.")
    else:
        _same_origin(request)
        found = Caller(DEFAULT_TENANT, "admin")
    request.state.caller = found
    needed = needs(request.method, request.scope["path"])
    if ROLES.index(found.role) < ROLES.index(needed):
        detail = f"The key's role is {found.role!r}, and this takes {needed!r}: use another key, or ask for one."
        raise ApiError(403, "not_allowed", detail)
    return found


def needs(method: str, path: str) -> Role:
    """The role that a request takes: to look, read; to make or end something, write; for keys, webhooks and the audit, admin."""
    if path in ("/keys", "/audit", "/webhooks") or path.startswith(("/keys/", "/webhooks/")):
        return "admin"
    return "read" if method in ("GET", "HEAD", "OPTIONS") or path == "/plans" else "write"


def expiry(wanted: NewKey) -> datetime | None:
    return now() + timedelta(days=wanted.expires_in_days) if wanted.expires_in_days else None


def create_key(
    session: Session, name: str, role: Role, tenant: str = DEFAULT_TENANT, expires_at: datetime | None = None
) -> tuple[KeyRow, str]:
    """A new key's row, and the key itself, which is nowhere else. The caller commits."""
    secret = f"nrw_{secrets.token_urlsafe(32)}"
    row = KeyRow(
        id=new_id("key"),
        tenant=tenant,
        name=name,
        role=role,
        hint=secret[-4:],
        sha256=_digest(secret),
        created_at=now(),
        expires_at=expires_at,
    )
    session.add(row)
    session.flush()
    return row, secret


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


_KEYS: Any = KeyRow.__table__  # type: ignore[attr-defined]
_BY_DIGEST = sql_select(_KEYS).where(_KEYS.c.sha256 == bindparam("digest"))


def _holder(request: Request, secret: str) -> Caller:
    # Every request asks this, so it is asked of the table and not of the mapper. Not remembered: a revoked key ends at once.
    with reading(request.app.state.engine).connect() as connection:
        row = connection.execute(_BY_DIGEST, {"digest": _digest(secret)}).first()
    if row is None:
        raise _unknown("unknown_key", "The API key is not one of this service: check it, or ask for a new one.")
    if row.revoked_at is not None:
        raise _unknown("revoked_key", f"The API key {row.name!r} was revoked: ask for a new one.")
    if row.expires_at is not None and row.expires_at <= now():
        raise _unknown(
            "expired_key", f"The API key {row.name!r} expired at {row.expires_at:%Y-%m-%d %H:%M} UTC: ask for a new one."
        )
    if row.used_at is None or row.used_at < now() - SEEN_EVERY:
        with open_session(request.app.state.engine) as session:
            used = session.get_one(KeyRow, row.id)
            used.used_at = now()
            session.commit()
    return Caller(row.tenant, row.role, row.id)


def _take(request: Request, secret: str) -> None:
    """Counts the request against those that the key may send. Where no keys are needed nobody is counted."""
    allowance = request.app.state.limiter.take(_digest(secret))
    request.state.allowance = allowance.headers
    if allowance.wait:
        detail = f"This key may send {allowance.limit} requests a minute: wait for {ceil(allowance.wait)} s."
        raise ApiError(429, "too_many_requests", detail, headers={"Retry-After": str(ceil(allowance.wait))})


def _unknown(code: str, detail: str) -> ApiError:
    return ApiError(401, code, detail, headers={"WWW-Authenticate": "Bearer"})


def _same_origin(request: Request) -> None:
    """Without keys a page of any site that the user looks at could send forms here."""
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        detail = "The request comes from a page of another site, and this service has no keys to know it by."
        raise ApiError(403, "cross_origin", detail)


def any_key(session: Session) -> bool:
    """Whether there is a key that was not revoked."""
    return session.exec(select(KeyRow.id).where(col(KeyRow.revoked_at).is_(None)).limit(1)).first() is not None
