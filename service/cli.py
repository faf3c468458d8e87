"""`narrow serve`: the API and its workers on this machine, with nothing to configure; `narrow keys`: who may use it."""

import asyncio
import ctypes
import errno
import ipaddress
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType

import click
import uvicorn
from alembic.util import CommandError
from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import Session, col, select

from narrow_engine import sandbox
from narrow_engine.spec import wording
from service import auth, logs, metrics, quotas, traces
from service.api.keys import as_key
from service.api.schemas import NewKey, Role
from service.app import create_app
from service.db.session import connect, migrate, open_session, read_session
from service.db.tables import DEFAULT_TENANT, KeyRow, TenantRow, now
from service.settings import Settings
from service.storage import open_storage
from service.webhooks import Courier
from service.wire import BACKLOG, Connection, most_connections

REQUEST_SECONDS = 10
"""What open requests have to end when the service is asked to stop."""

log = logging.getLogger("narrow.serve")


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--data", type=click.Path(file_okay=False, path_type=Path), help="Folder for everything; by default NARROW_DATA.")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(0), help="Worker processes; 0 for the API alone.")
def serve(host: str, port: int, data: Path | None, workers: int) -> None:
    """Start the service: the API and its workers."""
    if data is not None:
        os.environ["NARROW_DATA"] = str(data)
    settings = _settings()
    listener = _listen(host, port)
    _prepare(settings)
    logs.configure(settings.log)
    lacking = _lacking(settings) if workers and settings.runner == "local" else []
    if lacking and settings.sandbox == "require":
        raise click.ClickException(f"NARROW_SANDBOX=require, but {'; '.join(lacking)}.")
    for sentence in lacking:
        log.warning(sentence)
    traces.configure("narrow-api")
    metrics.begin(settings)
    # The form parser spools bodies here: on the data disk and under its limits, not in /tmp.
    tempfile.tempdir = str(settings.uploads)
    # uvicorn raises the signals that it caught once more when it is done; by then the workers still have to be ended.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    keys_needed = settings.keys == "always" or (settings.keys == "auto" and not _on_loopback(listener))
    server = Server(settings, keys_needed, host if _on_loopback(listener) else None)
    # One is enough to keep a cluster's jobs placed.
    supervisor = Supervisor(min(workers, 1) if settings.runner == "ray" else workers, settings)
    courier = Courier(server.app.state.engine, settings)
    try:
        server.run([listener])
    finally:
        # While the jobs are put back a second signal still means at once.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: supervisor.hurry.set())
        courier.close()
        supervisor.close(0 if server.force_exit else settings.drain_seconds + 5)


@click.group()
def keys() -> None:
    """API keys, on the service's own machine: the first one, and those of other tenants. NARROW_DATA says which service."""


@keys.command("create")
@click.argument("name")
@click.option("--role", type=click.Choice(auth.ROLES), default="write", show_default=True, help="read, write, or admin of keys.")
@click.option(
    "--tenant", default=DEFAULT_TENANT, show_default=True, help="Whose models, data and jobs it sees; made by its first key."
)
@click.option("--days", type=click.FloatRange(0, 3650, min_open=True), help="Until it expires; by default never.")
def create_key(name: str, role: Role, tenant: str, days: float | None) -> None:
    """Make an API key and print it, once."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,39}", tenant):
        raise click.UsageError(f"--tenant {tenant[:80]!r} should be small letters, digits and hyphens, 40 at most.")
    try:
        wanted = NewKey(name=name, role=role, expires_in_days=days)
    except ValidationError as error:
        first = error.errors()[0]
        raise click.UsageError(f"{first['loc'][0]} {wording(first)}.") from error
    with _keys() as session:
        row, secret = auth.create_key(session, wanted.name, wanted.role, tenant, auth.expiry(wanted))
        session.commit()
    click.echo(f"{row.id} is made, of the tenant {tenant} with the role {role}. The key, shown only now:", err=True)
    click.echo(secret)


@keys.command("list")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def list_keys(as_json: bool) -> None:
    """All keys of all tenants, without themselves."""
    with _keys() as session:
        rows = [as_key(row) for row in session.exec(select(KeyRow).order_by(col(KeyRow.id)))]
    if as_json:
        click.echo(json.dumps([row.model_dump(mode="json") for row in rows], indent=2))
        return
    for row in rows:
        state = "revoked" if row.revoked_at else "expired" if row.expires_at and row.expires_at <= now() else "counts"
        used = f"used {row.used_at:%Y-%m-%d}" if row.used_at else "never used"
        click.echo(f"{row.id}  …{row.hint}  {row.tenant:<16} {row.role:<6} {state:<8} {used:<16} {row.name}")
    if not rows:
        click.echo("There are no keys: narrow keys create NAME makes one.", err=True)


@keys.command("revoke")
@click.argument("key_id")
def revoke_key(key_id: str) -> None:
    """End a key: within a second, which is how long servers remember one."""
    with _keys() as session:
        row = session.get(KeyRow, key_id)
        if row is None:
            raise click.ClickException(f"There is no key {key_id[:80]!r}: narrow keys list shows all.")
        row.revoked_at = row.revoked_at or now()
        session.commit()
    click.echo(f"{key_id} does not count any more.", err=True)


@click.group()
def tenants() -> None:
    """What each tenant uses and may use, on the service's own machine. NARROW_DATA says which service."""


@tenants.command("list")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def list_tenants(as_json: bool) -> None:
    """All tenants, with what they use."""
    settings = _settings()
    with _keys() as session:
        found = {name: quotas.usage(session, settings, name) for name in quotas.by_tenant(session)}
    if as_json:
        click.echo(json.dumps({name: row.model_dump(mode="json") for name, row in found.items()}, indent=2))
        return
    for name, row in found.items():
        pairs = (
            (row.jobs, row.limits.jobs, "jobs"),
            (row.bytes, row.limits.bytes, "bytes"),
            (row.hours, row.limits.hours, "hours"),
        )
        told = "  ".join(
            f"{used:,.10g} of {'any' if most is None else format(most, ',.10g')} {unit}" for used, most, unit in pairs
        )
        click.echo(f"{name:<16}  {told}")


@tenants.command("limit")
@click.argument("tenant")
@click.option("--jobs", type=click.IntRange(0), help="That wait, run or are paused at a time.")
@click.option("--bytes", "size", type=click.IntRange(0), help="That are kept.")
@click.option("--hours", type=click.FloatRange(0), help="That jobs run in thirty days.")
def limit_tenant(tenant: str, jobs: int | None, size: int | None, hours: float | None) -> None:
    """Set a tenant's limits. What is not given is as the service's settings say."""
    with _keys() as session:
        session.merge(TenantRow(name=tenant, max_jobs=jobs, max_bytes=size, max_hours=hours))
        session.commit()


def _keys() -> Session:
    settings = _settings()
    _prepare(settings)
    return open_session(connect(settings))


def _on_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def _settings() -> Settings:
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        name = f"NARROW_{'_'.join(str(part) for part in first['loc'])}".upper()
        raise click.UsageError(f"{name}={str(first['input'])[:80]!r} {wording(first)}.") from error


def _prepare(settings: Settings) -> None:
    """Folders and tables."""
    try:
        open_storage(settings)
    except ImportError as error:
        raise click.ClickException("NARROW_STORAGE_URL takes the extra s3: pip install 'narrow[s3]'.") from error
    try:
        settings.prepare()
        with tempfile.TemporaryFile(dir=settings.uploads):
            pass
    except OSError as error:
        detail = f"The data folder {settings.data} cannot be written ({error.strerror}): choose another with --data."
        raise click.ClickException(detail) from error
    try:
        migrate(settings)
    except (SQLAlchemyError, CommandError, ImportError, OSError) as error:
        reason = str(getattr(error, "orig", error)).partition("\n")[0]
        where = "NARROW_DATABASE_URL" if settings.database_url else settings.data / "narrow.db"
        raise click.ClickException(f"The database ({where}) cannot be used: {reason}.") from error


def _lacking(settings: Settings) -> list[str]:
    """What jobs cannot be shut in with here, as sentences."""
    data = settings.data.resolve()
    shown = next((place for place in (*sandbox.libraries(), *sandbox.SYSTEM) if data.is_relative_to(place)), None)
    told = [f"jobs can read the data folder, which lies in {shown} among Python's libraries"] if shown else []
    return [*sandbox.lacking(), *told]


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Made here and not by uvicorn, which tells what is wrong as a line of its log."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
        listener = socket.create_server(address[:2], family=family)
        # Connections inherit it. asyncio sets it only on sockets that it makes itself; without it each answer, which is two
        # writes, waits 40 ms for the acknowledgement of the first.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except (OSError, UnicodeError) as error:
        number = getattr(error, "errno", None)
        if number == errno.EADDRINUSE:
            detail = f"Port {port} of {host} is taken: choose another with --port, or 0 for any that is free."
        elif number in (errno.EACCES, errno.EPERM):
            detail = f"Port {port} takes rights that you do not have: choose one above 1023 with --port."
        else:
            detail = f"This machine has no address {host[:80]!r}: choose another with --host, or leave it out for 127.0.0.1."
        raise click.ClickException(detail) from error


class Server(uvicorn.Server):
    """Says its URL when it is ready, and ends event streams as soon as it is asked to stop."""

    def __init__(self, settings: Settings, keys_needed: bool, host: str | None) -> None:
        self.app, self.drain_seconds = create_app(settings, keys_needed, host), settings.drain_seconds
        config = uvicorn.Config(
            self.app,
            http=partial(Connection, settings.silence_seconds, most_connections(settings.max_connections)),  # type: ignore[arg-type]
            backlog=BACKLOG,
            ws="none",
            log_level="warning",
            timeout_graceful_shutdown=REQUEST_SECONDS,
            server_header=False,
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.loop = asyncio.get_running_loop()
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            click.echo(f"Narrow is ready at http://{shown}:{port}")
            sys.stdout.flush()
            self._say_who_may_come()

    def _say_who_may_come(self) -> None:
        if not self.app.state.keys_needed:
            log.info("no API key is needed: everybody who reaches this address may do everything")
            return
        log.info("every request needs an API key")
        with read_session(self.app.state.engine) as session:
            if not auth.any_key(session):
                log.warning("there is no API key yet: `narrow keys create NAME --role admin` on this machine makes the first")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        log.info(
            "draining: requests have %g s to end, then running jobs %g s to write a checkpoint; a second signal stops at once",
            REQUEST_SECONDS,
            self.drain_seconds,
        )
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        # uvicorn waits for open connections before it tells the application, and a stream would never close by itself.
        self.loop.call_soon_threadsafe(self.app.state.drain.set)
        super().handle_exit(sig, frame)


class Supervisor:
    """Keeps a number of workers alive.

    The kernel kills a worker when the thread that started it ends (PR_SET_PDEATHSIG means the thread, not the process).
    The thread that starts new ones therefore also ends them all, and lives until they are gone.
    """

    def __init__(self, count: int, settings: Settings) -> None:
        self.settings = settings
        self.closing, self.hurry = threading.Event(), threading.Event()
        self.seconds = 0.0
        self.workers = [self._start() for _ in range(count)]
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _start(self) -> subprocess.Popen[bytes]:
        # A session of its own: Ctrl-C reaches only the server, which then ends the workers in order.
        return subprocess.Popen(
            [sys.executable, "-m", "service.worker"],
            stdin=subprocess.DEVNULL,
            env=metrics.environment(self.settings),
            start_new_session=True,
            preexec_fn=die_with_parent(),
        )

    def _watch(self) -> None:
        while not self.closing.wait(1.0):
            for number, worker in enumerate(self.workers):
                if worker.poll() is not None and not self.closing.is_set():
                    log.error("a worker ended with %s, another is started", worker.returncode)
                    self.workers[number] = self._start()
        for worker in self.workers:
            worker.terminate()
        deadline = time.monotonic() + self.seconds
        while any(worker.poll() is None for worker in self.workers) and time.monotonic() < deadline:
            if self.hurry.wait(0.05):
                break
        for worker in self.workers:
            worker.kill()
            worker.wait()

    def close(self, seconds: float) -> None:
        """Ends the workers: those that hold a job have `seconds` to put it back, or until `hurry` is set."""
        self.seconds = seconds
        self.closing.set()
        self.thread.join()


def die_with_parent() -> Callable[[], None]:
    """What a new child does to be killed when its parent dies, even by kill -9 (PR_SET_PDEATHSIG; Linux only)."""
    parent = os.getpid()

    def ask() -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
            if os.getppid() != parent:  # it was killed before this was asked for
                os._exit(1)

    return ask
