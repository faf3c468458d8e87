"""API keys of the caller's tenant: made, listed, renewed and revoked by its admins."""

from datetime import timedelta
from typing import Annotated

from fastapi import APIRouter, Body, Request
from sqlmodel import Session, select

from service import auth
from service.api.paging import Cursor, Limit, page
from service.api.schemas import Key, NewKey, Page, SecretKey
from service.api.sessions import Db, ReadDb
from service.db.tables import KeyRow, now
from service.problems import ApiError, not_found, responses

router = APIRouter(prefix="/keys", tags=["keys"])


def as_key(row: KeyRow) -> Key:
    return Key.model_validate(row.model_dump())


@router.post("", status_code=201, responses=responses(413))
def create_key(wanted: NewKey, session: Db) -> SecretKey:
    """Make a key. The answer is the only place where it is ever shown."""
    row, secret = auth.create_key(session, wanted.name, wanted.role, expires_at=auth.expiry(wanted))
    session.commit()
    return SecretKey(**as_key(row).model_dump(), key=secret)


@router.get("", responses=responses())
def list_keys(session: ReadDb, cursor: Cursor = None, limit: Limit = 20) -> Page[Key]:
    """Keys, newest first, also those that do not count any more."""
    return page(session, select(KeyRow), KeyRow, cursor, limit, as_key)


@router.post("/{key_id}/renew", status_code=201, responses=responses(404, 409, 413))
def renew_key(
    key_id: str,
    request: Request,
    session: Db,
    overlap_hours: Annotated[
        float, Body(ge=0, le=24 * 30, strict=True, embed=True, description="How long the old one still counts.")
    ] = 24.0,
) -> SecretKey:
    """A new key with the same name and role; the old one counts a while longer, so that it can be replaced where it is used."""
    old = _find(session, key_id)
    if old.revoked_at is not None:
        raise ApiError(409, "key_revoked", "The key was revoked: make a new one.")
    row, secret = auth.create_key(session, old.name, old.role)
    until = now() + timedelta(hours=overlap_hours)
    old.expires_at = min(old.expires_at or until, until)
    session.commit()
    auth.forget(request)
    return SecretKey(**as_key(row).model_dump(), key=secret)


@router.delete("/{key_id}", status_code=204, responses=responses(404))
def revoke_key(key_id: str, request: Request, session: Db) -> None:
    """End a key at once; other servers of the same database take it for a second more. It stays in the list."""
    row = _find(session, key_id)
    row.revoked_at = row.revoked_at or now()
    session.commit()
    auth.forget(request)


def _find(session: Session, key_id: str) -> KeyRow:
    row = session.get(KeyRow, key_id)
    if row is None:
        raise not_found("key", key_id)
    return row
