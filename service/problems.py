"""Every error that the API gives: RFC 9457 problem+json, made here and nowhere else.

Handlers raise `ApiError` or let the engine's `NarrowError` pass; both carry a stable `code` and a sentence. What nobody
foresaw is logged with the request's id and told as a 500 that says nothing about the inside.
"""

import errno
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DataError, OperationalError
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Scope

from narrow_engine.errors import NarrowError
from narrow_engine.spec import clear, sentence, wording
from service.api.paging import CURSOR, DIGEST
from service.api.schemas import FieldError, Problem
from service.storage import StorageAway
from service.web.render import problem_page

MEDIA_TYPE = "application/problem+json"
METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE")
log = logging.getLogger("narrow.api")

TITLES = {
    400: "Bad request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not found",
    405: "Method not allowed",
    406: "Not acceptable",
    408: "Timed out",
    409: "Conflict",
    412: "Precondition failed",
    413: "Too large",
    415: "Unsupported media type",
    416: "Range not satisfiable",
    422: "Cannot be processed",
    429: "Too many",
    460: "Checksum mismatch",
    500: "Internal error",
    502: "Bad gateway",
    503: "Unavailable",
    507: "Out of space",
}


TOO_LARGE = "What was sent is larger than the server takes: send less."

ALWAYS = (401, 403, 408, 422, 429, 500, 503)
"""What any route can answer."""


class ApiError(Exception):
    """An answer other than the one that was asked for."""

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        errors: list[FieldError] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail, self.errors, self.headers = status, code, detail, errors or [], headers or {}


def not_found(kind: str, identifier: str) -> ApiError:
    return ApiError(404, f"{kind}_not_found", f"There is no {kind} {identifier[:80]!r}.")


def beyond_end(size: int | str) -> ApiError:
    detail = f"The range begins behind the end of the file: it has {size} bytes."
    return ApiError(416, "range_not_satisfiable", detail, headers={"Content-Range": f"bytes */{size}"})


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that can answer with these problems, for the OpenAPI document."""
    return {status: {"description": TITLES[status], "model": Problem} for status in (*statuses, *ALWAYS)}


def install(app: FastAPI) -> None:
    """Registers the handlers."""

    @app.exception_handler(ApiError)
    def api_error(request: Request, error: ApiError) -> Response:
        answer = _answer(request, error.status, error.code, error.detail, error.errors)
        answer.headers.update(error.headers)
        return answer

    @app.exception_handler(NarrowError)
    def narrow_error(request: Request, error: NarrowError) -> Response:
        return _answer(request, 422, error.code, str(error))

    @app.exception_handler(RequestValidationError)
    def validation_error(request: Request, error: RequestValidationError) -> Response:
        errors = [FieldError(pointer=_pointer(e), detail=_wording(e)) for e in error.errors()[:20]]
        return _answer(request, 422, "invalid_request", _sentence(error.errors()[0]), errors)

    @app.exception_handler(HTTPException)
    def http_error(request: Request, error: HTTPException) -> Response:
        # FastAPI calls everything that happens while a body is read a bad request.
        if isinstance(error.__cause__, OSError):
            return disk_error(request, error.__cause__)
        if isinstance(error.__cause__, ApiError):
            return api_error(request, error.__cause__)
        title = TITLES.get(error.status_code, "Error")
        sentences = {
            404: f"There is nothing at {request.scope['path'][:200]}.",
            405: f"{request.method[:20]} is not possible here.",
            413: TOO_LARGE,
        }
        if error.__cause__ is not None and error.status_code == 400:
            sentences[400] = "The body cannot be read: send what the contract asks for, JSON in UTF-8 or a form with files."
        detail = sentences.get(error.status_code, str(error.detail)[:300])
        answer = _answer(request, error.status_code, title.lower().replace(" ", "_"), detail)
        answer.headers.update(error.headers or {})
        if error.status_code == 405:
            there = routed(request.scope)
            answer.headers["Allow"] = ", ".join(name for name in METHODS if name in there or (name == "HEAD" and "GET" in there))
        return answer

    @app.exception_handler(OSError)
    def disk_error(request: Request, error: OSError) -> Response:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _answer(request, 507, "disk_full", "The server's disk is full: nothing was kept of this request.")
        return unforeseen(request, error)

    @app.exception_handler(OperationalError)
    def database_error(request: Request, error: OperationalError) -> Response:
        name = getattr(error.orig, "sqlite_errorname", "")
        state = getattr(error.orig, "sqlstate", None)
        if name == "SQLITE_FULL" or state == "53100":
            return disk_error(request, OSError(errno.ENOSPC, "database"))
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")) or state in BUSY:
            return _answer(request, 503, "database_busy", "The database is busy with another request: send it again.")
        if error.connection_invalidated or not name:
            log.error("%s %s %s: %s", request.state.id, request.method, request.scope["path"], error.orig)
            return _answer(request, 503, "database_away", "The database cannot be reached: send the request again in a moment.")
        return unforeseen(request, error)

    @app.exception_handler(StorageAway)
    def storage_error(request: Request, error: StorageAway) -> Response:
        log.error("%s %s %s: %s", request.state.id, request.method, request.scope["path"], error)
        return _answer(request, 503, "storage_away", "The storage cannot be reached: send the request again in a moment.")

    @app.exception_handler(DataError)
    def unkept(request: Request, error: DataError) -> Response:
        if "\0" in request.scope["path"]:
            # No id has one, but only Postgres says so.
            return _answer(request, 404, "not_found", "There is nothing at this path: it has a NUL in it.")
        detail = "The database cannot hold a text of this request: leave out NUL and other characters that are not text."
        return _answer(request, 422, "bad_text", detail)

    @app.exception_handler(Exception)
    def unforeseen(request: Request, error: Exception) -> Response:
        log.error("%s %s %s", request.state.id, request.method, request.scope["path"], exc_info=error)
        return _answer(request, 500, "internal_error", "Something went wrong inside the server; it was logged under this id.")


def routed(scope: Scope) -> list[str]:
    """The methods that a path has routes for. The router says only what its first route there can."""
    asked = {"type": "http", "path": scope["path"], "root_path": ""}
    routes = scope["app"].router.routes
    return [name for name in METHODS if any(r.matches({**asked, "method": name})[0] is Match.FULL for r in routes)]


BUSY = ("55P03", "40P01", "40001", "53300")
"""Postgres: a lock that was waited for in vain, a deadlock, a conflict of transactions, too many connections."""


def _wording(error: Mapping[str, Any]) -> str:
    kind = error["type"]
    if kind == "json_invalid":
        return f"the body is not valid JSON: {error['ctx']['error']} at character {error['loc'][-1]}"
    if kind in ("model_attributes_type", "model_type", "dict_type"):
        whole = "; a body needs the header Content-Type: application/json" if len(error["loc"]) < 2 else ""
        return f"is not a JSON object{whole}"
    if kind == "string_pattern_mismatch" and error["ctx"]["pattern"] == CURSOR:
        return "is not a `next_cursor` that a page of a list gave"
    if kind == "string_pattern_mismatch" and error["ctx"]["pattern"] == DIGEST:
        return "is not a SHA-256: 64 digits, 0 to 9 and a to f"
    return wording(error)


def _sentence(error: Mapping[str, Any]) -> str:
    words = _wording(error)
    where = ".".join(clear(part) for part in _location(error))
    return sentence(where or ("The body" if words.startswith(("is ", "should ")) else ""), words)


def _pointer(error: Mapping[str, Any]) -> str:
    return "".join("/" + clear(part).replace("~", "~0").replace("/", "~1") for part in _location(error))


def _location(error: Mapping[str, Any]) -> tuple[Any, ...]:
    # The first part is "body", "query", ...; what follows it in an error of the JSON itself is a position.
    if error["type"] == "json_invalid":
        return ()
    # pydantic's way to say that it means the key itself
    return tuple(part for part in error["loc"][1:] if part != "[key]")


def replacement(scope: Scope, status: int, headers: Mapping[str, str]) -> Response | None:
    """What is said instead of the two answers that are made around the handlers, in plain text: for a route's limit, and for a
    range beyond the end of a file."""
    if not headers.get("content-type", "").startswith("text/plain"):
        return None
    if status == 413:
        return _answer(Request(scope), 413, "too_large", TOO_LARGE)
    if status == 416:
        size = headers.get("content-range", "").rpartition("/")[2]
        error = beyond_end(size)
        answer = _answer(Request(scope), error.status, error.code, error.detail)
        answer.headers.update(error.headers)
        return answer
    return None


def _answer(request: Request, status: int, code: str, detail: str, errors: list[FieldError] | None = None) -> Response:
    identifier = getattr(request.state, "id", "")
    problem = Problem(
        type=f"urn:narrow:problem:{code}",
        title=TITLES.get(status, "Error"),
        status=status,
        detail=detail,
        instance=request.scope["path"],
        code=code,
        errors=errors or [],
        request_id=identifier,
    )
    # Every answer has these (`requests`); one that nobody foresaw is made outside of there.
    headers = {"X-Request-Id": identifier, "X-Content-Type-Options": "nosniff"}
    shown = problem_page(request, problem)
    if shown:
        shown.headers.update(headers)
        return shown
    return JSONResponse(problem.model_dump(mode="json"), status, media_type=MEDIA_TYPE, headers=headers)
