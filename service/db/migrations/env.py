"""Alembic's environment: the URL comes from the service's settings, the target from its tables."""

from alembic import context
from sqlalchemy import create_engine, event, text
from sqlmodel import SQLModel

from service.db import tables
from service.settings import Settings

__all__ = ["tables"]  # importing it is what fills the metadata

url = context.config.attributes.get("url") or Settings().database
engine = create_engine(url)
if engine.dialect.name == "sqlite":
    # The driver begins transactions only before rows are written. Here all of an update is one, so that a kill in the middle of
    # it leaves the tables as they were. Foreign keys are off: a table that is replaced takes no rows of others with it.
    @event.listens_for(engine, "connect")
    def leave_transactions_alone(connection, _):  # type: ignore[no-untyped-def]
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection):  # type: ignore[no-untyped-def]
        connection.exec_driver_sql("BEGIN IMMEDIATE")


with engine.connect() as connection:
    context.configure(connection=connection, target_metadata=SQLModel.metadata, render_as_batch=True, transactional_ddl=True)
    with context.begin_transaction():
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('narrow.migrate'))"))
        context.run_migrations()
