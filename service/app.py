"""The application: wiring and nothing else. Importing it must stay quick, and never imports torch."""

import asyncio
from importlib.metadata import version

from fastapi import Depends, FastAPI
from fastapi.routing import APIRoute

from service import problems
from service.api import (
    artifacts,
    audit,
    datasets,
    events,
    fetches,
    health,
    jobs,
    keys,
    metrics,
    models,
    plans,
    sweeps,
    uploads,
    usage,
    webhooks,
)
from service.auth import caller
from service.db.session import connect
from service.hub import Fetches
from service.openapi import describe
from service.quotas import RateLimiter
from service.requests import Requests
from service.settings import Settings
from service.storage import open_storage
from service.streams import Hub
from service.web import pages


def create_app(settings: Settings, keys_needed: bool = False, host: str | None = None) -> FastAPI:
    """The API over migrated tables in `settings.data`. `keys_needed`: whether a request without an API key is refused. `host`:
    where it listens, if that is loopback: then it answers to no other name, unless there is a key."""
    settings.prepare()
    app = FastAPI(
        title="Narrow",
        version=version("narrow"),
        description="Turns a general language model into a small one for one domain, and says which skills it kept.",
        generate_unique_id_function=_operation_id,
        # It would send clients to whatever they have called this host.
        redirect_slashes=False,
        # FastAPI's own pages of the contract load theirs from other hosts.
        docs_url=None,
        redoc_url=None,
        # Its logs have what was raised, in which there may be what a user sent.
        telemetry={"logs": False, "metrics": False, "operation_spans": False},
    )
    app.state.settings, app.state.keys_needed, app.state.host = settings, keys_needed, host
    app.state.engine = connect(settings)
    app.state.storage = open_storage(settings)
    app.state.limiter = RateLimiter(settings.max_requests)
    app.state.known_keys = {}
    app.state.drain = asyncio.Event()
    app.state.fetches = Fetches(app.state.drain)
    app.state.hub = Hub(app.state.engine, settings.poll_seconds, app.state.drain)
    problems.install(app)
    app.add_middleware(Requests, silence_seconds=settings.silence_seconds)
    known = [Depends(caller)]
    # Limits belong to routes: FastAPI's limit of the whole application would answer around our error handlers.
    for router in (
        jobs.router,
        events.router,
        artifacts.router,
        sweeps.router,
        plans.router,
        keys.router,
        usage.router,
        audit.router,
        metrics.router,
        webhooks.router,
        fetches.router,
        pages.router,
    ):
        app.include_router(router, dependencies=known, max_body_size=settings.max_body_bytes)
    for router in (models.router, uploads.router, pages.model_router):
        app.include_router(router, dependencies=known, max_body_size=settings.max_model_bytes)
    for router in (datasets.router, pages.dataset_router):
        app.include_router(router, dependencies=known, max_body_size=settings.max_dataset_bytes)
    for router in (health.router, pages.open_router):
        app.include_router(router, max_body_size=settings.max_body_bytes)
    describe(app)
    return app


def _operation_id(route: APIRoute) -> str:
    return route.name
