"""Where files are kept, on a folder and on a real S3 server: the same behaviour, over HTTP too, and what happens without it."""

import hashlib
import os
import time

import httpx
import narrow_client
import objects
import postgres
import pytest
from live import QUICK, running, settings_of, spec_of

from service import janitor
from service.db.session import connect, migrate, open_session, publishing
from service.db.tables import ArtifactRow, JobRow, new_id, now
from service.settings import Settings
from service.storage import Storage, artifact_key, open_storage

needs_postgres = pytest.mark.skipif(postgres.BINARIES is None, reason="there is no Postgres on this machine")


@pytest.fixture(params=["folder", pytest.param("bucket", marks=objects.needed)])
def settings(request, tmp_path, monkeypatch) -> Settings:
    made = {}
    if request.param == "bucket":
        made = objects.server().bucket(f"b{time.time_ns()}")
        for name, value in made.items():
            monkeypatch.setenv(name, value)
    found = settings_of(tmp_path / "data").model_copy(update={"storage_url": made.get("NARROW_STORAGE_URL", "")})
    found.prepare()
    return found


@pytest.fixture
def storage(settings) -> Storage:
    return open_storage(settings)


def test_a_file_comes_back_as_it_was_whole_and_in_part(storage, tmp_path):
    body = os.urandom(3 * 2**20 + 17)
    (tmp_path / "file").write_bytes(body)
    assert not storage.has("models/mdl_a/file")
    storage.put("models/mdl_a/file", tmp_path / "file")
    assert storage.has("models/mdl_a/file")
    for start, end in ((0, len(body)), (0, 1), (2**20 - 1, 2**21 + 3), (len(body) - 1, len(body)), (5, 5)):
        assert b"".join(storage.read("models/mdl_a/file", start, end)) == body[start:end]
    with pytest.raises(FileNotFoundError):
        storage.read("models/mdl_a/other", 0, 1)
    assert [(s.key, s.bytes) for s in storage.below("models/mdl_a/")] == [("models/mdl_a/file", len(body))]
    assert list(storage.below("models/mdl/")) == [], "a prefix is a folder, not a beginning"
    storage.put("models/mdl_a/file", tmp_path / "file"), storage.delete(["models/mdl_a/file", "models/mdl_a/none"])
    assert list(storage.below("models/")) == []


def test_a_folder_is_kept_fetched_and_forgotten(storage, settings, tmp_path):
    made = settings.data / "models" / ".mdl_a"
    made.mkdir()
    for name in ("config.json", "model.safetensors"):
        (made / name).write_text(name)
    storage.keep(made, "models/mdl_a")
    assert not made.exists()
    elsewhere = open_storage(settings.model_copy(update={"data": tmp_path / "b"})) if settings.storage_url else storage
    whole = elsewhere.folder("models/mdl_a")
    assert sorted(p.name for p in whole.iterdir()) == ["config.json", "model.safetensors"]
    storage.forget("models/mdl_a")
    assert list(storage.below("models/")) == []
    assert not (settings.data / "models" / "mdl_a").exists()


def test_marks_are_seen_when_they_are_old_enough(storage):
    storage.doubt("models/mdl_a", "artifacts/ab/abc")
    assert storage.doubted("models/") == ["models/mdl_a"]
    assert storage.doubted("models/", seconds=60) == []
    storage.sure("models/mdl_a", "models/mdl_b")
    assert storage.doubted("models/") == []
    assert storage.doubted("artifacts/") == ["artifacts/ab/abc"]


def test_a_file_that_two_jobs_share_outlives_one_of_them(settings, storage, tmp_path):
    """Also when the second is just being published: its file was found, its row is not there yet."""
    migrate(settings)
    engine = connect(settings)
    file = tmp_path / "file"
    file.write_text("the same")
    sha256 = storage.put_artifact(file)
    with open_session(engine) as session, publishing(engine, settings.data) as held:
        assert storage.put_artifact(file) == sha256
        with open_session(engine) as other:
            janitor.tidy_artifacts(other, settings, storage, [sha256])  # what deleting the first does
        job = JobRow(id=new_id("job"), status="succeeded", spec={}, created_at=now())
        session.add(job)
        session.flush()
        session.add(ArtifactRow(job_id=job.id, path="a", bytes=8, sha256=sha256, media_type="text/plain"))
        held()
        session.commit()
    with open_session(engine) as session:
        janitor.tidy_artifacts(session, settings, storage, [sha256])
        assert storage.has(artifact_key(sha256))
        session.delete(session.get(JobRow, job.id))
        session.commit()
        janitor.tidy_artifacts(session, settings, storage, [sha256])
    assert not storage.has(artifact_key(sha256))


@objects.needed
@needs_postgres
@pytest.mark.slow
def test_two_machines_share_a_database_and_a_bucket(tmp_path, tiny_folder, python_file):
    """One takes requests and one works; neither sees the other's disk. The bucket goes away and comes back."""
    bucket = objects.server().bucket("two-machines")
    shared = {**bucket, "NARROW_DATABASE_URL": postgres.database_for(tmp_path / "x"), "NARROW_JANITOR_SECONDS": "1"}
    with (
        running(tmp_path / "api", workers=0, **shared) as service,
        running(tmp_path / "worker", workers=1, **shared, NARROW_STORAGE_LINKS="true") as other,
    ):
        spec = spec_of(service, tiny_folder, python_file, QUICK)
        job_id = service.http.post("/jobs", json=spec).json()["id"]
        service.wait(job_id, lambda j: j["phase"] in ("recover", "controls", "measure"))
        objects.server().stop()
        away = service.http.post("/datasets", files={"file": ("a.jsonl", python_file.read_bytes())})
        assert (away.status_code, away.json()["code"]) == (503, "storage_away"), away.text
        assert service.http.get("/readyz").json()["checks"]["storage"] != "ok"
        assert service.http.get(f"/jobs/{job_id}").json()["status"] == "running"
        time.sleep(3)
        objects.server().start()
        done = service.wait(job_id, lambda j: j["status"] == "succeeded")
        assert done["attempt"] == 1
        assert service.http.get("/readyz").status_code == 200

        listed = service.http.get(f"/jobs/{job_id}/artifacts").json()["data"]
        path = f"/jobs/{job_id}/artifacts/model/model.safetensors"
        size = next(a["bytes"] for a in listed if a["path"] == "model/model.safetensors")
        for each in (service, other):
            get = httpx.Client(base_url=each.url, timeout=60, follow_redirects=True).get
            for artifact in listed:
                body = get(f"/jobs/{job_id}/artifacts/{artifact['path']}").content
                assert hashlib.sha256(body).hexdigest() == artifact["sha256"], artifact
            body = get(path).content
            for wanted, part in (
                ("5-20", body[5:21]),
                (f"{size - 3}-", body[-3:]),
                ("-7", body[-7:]),
                (f"9-{size * 2}", body[9:]),
            ):
                answer = get(path, headers={"Range": f"bytes={wanted}"})
                assert (answer.status_code, answer.content) == (206, part), wanted
            assert get(path, headers={"Range": f"bytes={size}-"}).status_code == 416
        answer = service.http.get(path, headers={"Range": "bytes=0-4", "If-Range": '"another"'})
        assert (answer.status_code, len(answer.content)) == (200, size)
        head = service.http.head(path)
        assert (head.status_code, head.headers["content-length"], head.content) == (200, str(size), b"")
        assert service.http.get(path, headers={"Range": "bytes=x"}).status_code == 200
        assert other.http.get(path).status_code == 307
        page = service.http.get(f"/jobs/{job_id}/report", headers={"accept": "text/html"})
        assert page.text.startswith("<!doctype html>")

        for each, name in ((service, "streamed"), (other, "linked")):
            with narrow_client.Narrow(each.url) as client:
                half = tmp_path / name / "model" / "model.safetensors.part"
                half.parent.mkdir(parents=True)
                half.write_bytes(body[: size // 2])
                client.jobs.download(job_id, tmp_path / name)
                assert (tmp_path / name / "model" / "model.safetensors").read_bytes() == body

        model = done["result_model"]
        again = service.http.post("/jobs", json={**spec, "base": {"model": model}, "budget": {"parameters": 0.9}}).json()["id"]
        service.wait(again, lambda j: j["status"] == "succeeded")

        storage = open_storage_of(tmp_path / "look", bucket)
        for job in (job_id, again):
            assert service.http.delete(f"/jobs/{job}").status_code == 204
        for row in service.http.get("/models").json()["data"]:
            assert service.http.delete(f"/models/{row['id']}").status_code == 204
        assert service.http.delete(f"/datasets/{spec['target']['dataset']}").status_code == 204
        deadline = time.monotonic() + 60
        while (left := [s.key for s in storage.below("")]) and time.monotonic() < deadline:
            time.sleep(0.2)  # the worker may still be at what it saved of the second job
        assert left == []
        while list((tmp_path / "worker" / "models").iterdir()) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not list((tmp_path / "worker" / "models").iterdir()), "what was fetched goes when its row is gone"


def open_storage_of(data, bucket) -> Storage:
    os.environ.update(bucket)
    try:
        settings = Settings(data=data)
        settings.prepare()
        return open_storage(settings)
    finally:
        for name in bucket:
            del os.environ[name]
