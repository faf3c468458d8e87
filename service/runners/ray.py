"""Runs jobs on a Ray cluster: `NARROW_RUNNER=ray`.

Ray finds each job a node with the GPUs, CPUs and memory that it asks for, and starts a worker there which takes that one job
(`python -m service.worker JOB`). All else is as on one machine: the worker holds its job by a lease in the database, keeps
files in the bucket, sees there that it is to stop, and when its node is lost the lease runs out and the job is placed again.
So Ray's own records decide nothing, and losing them (a cluster that starts anew) loses no job.

The service speaks to Ray's Jobs API over HTTP and does without Ray itself. Nodes have Narrow installed and their own
environment: NARROW_DATABASE_URL, NARROW_STORAGE_URL and the keys of the bucket, which therefore never pass through Ray, whose
dashboard shows what does.
"""

import logging
import os
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import httpx
from sqlalchemy import Engine
from sqlalchemy.exc import NoResultFound
from sqlmodel import col, select

from narrow_engine.errors import NarrowError
from narrow_engine.spec import JobSpec
from service import queue
from service.db.session import open_session, read_session
from service.db.tables import JobRow
from service.estimates import estimate
from service.settings import Settings

SECONDS = 10.0
"""Ray has to answer a request."""
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
NO_ROOM = ("JOB_SUPERVISOR_ACTOR_START_TIMEOUT", "JOB_SUPERVISOR_ACTOR_UNSCHEDULABLE")
"""Why a placement ended that had waited for a node: nothing was wrong with it, and it waits again."""

log = logging.getLogger("narrow.ray")


@dataclass(frozen=True)
class Placement:
    """A job's place in Ray's queue or on a node. It is named after the job and the number of its last event at that time, so
    two services place it once, and a job to which something happened since has no use for it."""

    job: str
    seq: int
    status: str
    trouble: str

    @property
    def name(self) -> str:
        return f"{self.job}-{self.seq}"


class Cluster:
    """The Jobs API of a Ray cluster. Raises httpx.HTTPError."""

    def __init__(self, settings: Settings) -> None:
        token = os.environ.get("RAY_AUTH_TOKEN")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        # trust_env: a proxy of the machine is none for the cluster next to it.
        self.http = httpx.Client(base_url=settings.ray_url, timeout=SECONDS, headers=headers, trust_env=False)
        # Several services may share a cluster.
        self.owner = sha256(settings.database.encode()).hexdigest()[:16]

    def placements(self) -> list[Placement]:
        """All of this service's that Ray knows of."""
        found = self._ask("GET", "/api/jobs/").json()
        return [
            Placement(job, int(seq), row["status"], row.get("error_type") or "")
            for row in found
            if (row.get("metadata") or {}).get("narrow") == self.owner
            for job, _, seq in [(row["submission_id"] or "").rpartition("-")]
        ]

    def place(self, job: JobRow, cpus: int, gpus: int, memory: int) -> None:
        wanted = {
            "entrypoint": f"python -m service.worker {job.id}",
            "submission_id": f"{job.id}-{job.last_seq}",
            "metadata": {"narrow": self.owner},
            "entrypoint_num_cpus": cpus,
            "entrypoint_num_gpus": gpus,
            "entrypoint_memory": memory,
        }
        self._ask("POST", "/api/jobs/", json=wanted)

    def stop(self, placement: Placement) -> None:
        self._ask("POST", f"/api/jobs/{placement.name}/stop")

    def forget(self, placement: Placement) -> None:
        self._ask("DELETE", f"/api/jobs/{placement.name}")

    def last_words(self, placement: Placement) -> str:
        lines = str(self._ask("GET", f"/api/jobs/{placement.name}/logs").json().get("logs", "")).strip().splitlines()
        return " / ".join(lines[-5:])[-500:]

    def _ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        answer = self.http.request(method, path, **options)
        answer.raise_for_status()
        return answer


def look(settings: Settings, engine: Engine, cluster: Cluster) -> None:
    """Keeps the first jobs of the queue placed: forgets placements that have ended, stops those that nobody needs, and fills up
    those that wait. Where several services do so they do no harm. Raises httpx.HTTPError while the cluster is away."""
    placements = cluster.placements()
    with read_session(engine) as session:
        known = col(JobRow.id).in_({placement.job for placement in placements})
        numbers = dict(session.execute(select(JobRow.id, JobRow.last_seq).where(known)).all())
    waiting: set[str] = set()
    for placement in placements:
        untouched = numbers.get(placement.job) == placement.seq
        if placement.status not in ENDED:
            if untouched:
                waiting.add(placement.job)
            elif placement.status == "PENDING":
                log.info("%s needs no place any more", placement.job)
                cluster.stop(placement)
            continue
        if untouched and placement.trouble not in NO_ROOM and placement.status != "STOPPED":
            reason = placement.trouble.lower().replace("_", " ") or "its process ended without having taken the job"
            log.error("%s was not started: %s; its last words: %s", placement.job, reason, cluster.last_words(placement))
            with open_session(engine) as session:
                queue.not_placed(session, placement.job, placement.seq, settings.max_attempts, f"{reason}.")
        cluster.forget(placement)
    while len(waiting) < settings.ray_waiting:
        with open_session(engine) as session:
            job = queue.upcoming(session, settings.lease_seconds, settings.max_attempts, waiting)
        if job is None:
            return
        cpus, gpus, memory = resources(settings, engine, job)
        cluster.place(job, cpus, gpus, memory)
        log.info("%s is placed: %d CPUs, %d GPUs, %.1f GB", job.id, cpus, gpus, memory / 1e9)
        waiting.add(job.id)


def resources(settings: Settings, engine: Engine, job: JobRow) -> tuple[int, int, int]:
    """CPUs, GPUs and bytes of memory: what the job asks for, or what it is thought to need."""
    try:
        spec = JobSpec.model_validate(job.spec)
        with read_session(engine) as session:
            memory = spec.resources.memory or estimate(session, spec).memory_bytes
    except (ValueError, NarrowError, NoResultFound):
        # It cannot run, and its worker is who tells why.
        return settings.ray_cpus, 0, 0
    return spec.resources.cpus or settings.ray_cpus, spec.resources.gpus, memory
