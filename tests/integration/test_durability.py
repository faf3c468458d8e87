"""kill -9 of worker, job process and server at bad moments, and a drain: nothing is lost and nothing runs twice."""

import os
import signal
import subprocess
import time

import psutil
import pytest
from live import QUICK, SLOW, running, spec_of

WORKERS, JOBS = "service.worker", "-m narrow_engine"


def numbered(service, job_id):
    events = service.events(job_id)
    assert [e["seq"] for e in events] == list(range(1, len(events) + 1))
    return events


def test_a_killed_worker_and_then_a_killed_server(tmp_path, tiny_folder, python_file):
    data = tmp_path / "data"
    with running(data) as service:
        method = {**QUICK, "recover": {"tokens": 40_000, "batch_tokens": 256}}
        job_id = service.http.post("/jobs", json=spec_of(service, tiny_folder, python_file, method)).json()["id"]
        service.wait(job_id, lambda j: j["phase"] == "recover")
        engine = service.children(JOBS)[0]
        service.children(WORKERS)[0].kill()
        engine.wait(5)  # it goes down with its worker
        service.wait(job_id, lambda j: j["attempt"] == 2 and j["status"] == "running")

        service.wait(job_id, lambda j: j["phase"] == "recover" and j["progress"])
        family = [service.process.pid, *(c.pid for c in service.children(""))]
        service.process.kill()
        service.process.wait()
        deadline = time.monotonic() + 5
        while not all(gone(pid) for pid in family) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert all(gone(pid) for pid in family), "nothing outlives the server"
    with running(data) as service:
        job = service.wait(job_id, lambda j: j["status"] == "succeeded")
        assert job["attempt"] == 3
        events = numbered(service, job_id)
        reused = [e["phase"] for e in events if e["kind"] == "finished" and e["data"]["reused"]]
        assert {"load", "score", "reconstruct"} <= set(reused), "finished stages were not run again"
        # The killed job process is another matter than the job: a new one goes on.
        second = service.http.post(
            "/jobs", json={**job["spec"], "seed": 1, "method": {**job["spec"]["method"], "recover": {"tokens": 0}}}
        )
        second = second.json()["id"]
        service.wait(second, lambda j: j["phase"] in ("score", "plan", "slice", "reconstruct", "recover", "measure", "export"))
        service.children(JOBS)[0].kill()
        assert service.wait(second, lambda j: j["status"] == "succeeded")["attempt"] == 2
        numbered(service, second)


def gone(pid):
    """Whether a process has ended, reaped or not."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_sigterm_drains_a_stream_ends_and_the_job_goes_on_later(tmp_path, tiny_folder, python_file):
    data = tmp_path / "data"
    with running(data) as service:
        job_id = service.http.post("/jobs", json=spec_of(service, tiny_folder, python_file, SLOW)).json()["id"]
        service.wait(job_id, lambda j: j["phase"] == "recover" and j["progress"])
        headers = {"accept": "text/event-stream"}
        with service.http.stream("GET", f"/jobs/{job_id}/events", headers=headers) as response:
            lines = response.iter_lines()
            next(lines)
            asked = time.monotonic()
            service.process.send_signal(signal.SIGTERM)
            list(lines)  # ends cleanly: a torn stream would raise
        service.process.wait(30)
        assert time.monotonic() - asked < 15
        assert service.process.returncode == 0
    with running(data, workers=0) as service:
        job = service.job(job_id)
        assert (job["status"], job["attempt"]) == ("queued", 0), "a drain is no failed attempt"


def test_a_job_whose_process_always_dies_is_failed_with_a_sentence(tmp_path, tiny_folder, python_file):
    with running(tmp_path / "data", NARROW_MAX_ATTEMPTS="2") as service:
        job_id = service.http.post("/jobs", json=spec_of(service, tiny_folder, python_file, SLOW)).json()["id"]
        for attempt in (1, 2):
            service.wait(job_id, lambda j, attempt=attempt: j["attempt"] == attempt and j["status"] == "running")
            deadline = time.monotonic() + 20
            while not (found := service.children(JOBS)) and time.monotonic() < deadline:
                time.sleep(0.02)
            found[0].kill()
        deadline = time.monotonic() + 30
        while (job := service.job(job_id))["status"] != "failed" and time.monotonic() < deadline:
            time.sleep(0.1)
        assert job["error"]["code"] == "process_killed"
        assert "memory" in job["error"]["message"]
        assert service.http.get("/readyz").status_code == 200


def test_a_nearly_full_disk_is_told_before_it_is_full(tmp_path, python_file):
    with running(tmp_path / "data", workers=0, NARROW_MIN_FREE_BYTES=str(10**17)) as service:
        answer = service.http.post("/datasets", files={"file": ("a.jsonl", python_file.read_bytes())})
        assert (answer.status_code, answer.json()["code"]) == (507, "disk_full")
        assert service.http.get("/readyz").status_code == 503


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_full_disk_refuses_an_upload_and_keeps_what_was_there(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("this machine cannot mount")
    try:
        with running(disk / "data", workers=0, NARROW_MIN_FREE_BYTES="0", NARROW_MAX_DATASET_BYTES="100000000") as service:
            row = b'{"text": "' + b"word " * 200 + b'"}\n'
            kept = service.http.post("/datasets", files={"file": ("small.jsonl", row * 10)}).json()["id"]
            answer = service.http.post("/datasets", files={"file": ("large.jsonl", row * 20_000)})
            assert (answer.status_code, answer.json()["code"]) == (507, "disk_full"), answer.text
            assert service.http.get(f"/datasets/{kept}").status_code == 200
            assert service.http.post("/datasets", files={"file": ("again.jsonl", row * 10)}).status_code == 201
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_two_workers_share_a_queue_and_no_job_runs_twice(tmp_path, tiny_folder, python_file):
    with running(tmp_path / "data", workers=2) as service:
        spec = spec_of(service, tiny_folder, python_file, {**QUICK, "recover": {"tokens": 0}})
        ids = [service.http.post("/jobs", json={**spec, "seed": seed}).json()["id"] for seed in range(6)]
        for job_id in ids:
            job = service.wait(job_id, lambda j: j["status"] == "succeeded")
            assert job["attempt"] == 1
            started = [e["phase"] for e in numbered(service, job_id) if e["kind"] == "started"]
            assert len(started) == len(set(started)) == 11
