"""The API and its workers on this machine, with nothing to configure: what `narrow serve` starts."""

import asyncio
import ctypes
import errno
import fcntl
import ipaddress
import json
import logging
import os
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
from typing import IO

import click
import uvicorn
from alembic.util import CommandError
from pydantic import ValidationError
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import Session

from narrow_engine import sandbox
from narrow_engine.spec import wording
from service import auth, logs, metrics, traces
from service.app import create_app
from service.db.session import connect, migrate, open_session, read_session
from service.settings import Settings
from service.storage import open_storage
from service.webhooks import Courier
from service.wire import BACKLOG, Connection, most_connections

REQUEST_SECONDS = 10
"""What open requests have to end when the service is asked to stop."""

log = logging.getLogger("narrow.serve")


def serve(host: str, port: int, data: Path | None, workers: int, as_json: bool) -> None:
    """Serves until a signal comes."""
    if data is not None:
        os.environ["NARROW_DATA"] = str(data)  # for the workers as well
    settings = settings_here()
    listener = _listen(host, port)
    _prepare(settings)
    logs.configure(settings.log)
    mark = (settings.data / "serving").open("a")
    if not _alone(mark):
        log.warning(
            "another service runs on the data folder %s: both take jobs from one queue, and each has workers of its own",
            settings.data.resolve(),
        )
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
    server = Server(settings, keys_needed, host if _on_loopback(listener) else None, as_json)
    # One is enough to keep a cluster's jobs placed.
    supervisor = Supervisor(min(workers, 1) if settings.runner == "ray" else workers, settings)
    courier = Courier(server.app.state.engine, settings)
    try:
        server.run([listener])
    finally:
        mark.close()
        # While the jobs are put back a second signal still means at once.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: supervisor.hurry.set())
        courier.close()
        supervisor.close(0 if server.force_exit else settings.drain_seconds + 5)


def open_database(data: Path | None, make: bool = False) -> Session:
    """The database of the service whose settings are here, which is told on stderr. `make`: it may be a new one if somebody named
    it: what is called in another folder would else work on another service, which nobody runs. Raises click.UsageError."""
    settings = settings_here(data)
    if settings.database_url:
        place = f"database {make_url(settings.database).render_as_string(hide_password=True)}"
    else:
        place = f"data folder {settings.data.resolve()}"
        named = make and "data" in settings.model_fields_set
        if not named and not (settings.data / "narrow.db").is_file():
            raise click.UsageError(f"There is no service in the {place}: name the folder of one with --data or NARROW_DATA.")
    click.echo(f"Of the service with the {place}.", err=True)
    _prepare(settings)
    return open_session(connect(settings))


def _alone(mark: IO[str]) -> bool:
    """Whether no other service on this machine holds the mark of a data folder, which is held as long as the file is open."""
    try:
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _on_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def settings_here(data: Path | None = None) -> Settings:
    """With another data folder, if one is given. Raises click.UsageError."""
    try:
        return Settings() if data is None else Settings(data=data)
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

    def __init__(self, settings: Settings, keys_needed: bool, host: str | None, as_json: bool) -> None:
        self.app, self.drain_seconds = create_app(settings, keys_needed, host), settings.drain_seconds
        self.as_json = as_json
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
            url = f"http://{shown}:{port}"
            click.echo(json.dumps({"url": url}) if self.as_json else f"Narrow is ready at {url}")
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
