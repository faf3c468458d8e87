"""Figures for Prometheus: of requests, as they are answered; of jobs, as workers run them; of the queue, as the database has it.

Workers are processes of their own. They leave their figures in memory-mapped files (prometheus_client's multiprocess mode), and
the server that started them reads these with each scrape. Where several servers share a database each tells of its own requests
and workers, and all of them of the same queue.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
    multiprocess,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import Engine, func
from sqlmodel import col, select

from service.db.session import clock, read_session
from service.db.tables import STATUSES, JobRow, now
from service.settings import Settings

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
SECONDS = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 48 * 3600)

disable_created_metrics()  # type: ignore[no-untyped-call]

requests_ = Histogram(
    "narrow_request_seconds",
    "Requests until their answer began.",
    ("method", "operation", "status"),
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60),
)
streams = Gauge("narrow_event_streams", "Event streams that are open.", multiprocess_mode="livesum")
claims = Counter("narrow_claims_total", "Jobs that workers took, by whether it was their first attempt.", ("attempt",))
waits = Histogram("narrow_job_wait_seconds", "Jobs from being queued until a worker first took them.", buckets=SECONDS)
runs = Histogram("narrow_job_seconds", "Jobs while a worker had them, by how that ended.", ("outcome",), buckets=SECONDS)
stages = Histogram("narrow_stage_seconds", "Stages of jobs that were run, not reused.", ("stage",), buckets=SECONDS)
given_up = Counter("narrow_connections_given_up_total", "Closed to make room for new ones.")
troubles = Counter("narrow_worker_troubles_total", "What workers had to try again.", ("what",))


def workers_folder(settings: Settings) -> Path:
    return settings.data.resolve() / "metrics"


def begin(settings: Settings) -> None:
    """At the start of a server: the figures of workers that are gone belong to nobody."""
    shutil.rmtree(workers_folder(settings), ignore_errors=True)
    workers_folder(settings).mkdir()


def exposition(engine: Engine, settings: Settings) -> bytes:
    """Everything, in Prometheus' text format."""
    registry = CollectorRegistry()
    for metric in (requests_, streams):
        registry.register(metric)
    registry.register(_Queue(engine, settings))
    if workers_folder(settings).is_dir():
        multiprocess.MultiProcessCollector(registry, path=str(workers_folder(settings)))  # type: ignore[no-untyped-call]
    return generate_latest(registry)


class _Queue(Collector):
    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.settings = engine, settings

    def collect(self) -> Iterator[Metric]:
        with read_session(self.engine) as session:
            counts = dict(session.execute(select(JobRow.status, func.count()).group_by(col(JobRow.status))).all())
            oldest = session.scalar(select(func.min(JobRow.created_at)).where(col(JobRow.status) == "queued"))
            late = session.scalar(
                select(func.count()).where(
                    col(JobRow.status).in_(("running", "pausing", "cancelling")), col(JobRow.lease_until) < clock(session)
                )
            )
        jobs = GaugeMetricFamily("narrow_jobs", "Jobs by status.", labels=["status"])
        for status in STATUSES:
            jobs.add_metric([status], counts.get(status, 0))
        yield jobs
        waited = (now() - oldest).total_seconds() if oldest else 0.0
        yield GaugeMetricFamily("narrow_queue_oldest_seconds", "How long the job has waited that has waited longest.", waited)
        yield GaugeMetricFamily("narrow_leases_expired", "Jobs whose worker has not been heard of.", late or 0)
        free = shutil.disk_usage(self.settings.data).free
        yield GaugeMetricFamily("narrow_disk_free_bytes", "Free space where the data folder lies.", free)


def environment(settings: Settings) -> dict[str, str]:
    """For a worker: where its figures go."""
    return {**os.environ, FOLDER: str(workers_folder(settings))}
