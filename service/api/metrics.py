"""Figures for Prometheus."""

from fastapi import APIRouter, Request, Response

from service import metrics
from service.api.sessions import Who
from service.db.tables import DEFAULT_TENANT
from service.problems import ApiError, responses

router = APIRouter(tags=["health"])

_TEXT = {"description": "Prometheus' text format.", "content": {"text/plain": {"schema": {"type": "string"}}}}


@router.get("/metrics", response_class=Response, responses={**responses(), 200: _TEXT})
def get_metrics(request: Request, who: Who) -> Response:
    """Figures of requests, workers and the queue, of all tenants: for admins of the tenant `default`."""
    if who.tenant != DEFAULT_TENANT or who.role != "admin":
        detail = "Metrics tell of all tenants: they take a key of the tenant 'default' with the role 'admin'."
        raise ApiError(403, "not_allowed", detail)
    text = metrics.exposition(request.app.state.engine, request.app.state.settings)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
