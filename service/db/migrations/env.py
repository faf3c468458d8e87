"""Alembic's environment: the URL comes from the service's settings, the target from its tables."""

from alembic import context
from sqlalchemy import create_engine, text
from sqlmodel import SQLModel

from service.db import tables
from service.settings import Settings

__all__ = ["tables"]  # importing it is what fills the metadata

url = context.config.attributes.get("url") or Settings().database
with create_engine(url).connect() as connection:
    context.configure(connection=connection, target_metadata=SQLModel.metadata, render_as_batch=True)
    with context.begin_transaction():
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('narrow.migrate'))"))
        context.run_migrations()
