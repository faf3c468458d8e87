"""A full service: 10,000 queued jobs of 50 tenants, 200 event streams. What requests, claims and memory cost then.

    python bench/load.py [--postgres] [--jobs 10000] [--listeners 200]

Times are of this machine; what can be compared is in one run: `GET /jobs/{id}` with its key, tenant and row, against an endpoint
of a bare FastAPI application under the same server and load.
"""

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import httpx
import psutil
from sqlmodel import col, select

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from ports import free_port  # noqa: E402

from service import auth, queue  # noqa: E402
from service.db.session import connect, migrate, open_session, tenant_session  # noqa: E402
from service.db.tables import JobRow, new_id, now  # noqa: E402
from service.settings import Settings  # noqa: E402

TENANTS = 50
BARE = """
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

class Answer(BaseModel):
    id: str
    status: str

app = FastAPI()

@app.get("/jobs/{job_id}")
def get_job(job_id: str) -> Answer:
    return Answer(id=job_id, status="queued")

uvicorn.run(app, port={port}, log_level="warning", access_log=False)
"""


def fill(settings: Settings, jobs: int) -> tuple[dict[str, str], list[str]]:
    """Queues jobs in turn for all tenants. Returns a key of each, and the ids of the first tenant's jobs."""
    engine = connect(settings)
    keys = {}
    with open_session(engine) as session:
        for number in range(TENANTS):
            keys[f"t{number}"] = auth.create_key(session, "load", "read", f"t{number}")[1]
        session.commit()
    spec = {"base": {"model": "mdl_" + "0" * 26}, "target": {"dataset": "ds_" + "0" * 26}, "budget": {"parameters": 0.5}}
    ids = sorted(new_id("job") for _ in range(jobs))
    for number, tenant in enumerate(keys):
        with tenant_session(engine, tenant) as session:
            for identifier in ids[number::TENANTS]:
                row = JobRow(id=identifier, status="queued", spec=spec, created_at=now())
                session.add(row)
                session.flush()
                queue._append(session, row, now(), "state", "", "queued", {"status": "queued"})
            session.commit()
    return keys, ids[0::TENANTS]


@contextmanager
def serving(command: list[str], port: int, **environment: str):
    process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", port)) and time.monotonic() < deadline:
            time.sleep(0.1)
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)


def rate(port: int, path: str, key: str = "", seconds: float = 5, connections: int = 8) -> float:
    """Requests a second over connections that stay open, each with its next request as soon as it is answered."""
    head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n" + (f"Authorization: Bearer {key}\r\n" if key else "") + "\r\n"
    counts: list[int] = []

    def ask() -> None:
        count, end = 0, time.perf_counter() + seconds
        with socket.create_connection(("127.0.0.1", port)) as connection:
            file = connection.makefile("rb")
            while time.perf_counter() < end:
                connection.sendall(head.encode())
                assert b" 200 " in file.readline()
                length = 0
                while (line := file.readline()) != b"\r\n":
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                file.read(length)
                count += 1
        counts.append(count)

    threads = [threading.Thread(target=ask) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / seconds


def latencies(url: str, path: str, keys: list[str], count: int = 300) -> tuple[float, float]:
    """Median and 95th percentile of a request, in milliseconds, with the keys of all tenants in turn."""
    times = []
    with httpx.Client(base_url=url, timeout=60) as client:
        for number in range(count):
            headers = {"Authorization": f"Bearer {keys[number % len(keys)]}"}
            began = time.perf_counter()
            client.get(path, headers=headers).raise_for_status()
            times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times), sorted(times)[int(0.95 * count)]


async def listen(url: str, job: str, key: str, count: int, seconds: float) -> int:
    """Keeps event streams open, and returns how many of them have heard of the job's first event."""
    heard = 0

    async def one(client: httpx.AsyncClient) -> None:
        nonlocal heard
        headers = {"Accept": "text/event-stream", "Authorization": f"Bearer {key}"}
        async with client.stream("GET", f"/jobs/{job}/events", headers=headers) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("id: 1"):
                    heard += 1
                    await asyncio.sleep(seconds)
                    return

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        await asyncio.gather(*(one(client) for _ in range(count)))
    return heard


def claims(settings: Settings, count: int = 500) -> float:
    """Claims a second, of one worker."""
    engine = connect(settings)
    began = time.perf_counter()
    with open_session(engine) as session:
        for _ in range(count):
            assert queue.claim(session, 600, 3) is not None
        taken = time.perf_counter() - began
        for row in session.exec(select(JobRow).where(col(JobRow.status) == "running")):
            row.status, row.lease_token, row.lease_until = "queued", None, now() - timedelta(days=1)
        session.commit()
    return count / taken


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--postgres", action="store_true")
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--listeners", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        url = ""
        if options.postgres:
            import postgres

            url = postgres.database_for(data)
        settings = Settings(data=data, database_url=url)
        settings.prepare()
        migrate(settings)
        keys, ids = fill(settings, options.jobs)
        first = keys["t0"]
        told: dict[str, object] = {"database": "postgres" if url else "sqlite", "jobs": options.jobs, "tenants": TENANTS}
        told["claims_per_second"] = round(claims(settings))
        port, bare = free_port(), free_port()
        command = [sys.executable, "-m", "narrow_client.cli", "serve", "--port", str(port), "--workers", "0", "--data", str(data)]
        environment = {"NARROW_KEYS": "always", "NARROW_MAX_REQUESTS": "1000000000", "NARROW_DATABASE_URL": url}
        with (
            serving(command, port, **environment) as server,
            serving([sys.executable, "-c", BARE.replace("{port}", str(bare))], bare),
        ):
            address = f"http://127.0.0.1:{port}"
            told["memory_mib_idle"] = server.memory_info().rss >> 20
            for name, path in (("list", "/jobs"), ("list_queued", "/jobs?status=queued&limit=100"), ("get", f"/jobs/{ids[5]}")):
                told[f"{name}_ms_median"], told[f"{name}_ms_p95"] = (
                    round(value, 1) for value in latencies(address, path, list(keys.values()) if name != "get" else [first])
                )
            pairs = []
            for _ in range(3):
                pairs.append((rate(port, f"/jobs/{ids[5]}", first), rate(bare, "/jobs/a")))
            told["get_per_second"], told["bare_per_second"] = (
                round(statistics.median(side)) for side in zip(*pairs, strict=True)
            )
            told["get_to_bare"] = round(statistics.median(ours / theirs for ours, theirs in pairs), 2)
            streams: list[int] = []
            thread = threading.Thread(
                target=lambda: streams.append(asyncio.run(listen(address, ids[0], first, options.listeners, 20)))
            )
            thread.start()
            time.sleep(12)
            told["memory_mib_listeners"] = server.memory_info().rss >> 20
            busy = server.cpu_times()
            time.sleep(5)
            after = server.cpu_times()
            told["cpu_listeners"] = round((after.user + after.system - busy.user - busy.system) / 5, 2)
            told["list_ms_p95_listeners"] = round(latencies(address, "/jobs", list(keys.values()), 60)[1], 1)
            thread.join()
            told["streams_that_heard"] = streams[0]
    sys.stdout.write(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
