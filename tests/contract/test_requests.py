"""Requests made up from the contract itself, fitting and unfitting ones: nothing falls over, and every answer is one that the
contract promises. What schemathesis finds is a fault of the service or of its contract, and mended there.

The fast tests ask the same in every run. `pytest -m slow tests/contract/test_requests.py` asks forty times as much, by another
seed.
"""

import itertools
import json
import math
import random
import re
import traceback
from collections.abc import Iterator
from hashlib import sha256
from html import escape as html_escape
from pathlib import Path
from urllib.parse import quote, unquote

import httpx
import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from live import QUICK, settings_of
from schemathesis.engine import Status, events, from_schema
from unit.test_report import EVIL, example

from narrow_engine.report.frontier import outcome
from narrow_engine.report.page import render_page
from service import auth, estimates, queue
from service.app import create_app
from service.db.session import connect, migrate, open_session
from service.db.tables import DEFAULT_TENANT, ArtifactRow, OutcomeRow
from service.storage import open_storage

HOST = "127.0.0.1:8000"
REFUSED = [400, 401, 403, 404, 405, 408, 409, 412, 413, 415, 422, 460]
RULED = ["/jobs", "/plans", "/sweeps", "/models", "/fetches", "/datasets", "/uploads", "/uploads/{upload_id}", "/webhooks"]
"""Where a body that fits its schema may be refused all the same: a budget has exactly one field, a job's inputs have to be there,
files have to be a model. JSON Schema cannot say it. Everywhere else what fits is taken."""
BOUNDED = {"examples", "coverage"}
"""Phases that go through the schema once, however many examples are asked for."""

schemathesis.serializer.alias("application/offset+octet-stream", "application/octet-stream")


class Kept(dict):
    """Of keys that are known: one that is not in the database, and that nobody can revoke who has it and tries everything."""

    def clear(self) -> None:
        pass


class House:
    """A service in this process that has one of everything, and admins of two tenants."""

    def __init__(self, folder: Path, model: Path, data: Path, keys_needed: bool) -> None:
        self.settings = settings_of(folder)
        self.settings.max_requests = 1_000_000
        self.settings.prepare()
        migrate(self.settings)
        self.engine = connect(self.settings)
        with open_session(self.engine) as session:
            self.key, self.other = "nrw_fuzz", auth.create_key(session, "other", "admin", "other")[1]
            session.commit()
        self.app = create_app(self.settings, keys_needed, None if keys_needed else "127.0.0.1")
        admin = auth.Caller(DEFAULT_TENANT, "admin", "key_fuzz")
        self.app.state.known_keys = Kept({sha256(self.key.encode()).hexdigest(): (math.inf, admin)})
        headers = {"Authorization": f"Bearer {self.key}"} if keys_needed else {}
        self.client = TestClient(self.app, f"http://{HOST}", headers=headers, raise_server_exceptions=False)
        self.ids: dict[str, str] = {}
        self.made: list[tuple[str, httpx.Response]] = []
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
        self.made.append((path, answer))
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
            size, digest = path.stat().st_size, storage.put_artifact(path)
            rows.append(ArtifactRow(job_id=job_id, path=name, bytes=size, sha256=digest, media_type=media_type))
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
    """What schemathesis does with the service, with all its checks. `seed`: 0 for the same in every run, and in less time."""
    told = {
        "seed": seed,
        "headers": {"Host": HOST, **({"Authorization": f"Bearer {key}"} if key else {})},
        "generation": {"deterministic": not seed, "max-examples": examples, "no-shrink": True},
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
    for operation in told["operations"] if not seed else []:
        # A job is their body, too, and has a thousand cases.
        if operation["include-path"] in ("/plans", "/sweeps"):
            operation["phases"] = {"coverage": {"enabled": False}}
    schema = schemathesis.openapi.from_asgi("/openapi.json", house.app, config=schemathesis.Config.from_dict(told))
    if "stateful" not in phases:
        lead(house, schema)
    yield from from_schema(schema).execute()


def lead(house: House, schema) -> None:
    """Puts what there is into every second case that fits the contract: by chance none is about a job that there is."""
    bodies = {"/jobs": house.job, "/plans": house.job, "/sweeps": house.sweep}
    turn = itertools.cycle((False, True))

    @schema.hook
    def map_case(context, case):
        if case.method == "DELETE" or case.meta.generation.mode is not schemathesis.GenerationMode.POSITIVE or next(turn):
            return case
        for name in case.path_parameters:
            case.path_parameters[name] = "report.json" if name == "path" else house.ids[name.removesuffix("_id")]
        if case.path in bodies and isinstance(case.body, dict):
            case.body = {**case.body, **bodies[case.path], "skills": [], "teacher": None, "broad": None}
        return case


def found(house: House, key: str | None, examples: int, phases: set[str], seed: int = 0) -> str:
    """What was wrong, each once; and that it was worth the while: every operation was asked for, and most did what they do."""
    wrong: dict[str, str] = {}
    seen: dict[str, set[int]] = {}
    for event in run(house, key, examples, phases, seed):
        if isinstance(event, events.FatalError):
            raise event.exception
        if isinstance(event, events.NonFatalError):  # among them what the service raised
            wrong[f"{event.label}: {event.value!r:.200}"] = "".join(traceback.format_exception(event.value)[-3:])
        elif isinstance(event, events.ScenarioFinished):
            for name, node in event.recorder.cases.items():
                if answer := event.recorder.find_response(case_id=name):
                    seen.setdefault(node.value.operation.label, set()).add(answer.status_code)
            for checks in event.recorder.checks.values():
                for failure in (check.failure_info for check in checks if check.status == Status.FAILURE):
                    name = f"{event.phase.value}: {failure.failure.operation}: {failure.failure.title}"
                    wrong.setdefault(name, f"{failure.failure.message[:1000]}\n{failure.code_sample[:2000]}")
    done = [label for label, statuses in seen.items() if any(status < 300 for status in statuses)]
    operations = sum(len(path) for path in house.app.openapi()["paths"].values())
    assert (len(seen), len(done) > 30) == (operations, True) if "stateful" not in phases else len(done) > 8, (seen, done)
    return "\n\n".join(f"{name} (seed {seed})\n{how}" for name, how in wrong.items())


def test_every_answer_is_one_that_the_contract_has(free):
    assert not found(free, None, 3, {*BOUNDED, "fuzzing"})


def test_with_a_key_it_is_the_same(locked):
    assert not found(locked, locked.key, 8, {"fuzzing"})


def test_chains_of_requests_are_answered_as_the_contract_has_it(locked):
    """What one request made the next one asks for, as the links that schemathesis infers from the schema say."""
    assert not found(locked, locked.key, 25, {"stateful"})


def test_what_is_made_and_ended_is_as_the_contract_has_it(free):
    """What schemathesis does not come to by itself: files that are a model, an upload that is whole, jobs on their way."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", free.app)
    piece = {"Upload-Offset": "0", "Content-Type": "application/offset+octet-stream"}
    free.make("sweep", "/sweeps", json=free.sweep)
    for path, answer in free.made:
        schema[path]["POST"].validate_response(answer)
    for method, path, name, sent in (
        ("PATCH", "/uploads/{upload_id}", "upload", {"headers": piece, "content": b"012345678"}),
        *(("POST", f"/jobs/{{job_id}}/{verb}", "queued", {}) for verb in ("pause", "resume", "cancel")),
        ("POST", "/sweeps/{sweep_id}/cancel", "sweep", {}),
        ("DELETE", "/sweeps/{sweep_id}", "sweep", {}),
        *(("DELETE", f"/{kind}s/{{{kind}_id}}", kind, {}) for kind in ("model", "dataset", "upload", "webhook", "key")),
    ):
        answer = free.client.request(method, re.sub(r"{\w+}", free.ids[name], path), **sent)
        assert answer.status_code < 300, (method, path, answer.text)
        schema[path][method].validate_response(answer)


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


LISTS = (
    "/jobs",
    "/models",
    "/datasets",
    "/sweeps",
    "/uploads",
    "/webhooks",
    "/keys",
    "/audit",
    "/webhooks/{webhook_id}/messages",
)
SMALL = settings(max_examples=60, derandomize=True, deadline=None, database=None)


def test_whatever_a_cursor_is_a_list_shows_ones_own(locked):
    """Any text, ids of others among it, is a place in one's own list or no cursor."""
    theirs = {"Authorization": f"Bearer {locked.other}"}
    mine = [locked.client.post("/webhooks", json={"url": "https://example.com/"}, headers=theirs).json()["id"] for _ in range(3)]
    known = st.sampled_from([*locked.ids.values(), *mine])
    bent = st.builds(lambda text, place, more: text[:place] + more + text[place:], known, st.integers(0, 30), st.text(max_size=2))

    @SMALL
    @given(
        st.one_of(known, known.map(str.upper), bent, st.text(max_size=70)), st.sampled_from(LISTS), st.sampled_from((1, 2, 100))
    )
    def ask(cursor, path, limit):
        place = path.replace("{webhook_id}", mine[0])
        answer = locked.client.get(place, params={"cursor": cursor, "limit": limit}, headers=theirs)
        assert answer.status_code in (200, 422), answer.text
        if answer.status_code == 422:
            assert answer.json()["errors"][0]["pointer"] == "/cursor"
            return
        page = answer.json()
        shown = {row["id"] for row in page["data"]} | {page["next_cursor"]}
        assert shown.isdisjoint(locked.ids.values()), page
        assert path not in LISTS[:5] or page == {"data": [], "next_cursor": None}
        assert all(row["id"] < cursor for row in page["data"])

    ask()
    for after in ("-1", "1e3", "9" * 19, str(2**31), str(2**53), "٣", "0x1", ""):
        job = locked.ids["job"]
        assert locked.client.get(f"/jobs/{job}/events", params={"after": after}).status_code in (200, 422), after
        assert locked.client.get(f"/jobs/{job}/events", params={"after": 1}, headers=theirs).status_code == 404
        stream = {"Accept": "text/event-stream", "Last-Event-ID": after.encode()}
        told = locked.client.get(f"/jobs/{job}/events", headers=stream)  # it has ended, and so does the stream
        known = after in ("", str(2**31 - 1)) or (after.isascii() and after.isdigit() and int(after) < 2**31)
        assert told.status_code == (200 if known else 422), after
        assert told.text.endswith("event: end\ndata: {}\n\n") == known, after


TRICKS = {
    "as it is": lambda text: text,
    "capitals": lambda text: quote(text.upper()),
    "escaped": lambda text: "".join(f"%{byte:02x}" for byte in text.encode()),
    "a space": lambda text: text + "%20",
    "a line break": lambda text: text + "%0a",
    "NUL": lambda text: text + "%00",
    "full width": lambda text: quote("".join(chr(ord(c) + 0xFEE0) for c in text)),
    "a digit of another alphabet": lambda text: quote(text.replace("0", "\u0660")),  # an id's first is 0
    "an accent": lambda text: quote(text + "\u0301"),
    "a character without width": lambda text: quote("\u200b" + text),
    "a wildcard": lambda text: text[:-1] + "%25",
    "another wildcard": lambda text: text[:-1] + "_",
    "no end": lambda text: text[:-1],
    "SQL": lambda text: quote(text + "' OR '1'='1"),
    "a parameter": lambda text: text + ";x",
    "dots": lambda text: quote(f"x/../{text}", safe=""),
}


def test_ids_of_others_are_ids_of_nobody_in_every_disguise(locked):
    """In every path, to the letter of the answer; and in disguise one's own id is no id either."""
    theirs = {"Authorization": f"Bearer {locked.other}"}
    nobodys = {name: text[:-10] + "0" * 10 for name, text in locked.ids.items()}
    routes = [(m.upper(), path) for path, operations in locked.app.openapi()["paths"].items() for m in operations if "{" in path]

    def ask(method: str, path: str, ids: dict[str, str], trick, headers: dict[str, str]) -> tuple[int, str]:
        name = re.search(r"{(\w+)_id}", path)[1]
        place = path.replace(f"{{{name}_id}}", trick(ids[name])).replace("{path}", "report.json")
        sent = {"json": {}} if method == "POST" else {}
        answer = locked.client.request(method, place, headers={"Upload-Offset": "0", **headers}, **sent)
        told = (
            "" if answer.status_code == 200 else "|".join(answer.json()[key] for key in ("code", "title", "detail", "instance"))
        )
        given = unquote(trick(ids[name]))
        return answer.status_code, told.replace(given, "ID").replace(repr(given)[1:-1], "ID")

    for name, trick in TRICKS.items():
        for method, path in routes:
            one = ask(method, path, locked.ids, trick, theirs)
            assert one[0] in (404, 405), (name, method, path, one)
            assert one == ask(method, path, nobodys, trick, theirs), (name, method, path)
            if method == "GET" and name not in ("as it is", "escaped"):
                assert ask(method, path, locked.ids, trick, {})[0] == 404, (name, path)


def test_what_a_body_refers_to_is_ones_own(locked):
    """Inputs of jobs, plans and sweeps, and files of models and datasets."""
    theirs = {"Authorization": f"Bearer {locked.other}"}
    nobody = {text: text[:-10] + "0" * 10 for text in locked.ids.values()}
    skill = {"dataset": locked.ids["dataset"], "name": "skill"}
    sent = [
        *(("/jobs", {"json": locked.job}), ("/plans", {"json": locked.job}), ("/sweeps", {"json": locked.sweep})),
        ("/jobs", {"json": {**locked.job, "skills": [skill], "teacher": locked.job["base"]}}),
        ("/models", {"data": {"uploads": [locked.ids["upload"]]}}),
        ("/datasets", {"data": {"upload": locked.ids["upload"]}}),
    ]
    for path, body in sent:
        other = json.loads(re.sub("|".join(nobody), lambda match: nobody[match[0]], json.dumps(body)))
        one, two = (locked.client.post(path, headers=theirs, **given) for given in (body, other))
        assert (one.status_code, two.status_code) == (404, 404), (one.text, two.text)
        said = re.sub("|".join(nobody), lambda match: nobody[match[0]], one.text)
        assert re.sub(r"req_\w+", "", said) == re.sub(r"req_\w+", "", two.text)
    assert locked.client.get("/jobs", params={"sweep": locked.ids["sweep"]}, headers=theirs).status_code == 404


def test_pages_run_nothing_and_every_answer_is_what_it_is_called(free):
    """A page has nothing in it that a user wrote but as text, and would not run it if it had."""
    html = {"Accept": "text/html"}
    for path in (f"/jobs/{free.ids['job']}/report", f"/sweeps/{free.ids['sweep']}/frontier"):
        page = free.client.get(path, headers=html)
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert EVIL not in page.text
        assert html_escape(EVIL) in page.text
        policy = dict(part.strip().partition(" ")[::2] for part in page.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
        assert set(policy) == {"default-src", "base-uri", "form-action", "frame-ancestors", "style-src", "img-src"}
    file = free.client.get(f"/jobs/{free.ids['job']}/artifacts/report.html", headers=html)
    assert file.headers["content-disposition"].startswith("attachment")
    assert file.headers["content-security-policy"].startswith("sandbox; default-src 'none'")
    seen = set()
    for path in (*free.app.openapi()["paths"], "/nothing", "/docs", "/openapi.json"):
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"):
            answer = free.client.request(method, re.sub(r"{(\w+)_id}", lambda match: free.ids[match[1]], path))
            assert answer.headers["x-content-type-options"] == "nosniff", (method, path)
            seen.add(answer.status_code)
    free.app.state.engine = None
    assert free.client.get("/jobs").status_code == 500
    assert free.client.get("/jobs").headers["x-content-type-options"] == "nosniff"
    assert seen >= {200, 204, 404, 405, 409, 422}, seen


def test_head_is_get_without_its_body(free):
    paths = [path for path, methods in free.app.openapi()["paths"].items() if "get" in methods]
    asked = [re.sub(r"{(\w+)_id}", lambda match: free.ids[match[1]], path) for path in paths]
    for path in (*asked, "/", "/ui/jobs", "/jobs/nothing", f"/jobs/{free.ids['job']}/artifacts/report.json"):
        head, get = free.client.head(path, follow_redirects=False), free.client.get(path, follow_redirects=False)
        assert (head.status_code, head.content) == (get.status_code, b""), path
        assert head.headers.get("content-type") == get.headers.get("content-type"), path
    live = {"Accept": "text/event-stream"}
    head = free.client.head(f"/jobs/{free.ids['queued']}/events", headers=live)
    assert (head.status_code, head.headers["content-type"].partition(";")[0]) == (200, "text/event-stream")
    assert free.client.put("/jobs").headers["allow"] == "GET, HEAD, POST"
    assert free.client.head("/plans").status_code == 405
    assert not any("head" in methods for path, methods in free.app.openapi()["paths"].items() if path != "/uploads/{upload_id}")


def test_what_a_filter_cannot_mean_is_refused(free):
    for sweep in ("nope", "swp_0000000000000000", ""):
        answer = free.client.get("/jobs", params={"sweep": sweep})
        assert (answer.status_code, answer.json()["code"]) == (404, "sweep_not_found")
    told = free.client.get("/jobs", params={"cursor": "x"}).json()["detail"]
    assert told == "cursor is not a `next_cursor` that a page of a list gave."
    for listed in ("/models", "/datasets"):
        told = free.client.get(listed, params={"sha256": "A" * 64}).json()["detail"]
        assert told == "sha256 is not a SHA-256: 64 digits, 0 to 9 and a to f."


def test_a_plan_says_which_gpus_are_not_here(free, monkeypatch, tmp_path):
    monkeypatch.setattr(estimates, "DEVICES", tmp_path)
    job = {**free.job, "resources": {"gpus": 2}}

    def told():
        return [notice for notice in free.client.post("/plans", json=job).json()["notices"] if "gpus" in notice]

    assert "has no GPU" in told()[0]
    for name in ("nvidia0", "nvidiactl"):
        (tmp_path / name).touch()
    assert "has 1" in told()[0]
    (tmp_path / "nvidia1").touch()
    assert not told()
