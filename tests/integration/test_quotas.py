"""What a tenant may use: jobs, bytes, hours, requests; and whose job goes first."""

import json
import subprocess
import sys
import time
from datetime import timedelta

import narrow_client
import pytest
from fastapi.testclient import TestClient
from live import settings_of
from sqlmodel import select
from test_tenants import INFO, SPEC, SWEEP

from service import auth, queue, quotas
from service.app import create_app
from service.db.session import connect, migrate, open_session, tenant_session
from service.db.tables import ArtifactRow, DatasetRow, JobRow, ModelRow, TenantRow, new_id, now
from service.quotas import RateLimiter

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 1024,
}


@pytest.fixture
def house(tmp_path, request):
    """A service in this process with two tenants, each with a model and a dataset that jobs can be made of."""
    settings = settings_of(tmp_path / "data").model_copy(update=getattr(request, "param", {}))
    settings.prepare()
    migrate(settings)
    engine = connect(settings)
    keys = {}
    for tenant in ("ours", "theirs"):
        with open_session(engine) as session:
            keys[tenant] = auth.create_key(session, "key", "write", tenant)[1]
            session.commit()
        with tenant_session(engine, tenant) as session:
            name = SPEC["base"]["model"][:-6] + tenant.rjust(6, "0")
            info = {**INFO, "config": CONFIG, "dtype": "F32", "bytes": 100, "parameters": 50_000}
            session.add(ModelRow(id=name, name="m", info=info, stored=100, created_at=now()))
            data = {"file": "d.jsonl", "text_column": "text", "documents": 900, "sha256": "0", "preview": []}
            session.add(DatasetRow(id=name.replace("mdl", "ds"), name="d", bytes=90_000, stored=50, created_at=now(), **data))
            session.commit()
    app = create_app(settings, keys_needed=True)
    client = TestClient(app, raise_server_exceptions=False)

    def ask(method, path, tenant="ours", **arguments):
        headers = {"Authorization": f"Bearer {keys[tenant]}", **arguments.pop("headers", {})}
        return client.request(method, path, headers=headers, **arguments)

    ask.engine, ask.settings, ask.app = engine, settings, app
    return ask


def spec(tenant="ours", **changes):
    name = SPEC["base"]["model"][:-6] + tenant.rjust(6, "0")
    return {"base": {"model": name}, "target": {"dataset": name.replace("mdl", "ds")}, **changes}


JOB = {"budget": {"parameters": 0.9}, "method": {"units": ["neuron"]}}


def refused(answer, status, code, words=""):
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert words in answer.json()["detail"]


@pytest.mark.parametrize("house", [{"max_jobs": 3}], indirect=True)
def test_jobs_at_a_time(house):
    made = [house("POST", "/jobs", json=spec(**JOB)) for _ in range(2)]
    assert [answer.status_code for answer in made] == [201, 201], made[0].text
    sweep = spec(methods={"default": JOB["method"]}, budgets=[{"parameters": 0.9}, {"parameters": 0.8}])
    refused(house("POST", "/sweeps", json=sweep), 403, "too_many_jobs", "2 jobs wait or run, and the limit is 3")
    assert house("POST", "/jobs", json=spec(**JOB), headers={"Idempotency-Key": "a"}).status_code == 201
    refused(house("POST", "/jobs", json=spec(**JOB)), 403, "too_many_jobs")
    again = house("POST", "/jobs", json=spec(**JOB), headers={"Idempotency-Key": "a"})
    assert again.status_code == 201, "what was made before is answered, whatever the limit"
    assert house("POST", "/jobs", "theirs", json=spec("theirs", **JOB)).status_code == 201, "limits are each one's own"
    assert house("POST", f"/jobs/{made[0].json()['id']}/cancel").status_code == 200
    assert house("POST", "/sweeps", json={**sweep, "budgets": sweep["budgets"][:1]}).status_code == 201
    assert house("GET", "/usage").json()["jobs"] == 3


@pytest.mark.parametrize("house", [{"max_bytes": 400}], indirect=True)
def test_bytes_that_are_kept(house):
    def used():
        return house("GET", "/usage").json()["bytes"]

    assert used() == 150
    with tenant_session(house.engine, "ours") as session:
        row = JobRow(id=new_id("job"), status="succeeded", spec=SPEC, created_at=now())
        session.add(row)
        session.flush()
        session.add(ArtifactRow(job_id=row.id, path="a", bytes=30, sha256="0", media_type="text/plain"))
        session.commit()
    assert used() == 180
    body = b'{"text": "' + b"word " * 60 + b'"}\n'
    refused(house("POST", "/datasets", files={"file": ("a.jsonl", body)}), 507, "quota_full", "180 bytes are kept")
    headers = {"Upload-Length": "120", "Upload-Metadata": "filename YS50eHQ="}
    assert house("POST", "/uploads", headers=headers).status_code == 201
    assert used() == 300, "an upload has its room from the beginning"
    refused(house("POST", "/uploads", headers=headers), 507, "quota_full")
    refused(house("POST", "/models", files=[("files", ("config.json", body))]), 507, "quota_full")
    assert house("POST", "/datasets", files={"file": ("a.jsonl", b'{"text": "' + b"w " * 20 + b'"}\n')}).status_code == 201
    assert 300 < used() < 400
    with open_session(house.engine) as session:
        session.add(TenantRow(name="ours", max_bytes=200))
        session.commit()
    refused(house("POST", "/jobs", json=spec(**JOB)), 507, "quota_full", "the limit is 200")
    assert house("POST", "/jobs", "theirs", json=spec("theirs", **JOB)).status_code == 201


@pytest.mark.parametrize("house", [{"max_hours": 2.0}], indirect=True)
def test_hours_are_counted_as_workers_have_the_job(house):
    ids = [house("POST", "/jobs", json=spec(**JOB)).json()["id"] for _ in range(3)]
    engine = house.engine
    with open_session(engine) as session:
        for _ in ids:
            queue.claim(session, 60, 3)
    with open_session(engine) as session:
        rows = [session.get_one(JobRow, identifier) for identifier in ids]
        for row in rows:
            row.claimed_at = now() - timedelta(hours=1)
        # A worker that died half an hour ago: what nobody held is nobody's use.
        rows[2].lease_until = now() - timedelta(minutes=30)
        session.commit()
    with open_session(engine) as session:
        queue.finish(session, ids[0], rows[0].lease_token, "succeeded", None, [])
        queue.release(session, ids[1], rows[1].lease_token, counts=False)
        again = queue.claim(session, 60, 3)
    assert again.id in ids[1:]
    hours = {identifier: house("GET", f"/jobs/{identifier}").json()["seconds"] / 3600 for identifier in ids}
    assert hours[ids[0]] == pytest.approx(1, abs=0.01)
    assert hours[ids[1]] == pytest.approx(1, abs=0.01)
    assert house("GET", "/usage").json()["hours"] == pytest.approx(3 if again.id == ids[1] else 2.5, abs=0.01)
    refused(house("POST", "/jobs", json=spec(**JOB)), 403, "hours_used_up", "in the last 30 days, and the limit is 2")
    with open_session(engine) as session:
        for row in session.exec(select(JobRow)):
            row.started_at = now() - timedelta(days=31)
            row.claimed_at = None
        session.commit()
    assert house("POST", "/jobs", json=spec(**JOB)).status_code == 201


def test_priority_among_a_tenants_jobs_and_not_between_tenants(house):
    order = {"sweep": ("ours", -1), "low": ("ours", -5), "first": ("ours", 0), "second": ("ours", 0), "high": ("ours", 10)}
    ids = {}
    for name, (tenant, priority) in {**order, "other": ("theirs", -10)}.items():
        answer = house("POST", "/jobs", tenant, json=spec(tenant, **JOB, priority=priority))
        ids[answer.json()["id"]] = name
    claimed = []
    with open_session(house.engine) as session:
        while (job := queue.claim(session, 60, 3)) is not None:
            claimed.append(ids[job.id])
    assert [name for name in claimed if name != "other"] == ["high", "first", "second", "sweep", "low"]
    assert claimed.index("other") == 1, "high counts among ours alone"
    refused(house("POST", "/jobs", json=spec(**JOB, priority=11)), 422, "invalid_request")
    sweep = house("POST", "/sweeps", json={**SWEEP, **spec(methods={"d": JOB["method"]}, budgets=[JOB["budget"]])})
    job = house("GET", "/jobs", params={"sweep": sweep.json()["id"]}).json()["data"][0]
    assert job["spec"]["priority"] == -1, "a sweep waits for single jobs"


@pytest.mark.parametrize("house", [{"max_requests": 3}], indirect=True)
def test_requests_a_minute_of_one_key(house):
    for left in (2, 1, 0):
        answer = house("GET", "/usage")
        assert answer.status_code == 200
        assert answer.headers["ratelimit-policy"] == '"requests";q=3;w=60'
        assert answer.headers["ratelimit"].startswith(f'"requests";r={left};t=')
    answer = house("GET", "/usage")
    refused(answer, 429, "too_many_requests", "3 requests a minute: wait for")
    assert 1 <= int(answer.headers["retry-after"]) <= 20
    assert answer.headers["ratelimit"].startswith('"requests";r=0;t=')
    assert house("GET", "/usage", "theirs").status_code == 200
    for _ in range(9):
        assert house.app.state.limiter.limit == 3
    assert TestClient(house.app).get("/healthz").status_code == 200


def test_a_bucket_fills_again(monkeypatch):
    moment = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: moment[0])
    limiter = RateLimiter(60)
    assert [limiter.take("a").wait > 0 for _ in range(61)] == [False] * 60 + [True]
    moment[0] += 1.01
    assert [limiter.take("a").wait > 0 for _ in range(2)] == [False, True]
    moment[0] += 600
    assert limiter.take("a").left == 59, "never more than full"
    assert limiter.take("b").left == 59


def test_limits_are_set_and_shown_on_the_services_machine(house):
    def narrow(*arguments):
        settings = {"NARROW_DATA": str(house.settings.data), "NARROW_DATABASE_URL": house.settings.database_url}
        command = [sys.executable, "-m", "narrow_client.cli", "tenants", *arguments]
        done = subprocess.run(command, env={"PATH": "/usr/bin:/bin", **settings}, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    told = json.loads(narrow("limit", "ours", "--jobs", "7", "--hours", "1.5", "--json"))
    assert (told["limits"]["jobs"], told["limits"]["hours"]) == (7, 1.5)
    assert json.loads(narrow("list", "--json"))["ours"]["limits"]["jobs"] == 7
    lines = narrow("list").splitlines()
    assert [line.split()[0] for line in lines] == ["ours", "theirs"]
    assert "0 of 7 jobs  150 of any bytes  0 of 1.5 hours" in lines[0]
    with tenant_session(house.engine, "ours") as session:
        assert quotas.usage(session, house.settings, "ours").limits.jobs == 7
    with pytest.raises(narrow_client.NarrowClientError):
        narrow_client.Narrow("http://127.0.0.1:9").usage()
