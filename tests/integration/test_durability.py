"""kill -9 of worker, job process and server at bad moments, and a drain: nothing is lost and nothing runs twice."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from datetime import timedelta

import psutil
import pytest
from live import POSTGRES, QUICK, SLOW, running, settings_of, spec_of
from sqlalchemy import text

from narrow_engine.pipeline import LINE
from service import janitor, queue
from service.db import session as clocks
from service.db.session import connect, open_session, publishing
from service.db.tables import ArtifactRow, JobRow, ModelRow, new_id, now
from service.storage import artifact_key, open_storage

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


@pytest.mark.slow
def test_a_paused_job_frees_its_worker_and_goes_on_where_it_was(tmp_path, tiny_folder, python_file):
    with running(tmp_path / "data") as service:
        spec = spec_of(service, tiny_folder, python_file, SLOW)
        first, second = (service.http.post("/jobs", json={**spec, "seed": seed}).json()["id"] for seed in (0, 1))
        assert service.http.post(f"/jobs/{second}/pause").json()["status"] == "paused"
        assert service.http.post(f"/jobs/{second}/pause").json()["status"] == "paused"
        service.wait(first, lambda j: j["phase"] == "recover" and j["progress"] and j["progress"]["done"])
        assert service.http.post(f"/jobs/{first}/pause").json()["status"] == "pausing"
        service.wait(first, lambda j: j["status"] == "paused")
        assert not service.children(JOBS)
        done = service.job(first)["progress"]["done"]
        assert service.http.post(f"/jobs/{second}/resume").json()["status"] == "queued"
        service.wait(second, lambda j: j["status"] == "running")
        assert service.http.post(f"/jobs/{first}/resume").json()["status"] == "queued"
        assert service.http.post(f"/jobs/{second}/pause").json()["status"] == "pausing"
        job = service.wait(first, lambda j: j["progress"] and j["progress"]["done"] > done)
        assert job["attempt"] == 1, "a pause is no failed attempt"
        again = [e["data"]["done"] for e in numbered(service, first) if e["kind"] == "progress" and e["phase"] == "recover"]
        assert again == sorted(again), "and costs no work"
        reused = [e["phase"] for e in numbered(service, first) if e["kind"] == "finished" and e["data"]["reused"]]
        assert {"load", "score", "reconstruct"} <= set(reused)
        for job_id in (first, second):
            service.http.post(f"/jobs/{job_id}/cancel")
            service.wait(job_id, lambda j: j["status"] == "cancelled")
            for verb, words in (("pause", "nothing to pause"), ("resume", "nothing to resume")):
                answer = service.http.post(f"/jobs/{job_id}/{verb}")
                assert (answer.status_code, words in answer.json()["detail"]) == (409, True)


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


@pytest.mark.skipif(POSTGRES, reason="its files are on another disk")
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
            engine, _ = database(disk / "data")
            with open_session(engine) as session:
                job_id = ended_job(session, "queued", finished_at=None)
                session.commit()
            with (disk / "rest").open("wb", buffering=0) as rest, suppress(OSError):
                while True:
                    rest.write(bytes(4096))
            for answer in (service.http.post(f"/jobs/{job_id}/cancel"), service.http.delete(f"/datasets/{kept}")):
                assert (answer.status_code, answer.json()["code"]) == (507, "disk_full"), answer.text
            assert service.http.get("/readyz").status_code == 503
            (disk / "rest").unlink()
            assert service.http.delete(f"/datasets/{kept}").status_code == 204
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def database(data):
    """Engine and settings of a service's folder, from outside."""
    settings = settings_of(data)
    return connect(settings), settings


def ended_job(session, status="succeeded", **changes):
    spec = {"base": {"model": "mdl_x"}, "target": {"dataset": "ds_x"}, "skills": []}
    job = JobRow(**{"id": new_id("job"), "status": status, "spec": spec, "created_at": now(), "finished_at": now(), **changes})
    session.add(job)
    session.flush()
    return job.id


@contextmanager
def locked(data):
    """Somebody who lets nobody else write."""
    engine, _ = database(data)
    with engine.connect() as other:
        if POSTGRES:
            other.execute(text("LOCK TABLE job IN EXCLUSIVE MODE"))
        else:
            other.execute(text("SELECT 1"))  # which begins with BEGIN IMMEDIATE
        yield


def test_a_slow_download_and_a_held_lock_keep_no_reader_waiting(tmp_path, python_file):
    with running(tmp_path / "data", workers=0) as service:
        large = tmp_path / "large"
        with large.open("wb") as file:
            file.truncate(64 * 2**20)
        engine, settings = database(tmp_path / "data")
        storage = open_storage(settings)
        sha256 = storage.put_artifact(large)
        with open_session(engine) as session:
            job_id = ended_job(session)
            row = ArtifactRow(job_id=job_id, path="large", bytes=64 * 2**20, sha256=sha256, media_type="text/plain")
            session.add(row)
            session.commit()
        host, port = service.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as slow:
            slow.sendall(f"GET /jobs/{job_id}/artifacts/large HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert slow.recv(300).startswith(b"HTTP/1.1 200")
            asked = time.monotonic()
            with locked(settings.data):
                assert service.http.get(f"/jobs/{job_id}/artifacts").status_code == 200
            service.upload_dataset(python_file)
            assert service.http.delete(f"/jobs/{job_id}").status_code == 204
            assert time.monotonic() - asked < 5
        assert not storage.has(artifact_key(sha256))


def test_clients_that_fall_silent_are_let_go_and_keep_nobody_waiting(tmp_path, python_file):
    with running(tmp_path / "data", workers=0, NARROW_SILENCE_SECONDS="1") as service:
        host, port = service.url.removeprefix("http://").split(":")
        body = b'{"base": {"model": "mdl_'
        head = f"POST /jobs HTTP/1.1\r\nHost: [::1]\r\nContent-Type: application/json\r\nContent-Length: {2 * len(body)}\r\n\r\n"
        silent = [socket.create_connection((host, int(port)), timeout=20) for _ in range(60)]
        asked = time.monotonic()
        for connection in silent:
            connection.sendall(head.encode() + body)
        assert service.http.get("/jobs").status_code == 200
        for connection in silent:
            with connection, connection.makefile("rb") as answer:
                told = answer.read()  # until the server closes it
            assert told.startswith(b"HTTP/1.1 408"), told[:200]
            assert b"Nothing of the body came for 1 s" in told
        assert time.monotonic() - asked < 15

        headers = {"Tus-Resumable": "1.0.0", "Upload-Length": "20", "Upload-Metadata": "filename YS5qc29ubA=="}
        place = service.http.post("/uploads", headers=headers).headers["location"].removeprefix(service.url)
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            lines = ("Host: [::1]", "Tus-Resumable: 1.0.0", "Upload-Offset: 0", "Content-Type: application/offset+octet-stream")
            head = "\r\n".join([f"PATCH {place} HTTP/1.1", *lines, "Content-Length: 20", "", ""])
            connection.sendall(head.encode() + b"0123456")
            assert connection.recv(100).startswith(b"HTTP/1.1 204")
        assert service.http.head(place, headers={"Tus-Resumable": "1.0.0"}).headers["upload-offset"] == "7", "what came is kept"

        engine, _ = database(tmp_path / "data")
        with open_session(engine) as session:
            job_id = ended_job(session, "running", lease_token="x", finished_at=None)
            session.commit()
        with service.http.stream("GET", f"/jobs/{job_id}/events", headers={"accept": "text/event-stream"}) as stream:
            lines = stream.iter_lines()
            next(lines)
            time.sleep(2.5)  # it has nothing to say, and is no body
            with open_session(engine) as session:
                queue.finish(session, job_id, "x", "succeeded", None, [])
            assert "event: end" in list(lines)


def test_many_readers_at_once_do_not_starve_each_other(tmp_path):
    import concurrent.futures
    import urllib.request

    with running(tmp_path / "data", workers=0) as service, concurrent.futures.ThreadPoolExecutor(120) as pool:
        asked = time.monotonic()
        # A connection for each: so many threads on one pool of connections is a test of the pool.
        answers = pool.map(lambda _: urllib.request.urlopen(f"{service.url}/models", timeout=40).status, range(360))
        assert set(answers) == {200}
        assert time.monotonic() - asked < 25


@pytest.mark.slow
def test_a_worker_outlives_a_database_that_is_locked(tmp_path, tiny_folder, python_file):
    """The lock is held for longer than the lease: the job goes on, and no attempt is lost."""
    with running(tmp_path / "data") as service:
        method = {**QUICK, "recover": {"tokens": 20_000, "batch_tokens": 256}}
        job_id = service.http.post("/jobs", json=spec_of(service, tiny_folder, python_file, method)).json()["id"]
        service.wait(job_id, lambda j: j["phase"] == "recover")
        worker = service.children(WORKERS)[0].pid
        with locked(tmp_path / "data"):
            busy = service.http.post(f"/jobs/{job_id}/cancel")
            assert (busy.status_code, busy.json()["code"]) == (503, "database_busy")
            time.sleep(4)
        assert service.wait(job_id, lambda j: j["status"] == "succeeded")["attempt"] == 1
        assert [w.pid for w in service.children(WORKERS)] == [worker]
        numbered(service, job_id)


def test_a_job_that_cannot_be_told_to_the_engine_fails_and_the_worker_lives(tmp_path, tiny_folder, python_file):
    with running(tmp_path / "data") as service:
        spec = spec_of(service, tiny_folder, python_file, QUICK)
        worker = service.children(WORKERS)[0].pid
        with database(tmp_path / "data")[0].begin() as other:
            other.execute(text("UPDATE dataset SET name = 'm²'"))
        job_id = service.http.post("/jobs", json=spec).json()["id"]
        deadline = time.monotonic() + 30
        while (job := service.job(job_id))["status"] != "failed" and time.monotonic() < deadline:
            time.sleep(0.1)
        assert (job["error"]["code"], job["attempt"]) == ("bad_spec", 1)
        assert "target_name" in job["error"]["message"]
        assert [w.pid for w in service.children(WORKERS)] == [worker]
        assert not list((tmp_path / "data").glob("tenants/*/runs/*"))


@pytest.mark.slow
def test_sigterm_drains_also_a_worker_that_replaced_a_killed_one(tmp_path, tiny_folder, python_file):
    data = tmp_path / "data"
    with running(data) as service:
        first = service.children(WORKERS)[0]
        first.kill()
        deadline = time.monotonic() + 20
        while not [w for w in service.children(WORKERS) if w.pid != first.pid] and time.monotonic() < deadline:
            time.sleep(0.05)
        job_id = service.http.post("/jobs", json=spec_of(service, tiny_folder, python_file, SLOW)).json()["id"]
        service.wait(job_id, lambda j: j["phase"] == "recover" and j["progress"])
        assert service.stop() == 0
    log = (tmp_path / "data.log").read_text()
    assert log.count("draining") == 1
    with running(data, workers=0) as service:
        job = service.job(job_id)
        assert (job["status"], job["attempt"]) == ("queued", 0), "a drain is no failed attempt"
        assert (data / "tenants" / "default" / "runs" / job_id).is_dir()
        assert service.http.post(f"/jobs/{job_id}/cancel").json()["status"] == "cancelled"
        assert not (data / "tenants" / "default" / "runs" / job_id).exists()


@pytest.fixture
def idle(tmp_path):
    """A database with its folders and nobody at work."""
    from service.db.session import migrate

    settings = settings_of(tmp_path / "data")
    settings.prepare()
    migrate(settings)
    return connect(settings), settings


def test_the_janitor_removes_what_was_left_and_nothing_else(idle):
    engine, settings = idle
    storage = open_storage(settings)
    with open_session(engine) as session:
        kept = ended_job(session, "queued", finished_at=None)
        expired = {"attempt": 3, "lease_token": "x", "lease_until": now(), "finished_at": None}
        gone = [
            ended_job(session, "failed"),
            ended_job(session, "running", **expired),
            ended_job(session, "cancelling", **expired),
        ]
        paused = ended_job(session, "pausing", **expired)
        session.add(ModelRow(id="mdl_known", name="x", info={}, created_at=now()))
        session.commit()
        for _ in range(4):
            queue.claim(session, 1, 3)
    for name in (kept, paused, *gone):
        (settings.tenants / "default" / "runs" / name).mkdir(parents=True)
    models = settings.data / "models"
    for name in ("mdl_known", "mdl_lost", "mdl_unmarked", ".mdl_upload"):
        (models / name).mkdir()
    for name in ("mdl_known", "mdl_lost"):
        storage.doubt(f"models/{name}")
    (settings.data / "any").write_text("any")
    sha256 = storage.put_artifact(settings.data / "any")
    (storage.file(artifact_key(sha256)).parent / ".tmp-torn").touch()
    with publishing(engine, settings.data):
        janitor.tidy(engine, settings, storage)
        assert storage.has(artifact_key(sha256)), "somebody publishes"
    assert sorted(f.name for f in (settings.tenants / "default" / "runs").iterdir()) == sorted([kept, paused])
    assert (models / ".mdl_upload").exists(), "an upload that may be running"
    assert (models / "mdl_lost").exists(), "an upload that may be running"
    janitor.tidy(engine, settings, storage, stale_seconds=0)
    assert sorted(f.name for f in models.iterdir()) == ["mdl_known", "mdl_unmarked"]
    assert [p for p in (settings.data / "artifacts").rglob("*") if p.is_file() and p.name != ".lock"] == []
    assert storage.doubted("") == []


@pytest.mark.parametrize(
    ("arguments", "settings", "code", "words"),
    [
        (["--port", "{taken}"], {}, 1, "is taken: choose another with --port"),
        (["--host", "no.such.host.invalid"], {}, 1, "has no address 'no.such.host.invalid'"),
        (["--port", "70000"], {}, 2, "--port"),
        (["--data", "/proc/nothing/data"], {}, 1, "cannot be written"),
        (["--port", "0"], {"NARROW_LEASE_SECONDS": "abc"}, 2, "NARROW_LEASE_SECONDS='abc' should be a number"),
        (["--port", "0"], {"NARROW_DATABASE_URL": "nonsense://"}, 1, "NARROW_DATABASE_URL"),
    ],
)
def test_a_service_that_cannot_start_says_why(tmp_path, arguments, settings, code, words):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        arguments = [a.format(taken=taken.getsockname()[1]) for a in arguments]
        found = subprocess.run(
            [sys.executable, "-m", "narrow_client.cli", "serve", *arguments],
            env={**os.environ, "NARROW_DATA": str(tmp_path / "data"), **settings},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert found.returncode == code, found.stderr
    assert words in found.stderr
    assert "Traceback" not in found.stderr
    assert found.stdout == ""


@pytest.mark.slow
def test_two_workers_share_a_queue_and_no_job_runs_twice(tmp_path, tiny_folder, python_file):
    with running(tmp_path / "data", workers=2) as service:
        spec = spec_of(service, tiny_folder, python_file, {**QUICK, "recover": {"tokens": 0}})
        ids = [service.http.post("/jobs", json={**spec, "seed": seed}).json()["id"] for seed in range(6)]
        for job_id in ids:
            job = service.wait(job_id, lambda j: j["status"] == "succeeded")
            assert job["attempt"] == 1
            started = [e["phase"] for e in numbered(service, job_id) if e["kind"] == "started"]
            assert len(started) == len(set(started))
            assert set(started) == {stage.name for stage in LINE} - {
                "sparsify",
                "correct",
                "teach",
                "answer",
                "locality",
                "relearn",
            }


@pytest.mark.parametrize("hours", [1, -1])
def test_a_worker_whose_clock_is_wrong_takes_nobody_elses_job(idle, monkeypatch, hours):
    """On Postgres leases go by its clock. On SQLite there is one clock, and a jump of it costs a start from the checkpoint."""
    engine, _ = idle
    with open_session(engine) as session:
        ended_job(session, "queued", finished_at=None)
        session.commit()
        job = queue.claim(session, 20, 3)
        held, token = job.id, job.lease_token

        def beat():
            return queue.heartbeat(session, held, token, 20)

        for module in (queue, clocks):
            monkeypatch.setattr(module, "now", lambda: now() + timedelta(hours=hours))
        taken = queue.claim(session, 20, 3)
        if POSTGRES:
            assert taken is None
            assert beat() == "running"
            assert queue.claim(session, 20, 3) is None
        else:
            assert (taken.id, taken.attempt) == (held, 2), "also where the clock was set back: no job waits for it to catch up"
            with pytest.raises(queue.LeaseLost):
                beat()
            assert queue.heartbeat(session, taken.id, taken.lease_token, 20) == "running"
            assert queue.claim(session, 20, 3) is None
            queue.release(session, taken.id, taken.lease_token, counts=False)
            session.expire_all()
            assert 0 <= session.get_one(JobRow, held).seconds < 60, "what the clock jumped over is nobody's use"
