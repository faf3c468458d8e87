"""Models that the server fetches from a hub, where its administrator has named one. What comes out is a model like any other."""

from typing import Any

from fastapi import APIRouter, Request, Response

from service import hub
from service.api.schemas import HubModel, Model
from service.api.sessions import Db, Who
from service.problems import responses
from service.uploads import require_space

router = APIRouter(prefix="/fetches", tags=["models"])

_THERE: dict[int | str, dict[str, Any]] = {200: {"model": Model, "description": "It was there already."}}


@router.post("", status_code=201, responses=_THERE | responses(404, 413, 502, 507))
async def fetch_model(wanted: HubModel, request: Request, response: Response, session: Db, who: Who) -> Model:
    """Have the server fetch a model from its hub, where it has one. After a break ask again: a commit that is there already or on
    its way is answered with its model."""
    state = request.app.state
    require_space(state.settings)
    model, made = await hub.bring(session, state.settings, state.storage, state.fetches, who.tenant, wanted)
    response.status_code = 201 if made else 200
    return model
