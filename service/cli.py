"""`narrow serve`: the API and its workers on this machine, with nothing to configure."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType

import click
import uvicorn

from service.app import create_app
from service.db.session import migrate
from service.runners.local import die_with_parent
from service.settings import Settings


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True, help="0 takes a free one.")
@click.option("--data", type=click.Path(file_okay=False, path_type=Path), help="Folder for everything; by default NARROW_DATA.")
@click.option("--workers", default=1, show_default=True, help="Worker processes; 0 for the API alone.")
def serve(host: str, port: int, data: Path | None, workers: int) -> None:
    """Start the service: the API and its workers."""
    if data is not None:
        os.environ["NARROW_DATA"] = str(data)
    settings = Settings()
    settings.prepare()
    migrate(settings)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    # The form parser spools bodies here: on the data disk and under its limits, not in /tmp.
    tempfile.tempdir = str(settings.uploads)
    # uvicorn raises the signals that it caught once more when it is done; by then the workers still have to be ended.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    supervisor = Supervisor(workers)
    server = Server(settings, host, port)
    try:
        server.run()
    finally:
        supervisor.close(0 if server.force_exit else settings.drain_seconds + 5)


class Server(uvicorn.Server):
    """Says its URL when it is ready, and ends event streams as soon as it is asked to stop."""

    def __init__(self, settings: Settings, host: str, port: int) -> None:
        self.app = create_app(settings)
        config = uvicorn.Config(self.app, host, port, log_level="warning", timeout_graceful_shutdown=10, server_header=False)
        super().__init__(config)

    async def startup(self, sockets: list | None = None) -> None:  # type: ignore[type-arg]
        await super().startup(sockets)
        self.loop = asyncio.get_running_loop()
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            click.echo(f"Narrow is ready at http://{shown}:{port}")
            sys.stdout.flush()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn waits for open connections before it tells the application, and a stream would never close by itself.
        self.loop.call_soon_threadsafe(self.app.state.drain.set)
        super().handle_exit(sig, frame)


class Supervisor:
    """Keeps a number of workers alive."""

    def __init__(self, count: int) -> None:
        self.closing = threading.Event()
        self.workers = [self._start() for _ in range(count)]
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _start(self) -> subprocess.Popen[bytes]:
        # A session of its own: Ctrl-C reaches only the server, which then ends the workers in order.
        return subprocess.Popen(
            [sys.executable, "-m", "service.worker"],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )

    def _watch(self) -> None:
        while not self.closing.wait(1.0):
            for number, worker in enumerate(self.workers):
                if worker.poll() is not None and not self.closing.is_set():
                    logging.getLogger("narrow.serve").error("a worker ended with %s, another is started", worker.returncode)
                    self.workers[number] = self._start()

    def close(self, seconds: float) -> None:
        """Ends the workers: those that hold a job have `seconds` to put it back."""
        self.closing.set()
        self.thread.join()
        for worker in self.workers:
            worker.terminate()
        deadline = time.monotonic() + seconds
        for worker in self.workers:
            try:
                worker.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
