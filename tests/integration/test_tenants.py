"""Every route with every role, and another tenant's key on everything: nothing is done and nothing is told."""

import re
import time
from datetime import timedelta
from pathlib import Path

import narrow_client
import pytest
from fastapi.testclient import TestClient
from live import QUICK, running, settings_of, spec_of
from sqlalchemy import text

from service import auth
from service.app import create_app
from service.db.session import connect, migrate, open_session, tenant_session
from service.db.tables import (
    ArtifactRow,
    DatasetRow,
    EventRow,
    IdempotencyRow,
    JobRow,
    KeyRow,
    ModelRow,
    OutcomeRow,
    SweepRow,
    UploadRow,
    WebhookRow,
    new_id,
    now,
)

INFO = {"family": "llama", "parameters": 1, "bytes": 1, "sha256": "0", "units": [], "config": {}}
SPEC = {"base": {"model": "mdl_" + "0" * 26}, "target": {"dataset": "ds_" + "0" * 26}, "budget": {"parameters": 0.5}}
SWEEP = {"base": SPEC["base"], "target": SPEC["target"], "methods": {"default": {}}, "budgets": [SPEC["budget"]]}


class House:
    """A service in this process with two tenants, of whom one has one of everything."""

    def __init__(self, folder: Path) -> None:
        self.settings = settings_of(folder)
        self.settings.prepare()
        migrate(self.settings)
        self.engine = connect(self.settings)
        self.keys: dict[str, str] = {}
        with open_session(self.engine) as session:
            for tenant in ("ours", "theirs"):
                for role in auth.ROLES:
                    self.keys[f"{tenant} {role}"] = auth.create_key(session, role, role, tenant)[1]
            session.commit()
        prefixes = {"model": "mdl", "dataset": "ds", "sweep": "swp", "job": "job", "upload": "upl", "webhook": "whk"}
        self.ids = {name: new_id(prefix) for name, prefix in prefixes.items()}
        with tenant_session(self.engine, "ours") as session:
            session.add(ModelRow(id=self.ids["model"], name="m", info=INFO, created_at=now()))
            session.add(
                DatasetRow(
                    **{"id": self.ids["dataset"], "name": "d", "file": "d.jsonl", "text_column": "text", "documents": 1},
                    **{"bytes": 9, "sha256": "0", "preview": ["secret text"], "created_at": now()},
                )
            )
            session.add(
                UploadRow(
                    id=self.ids["upload"], name="secret.txt", bytes=9, created_at=now(), expires_at=now() + timedelta(days=1)
                )
            )
            hook = {"url": "https://secret.example/", "events": [], "secret": "whsec_", "created_at": now()}
            session.add(WebhookRow(id=self.ids["webhook"], **hook))
            session.add(SweepRow(id=self.ids["sweep"], spec=SWEEP, created_at=now()))
            session.flush()
            session.add(
                JobRow(id=self.ids["job"], status="running", spec=SPEC, created_at=now(), last_seq=1, sweep=self.ids["sweep"])
            )
            session.flush()
            session.add(EventRow(job_id=self.ids["job"], seq=1, time=now(), kind="state", phase="", message="secret", data={}))
            session.add(
                ArtifactRow(job_id=self.ids["job"], path="report.json", bytes=1, sha256="0" * 64, media_type="text/plain")
            )
            session.add(OutcomeRow(job_id=self.ids["job"], outcome={}))
            session.commit()
            self.ids["key"] = session.execute(text("SELECT id FROM api_key WHERE tenant = 'ours' AND role = 'read'")).scalar()
        self.app = create_app(self.settings, keys_needed=True)
        self.client = TestClient(self.app, raise_server_exceptions=False)

    def routes(self):
        for path, operations in self.app.openapi()["paths"].items():
            for method in operations:
                yield method.upper(), path

    def ask(self, method: str, path: str, key: str | None, known: bool = True):
        """A request to a route, its parameters filled with ids that are there, or with ids that nobody has."""
        found = {f"{name}_id": identifier if known else identifier[:-10] + "0" * 10 for name, identifier in self.ids.items()}
        place = re.sub(r"{(\w+)}", lambda match: found.get(match[1], "report.json"), path)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        body = {"json": {}} if method == "POST" else {}
        return self.client.request(method, place, headers=headers, **body)


@pytest.fixture
def house(tmp_path) -> House:
    return House(tmp_path / "data")


def told(answer) -> dict:
    """What an answer says, without what every answer has of its own."""
    return {key: value for key, value in answer.json().items() if key not in ("request_id", "instance")}


def test_every_route_refuses_who_has_no_key_that_counts(house):
    with open_session(house.engine) as session:
        _, expired = auth.create_key(session, "old", "admin", "ours", now() - timedelta(seconds=1))
        row, revoked = auth.create_key(session, "gone", "admin", "ours")
        row.revoked_at = now()
        session.commit()
    seen = 0
    for method, path in house.routes():
        answers = {
            "key_needed": house.ask(method, path, None),
            "unknown_key": house.ask(method, path, "nrw_" + "x" * 43),
            "expired_key": house.ask(method, path, expired),
            "revoked_key": house.ask(method, path, revoked),
        }
        for code, answer in answers.items():
            if path in ("/healthz", "/readyz"):
                assert answer.status_code in (200, 503)
                continue
            assert (answer.status_code, answer.json()["code"]) == (401, code), (method, path)
            assert answer.headers["www-authenticate"] == "Bearer"
            seen += 1
    assert seen > 100


def test_every_route_takes_the_role_that_it_needs_and_no_less(house):
    for method, path in house.routes():
        if path in ("/healthz", "/readyz", "/metrics"):  # metrics: test_operations.py
            continue
        needed = auth.needs(method, path)
        assert needed == (
            "admin"
            if path.startswith(("/keys", "/audit", "/webhooks"))
            else "read"
            if method == "GET" or path == "/plans"
            else "write"
        )
        for role in auth.ROLES[: auth.ROLES.index(needed)]:
            answer = house.ask(method, path, house.keys[f"ours {role}"])
            assert (answer.status_code, answer.json()["code"]) == (403, "not_allowed"), (method, path, role)
        if method == "GET":
            assert house.ask(method, path, house.keys[f"ours {needed}"]).status_code != 403


def test_what_belongs_to_others_is_as_good_as_not_there(house):
    """The answer to the id of another tenant is that to an id of nobody, to the letter; and what is there stays as it was."""
    tables = ("model", "dataset", "sweep", "job", "event", "artifact", "api_key")

    def everything():
        with house.engine.connect() as connection:
            return [connection.execute(text(f"SELECT * FROM {table} ORDER BY 1, 2")).fetchall() for table in tables]

    for role in auth.ROLES:
        key = house.keys[f"theirs {role}"]
        house.ask("GET", "/jobs", key)  # its last use is written down once
        before = everything()
        for method, path in house.routes():
            if "{" not in path:
                continue
            theirs, nobodys = (house.ask(method, path, key, known) for known in (True, False))
            assert theirs.status_code in (403, 404, 422), (method, path, theirs.text)
            assert theirs.status_code == nobodys.status_code, (method, path)
            same = {name: identifier[:-10] + "0" * 10 for name, identifier in house.ids.items()}
            said = theirs.text
            for name, identifier in house.ids.items():
                said = said.replace(identifier, same[name])
            assert re.sub(r"req_\w+", "", said) == re.sub(r"req_\w+", "", nobodys.text), (method, path)
            assert "secret" not in theirs.text
        assert everything() == before


def test_lists_and_jobs_hold_what_is_ones_own(house):
    for path in ("/models", "/datasets", "/jobs", "/sweeps", "/keys"):
        ours, theirs = (house.ask("GET", path, house.keys[f"{tenant} admin"]).json()["data"] for tenant in ("ours", "theirs"))
        assert ours, path
        assert {row["id"] for row in ours}.isdisjoint(row["id"] for row in theirs), path
    theirs = {"Authorization": f"Bearer {house.keys['theirs admin']}"}
    spec = {**SPEC, "base": {"model": house.ids["model"]}}
    answer = house.client.post("/jobs", json=spec, headers=theirs)
    assert (answer.status_code, answer.json()["code"]) == (404, "model_not_found")
    assert house.client.get("/jobs", params={"sweep": house.ids["sweep"]}, headers=theirs).status_code == 404


def test_a_session_sees_and_gives_its_own_whatever_it_asks_for(house):
    from sqlmodel import col, delete, func, select, update

    with tenant_session(house.engine, "theirs") as session:
        assert session.get(ModelRow, house.ids["model"]) is None
        assert session.exec(select(func.count()).select_from(JobRow)).one() == 0
        assert session.exec(select(JobRow.status)).all() == []
        assert session.exec(select(JobRow, OutcomeRow).join(OutcomeRow)).all() == []
        session.execute(update(JobRow).values(status="cancelled"))
        session.execute(delete(DatasetRow).where(col(DatasetRow.bytes) > 0))
        session.add(ModelRow(id="mdl_theirs", name="m", info={}, created_at=now(), tenant="ours"))
        session.commit()
    with open_session(house.engine) as session:
        assert session.get(JobRow, house.ids["job"]).status == "running"
        assert session.get(DatasetRow, house.ids["dataset"]) is not None
        assert session.get(ModelRow, "mdl_theirs").tenant == "theirs"


def test_two_tenants_may_send_the_same_idempotency_key(house):
    for tenant in ("ours", "theirs"):
        with tenant_session(house.engine, tenant) as session:
            session.add(IdempotencyRow(key="first", body_sha256=tenant, created_at=now()))
            session.commit()
    with tenant_session(house.engine, "ours") as session:
        from sqlmodel import select

        assert session.exec(select(IdempotencyRow)).one().body_sha256 == "ours"


def test_a_key_is_shown_once_renewed_and_revoked(house):
    admin = {"Authorization": f"Bearer {house.keys['ours admin']}"}
    made = house.client.post("/keys", json={"name": "CI", "role": "read", "expires_in_days": 1}, headers=admin)
    assert made.status_code == 201, made.text
    key = made.json()
    assert re.fullmatch(r"nrw_[\w-]{43}", key["key"])
    assert (key["tenant"], key["role"], key["hint"]) == ("ours", "read", key["key"][-4:])
    listed = house.client.get("/keys", headers=admin)
    assert key["key"] not in listed.text
    with house.engine.connect() as connection:
        assert key["key"] not in str(connection.execute(text("SELECT * FROM api_key")).fetchall())
    mine = {"Authorization": f"Bearer {key['key']}"}
    assert house.client.get("/jobs", headers=mine).status_code == 200
    with open_session(house.engine) as session:
        assert session.get(KeyRow, key["id"]).used_at is not None

    renewed = house.client.post(f"/keys/{key['id']}/renew", json={"overlap_hours": 1}, headers=admin).json()
    assert (renewed["name"], renewed["role"]) == ("CI", "read")
    for each in (key, renewed):
        assert house.client.get("/jobs", headers={"Authorization": f"Bearer {each['key']}"}).status_code == 200
    again = house.client.post(f"/keys/{renewed['id']}/renew", json={"overlap_hours": 0}, headers=admin).json()
    assert house.client.get("/jobs", headers={"Authorization": f"Bearer {renewed['key']}"}).json()["code"] == "expired_key"

    assert house.client.delete(f"/keys/{again['id']}", headers=admin).status_code == 204
    assert house.client.get("/jobs", headers={"Authorization": f"Bearer {again['key']}"}).json()["code"] == "revoked_key"
    assert house.client.post(f"/keys/{again['id']}/renew", json={}, headers=admin).json()["code"] == "key_revoked"
    for wrong in ({"name": ""}, {"name": "a\nb"}, {"name": "x", "role": "root"}, {"name": "x", "tenant": "theirs"}):
        assert house.client.post("/keys", json=wrong, headers=admin).status_code == 422, wrong


def test_without_keys_pages_of_other_sites_may_not_send_anything(tmp_path):
    settings = settings_of(tmp_path / "data")
    settings.prepare()
    migrate(settings)
    client = TestClient(create_app(settings), base_url="http://127.0.0.1:8000")
    assert client.get("/jobs").status_code == 200
    assert client.get("/jobs", headers={"Origin": "http://127.0.0.1:8000"}).status_code == 200
    answer = client.post("/datasets", files={"file": ("a.txt", b"x")}, headers={"Origin": "https://evil.example"})
    assert (answer.status_code, answer.json()["code"]) == (403, "cross_origin")
    assert client.get("/jobs", headers={"Authorization": "Bearer nrw_wrong"}).json()["code"] == "unknown_key"


def test_a_service_that_others_can_reach_needs_keys_and_says_so(tmp_path, tiny_folder, python_file):
    """From the command that makes the first key to the model that comes out, which is its tenant's."""
    import json
    import os
    import subprocess
    import sys

    data = tmp_path / "data"
    with running(data, host="0.0.0.0") as service:
        assert service.http.get("/jobs").status_code == 401
        assert service.http.get("/readyz").status_code == 200
        command = [sys.executable, "-m", "narrow_client.cli", "keys"]
        environment = {**os.environ, "NARROW_DATA": str(data), "NARROW_DATABASE_URL": settings_of(data).database_url}

        def keys(*arguments: str) -> str:
            return subprocess.run(
                [*command, *arguments], env=environment, check=True, capture_output=True, text=True
            ).stdout.strip()

        key, other = keys("create", "me", "--tenant", "acme"), keys("create", "them", "--tenant", "rival", "--role", "read")
        service.http.headers["Authorization"] = f"Bearer {key}"
        spec = spec_of(service, tiny_folder, python_file, QUICK)
        job_id = service.http.post("/jobs", json=spec).json()["id"]
        done = service.wait(job_id, lambda j: j["status"] == "succeeded")
        assert service.http.get(f"/models/{done['result_model']}").status_code == 200
        assert [folder.name for folder in (data / "tenants").iterdir()] == ["acme"]
        service.http.headers["Authorization"] = f"Bearer {other}"
        for path in (f"/models/{done['result_model']}", f"/jobs/{job_id}/report", f"/jobs/{job_id}/artifacts/report.json"):
            assert service.http.get(path).status_code == 404
        assert "acme" in keys("list")
        shown = json.loads(keys("create", "machine", "--tenant", "acme", "--json"))
        assert shown["key"].endswith(shown["hint"])
        assert json.loads(keys("revoke", shown["id"], "--json"))["revoked_at"]
        with narrow_client.Narrow(service.url, keys("create", "boss", "--tenant", "acme", "--role", "admin")) as client:
            made = client.keys.create("nightly", "read", expires_in_days=1)
            renewed = client.keys.renew(made.id, overlap_hours=0)
            assert [key.name for key in client.keys.list()] == ["nightly", "nightly", "boss", "machine", "me"]
            client.keys.revoke(renewed.id)
        with narrow_client.Narrow(service.url, renewed.key) as client, pytest.raises(narrow_client.NotAllowed, match="revoked"):
            client.jobs.get(job_id)
        identifier = next(row.split()[0] for row in keys("list").splitlines() if "rival" in row)
        assert service.http.get("/jobs").status_code == 200
        keys("revoke", identifier)
        time.sleep(auth.REMEMBERED)
        assert service.http.get("/jobs").json()["code"] == "revoked_key"
    log = Path(service.log.name).read_text()
    assert "every request needs an API key" in log
    assert "there is no API key yet" in log
    assert key not in log
    assert other not in log
