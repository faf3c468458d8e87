"""How pages are rendered: templates, their words for numbers, static files, and the headers that every page has."""

import hashlib
from pathlib import Path
from typing import Any, get_args
from urllib.parse import quote

from fastapi import Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from narrow_engine import report
from narrow_engine.report.frontier_page import budget_words
from narrow_engine.report.page import FILTERS
from service.api.schemas import Event, Problem, Role

HERE = Path(__file__).parent
REPORT = Path(report.__file__).parent
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'"
)
# Of the referrer no less than the origin: without one browsers say `Origin: null` when they send a form.
HEADERS = {"Content-Security-Policy": POLICY, "Referrer-Policy": "same-origin", "Cache-Control": "no-store", "Vary": "Accept"}
TYPES = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}


def _files() -> dict[str, bytes]:
    """Static files by name. The report's own style is the pages' as well, so that both look like one product."""
    found = {path.name: path.read_bytes() for path in sorted((HERE / "static").iterdir()) if path.suffix in TYPES}
    head = (REPORT / "head.html").read_text(encoding="utf-8")
    found["report.css"] = head.partition("<style>")[2].partition("</style>")[0].encode()
    return found


FILES = _files()
VERSION = hashlib.sha256(b"".join(name.encode() + body for name, body in FILES.items())).hexdigest()[:12]
"""Part of the URL of every static file, so that browsers can keep them for ever."""


def words(event: Event) -> str:
    """An event as a line of the log."""
    data = event.data
    if event.kind == "started":
        return event.message or "begun"
    if event.kind == "finished":
        return f"done in {FILTERS['duration'](_number(data, 'seconds'))}{', ' + event.message if event.message else ''}"
    if event.kind != "progress":
        return event.message
    told = [f"{_number(data, 'done'):,.0f} of {_number(data, 'total'):,.0f}"]
    told += [f"{word} {_number(data, name):.3f}" for name, word in (("loss", "loss"), ("validation", "held-out")) if name in data]
    return ", ".join([*told, *([event.message] if event.message else [])])


def size(count: float) -> str:
    """Bytes, with their unit."""
    short = FILTERS["short"](count)
    return f"{short}B" if " " in short else f"{short} B"


def brief(identifier: str) -> str:
    """The end of an id, which tells it from others of its kind: the beginning is the time."""
    return f"…{identifier[-6:]}"


def _number(data: dict[str, Any], name: str) -> float:
    """A figure of an event, which a job's process wrote: it may be anything."""
    found = data.get(name, 0)
    return float(found) if isinstance(found, int | float) and abs(found) < 1e18 else 0.0


_pages = Environment(
    loader=FileSystemLoader([HERE / "templates", REPORT]),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_pages.filters |= {
    **FILTERS,
    "size": size,
    "told": words,
    "budget": budget_words,
    "quoted": lambda text: quote(text, safe="/"),
    "brief": brief,
}
_pages.globals |= {"static": lambda name: f"/ui/static/{VERSION}/{name}"}


def page(request: Request, template: str, api: str = "", status: int = 200, **given: Any) -> Response:
    """A template as an answer. `api`: the path of the same as JSON, which whoever prefers that is sent to."""
    accept = request.headers.get("accept", "")
    if api and request.method == "GET" and "application/json" in accept and "text/html" not in accept:
        return RedirectResponse(api, 303, HEADERS)
    caller = getattr(request.state, "caller", None)

    def may(role: Role) -> bool:
        roles = get_args(Role)
        return caller is not None and roles.index(caller.role) >= roles.index(role)

    known = {"caller": caller, "may": may, "api": api, "path": request.scope["path"], "here": _here(request)}
    known["keys_needed"] = request.app.state.keys_needed
    return HTMLResponse(_pages.get_template(template).render(**known, **given), status, HEADERS)


def _here(request: Request) -> str:
    """What was asked for, as a link."""
    path = request.scope["path"]
    return f"{path}?{request.url.query}" if request.url.query else path


def problem_page(request: Request, problem: Problem) -> Response | None:
    """What a person sees of a problem; None where a program asked. Who has to log in is sent there."""
    if not request.scope["path"].startswith("/ui/") or "text/html" not in request.headers.get("accept", ""):
        return None
    if problem.status == 401:
        return RedirectResponse(
            f"/ui/login?next={quote(_here(request) if request.method == 'GET' else '/ui/jobs')}", 303, HEADERS
        )
    kind = request.scope["path"].split("/")[2]
    lists = kind if kind in ("sweeps", "models", "datasets", "keys") else "jobs"
    return page(request, "problem.html", status=problem.status, problem=problem, lists=lists)
