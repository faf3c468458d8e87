"""Uploads that survive a broken connection: tus 1.0 (https://tus.io/protocols/resumable-upload), which has clients for every
language, with its extensions creation, checksum, expiration and termination.

What arrives is kept in pieces, one for each PATCH, in the storage that all servers share: any of them takes the next one. A
PATCH that breaks off keeps what had come. `POST /models` and `POST /datasets` take the ids of uploads that are complete.
"""

import base64
import hashlib
import os
import tempfile
from collections.abc import AsyncIterator
from datetime import timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi.concurrency import run_in_threadpool
from sqlmodel import select
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from service import quotas
from service.api.paging import Cursor, Limit, page
from service.api.schemas import Page, Upload
from service.api.sessions import Db, ReadDb, Who
from service.db.session import tenant_session
from service.db.tables import UploadRow, new_id, now
from service.problems import ApiError, responses
from service.storage import Storage
from service.uploads import check_name, find_upload, offset_of, piece_key, require_space

VERSION = "1.0.0"
ALGORITHMS = ("sha256", "sha1", "md5")


def speaks(
    response: Response,
    tus_resumable: Annotated[str, Header(description="The version of tus.", json_schema_extra={"enum": [VERSION]})] = VERSION,
) -> None:
    if tus_resumable != VERSION:
        detail = f"This server speaks tus {VERSION}, and the request {tus_resumable[:20]}."
        raise ApiError(412, "tus_version", detail, headers={"Tus-Version": VERSION})
    response.headers["Tus-Resumable"] = VERSION


router = APIRouter(prefix="/uploads", tags=["uploads"], dependencies=[Depends(speaks)])

_BODY = {"requestBody": {"content": {"application/offset+octet-stream": {"schema": {"type": "string", "format": "binary"}}}}}


@router.options("", status_code=204, include_in_schema=False)
def options(request: Request, response: Response) -> None:
    response.headers["Tus-Version"] = VERSION
    response.headers["Tus-Extension"] = "creation,checksum,expiration,termination"
    response.headers["Tus-Max-Size"] = str(request.app.state.settings.max_model_bytes)
    response.headers["Tus-Checksum-Algorithm"] = ",".join(ALGORITHMS)


@router.post("", status_code=201, responses=responses(412, 413, 507))
def create_upload(
    request: Request,
    response: Response,
    session: Db,
    upload_length: Annotated[int, Header(ge=1, description="Bytes of the file.")],
    upload_metadata: Annotated[
        str, Header(max_length=2000, description="`filename BASE64`, and `sha256 BASE64` of its hex digits to have it verified.")
    ],
) -> Upload:
    """Begin an upload; `PATCH` sends its bytes."""
    settings = request.app.state.settings
    if upload_length > settings.max_model_bytes:
        detail = f"The file has {upload_length:,} bytes, and the server takes {settings.max_model_bytes:,}."
        raise ApiError(413, "too_large", detail)
    require_space(settings)
    quotas.require(session, settings, size=upload_length)
    told = _metadata(upload_metadata)
    if "filename" not in told:
        raise ApiError(422, "bad_metadata", "Upload-Metadata has no filename: send `filename BASE64`.")
    sha256 = told.get("sha256")
    if sha256 is not None and (len(sha256) != 64 or set(sha256) - set("0123456789abcdef")):
        raise ApiError(422, "bad_metadata", "sha256 in Upload-Metadata should be 64 hexadecimal digits.")
    until = now() + timedelta(seconds=settings.upload_seconds)
    row = UploadRow(
        id=new_id("upl"),
        name=check_name(told["filename"]),
        bytes=upload_length,
        sha256=sha256,
        created_at=now(),
        expires_at=until,
    )
    session.add(row)
    session.commit()
    response.headers["Location"] = f"/uploads/{row.id}"
    response.headers["Upload-Expires"] = format_datetime(until, usegmt=True)
    return as_upload(row, request.app.state.storage)


@router.get("", responses=responses(412))
def list_uploads(request: Request, session: ReadDb, cursor: Cursor = None, limit: Limit = 20) -> Page[Upload]:
    """Uploads that no model or dataset has been made of, newest first."""
    return page(session, select(UploadRow), UploadRow, cursor, limit, lambda row: as_upload(row, request.app.state.storage))


@router.head("/{upload_id}", include_in_schema=False)
@router.get("/{upload_id}", responses=responses(404, 412))
def get_upload(upload_id: str, request: Request, response: Response, session: ReadDb) -> Upload:
    """How far it is; `HEAD` says the same in the headers of tus."""
    row = find_upload(session, upload_id)
    found = as_upload(row, request.app.state.storage)
    response.headers["Upload-Offset"], response.headers["Upload-Length"] = str(found.offset), str(row.bytes)
    response.headers["Upload-Expires"] = format_datetime(row.expires_at, usegmt=True)
    response.headers["Cache-Control"] = "no-store"
    return found


@router.patch("/{upload_id}", status_code=204, openapi_extra=_BODY, responses=responses(404, 409, 412, 413, 415, 460, 507))
async def send_piece(
    upload_id: str,
    request: Request,
    response: Response,
    who: Who,
    upload_offset: Annotated[int, Header(ge=0, description="Where the piece begins: what `HEAD` says.")],
    upload_checksum: Annotated[str | None, Header(max_length=200, description="`sha256 BASE64` of the piece.")] = None,
) -> None:
    """Send the next piece, as large as you like."""
    storage: Storage = request.app.state.storage
    row = await run_in_threadpool(_look, request, who.tenant, upload_id)
    require_space(request.app.state.settings)
    if request.headers.get("content-type", "") != "application/offset+octet-stream":
        raise ApiError(415, "not_a_piece", "A piece of an upload has the Content-Type application/offset+octet-stream.")
    offset = await run_in_threadpool(offset_of, storage, upload_id)
    if upload_offset != offset:
        detail = f"The piece begins at {upload_offset}, and {offset} bytes are here: go on from there."
        raise ApiError(409, "wrong_offset", detail, headers={"Upload-Offset": str(offset)})
    digest, expected = _checksum(upload_checksum)
    handle, name = tempfile.mkstemp(dir=request.app.state.settings.uploads, prefix=".piece-")
    piece, size = Path(name), 0
    try:
        with os.fdopen(handle, "wb") as file:
            async for chunk in _chunks(request):
                size += len(chunk)
                if offset + size > row.bytes:
                    detail = f"More was sent than the {row.bytes} bytes that were announced."
                    raise ApiError(413, "too_large", detail)
                digest.update(chunk)
                await run_in_threadpool(file.write, chunk)
        if expected and digest.digest() != expected:
            raise ApiError(460, "wrong_checksum", "The piece does not have the checksum that came with it: send it again.")
        if size:
            await run_in_threadpool(storage.move, piece_key(upload_id, offset), piece)
    finally:
        await run_in_threadpool(piece.unlink, missing_ok=True)
    response.headers["Upload-Offset"] = str(offset + size)
    response.headers["Upload-Expires"] = format_datetime(row.expires_at, usegmt=True)


@router.delete("/{upload_id}", status_code=204, responses=responses(404, 412))
def delete_upload(upload_id: str, request: Request, session: Db) -> None:
    """Give an upload up."""
    row = find_upload(session, upload_id)
    request.app.state.storage.forget(f"uploads/{upload_id}")
    session.delete(row)
    session.commit()


def as_upload(row: UploadRow, storage: Storage) -> Upload:
    return Upload(**row.model_dump(exclude={"tenant"}), offset=offset_of(storage, row.id))


def _look(request: Request, tenant: str, upload_id: str) -> UploadRow:
    # Not `ReadDb`: a client that sends slowly must not keep a reader's place.
    with tenant_session(request.app.state.engine, tenant, reads=True) as session:
        return find_upload(session, upload_id)


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    """What the client sends, until it ends, breaks off or falls silent: a piece may be as long as it came."""
    try:
        async for chunk in request.stream():
            yield chunk
    except ClientDisconnect:
        return
    except HTTPException as error:
        if error.status_code != 408:
            raise


def _metadata(header: str) -> dict[str, str]:
    told = {}
    for pair in header.split(","):
        key, _, value = pair.strip().partition(" ")
        try:
            told[key] = base64.b64decode(value, validate=True).decode()
        except ValueError as error:
            raise ApiError(422, "bad_metadata", f"{key[:80]!r} in Upload-Metadata is not text in base64.") from error
    return told


def _checksum(header: str | None) -> "tuple[hashlib._Hash, bytes]":
    """A hash to feed, and what it should come to; nothing if the client says nothing."""
    if header is None:
        return hashlib.sha256(), b""
    name, _, value = header.partition(" ")
    if name not in ALGORITHMS:
        raise ApiError(422, "bad_checksum", f"Upload-Checksum should begin with one of {', '.join(ALGORITHMS)}.")
    try:
        return hashlib.new(name), base64.b64decode(value, validate=True)
    except ValueError as error:
        raise ApiError(422, "bad_checksum", "The value of Upload-Checksum is not base64.") from error
