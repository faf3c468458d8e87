"""OpenTelemetry traces: of requests, and of jobs as what the request that made them led to.

    POST /jobs                              (FastAPI's own)
    ├─ job                                  one for each time that a worker had it
    │  └─ load, score, ... report           the stages of its process, from its events
    └─ queued                               until a worker first took it

They are sent where OTEL_EXPORTER_OTLP_ENDPOINT says, by OpenTelemetry's SDK, which is the extra `otel`; all its variables count.
A job process does not know of any of this: it may run anywhere, and tells its worker what happened and when.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, StatusCode

from narrow_engine.events import Event
from service.db.tables import JobRow, now

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

log = logging.getLogger("narrow.traces")
_tracer = trace.get_tracer("narrow")


def configure(name: str) -> None:
    """Has this process send its traces, if it is told where to."""
    if not any(os.environ.get(endpoint) for endpoint in ENDPOINTS):
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        log.warning("traces are asked for and not sent: they take the extra otel: pip install 'narrow[otel]'")
        return
    provider = TracerProvider(resource=Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", name)}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)


def here() -> str | None:
    """The span that this is done for, as W3C's traceparent."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier.get("traceparent")


@contextmanager
def of_job(job: JobRow) -> Iterator[Span]:
    """The span of a start of a job, in the trace of the request that made it."""
    parent = propagate.extract({"traceparent": job.trace}) if job.trace else Context()
    about: dict[str, str | int] = {"narrow.job": job.id, "narrow.tenant": job.tenant, "narrow.attempt": job.attempt}
    if job.attempt == 1:
        _tracer.start_span("queued", parent, attributes=about, start_time=_ns(job.created_at)).end(_ns(now()))
    with _tracer.start_as_current_span("job", parent, attributes=about) as span:
        yield span


def ended(span: Span, outcome: str, error: dict[str, Any] | None) -> None:
    """How a start of a job ended."""
    span.set_attribute("narrow.outcome", outcome)
    if error:
        span.set_attribute("error.type", error["code"])
        span.set_status(StatusCode.ERROR, error["message"])


def of_stage(span: Span, started: Event, finished: Event) -> None:
    """The span of a stage of the job that `span` is of."""
    context = trace.set_span_in_context(span)
    _tracer.start_span(finished.phase, context, start_time=_ns(started.time)).end(_ns(finished.time))


def _ns(moment: datetime) -> int:
    return int(moment.timestamp() * 1e9)
