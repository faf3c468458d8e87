"""What who runs the service sees of it: figures, the log, and who changed what."""

import gzip
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from live import QUICK, running, spec_of
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families
from test_quotas import JOB, house, spec  # noqa: F401

from service import auth
from service.db.session import open_session


def figures(text: str) -> dict[tuple, float]:
    """Samples by name and labels."""
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {(sample.name, *sorted(sample.labels.items())): sample.value for sample in samples}


def metrics_of(service) -> str:
    answer = service.http.get("/metrics")
    assert answer.status_code == 200
    return answer.text


def key(engine, tenant: str, role: str) -> dict[str, str]:
    with open_session(engine) as session:
        secret = auth.create_key(session, role, role, tenant)[1]
        session.commit()
    return {"Authorization": f"Bearer {secret}"}


def test_a_change_and_the_line_that_tells_of_it_are_one(house):  # noqa: F811
    admin = key(house.engine, "ours", "admin")
    made = house("POST", "/jobs", json=spec(**JOB))
    job_id = made.json()["id"]
    assert house("POST", f"/jobs/{job_id}/pause").status_code == 200
    assert house("POST", "/jobs", json=spec(**JOB, seed=-1)).status_code == 422
    assert house("DELETE", f"/jobs/{job_id}").status_code == 409
    assert house("POST", "/plans", json=spec(**JOB)).status_code == 200
    assert house("POST", f"/jobs/{job_id}/cancel").status_code == 200
    sweep = house("POST", "/sweeps", json=spec(methods={"d": JOB["method"]}, budgets=[{"parameters": 0.9}, {"parameters": 0.8}]))
    assert house("DELETE", f"/jobs/{job_id}").status_code == 204
    another = house("POST", "/keys", headers=admin, json={"name": "x"})
    lines = house("GET", "/audit", headers=admin).json()["data"]
    assert [(line["operation"], line["path"], line["made"]) for line in lines] == [
        ("create_key", "/keys", another.json()["id"]),
        ("delete_job", f"/jobs/{job_id}", None),
        ("create_sweep", "/sweeps", sweep.json()["id"]),
        ("cancel_job", f"/jobs/{job_id}/cancel", None),
        ("pause_job", f"/jobs/{job_id}/pause", None),
        ("create_job", "/jobs", job_id),
    ]
    assert lines[-1]["request_id"] == made.headers["x-request-id"]
    assert lines[-1]["key"].startswith("key_")
    assert lines[0]["key"] != lines[1]["key"]
    assert "nrw_" not in json.dumps(lines)
    assert house("GET", "/audit").status_code == 403
    assert house("GET", "/audit", headers=key(house.engine, "theirs", "admin")).json()["data"] == []


def test_metrics_are_for_who_runs_the_service(house):  # noqa: F811
    assert house("GET", "/metrics").status_code == 403
    assert house("GET", "/metrics", headers=key(house.engine, "ours", "admin")).status_code == 403
    assert house("GET", "/metrics", headers=key(house.engine, "default", "write")).status_code == 403
    house("POST", "/jobs", json=spec(**JOB))
    house("BREW", "/coffee")
    answer = house("GET", "/metrics", headers=key(house.engine, "default", "admin"))
    found = figures(answer.text)
    assert answer.headers["content-type"].startswith("text/plain")
    assert found["narrow_jobs", ("status", "queued")] == 1
    assert found["narrow_queue_oldest_seconds",] >= 0
    assert found["narrow_request_seconds_count", ("method", "other"), ("operation", "none"), ("status", "404")] == 1
    assert found["narrow_request_seconds_count", ("method", "POST"), ("operation", "create_job"), ("status", "201")] >= 1


def test_figures_and_log_of_a_job_that_ran_in_processes_of_its_own(tmp_path, tiny_folder, python_file):
    with running(tmp_path / "data", NARROW_LOG="json") as service:
        secret = {"Authorization": "Bearer nrw_secret-secret-secret"}
        assert service.http.get("/jobs?token=hidden-in-a-query", headers=secret).status_code == 401
        answer = service.http.post("/jobs", json=spec_of(service, tiny_folder, python_file, QUICK))
        job = service.wait(answer.json()["id"], lambda j: j["status"] == "succeeded")
        deadline = time.monotonic() + 10
        while ("narrow_job_seconds_count", ("outcome", "succeeded")) not in (found := figures(metrics_of(service))):
            assert time.monotonic() < deadline, found
            time.sleep(0.1)
    assert found["narrow_jobs", ("status", "succeeded")] == 1
    assert found["narrow_claims_total", ("attempt", "first")] == 1
    assert found["narrow_job_wait_seconds_count",] == 1
    assert found["narrow_job_seconds_count", ("outcome", "succeeded")] == 1
    assert found["narrow_job_seconds_sum", ("outcome", "succeeded")] == pytest.approx(job["seconds"], abs=10)
    for stage in ("load", "score", "recover", "report"):
        assert found["narrow_stage_seconds_count", ("stage", stage)] == 1
    assert found["narrow_disk_free_bytes",] > 0

    text, request_id = Path(service.log.name).read_text(), answer.headers["x-request-id"]
    lines = [json.loads(line) for line in text.splitlines()]
    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
    created = next(line for line in lines if line.get("request") == request_id)
    assert (created["message"], created["path"], created["status"]) == ("POST create_job", "/jobs", 201)
    assert created["ms"] > 0
    of_job = [line["message"] for line in lines if line.get("job") == job["id"]]
    assert (of_job[0], of_job[-1]) == ("claimed", "let go")
    assert "secret" not in text
    assert "hidden" not in text


class Collector(ThreadingHTTPServer):
    """What receives OTLP over HTTP, and keeps the spans."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, object]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    name = next(a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
                    outer.spans += [(name, span) for scope in resource.scope_spans for span in scope.spans]
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


@pytest.mark.slow
def test_a_job_is_one_trace_from_the_request_to_the_stages_of_its_process(tmp_path, tiny_folder, python_file):
    collector = Collector()
    settings = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }
    with running(tmp_path / "data", **settings) as service:
        spec = spec_of(service, tiny_folder, python_file, QUICK)
        trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"  # pragma: allowlist secret
        job_id = service.http.post("/jobs", json=spec, headers={"traceparent": f"00-{trace}-{parent}-01"}).json()["id"]
        service.wait(job_id, lambda j: j["status"] == "succeeded")
        events = service.events(job_id)
    mine = [(name, span) for name, span in collector.spans if span.trace_id.hex() == trace]
    by_name = {span.name: (name, span) for name, span in mine}
    request = next(span for name, span in mine if name == "narrow-api")
    assert (request.name, request.parent_span_id.hex()) == ("POST /jobs", parent)
    name, job = by_name["job"]
    assert (name, job.parent_span_id) == ("narrow-worker", request.span_id)
    assert {a.key: a.value.string_value or a.value.int_value for a in job.attributes} == {
        "narrow.job": job_id,
        "narrow.tenant": "default",
        "narrow.attempt": 1,
        "narrow.outcome": "succeeded",
    }
    assert by_name["queued"][1].parent_span_id == request.span_id
    ran = [e["phase"] for e in events if e["kind"] == "finished" and not e["data"]["reused"]]
    stages = [span for _, span in mine if span.parent_span_id == job.span_id]
    assert [span.name for span in sorted(stages, key=lambda span: span.start_time_unix_nano)] == ran
    for span in stages:
        assert job.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano <= job.end_time_unix_nano
