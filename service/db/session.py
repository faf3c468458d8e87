"""The database: an engine for SQLite or Postgres, and migrations at start."""

import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from alembic import command
from alembic.config import Config
from fastapi import Depends, Request
from sqlalchemy import Engine, event
from sqlmodel import Session, create_engine

from service.settings import Settings


def connect(settings: Settings) -> Engine:
    """An engine for the configured database. SQLite: write-ahead log, full durability, waits for locks."""
    url = settings.database
    if not url.startswith("sqlite"):
        return create_engine(url, pool_pre_ping=True)
    engine = create_engine(url, connect_args={"check_same_thread": False, "timeout": 30})

    @event.listens_for(engine, "connect")
    def prepare(connection, _):  # type: ignore[no-untyped-def]
        # The driver's own transactions begin too late (at the first write); SQLAlchemy's BEGIN below replaces them.
        connection.isolation_level = None
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=30000"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection):  # type: ignore[no-untyped-def]
        # IMMEDIATE: a transaction that reads and then writes would otherwise fail when another wrote in between.
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def migrate(settings: Settings) -> None:
    """Brings the database to this version's tables. Processes that start together do it one after the other."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["url"] = settings.database
    with (settings.data / "migrate.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        command.upgrade(config, "head")


def open_session(engine: Engine) -> Session:
    """A session whose rows can still be read after its commit."""
    return Session(engine, expire_on_commit=False)


def _session(request: Request) -> Iterator[Session]:
    with open_session(request.app.state.engine) as session:
        yield session


Db = Annotated[Session, Depends(_session)]
