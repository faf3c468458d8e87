"""The application: wiring and nothing else. Importing it must stay quick, and never imports torch."""

import asyncio

from fastapi import FastAPI
from fastapi.routing import APIRoute

from service import problems
from service.api import artifacts, datasets, events, health, jobs, models, plans, sweeps
from service.db.session import connect
from service.openapi import describe
from service.settings import Settings
from service.storage import Storage


def create_app(settings: Settings) -> FastAPI:
    """The API over migrated tables in `settings.data`."""
    settings.prepare()
    app = FastAPI(
        title="Narrow",
        version="0.1.0",
        description="Turns a general language model into a small one for one domain, and says which skills it kept.",
        generate_unique_id_function=_operation_id,
    )
    app.state.settings = settings
    app.state.engine = connect(settings)
    app.state.storage = Storage(settings.data / "artifacts")
    app.state.drain = asyncio.Event()
    problems.install(app)
    # Limits belong to routes: FastAPI's limit of the whole application would answer around our error handlers.
    for router in (jobs.router, events.router, artifacts.router, sweeps.router, plans.router, health.router):
        app.include_router(router, max_body_size=settings.max_body_bytes)
    app.include_router(models.router, max_body_size=settings.max_model_bytes)
    app.include_router(datasets.router, max_body_size=settings.max_dataset_bytes)
    describe(app)
    return app


def _operation_id(route: APIRoute) -> str:
    return route.name
