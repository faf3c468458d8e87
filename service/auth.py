"""Who is asking: API keys, the tenant that each belongs to, and what its role may do.

A key is `nrw_` and 256 random bits. The database has its SHA-256 alone: what is random needs no slow hash, and what is not
there cannot leak. It comes in a header or, from the pages of this service, in a cookie, which browsers send by themselves: with
that, what changes anything has to come from such a page. Every request comes through `caller`; what it may do follows from
method and path, so no route can forget to ask. Whose rows it sees follows from its session (`db.session`), so no query can
forget either.
"""

import hashlib
import ipaddress
import secrets
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from math import ceil
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import Engine, bindparam
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
REMEMBERED = 1.0
"""Seconds for which a server takes a key without asking the database again. A key that one server revokes, or the command line,
counts so long with the others: to ask with each request took a quarter of its time."""
MOST_KNOWN = 10_000

COOKIE = "narrow_key"
"""With the key of somebody who has logged in to the pages. Of a host: services on other ports of it share the name."""
OPEN = ("/ui/login", "/ui/logout")
"""Pages for those who have no key yet, or want to be rid of it."""
SAFE = ("GET", "HEAD", "OPTIONS")

_bearer = HTTPBearer(auto_error=False, description="An API key. Not needed where the service says so at its start: on loopback.")


@dataclass(frozen=True)
class Caller:
    tenant: str
    role: Role
    key: str | None = None
    """Its id, if there is one."""


async def caller(request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> Caller:
    """The tenant and role behind a request. Raises ApiError: 401 without a key that counts, 403 where its role is not enough."""
    if "caller" in request.scope["state"]:  # by `know`
        found: Caller = request.state.caller
    elif credentials is not None:
        found = await holder(request, credentials.credentials)
    elif request.app.state.keys_needed:
        secret = request.cookies.get(COOKIE)
        if secret is None:
            raise _unknown("key_needed", "This service needs an API key: send it as `Authorization: Bearer nrw_...`.")
        require_own_page(request)
        found = await holder(request, secret)
    else:
        _from_here(request)
        found = Caller(DEFAULT_TENANT, "admin")
    request.state.caller = found
    if request.scope["path"].startswith("/ui/"):
        require_own_page(request)
    needed = needs(request.method, request.scope["path"])
    if ROLES.index(found.role) < ROLES.index(needed):
        detail = f"The key's role is {found.role!r}, and this takes {needed!r}: use another key, or ask for one."
        raise ApiError(403, "not_allowed", detail)
    return found


async def know(request: Request) -> None:
    """As `caller`, before FastAPI asks: it reads the whole body first."""
    if request.scope["path"] not in OPEN:
        await caller(request, await _bearer(request))


async def holder(request: Request, secret: str) -> Caller:
    """Whose key it is, of whom the request is counted. Raises ApiError: 401 if it is one that does not count, 429."""
    digest = _digest(secret)
    found = await _holder(request, digest)
    _take(request, digest)
    return found


def needs(method: str, path: str) -> Role:
    """The role that a request takes: to look, read; to make or end something, write; for keys, webhooks and the audit, admin.
    A page takes what it shows or does."""
    path = path.removeprefix("/ui")
    if path in ("/keys", "/audit", "/webhooks") or path.startswith(("/keys/", "/webhooks/")):
        return "admin"
    return "read" if method in SAFE or path == "/plans" else "write"


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


async def _holder(request: Request, digest: str) -> Caller:
    known: dict[str, tuple[float, Caller]] = request.app.state.known_keys
    until, found = known.get(digest, (0.0, None))
    if found is None or until < time.monotonic():
        row = await run_in_threadpool(_look_up, request.app.state.engine, digest)
        found = Caller(row.tenant, row.role, row.id)
        lives = REMEMBERED if row.expires_at is None else min(REMEMBERED, (row.expires_at - now()).total_seconds())
        if len(known) >= MOST_KNOWN:
            known.clear()
        known[digest] = time.monotonic() + lives, found
    return found


def forget(request: Request) -> None:
    """After a change to keys: this server asks for each of them again."""
    request.app.state.known_keys.clear()


def _look_up(engine: Engine, digest: str) -> Any:
    with reading(engine).connect() as connection:
        row = connection.execute(_BY_DIGEST, {"digest": digest}).first()
    if row is None:
        raise _unknown("unknown_key", "The API key is not one of this service: check it, or ask for a new one.")
    if row.revoked_at is not None:
        raise _unknown("revoked_key", f"The API key {row.name!r} was revoked: ask for a new one.")
    if row.expires_at is not None and row.expires_at <= now():
        raise _unknown(
            "expired_key", f"The API key {row.name!r} expired at {row.expires_at:%Y-%m-%d %H:%M} UTC: ask for a new one."
        )
    if row.used_at is None or row.used_at < now() - SEEN_EVERY:
        with open_session(engine) as session:
            used = session.get_one(KeyRow, row.id)
            used.used_at = now()
            session.commit()
    return row


def _take(request: Request, digest: str) -> None:
    """Counts the request against those that the key may send. Where no keys are needed nobody is counted."""
    allowance = request.app.state.limiter.take(digest)
    request.state.allowance = allowance.headers
    if allowance.wait:
        detail = f"This key may send {allowance.limit} requests a minute: wait for {ceil(allowance.wait)} s."
        raise ApiError(429, "too_many_requests", detail, headers={"Retry-After": str(ceil(allowance.wait))})


def _unknown(code: str, detail: str) -> ApiError:
    return ApiError(401, code, detail, headers={"WWW-Authenticate": "Bearer"})


def _from_here(request: Request) -> None:
    """Without keys a page of any site that the user looks at could send forms here; and where its own name is made to lead to
    this machine (DNS rebinding), it could read the answers too. That name is what such a request has as its host."""
    host, origin, bound = request.headers.get("host"), request.headers.get("origin"), request.app.state.host
    if bound is not None and host is not None and not _loopback(_hostname(host), bound):
        detail = (
            f"This service has no keys and listens on loopback, where {host[:80]!r} is nobody's name: ask for localhost, or "
            "start it with NARROW_KEYS=always."
        )
        raise ApiError(403, "wrong_host", detail)
    # A link of another site that somebody follows is no harm, and comes without an origin.
    site = "none" if request.method in ("GET", "HEAD") else request.headers.get("sec-fetch-site", "none")
    if (origin is not None and (not host or origin.partition("://")[2] != host)) or site not in ("none", "same-origin"):
        detail = "The request comes from a page of another site, and this service has no keys to know it by."
        raise ApiError(403, "cross_origin", detail)


def require_own_page(request: Request) -> None:
    """Refuses what would change something and does not come from a page of this service: browsers send cookies by themselves, and
    forms of any site to anywhere. What a browser says of the site that it is from no page can change; over plain HTTP to
    another machine it does not say it, and then the page's origin has to be the host that was asked."""
    if request.method in SAFE:
        return
    site, origin, host = (request.headers.get(name, "") for name in ("sec-fetch-site", "origin", "host"))
    own = site == "same-origin" if site else bool(host) and origin.partition("://")[2] == host
    if not own:
        detail = "The request does not come from a page of this service: open the page again, or send the key in a header."
        raise ApiError(403, "cross_origin", detail)


def _hostname(netloc: str) -> str:
    try:
        return urlsplit(f"//{netloc}").hostname or ""
    except ValueError:
        return ""


def _loopback(name: str, bound: str) -> bool:
    try:
        return name in ("localhost", bound.lower()) or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def any_key(session: Session) -> bool:
    """Whether there is a key that was not revoked."""
    return session.exec(select(KeyRow.id).where(col(KeyRow.revoked_at).is_(None)).limit(1)).first() is not None
