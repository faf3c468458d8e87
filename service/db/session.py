"""The database: an engine for SQLite or Postgres, and migrations at start."""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, event, text
from sqlalchemy.exc import InterfaceError, OperationalError, TimeoutError
from sqlalchemy.orm import ORMExecuteState, with_loader_criteria
from sqlalchemy.sql.base import ExecutableOption
from sqlmodel import Session, col, create_engine

from service.db.tables import Owned, now
from service.settings import Settings

READERS = 16
BUSY_MS = 10_000
"""How long a statement waits for another's lock: less than a lease, so that a worker can still act on its answer."""
IDLE_MS = 60_000
"""After which Postgres ends a transaction whose owner says nothing, and with it the locks of a machine that is gone."""

AWAY = (OperationalError, InterfaceError, TimeoutError)
"""What a database raises that is locked, full or not there: the same statement may pass later."""


def connect(settings: Settings) -> Engine:
    """An engine for the configured database. SQLite: write-ahead log, full durability. Both wait for locks, but not for ever."""
    url = settings.database
    if not url.startswith("sqlite"):
        limits = f"-c lock_timeout={BUSY_MS} -c idle_in_transaction_session_timeout={IDLE_MS}"
        # A peer that vanished without a word is noticed too: what was sent and not acknowledged for so long ends the connection.
        arguments = {"options": limits, "connect_timeout": 10, "tcp_user_timeout": BUSY_MS}
        return create_engine(url, pool_pre_ping=True, pool_size=2 * READERS, connect_args=arguments)
    engine = create_engine(url, connect_args={"check_same_thread": False}, pool_size=2 * READERS)

    @event.listens_for(engine, "connect")
    def prepare(connection, _):  # type: ignore[no-untyped-def]
        # The driver's own transactions begin too late (at the first write); SQLAlchemy's BEGIN below replaces them.
        connection.isolation_level = None
        for pragma in (f"busy_timeout={BUSY_MS}", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection):  # type: ignore[no-untyped-def]
        # IMMEDIATE: a transaction that reads and then writes would otherwise fail when another wrote in between. One that
        # only reads takes no lock: it waits for nobody and nobody waits for it.
        reads = connection.get_execution_options().get("reads")
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine


def migrate(settings: Settings) -> None:
    """Brings the database to this version's tables. Processes that start together do it one after the other: on one machine by
    a file, on several by a lock in the database, which SQLite, where there is but one machine, does not have."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["url"] = settings.database
    with (settings.data / "migrate.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        command.upgrade(config, "head")


# A file that is kept already is not stored again, so nobody may remove it between the moment when it was found and the commit
# of the row that names it. Who publishes therefore shares a lock from the first file to the commit, and files are removed only
# under the whole of it. It is the database's where that is on many machines, and the kernel's where it is on this one; both
# release it when its holder dies, and it does not matter how long a publication takes.

_LOCK = "hashtext('narrow.artifacts')"


@contextmanager
def publishing(engine: Engine, data: Path) -> Iterator[Callable[[], object]]:
    """While files are stored that rows will name. To be called before the commit: it fails if the lock was lost meanwhile."""
    if engine.dialect.name == "postgresql":
        with _apart(engine) as connection:
            connection.execute(text(f"SELECT pg_advisory_lock_shared({_LOCK})"))
            yield lambda: connection.execute(text("SELECT 1"))
        return
    with (data / "artifacts" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield lambda: None


@contextmanager
def removing(engine: Engine, data: Path) -> Iterator[bool]:
    """Whether files can be removed now; if not, their marks stay for the janitor."""
    if engine.dialect.name == "postgresql":
        with _apart(engine) as connection:
            yield bool(connection.execute(text(f"SELECT pg_try_advisory_lock({_LOCK})")).scalar())
        return
    with (data / "artifacts" / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@contextmanager
def _apart(engine: Engine) -> Iterator[Connection]:
    """A connection without transactions, which would be ended for being idle. Its locks end with it."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        try:
            yield connection
        finally:
            connection.invalidate()


def clock(session: Session) -> datetime:
    """The database's time, by which leases count: clocks of machines differ, and one that jumps must not take others' jobs.
    On SQLite, where there is one machine, it is that one's."""
    if session.get_bind().dialect.name == "postgresql":
        moment: datetime = session.execute(text("SELECT clock_timestamp()")).scalar_one()
        return moment.astimezone(UTC)
    return now()


def open_session(engine: Engine) -> Session:
    """A session whose rows can still be read after its commit."""
    return Session(engine, expire_on_commit=False)


@lru_cache(maxsize=100)
def reading(engine: Engine) -> Engine:
    """The engine for what only reads: on SQLite it takes no lock, and on Postgres no transaction, which would be two more trips
    and, at its isolation, shows no more than its statements alone. Kept, because making one costs more than a query."""
    if engine.dialect.name == "postgresql":
        return engine.execution_options(isolation_level="AUTOCOMMIT")
    return engine.execution_options(reads=True)


def read_session(engine: Engine) -> Session:
    """A session that must not write: on SQLite it holds no lock, however long it is open."""
    return open_session(reading(engine))


def tenant_session(engine: Engine, tenant: str, reads: bool = False) -> Session:
    """A session that sees what belongs to a tenant and nothing else, whatever it asks for, and gives what it adds to it."""
    return _TenantSession(reading(engine) if reads else engine, expire_on_commit=False, info={"tenant": tenant})


class _TenantSession(Session):
    def get(self, entity: Any, ident: Any, **options: Any) -> Any:
        """By primary key, the commonest of all: the row is looked at instead of its query, which costs a third of it."""
        self.info["by_key"] = True
        try:
            row = super().get(entity, ident, **options)
        finally:
            self.info["by_key"] = False
        return None if isinstance(row, Owned) and row.tenant != self.info["tenant"] else row


@event.listens_for(Session, "do_orm_execute")
def _see_own(state: ORMExecuteState) -> None:
    tenant = state.session.info.get("tenant")
    if tenant is not None and not state.is_column_load and not state.session.info.get("by_key"):
        state.statement = state.statement.options(*_own(tenant))


@lru_cache(maxsize=1000)
def _own(tenant: str) -> list[ExecutableOption]:
    # For every table: which of them a statement touches is more than SQLAlchemy says of a `select_from`.
    return [with_loader_criteria(table, col(table.tenant) == tenant, include_aliases=True) for table in Owned.__subclasses__()]


@event.listens_for(Session, "after_flush")
def _note(session: Session, _: object) -> None:
    """What a request makes first that has an id: a sweep comes before its points."""
    for row in session.new:
        if isinstance(row, Owned) and row is not session.info.get("audit"):
            session.info.setdefault("made", getattr(row, "id", None))


@event.listens_for(Session, "before_commit")
def _audit(session: Session) -> None:
    """A change and the line that tells of it are one transaction."""
    row = session.info.get("audit")
    if row is None:
        return
    session.flush()
    del session.info["audit"]
    row.made = session.info.get("made")
    session.add(row)


@event.listens_for(Session, "before_flush")
def _give_own(session: Session, *_: object) -> None:
    if "tenant" in session.info:
        for row in session.new:
            if isinstance(row, Owned):
                row.tenant = session.info["tenant"]
