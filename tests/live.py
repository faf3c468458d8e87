"""A real service: real processes, a real database, on a free port.

With NARROW_TEST_DATABASE=postgres the same tests run on Postgres instead of SQLite (`make test-postgres`).
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import postgres
import psutil

from service.settings import Settings

QUICK = {"calibration_tokens": 512, "recover": {"tokens": 1024, "batch_tokens": 256}}
SLOW = {"calibration_tokens": 512, "recover": {"tokens": 2_000_000, "batch_tokens": 256}}
FAST_SETTINGS = {"NARROW_POLL_SECONDS": "0.1", "NARROW_LEASE_SECONDS": "3", "NARROW_MAX_DATASET_BYTES": "200000"}

POSTGRES = os.environ.get("NARROW_TEST_DATABASE") == "postgres"


def settings_of(data: Path) -> Settings:
    """The settings of a service with this data folder, with the database that the tests run on."""
    return Settings(data=data, database_url=postgres.database_for(data) if POSTGRES else "")


class Service:
    """`narrow serve` as a process, and a client of it."""

    def __init__(self, data: Path, workers: int = 1, host: str = "127.0.0.1", **settings: str) -> None:
        self.data = data
        database = {"NARROW_DATABASE_URL": settings_of(data).database_url}
        environment = {**os.environ, **FAST_SETTINGS, **database, **settings}
        self.log = (data.parent / f"{data.name}.log").open("a")
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "narrow_client.cli", "serve", "--host", host, "--port", "0"),
                *("--data", str(data), "--workers", str(workers)),
            ],
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
            start_new_session=True,
        )
        line = self.process.stdout.readline()
        assert line.startswith("Narrow is ready at http"), (line, Path(self.log.name).read_text())
        self.url = line.split()[-1].replace("0.0.0.0", "127.0.0.1")
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def children(self, needle: str) -> list[psutil.Process]:
        """What it has started, but for the processes that others are shut in by."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                command = " ".join(child.cmdline())
                if needle in command and "sandbox.py" not in command:
                    found.append(child)
            except psutil.NoSuchProcess:
                continue
        return found

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def upload_model(self, folder: Path) -> str:
        files = [("files", (p.name, p.read_bytes())) for p in sorted(folder.iterdir())]
        answer = self.http.post("/models", files=files)
        assert answer.status_code == 201, answer.text
        return answer.json()["id"]

    def upload_dataset(self, path: Path) -> str:
        answer = self.http.post("/datasets", files={"file": (path.name, path.read_bytes())})
        assert answer.status_code == 201, answer.text
        return answer.json()["id"]

    def job(self, job_id: str) -> dict:
        return self.http.get(f"/jobs/{job_id}").json()

    def wait(self, job_id: str, condition, seconds: float = 120) -> dict:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            job = self.job(job_id)
            if condition(job):
                return job
            assert job["status"] != "failed", job
            time.sleep(0.05)
        raise AssertionError(f"still {job}")

    def events(self, job_id: str) -> list[dict]:
        found: list[dict] = []
        while True:
            page = self.http.get(f"/jobs/{job_id}/events", params={"after": len(found), "limit": 500}).json()
            found += page["data"]
            if page["next_cursor"] is None:
                return found


@contextmanager
def running(data: Path, **options):
    service = Service(data, **options)
    try:
        yield service
    finally:
        service.stop()
        service.log.close()


def spec_of(service: Service, model: Path, data: Path, method: dict, **changes) -> dict:
    return {
        "base": {"model": service.upload_model(model)},
        "target": {"dataset": service.upload_dataset(data)},
        "budget": {"parameters": 0.85},
        "method": method,
        "block_tokens": 64,
        "skill_tokens": 1024,
        "export": ["safetensors"],
        **changes,
    }
