"""Is the process alive, and can it take work?"""

import shutil
import tempfile

from fastapi import APIRouter, Request, Response
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from service.api.schemas import Health
from service.db.session import read_session
from service.storage import StorageAway

router = APIRouter(tags=["health"])


@router.get("/healthz")
def healthz(request: Request) -> Health:
    """The process answers."""
    return Health(status="ok", version=request.app.version)


@router.get("/readyz", responses={503: {"model": Health, "description": "Not ready; the checks say why."}})
def readyz(request: Request, response: Response) -> Health:
    """Database, disk, storage and the will to work."""
    state = request.app.state
    checks = {"accepting": "the service is stopping" if state.drain.is_set() else "ok"}
    try:
        with read_session(state.engine) as session:
            session.execute(text("SELECT 1"))
        checks["database"] = "ok"
    except SQLAlchemyError as error:
        checks["database"] = type(error).__name__
    try:
        with tempfile.TemporaryFile(dir=state.settings.uploads) as file:
            file.write(b"ok")
        free = shutil.disk_usage(state.settings.data).free
        checks["disk"] = "ok" if free >= state.settings.min_free_bytes else f"only {free >> 20} MiB free"
    except OSError as error:
        checks["disk"] = error.strerror or "not writable"
    if state.settings.storage_url:
        try:
            state.storage.has("ready")
            checks["storage"] = "ok"
        except StorageAway as error:
            checks["storage"] = str(error)
    ready = all(value == "ok" for value in checks.values())
    response.status_code = 200 if ready else 503
    return Health(status="ok" if ready else "unavailable", version=request.app.version, checks=checks)
