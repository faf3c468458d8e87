"""What a tenant uses, and what it may."""

from fastapi import APIRouter, Request

from service import quotas
from service.api.schemas import Usage
from service.api.sessions import ReadDb, Who
from service.problems import responses

router = APIRouter(prefix="/usage", tags=["usage"])


@router.get("", responses=responses())
def get_usage(request: Request, session: ReadDb, who: Who) -> Usage:
    """Jobs, bytes and hours with their limits, and what the caller may do."""
    return quotas.usage(session, request.app.state.settings, who.tenant).model_copy(update={"role": who.role})
