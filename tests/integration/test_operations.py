"""What who runs the service sees of it: figures, the log, and who changed what."""

import json
import time
from pathlib import Path

import pytest
from live import QUICK, running, spec_of
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
