"""kill -9 of server, workers, job processes and database at a hundred random moments, under a queue of real jobs.

Whatever was answered with 2xx is there in the end, each job has run once to its end and never twice at the same time, its
events are numbered without gaps, every file is whole, and the results are those of a run that nobody disturbed.
"""

import hashlib
import random
import signal
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import httpx
import postgres
import psutil
import pytest
from live import QUICK, Service, running, spec_of

MOMENTS = 100
SEEDS = 3
WAITING = 3
"""Jobs that are kept unfinished at a time."""
TIMED = ("report.json", "report.html", "model/README.md")
"""Files that hold times, and so differ from run to run."""

needs_postgres = pytest.mark.skipif(postgres.BINARIES is None, reason="there is no Postgres on this machine")


class Client(threading.Thread):
    """Somebody who keeps sending jobs and datasets, each until it is answered."""

    def __init__(self, service: Service, spec: dict, rows: Path) -> None:
        super().__init__(daemon=True)
        self.url, self.spec, self.rows = service.url, spec, rows
        self.jobs: dict[str, int] = {}
        self.datasets: list[str] = []
        self.enough = threading.Event()

    def ask(self, method: str, path: str, **arguments) -> httpx.Response:
        while True:
            with suppress(httpx.TransportError):
                answer = httpx.request(method, self.url + path, timeout=20, **arguments)
                if answer.status_code < 500:
                    return answer
                assert answer.status_code in (503,), answer.text
            time.sleep(0.1)

    def run(self) -> None:
        number = 0
        while not self.enough.wait(0.2):
            listed = self.ask("GET", "/jobs", params={"limit": 100}).json()["data"]
            if sum(job["status"] in ("queued", "running") for job in listed) >= WAITING:
                continue
            spec = {**self.spec, "seed": number % SEEDS}
            answer = self.ask("POST", "/jobs", json=spec, headers={"Idempotency-Key": f"job-{number}"})
            assert answer.status_code == 201, answer.text
            self.jobs[answer.json()["id"]] = number % SEEDS
            answer = self.ask("POST", "/datasets", files={"file": (f"{number}.jsonl", self.rows.read_bytes())})
            assert answer.status_code == 201, answer.text
            self.datasets.append(answer.json()["id"])
            number += 1


class Watch(threading.Thread):
    """Looks for a job that runs twice."""

    def __init__(self, data: Path) -> None:
        super().__init__(daemon=True)
        self.data, self.began = data, time.monotonic()
        self.known: dict[psutil.Process, str | None] = {}
        self.twice: list[str] = []
        self.enough = threading.Event()

    def run(self) -> None:
        while not self.enough.wait(0.05):
            alive = {p: self.known[p] if p in self.known else run_of(p) for p in psutil.process_iter()}
            self.known = alive
            ours = {process: folder for process, folder in alive.items() if folder and folder.startswith(str(self.data))}
            running = [(folder, process) for process, folder in ours.items() if lives(process)]
            # What an engine starts looks like itself until it becomes another program.
            parents = {process: parent_of(process) for _, process in running}
            running = [(f, p) for f, p in running if (parent := parents[p]) is not None and run_of(parent) != f]
            counts = Counter(folder for folder, _ in running)
            self.twice += [
                f"{time.monotonic() - self.began:.1f} s, {folder[-30:]}: {told(process)}"
                for folder, process in running
                if counts[folder] > 1
            ]


def parent_of(process: psutil.Process) -> psutil.Process | None:
    """None if the process has ended meanwhile: what lost its parent has another."""
    with suppress(psutil.Error):
        return process.parent()
    return None


def run_of(process: psutil.Process | None) -> str | None:
    """The run folder of a job process."""
    if process is None:
        return None
    with suppress(psutil.Error):
        words = process.cmdline()
        if "narrow_engine" in words and "--out" in words:
            return words[words.index("--out") + 1]
    return None


def told(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return f"{process.pid} of {process.ppid()}, {time.time() - process.create_time():.1f} s old, {process.status()}"
    return "gone"


def lives(process: psutil.Process) -> bool:
    """Whether it will do anything more. What was killed while it waits for the disk is there until the disk answers."""
    with suppress(psutil.Error, OSError):
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return False
        told = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
        return not int(told["ShdPnd"], 16) & 1 << (signal.SIGKILL - 1)
    return False


def files_of(http: httpx.Client, job_id: str) -> dict[str, str]:
    """Digests of a job's files, as they are downloaded."""
    found = {}
    for artifact in http.get(f"/jobs/{job_id}/artifacts").json()["data"]:
        content = http.get(f"/jobs/{job_id}/artifacts/{artifact['path']}").content
        found[artifact["path"]] = hashlib.sha256(content).hexdigest()
        assert found[artifact["path"]] == artifact["sha256"], artifact
    return found


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("database", ["sqlite", pytest.param("postgres", marks=needs_postgres)])
def test_a_hundred_kills_lose_nothing_and_change_nothing(tmp_path, tiny_folder, python_file, database):
    method = {**QUICK, "recover": {"tokens": 8192, "batch_tokens": 256}}
    with running(tmp_path / "calm", workers=2) as service:
        spec = spec_of(service, tiny_folder, python_file, method)
        ids = [service.http.post("/jobs", json={**spec, "seed": seed}).json()["id"] for seed in range(SEEDS)]
        for job_id in ids:
            service.wait(job_id, lambda j: j["status"] == "succeeded", seconds=600)
        calm = [files_of(service.http, job_id) for job_id in ids]

    data = tmp_path / "data"
    # Not the shortest lease: on two cores a worker may have to wait for its turn longer than that, and lose its job by it.
    settings = {"NARROW_LEASE_SECONDS": "6", "NARROW_MAX_ATTEMPTS": "1000", "NARROW_JANITOR_SECONDS": "2"}
    if database == "postgres":
        settings["NARROW_DATABASE_URL"] = postgres.database_for(data)
    chance = random.Random(0)
    killed: Counter[str] = Counter()
    service = Service(data, workers=2, **settings)
    client, watch = Client(service, spec_of(service, tiny_folder, python_file, method), python_file), Watch(data)
    client.start(), watch.start()
    try:
        while sum(killed.values()) < MOMENTS:
            # Short waits strike what is just starting, long ones let jobs come to their ends.
            time.sleep(chance.choice([chance.uniform(0.05, 3), chance.uniform(5, 30)]))
            victim = chance.choice(["server", "worker", "job", *(["database"] if database == "postgres" else [])])
            if victim == "database":
                postgres.cluster().kill()
                time.sleep(chance.uniform(0, 2))
                postgres.cluster().start()
            elif victim == "server":
                service.process.kill()
                service.process.wait()
                service = Service(data, workers=2, **settings)
                client.url = service.url
            else:
                found = service.children("service.worker" if victim == "worker" else "-m narrow_engine")
                if not found:
                    continue
                with suppress(psutil.NoSuchProcess):
                    chance.choice(found).kill()
            killed[victim] += 1
        client.enough.set()
        client.join(60)
        assert not client.is_alive()
        for job_id in client.jobs:
            service.wait(job_id, lambda j: j["status"] == "succeeded", seconds=600)
        watch.enough.set()
        watch.join(60)

        attempts = Counter(service.job(job_id)["attempt"] for job_id in client.jobs)
        print(f"{database}: killed {dict(killed)}; {len(client.jobs)} jobs, by their attempts {dict(sorted(attempts.items()))}")  # noqa: T201
        assert not watch.twice, "\n".join(dict.fromkeys(watch.twice))
        listed = []
        page = {"next_cursor": None}
        while page is not None:
            cursor = {"cursor": page["next_cursor"]} if page["next_cursor"] else {}
            page = service.http.get("/jobs", params={"limit": 100, **cursor}).json()
            listed += [job["id"] for job in page["data"]]
            page = page if page["next_cursor"] else None
        assert sorted(listed) == sorted(client.jobs)
        for dataset in client.datasets:
            assert service.http.get(f"/datasets/{dataset}").status_code == 200
        for job_id, seed in client.jobs.items():
            events = service.events(job_id)
            assert [e["seq"] for e in events] == list(range(1, len(events) + 1))
            assert [e["data"]["status"] for e in events if e["kind"] == "state"][-1] == "succeeded"
            found = files_of(service.http, job_id)
            assert {k: v for k, v in found.items() if k not in TIMED} == {k: v for k, v in calm[seed].items() if k not in TIMED}
    finally:
        client.enough.set()
        watch.enough.set()
        service.stop()
