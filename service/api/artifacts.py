"""What a job made: its files, and the report among them. Resumable by `Range`, verifiable by `ETag` and `Repr-Digest`."""

import base64
import re
from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Header, Request, Response
from fastapi.responses import FileResponse, RedirectResponse, StreamingResponse
from sqlmodel import Session, col, select

from narrow_engine.report.model import Report
from service import queue
from service.api.schemas import Artifact, Page
from service.api.sessions import ReadDb
from service.db.tables import ArtifactRow
from service.problems import ApiError, beyond_end, responses
from service.requests import PAGE
from service.storage import Storage, StorageAway, artifact_key

router = APIRouter(prefix="/jobs/{job_id}", tags=["artifacts"])

_RANGE = re.compile(r"(?=.?[0-9])([0-9]{0,18})-([0-9]{0,18})")

_BINARY = {
    "description": "The file, of whatever type it is.",
    "content": {"*/*": {"schema": {}}},
}


@router.get(
    "/report",
    response_model=Report,
    responses={
        **responses(404, 409, 416),
        200: {"content": {"text/html": {"schema": {"type": "string"}}}, "description": "The report."},
    },
)
def get_report(job_id: str, request: Request, session: ReadDb) -> Response:
    """The report, as JSON or, by `Accept: text/html`, as a page."""
    path = "report.html" if "text/html" in request.headers.get("accept", "") else "report.json"
    row = _artifact(session, job_id, path)
    media_type = "text/html; charset=utf-8" if path.endswith("html") else "application/json"
    return _file(request, row, media_type, {"Content-Security-Policy": PAGE, "Vary": "Accept"})


@router.get("/artifacts", responses=responses(404))
def list_artifacts(job_id: str, session: ReadDb) -> Page[Artifact]:
    """All files of a job; empty until it has succeeded."""
    queue.find(session, job_id)
    rows = session.exec(select(ArtifactRow).where(ArtifactRow.job_id == job_id).order_by(col(ArtifactRow.path)))
    return Page(data=[Artifact.model_validate(row.model_dump()) for row in rows])


@router.head("/artifacts/{path:path}", include_in_schema=False)
@router.get(
    "/artifacts/{path:path}",
    response_class=Response,
    responses={
        **responses(404, 409, 416),
        200: _BINARY,
        206: {**_BINARY, "description": "The part that `Range` asked for."},
        304: {"description": "The file that `If-None-Match` names."},
    },
)
def download_artifact(
    job_id: str,
    path: str,
    request: Request,
    session: ReadDb,
    if_none_match: Annotated[str | None, Header(max_length=500, description="`ETag` of the file that is known.")] = None,
) -> Response:
    """One file. `ETag` is its SHA-256, `Repr-Digest` the same for checking a download that was resumed."""
    row = _artifact(session, job_id, path)
    digest = base64.b64encode(bytes.fromhex(row.sha256)).decode()
    headers = {
        "ETag": f'"{row.sha256}"',
        "Repr-Digest": f"sha-256=:{digest}:",
        "Cache-Control": "private, max-age=31536000, immutable",
        "Content-Security-Policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'",
    }
    if if_none_match and (row.sha256 in if_none_match or if_none_match.strip() == "*"):
        return Response(status_code=304, headers=headers)
    return _file(request, row, row.media_type, headers, filename=row.path.rsplit("/", 1)[-1])


def _artifact(session: Session, job_id: str, path: str) -> ArtifactRow:
    job = queue.find(session, job_id)
    row = session.get(ArtifactRow, (job_id, path))
    if row is not None:
        return row
    if job.status != "succeeded":
        raise ApiError(409, "job_not_succeeded", f"The job is {job.status}: files and report come when it has succeeded.")
    raise ApiError(404, "artifact_not_found", f"The job made no file {path[:200]!r}.")


def _file(request: Request, row: ArtifactRow, media_type: str, headers: dict[str, str], filename: str | None = None) -> Response:
    storage: Storage = request.app.state.storage
    path = storage.file(artifact_key(row.sha256))
    if path is None:
        return _from_bucket(request, row, media_type, headers, filename)
    if not _understood(request.headers.get("range", "")):
        # RFC 9110, 14.2: a range that cannot be read is as good as none. Starlette would answer 400.
        request.scope["headers"] = [header for header in request.scope["headers"] if header[0] != b"range"]
    return FileResponse(path, media_type=media_type, headers=headers, filename=filename)


def _from_bucket(request: Request, row: ArtifactRow, media_type: str, headers: dict[str, str], filename: str | None) -> Response:
    """The same answer for a file that is not on this machine; of several ranges it gives the whole, as RFC 9110 allows."""
    storage: Storage = request.app.state.storage
    if filename and request.app.state.settings.storage_links and (link := storage.link(artifact_key(row.sha256))):
        return RedirectResponse(link, 307, {**headers, "Cache-Control": "no-store"})
    start, end, status = 0, row.bytes, 200
    wanted = request.headers.get("range", "")
    same = request.headers.get("if-range", headers.get("ETag", "")) == headers.get("ETag", "")
    if _understood(wanted) and "," not in wanted and same:
        first, last = _RANGE.fullmatch(wanted.partition("=")[2].strip()).groups()  # type: ignore[union-attr]
        start, end = (int(first), int(last or row.bytes) + 1) if first else (max(0, row.bytes - int(last)), row.bytes)
        end, status = min(end, row.bytes), 206
        if start >= end:
            raise beyond_end(row.bytes)
        headers = {**headers, "Content-Range": f"bytes {start}-{end - 1}/{row.bytes}"}
    headers = {**headers, "Accept-Ranges": "bytes", "Content-Length": str(end - start)}
    if filename:
        headers["Content-Disposition"] = f"attachment; filename*=utf-8''{quote(filename)}"
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=media_type)
    try:
        chunks = storage.read(artifact_key(row.sha256), start, end)
    except FileNotFoundError as error:
        raise StorageAway(f"{row.sha256} is not in the bucket") from error
    return StreamingResponse(chunks, status, headers, media_type)


def _understood(header: str) -> bool:
    ranges = re.fullmatch(r"bytes\s*=\s*(\S.*)", header, re.IGNORECASE)
    parts = [_RANGE.fullmatch(part.strip()) for part in ranges[1].split(",")] if ranges else [None]
    return all(part and (not part[1] or not part[2] or int(part[1]) <= int(part[2])) for part in parts)
