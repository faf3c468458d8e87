"""Requests made up from the contract itself, fitting and unfitting ones: nothing falls over, and every answer is one that the
contract promises. What schemathesis finds is a fault of the service or of its contract, and mended there.

The fast tests ask the same in every run. `pytest -m slow tests/contract/test_fuzz.py` asks forty times as much, by another seed.
"""

import random
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from fastapi.testclient import TestClient
from live import QUICK, settings_of
from schemathesis.engine import Status, events, from_schema
from unit.test_report import EVIL, example

from narrow_engine.report.frontier import outcome
from narrow_engine.report.page import render_page
from service import auth, queue
from service.app import create_app
from service.db.session import connect, migrate, open_session
from service.db.tables import ArtifactRow, OutcomeRow
from service.storage import open_storage

HOST = "127.0.0.1:8000"
REFUSED = [400, 401, 403, 404, 405, 408, 409, 412, 413, 415, 422, 460]
RULED = ["/jobs", "/plans", "/sweeps", "/models", "/datasets", "/uploads", "/uploads/{upload_id}", "/webhooks"]
"""Where a body that fits its schema may be refused all the same: a budget has exactly one field, a job's inputs have to be there,
files have to be a model. JSON Schema cannot say it. Everywhere else what fits is taken."""
BOUNDED = {"examples", "coverage"}
"""Phases that go through the schema once, however many examples are asked for."""

schemathesis.serializer.alias("application/offset+octet-stream", "application/octet-stream")


class House:
    """A service in this process that has one of everything, and admins of two tenants."""

    def __init__(self, folder: Path, model: Path, data: Path, keys_needed: bool) -> None:
        self.settings = settings_of(folder)
        self.settings.max_requests = 1_000_000
        self.settings.prepare()
        migrate(self.settings)
        self.engine = connect(self.settings)
        with open_session(self.engine) as session:
            self.key, self.other = (auth.create_key(session, "fuzz", "admin", tenant)[1] for tenant in ("default", "other"))
            session.commit()
        self.app = create_app(self.settings, keys_needed, None if keys_needed else "127.0.0.1")
        headers = {"Authorization": f"Bearer {self.key}"} if keys_needed else {}
        self.client = TestClient(self.app, f"http://{HOST}", headers=headers, raise_server_exceptions=False)
        self.ids: dict[str, str] = {}
        self.make("model", "/models", files=[("files", (file.name, file.read_bytes())) for file in sorted(model.iterdir())])
        self.make("dataset", "/datasets", files={"file": (data.name, data.read_bytes())})
        self.make("webhook", "/webhooks", json={"url": "https://example.com/", "events": ["job.queued"]})
        self.make("key", "/keys", json={"name": "another"})
        self.make("upload", "/uploads", headers={"Upload-Length": "9", "Upload-Metadata": "filename YS5qc29ubA=="})
        inputs = {"base": {"model": self.ids["model"]}, "target": {"dataset": self.ids["dataset"]}, "block_tokens": 64}
        self.sweep = {**inputs, "budgets": [{"parameters": 0.85}], "methods": {"default": QUICK}}
        self.job = {**inputs, "budget": {"parameters": 0.85}, "method": QUICK}
        self.make("sweep", "/sweeps", json=self.sweep)
        self.ids["job"] = self.client.get(f"/sweeps/{self.ids['sweep']}").json()["points"][0]["job"]
        self._finish(self.ids["job"])
        self.make("queued", "/jobs", json=self.job)

    def make(self, name: str, path: str, **sent) -> None:
        answer = self.client.post(path, **sent)
        assert answer.status_code == 201, answer.text
        self.ids[name] = answer.json()["id"]

    def _finish(self, job_id: str) -> None:
        """What a worker would have done, to a target with a name that is markup."""
        report, storage = example(), open_storage(self.settings)
        report.target = EVIL
        rows: list = [OutcomeRow(job_id=job_id, outcome=outcome(report).model_dump(mode="json"))]
        for name, media_type, text in (
            ("report.json", "application/json", report.model_dump_json()),
            ("report.html", "text/html", render_page(report)),
            ("model/model.safetensors", "application/octet-stream", "0123456789"),
        ):
            path = self.settings.data / "made"
            path.write_text(text)
            size, sha256 = path.stat().st_size, storage.put_artifact(path)
            rows.append(ArtifactRow(job_id=job_id, path=name, bytes=size, sha256=sha256, media_type=media_type))
        with open_session(self.engine) as session:
            job = queue.claim(session, 60, 3, only=job_id)
            queue.finish(session, job.id, job.lease_token, "succeeded", None, rows)


@pytest.fixture
def free(tmp_path, tiny_folder, python_file) -> House:
    """On loopback, where nobody needs a key."""
    return House(tmp_path / "data", tiny_folder, python_file, keys_needed=False)


@pytest.fixture
def locked(tmp_path, tiny_folder, python_file) -> House:
    """Where everybody needs one."""
    return House(tmp_path / "data", tiny_folder, python_file, keys_needed=True)


def run(house: House, key: str | None, examples: int, phases: set[str], seed: int = 0) -> Iterator[events.EngineEvent]:
    """What schemathesis does with the service, with all its checks."""
    told = {
        "seed": seed,
        "headers": {"Host": HOST, **({"Authorization": f"Bearer {key}"} if key else {})},
        "generation": {"deterministic": True, "max-examples": examples, "no-shrink": True},
        "phases": {name: {"enabled": name in phases} for name in (*BOUNDED, "fuzzing", "stateful")},
        "continue-on-failure": True,
        # Streams do not end by themselves: the events of a queued job are read this far.
        "max-stream-events": 2,
        "request-timeout": 60,
        "checks": {"negative_data_rejection": {"expected-statuses": REFUSED}},
        "operations": [
            {"include-path": path, "checks": {"positive_data_acceptance": {"expected-statuses": ["2xx", *REFUSED]}}}
            for path in RULED
        ],
    }
    schema = schemathesis.openapi.from_asgi("/openapi.json", house.app, config=schemathesis.Config.from_dict(told))
    yield from from_schema(schema).execute()


def found(house: House, key: str | None, examples: int, phases: set[str], seed: int = 0) -> str:
    """What was wrong, each once; and that anything was looked at."""
    wrong: dict[str, str] = {}
    seen: set[str] = set()
    for event in run(house, key, examples, phases, seed):
        if isinstance(event, events.FatalError):
            raise event.exception
        if isinstance(event, events.NonFatalError):  # among them what the service raised
            wrong[f"{event.label}: {event.value!r:.200}"] = "".join(traceback.format_exception(event.value)[-3:])
        elif isinstance(event, events.ScenarioFinished):
            seen |= {node.value.operation.label for node in event.recorder.cases.values()}
            for checks in event.recorder.checks.values():
                for failure in (check.failure_info for check in checks if check.status == Status.FAILURE):
                    name = f"{event.phase.value}: {failure.failure.operation}: {failure.failure.title}"
                    wrong.setdefault(name, f"{failure.failure.message[:1000]}\n{failure.code_sample[:2000]}")
    assert len(seen) == sum(len(path) for path in house.app.openapi()["paths"].values()) or phases == {"stateful"}, seen
    return "\n\n".join(f"{name}\n{how}" for name, how in wrong.items())


def test_every_answer_is_one_that_the_contract_has(free):
    assert not found(free, None, 3, {*BOUNDED, "fuzzing"})


def test_with_a_key_it_is_the_same(locked):
    assert not found(locked, locked.key, 8, {"fuzzing"})


def test_chains_of_requests_are_answered_as_the_contract_has_it(locked):
    """What one request made the next one asks for, as the links that schemathesis infers from the schema say."""
    assert not found(locked, locked.key, 10, {"stateful"})


def test_without_a_key_nothing_is_told(locked):
    told: dict[str, set[int]] = {}
    for event in run(locked, None, 2, {"fuzzing"}):
        assert not isinstance(event, events.NonFatalError), event
        if isinstance(event, events.ScenarioFinished):
            for name, node in event.recorder.cases.items():
                if answer := event.recorder.find_response(case_id=name):
                    told.setdefault(node.value.operation.path, set()).add(answer.status_code)
    assert {path for path, statuses in told.items() if statuses != {401}} == {"/healthz", "/readyz"}, told
    assert len(told) == len(locked.app.openapi()["paths"])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("phases", [{*BOUNDED, "fuzzing"}, {"stateful"}], ids=["single", "chains"])
@pytest.mark.parametrize("keys", ["free", "locked"])
def test_much_of_all_that(request, keys, phases):
    house: House = request.getfixturevalue(keys)
    assert not found(house, house.key if keys == "locked" else None, 150, phases, seed=random.randrange(2**32))
