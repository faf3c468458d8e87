"""What a job costs beside its own work, and what 10,000 a day of them make of it.

    python bench/costs.py [--postgres] [--pairs 3] [--tokens 50000]

Measured: a job of the embedded base model through the service (local runner, with and without a bucket beside it is the same
path) against the engine alone, in turn; what the queue takes of the database for a claim, a heartbeat and a batch of events with
10,000 jobs in it; and what a job leaves there. Calculated from that: a day of 10,000 jobs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import httpx
from load import ROOT, fill, free_port, serving

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from sqlalchemy import text  # noqa: E402

from narrow_engine.events import Event  # noqa: E402
from service import queue  # noqa: E402
from service.db.session import connect, migrate, open_session  # noqa: E402
from service.settings import Settings  # noqa: E402

BASE, DATA = ROOT / "demo" / "base", ROOT / "demo" / "data"
A_DAY = 10_000
BEATS = 2.0
"""Heartbeats a second of a running job, and at most as many batches of events."""


def engine_alone(folder: Path, spec: dict) -> float:
    """Seconds of `narrow run`."""
    folder.mkdir()
    (folder / "spec.json").write_text(json.dumps(spec))
    began = time.perf_counter()
    command = [sys.executable, "-m", "narrow_engine", str(folder / "spec.json"), "--out", str(folder / "run"), "--quiet"]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def through_service(client: httpx.Client, spec: dict) -> tuple[float, dict]:
    """Seconds from `POST /jobs` until the job has succeeded, and the job."""
    began = time.perf_counter()
    answer = client.post("/jobs", json=spec)
    answer.raise_for_status()
    while True:
        job = client.get(f"/jobs/{answer.json()['id']}").json()
        assert job["status"] in ("queued", "running", "succeeded"), job
        if job["status"] == "succeeded":
            return time.perf_counter() - began, job
        time.sleep(0.1)


def upload(client: httpx.Client) -> dict:
    files = [("files", (path.name, path.read_bytes())) for path in sorted(BASE.iterdir()) if path.is_file()]
    model = client.post("/models", files=files)
    data = client.post("/datasets", files={"file": ("python.jsonl.gz", (DATA / "python.jsonl.gz").read_bytes())})
    for answer in (model, data):
        answer.raise_for_status()
    return {"base": {"model": model.json()["id"]}, "target": {"dataset": data.json()["id"]}}


def pairs(folder: Path, url: str, count: int, tokens: int) -> dict:
    """The same job alone and through the service, `count` times in turn. Each has a seed of its own, so nothing is shared."""
    port = free_port()
    command = [sys.executable, "-m", "narrow_client.cli", "serve", "--port", str(port), "--data", str(folder / "service")]
    alone, through = [], []
    with (
        serving(command, port, NARROW_DATABASE_URL=url, NARROW_MAX_REQUESTS="1000000"),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client,
    ):
        inputs = upload(client)
        method = {"calibration_tokens": 8192, "recover": {"tokens": tokens}}
        options = {"budget": {"parameters": 0.5}, "method": method, "skill_tokens": 8192, "export": ["safetensors"]}
        paths = {"base": {"path": str(BASE)}, "target": {"path": str(DATA / "python.jsonl.gz")}, "target_name": "python"}
        for seed in range(count):
            alone.append(engine_alone(folder / f"alone-{seed}", {**options, **paths, "seed": seed}))
            seconds, job = through_service(client, {**options, **inputs, "seed": seed})
            through.append(seconds)
        events = client.get(f"/jobs/{job['id']}/events", params={"limit": 500}).json()["data"]
        files = client.get(f"/jobs/{job['id']}/artifacts").json()["data"]
    ratios = [b / a for a, b in zip(alone, through, strict=True)]
    return {
        "engine_seconds": [round(value, 1) for value in alone],
        "service_seconds": [round(value, 1) for value in through],
        "ratio": round(statistics.median(ratios), 3),
        "events": len(events),
        "event_bytes": sum(len(json.dumps(event)) for event in events),
        "artifact_bytes": sum(file["bytes"] for file in files),
    }


def database(settings: Settings) -> dict:
    """Milliseconds of what a worker asks of the database, with 10,000 jobs queued."""
    migrate(settings)
    fill(settings, A_DAY)
    engine = connect(settings)
    found: dict[str, list[float]] = {"claim": [], "heartbeat": [], "events": []}
    for _ in range(200):
        with open_session(engine) as session:
            began = time.perf_counter()
            job = queue.claim(session, 600, 3)
            found["claim"].append(time.perf_counter() - began)
        told = [
            Event(seq=seq, time=datetime.now(UTC), kind="progress", phase="recover", message="", data={"done": seq, "total": 9})
            for seq in (1, 2)
        ]
        for name, act in (
            ("heartbeat", lambda session, job=job: queue.heartbeat(session, job.id, job.lease_token, 600)),
            ("events", lambda session, job=job, told=told: queue.ingest(session, job.id, job.lease_token, told)),
        ):
            with open_session(engine) as session:
                began = time.perf_counter()
                act(session)
                found[name].append(time.perf_counter() - began)
    with open_session(engine) as session:
        if engine.dialect.name == "postgresql":
            size = session.execute(text("SELECT pg_database_size(current_database())")).scalar_one()
        else:
            size = (settings.data / "narrow.db").stat().st_size
    return {**{f"{name}_ms": round(1000 * statistics.median(times), 2) for name, times in found.items()}, "bytes": size}


def a_day(job: dict, cost: dict) -> list[dict]:
    """A day of 10,000 jobs, by how long one takes."""
    rows = []
    for seconds in (60, 600, 3600):
        running = A_DAY * seconds / 86400
        rate = BEATS * running
        busy = rate * (cost["heartbeat_ms"] + cost["events_ms"]) / 1000 + A_DAY / 86400 * cost["claim_ms"] / 1000
        rows.append(
            {
                "seconds_of_a_job": seconds,
                "running_at_a_time": round(running),
                "transactions_per_second": round(2 * rate),
                "database_connections_busy": round(busy, 2),
                "events_gb": round(A_DAY * job["event_bytes"] / 1e9, 2),
                "artifacts_gb": round(A_DAY * job["artifact_bytes"] / 1e9, 1),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--postgres", action="store_true")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=50_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        urls = ["", ""]
        if options.postgres:
            import postgres

            urls = [postgres.database_for(folder / part) for part in ("service", "queue")]
        settings = Settings(data=folder / "queue", database_url=urls[1])
        settings.prepare()
        told: dict = {"cores": os.cpu_count(), "database": "postgres" if options.postgres else "sqlite"}
        told["queue"] = database(settings)
        told["job"] = pairs(folder, urls[0], options.pairs, options.tokens)
        told["a_day_of_10000"] = a_day(told["job"], told["queue"])
    sys.stdout.write(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
