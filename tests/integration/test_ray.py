"""Jobs on a real Ray cluster, whose nodes share with the service a database and a bucket, and nothing else."""

import hashlib
import json
import time
from contextlib import contextmanager

import cluster as ray
import objects
import postgres
import pytest
from live import QUICK, SLOW, running, spec_of

from narrow_engine.spec import JobSpec
from service.settings import Settings
from service.storage import open_storage

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    ray.needed,
    objects.needed,
    pytest.mark.skipif(postgres.BINARIES is None, reason="there is no Postgres on this machine"),
]
ONE = {"resources": {"cpus": 1, "memory": 500_000_000}}


@pytest.fixture
def shared(tmp_path):
    """Settings that the service and all nodes have."""
    bucket = objects.server().bucket(f"ray-{tmp_path.name.replace('_', '-').lower()[:40]}")
    return {**bucket, "NARROW_DATABASE_URL": postgres.database_for(tmp_path), "NARROW_LEASE_SECONDS": "6"}


@contextmanager
def cluster_of(tmp_path, shared, *nodes):
    found = ray.Cluster()
    try:
        for name in nodes:
            found.start_node(name, 1, **shared, NARROW_DATA=str(tmp_path / name), NARROW_POLL_SECONDS="0.1")
        yield found
    finally:
        found.remove()


def where(tmp_path, job_id, nodes):
    """The node on which a job runs."""
    found = [node for node in nodes if (tmp_path / node / "tenants" / "default" / "runs" / job_id / "events.jsonl").exists()]
    assert len(found) == 1
    return found[0]


def saved(storage, job_id):
    """The files that another machine would go on with."""
    key = f"runs/{job_id}/manifest.json"
    sizes = [stored.bytes for stored in storage.below(f"runs/{job_id}/") if stored.key == key]
    return json.loads(b"".join(storage.read(key, 0, sizes[0])))["files"] if sizes else {}


def test_a_job_outlives_its_node_and_the_head(tmp_path, shared, tiny_folder, python_file, monkeypatch):
    nodes = ["one", "two"]
    with cluster_of(tmp_path, shared, *nodes) as cluster, running(tmp_path / "api", **shared, **cluster.settings) as service:
        spec = spec_of(service, tiny_folder, python_file, {**QUICK, "recover": {"tokens": 120_000, "batch_tokens": 256}}, **ONE)
        job_id = service.http.post("/jobs", json=spec).json()["id"]
        service.wait(job_id, lambda j: j["phase"] == "recover" and j["progress"])
        assert not service.children("-m narrow_engine"), "the service's own machine runs no job"
        node = where(tmp_path, job_id, nodes)

        for name, value in shared.items():
            monkeypatch.setenv(name, value)
        storage = open_storage(Settings(data=tmp_path / "api"))
        deadline = time.monotonic() + 60
        while "stages/reconstruct.json" not in saved(storage, job_id):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        lost = time.monotonic()
        cluster.kill(node)
        service.wait(job_id, lambda j: j["attempt"] == 2)
        print(f"taken up again {time.monotonic() - lost:.1f} s after its node was lost")  # noqa: T201
        service.wait(job_id, lambda j: j["attempt"] == 2 and j["phase"] == "recover" and j["progress"])
        other = next(name for name in nodes if name != node)
        assert (tmp_path / other / "tenants" / "default" / "runs" / job_id).exists()

        cluster.kill_all()
        cluster.start_head()
        cluster.start_node(other, 1, **shared, NARROW_DATA=str(tmp_path / other), NARROW_POLL_SECONDS="0.1")
        done = service.wait(job_id, lambda j: j["status"] == "succeeded", seconds=300)
        assert done["attempt"] == 3

        events = service.events(job_id)
        assert [e["seq"] for e in events] == list(range(1, len(events) + 1))
        starts = [n for n, e in enumerate(events) if e["kind"] == "state" and e["data"]["status"] == "running"]
        for begin in starts[1:]:
            rest = events[begin:]
            reused = {e["phase"] for e in rest if e["kind"] == "finished" and e["data"]["reused"]}
            assert {"load", "score", "reconstruct"} <= reused, "what was finished before was fetched, not done again"
        for artifact in service.http.get(f"/jobs/{job_id}/artifacts").json()["data"]:
            content = service.http.get(f"/jobs/{job_id}/artifacts/{artifact['path']}").content
            assert hashlib.sha256(content).hexdigest() == artifact["sha256"]
        deadline = time.monotonic() + 60
        while list(storage.below("runs/")) or storage.doubted("runs/"):
            assert time.monotonic() < deadline, "what was saved goes when nobody will go on with it"
            time.sleep(0.2)


def test_jobs_wait_for_room_and_are_cancelled_paused_and_refused(tmp_path, shared, tiny_folder, python_file):
    with cluster_of(tmp_path, shared, "one") as cluster, running(tmp_path / "api", **shared, **cluster.settings) as service:
        spec = spec_of(service, tiny_folder, python_file, SLOW, **ONE)

        def submit(**changes):
            answer = service.http.post("/jobs", json={**spec, **changes})
            assert answer.status_code == 201, answer.text
            return answer.json()["id"]

        greedy = submit(resources={"gpus": 1, "cpus": 1, "memory": 10**9})
        first = submit()
        service.wait(first, lambda j: j["phase"] == "recover" and j["progress"])
        second, third = submit(seed=1), submit(seed=2)
        assert service.http.post(f"/jobs/{second}/cancel").json()["status"] == "cancelled", "while it waits for a node"
        time.sleep(2)
        assert [service.job(job_id)["status"] for job_id in (greedy, third)] == ["queued", "queued"]

        assert service.http.post(f"/jobs/{first}/pause").json()["status"] == "pausing"
        service.wait(first, lambda j: j["status"] == "paused")
        service.wait(third, lambda j: j["phase"] == "recover" and j["progress"])
        assert service.http.post(f"/jobs/{first}/resume").json()["status"] == "queued"
        asked = time.monotonic()
        assert service.http.post(f"/jobs/{third}/cancel").json()["status"] == "cancelling"
        service.wait(third, lambda j: j["status"] == "cancelled")
        took = time.monotonic() - asked
        assert took < 4, took
        again = service.wait(first, lambda j: j["status"] == "running")
        assert again["attempt"] == 1, "a pause is no failed attempt"
        service.http.post(f"/jobs/{first}/cancel")
        service.http.post(f"/jobs/{greedy}/cancel")
        service.wait(first, lambda j: j["status"] == "cancelled")


def test_a_cluster_that_cannot_start_jobs_fails_them_with_a_sentence(tmp_path, shared, tiny_folder, python_file):
    broken = {**shared, "NARROW_LEASE_SECONDS": "nonsense"}
    with cluster_of(tmp_path, broken, "one") as cluster:
        with running(tmp_path / "api", **shared, **cluster.settings) as service:
            job_id = service.http.post("/jobs", json=spec_of(service, tiny_folder, python_file, QUICK, **ONE)).json()["id"]
            deadline = time.monotonic() + 120
            while (job := service.job(job_id))["status"] != "failed":
                assert time.monotonic() < deadline, job
                time.sleep(0.2)
            assert job["error"]["code"] == "not_started"
            assert "could not start the job, 3 times" in job["error"]["message"]
        log = (tmp_path / "api.log").read_text()
        assert "lease_seconds" in log.lower(), "why is in the service's log"


def test_what_a_job_asks_for_is_checked():
    base = {"base": {"model": f"mdl_{'x' * 26}"}, "target": {"dataset": f"ds_{'x' * 26}"}, "budget": {"parameters": 0.5}}
    assert JobSpec.model_validate({**base, "resources": {"gpus": 2}}).resources.cpus is None
    for resources in ({"gpus": -1}, {"cpus": 0}, {"memory": 5}, {"tpus": 1}):
        with pytest.raises(ValueError, match="resources"):
            JobSpec.model_validate({**base, "resources": resources})
