"""The audit log: who changed what, kept with the change itself."""

from fastapi import APIRouter
from sqlmodel import select

from service.api.paging import Cursor, Limit, page
from service.api.schemas import Change, Page
from service.api.sessions import ReadDb
from service.db.tables import AuditRow
from service.problems import responses

router = APIRouter(prefix="/audit", tags=["audit"])


@router.get("", responses=responses())
def list_changes(session: ReadDb, cursor: Cursor = None, limit: Limit = 20) -> Page[Change]:
    """What was made, changed and removed over the API, newest first. Only for admins."""
    return page(session, select(AuditRow), AuditRow, cursor, limit, lambda row: Change.model_validate(row.model_dump()))
