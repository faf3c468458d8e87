"""A real Ray cluster: a head without CPUs, and nodes as processes of this machine. Ray may be installed in an environment of its
own: NARROW_TEST_RAY names its `ray`."""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
from ports import free_port

RAY = os.environ.get("NARROW_TEST_RAY") or shutil.which("ray", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
needed = pytest.mark.skipif(RAY is None, reason="there is no Ray here: pip install 'narrow[ray]'")


class Cluster:
    """`url` is its Jobs API; `settings` are those of a service that uses it."""

    def __init__(self) -> None:
        # Sockets lie in it, whose paths must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
        self.port, self.dashboard = free_port(), free_port()
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_USAGE_STATS_ENABLED": "0",
            # How soon Ray notices that a node is gone.
            "RAY_health_check_initial_delay_ms": "1000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
        }
        self.url = f"http://127.0.0.1:{self.dashboard}"
        self.settings = {
            "NARROW_RUNNER": "ray",
            "NARROW_RAY_URL": self.url,
            "RAY_AUTH_TOKEN": self.environment["RAY_AUTH_TOKEN"],
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.start_head()

    def start_head(self) -> None:
        """A head that knows nothing of what an earlier one knew."""
        place = ("--port", str(self.port), "--dashboard-port", str(self.dashboard), "--temp-dir", str(self.folder))
        self._start("head", {}, "--head", *place, "--include-dashboard=true", "--num-cpus=0")
        self._wait("head", lambda: self._ask("/api/jobs/") is not None)

    def start_node(self, name: str, cpus: int, **settings: str) -> None:
        """A node whose jobs have these settings."""
        before = self._alive()
        self._start(name, settings, "--address", f"127.0.0.1:{self.port}", f"--num-cpus={cpus}")
        self._wait(name, lambda: self._alive() > before)

    def _alive(self) -> int:
        nodes = self._ask("/nodes?view=summary")["data"]["summary"]
        return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)

    def _ask(self, path: str):
        headers = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        with suppress(httpx.TransportError):
            answer = httpx.get(f"{self.url}{path}", headers=headers, timeout=10)
            return answer.json() if answer.status_code == 200 else None

    def _wait(self, name: str, ready) -> None:
        deadline = time.monotonic() + 120
        while not ready():
            assert time.monotonic() < deadline, (self.folder / f"{name}.log").read_text()[-3000:]
            time.sleep(0.2)

    def _start(self, name: str, settings: dict[str, str], *arguments: str) -> None:
        # Jobs are run by the tests' own Python, whichever Ray's is.
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        own = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port")
        ports = [f"--{each}={free_port()}" for each in own]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [RAY, "start", "--block", "--node-ip-address=127.0.0.1", "--object-store-memory=80000000", *ports, *arguments],
                stdout=log,
                stderr=log,
                env={**self.environment, **settings, "PATH": path},
                start_new_session=True,
            )

    def kill(self, name: str) -> None:
        """kill -9 of all that runs on a node."""
        process = self.processes.pop(name)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for each in family:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()
        psutil.wait_procs(family, 30)

    def kill_all(self) -> None:
        for name in list(self.processes):
            self.kill(name)

    def remove(self) -> None:
        self.kill_all()
        shutil.rmtree(self.folder, ignore_errors=True)
