"""The pages without a browser: what they answer, to whom, and what they refuse."""

import logging
import re
import time
from html import unescape
from typing import get_args

import fakehub
import pytest
from fastapi.testclient import TestClient
from live import settings_of
from sqlmodel import select

from narrow_engine.events import Event
from narrow_engine.spec import JobSpec, SweepSpec
from service import auth, queue
from service.api.schemas import Phase
from service.app import create_app
from service.db.session import connect, migrate, open_session, tenant_session
from service.db.tables import AuditRow, DatasetRow, JobRow, ModelRow, new_id, now
from service.web.draft import draft_of, spec_of
from service.web.pages import SHOWN, STEPS

SITE = "http://127.0.0.1:8000"
OWN = {"Origin": SITE}
HOSTILE = "<script>alert(1)</script>\x1b[31m\"'\u202eeman" + "x" * 150


class House:
    """A service in this process that needs keys, with a model, a dataset and jobs of one tenant."""

    def __init__(self, folder, model, data):
        self.settings = settings_of(folder)
        self.settings.prepare()
        migrate(self.settings)
        self.engine = connect(self.settings)
        self.keys = {}
        with open_session(self.engine) as session:
            for tenant in ("ours", "theirs"):
                for role in auth.ROLES:
                    self.keys[f"{tenant} {role}"] = auth.create_key(session, role, role, tenant)[1]
            session.commit()
        self.app = create_app(self.settings, keys_needed=True)
        self.open = create_app(self.settings, keys_needed=False, host="127.0.0.1")
        api = TestClient(self.app, SITE, headers={"Authorization": f"Bearer {self.keys['ours write']}"})
        files = [("files", (file.name, file.read_bytes())) for file in sorted(model.iterdir())]
        self.model = api.post("/models", files=files, data={"name": "llama"}).json()["id"]
        self.dataset = api.post("/datasets", files={"file": (data.name, data.read_bytes())}).json()["id"]
        self.form = {"base": self.model, "target": self.dataset, "amount": "0.85", "more": '{"block_tokens": 64}', "once": "1"}
        self.spec = JobSpec.model_validate(
            {
                "base": {"model": self.model},
                "target": {"dataset": self.dataset},
                "budget": {"parameters": 0.85},
                "block_tokens": 64,
            }
        )

    def browser(self, who="ours admin"):
        """A browser whose user has logged in."""
        client = TestClient(self.app, SITE, headers={"Accept": "text/html", **OWN}, follow_redirects=False)
        assert client.post("/ui/login", data={"key": self.keys[who]}).status_code == 303
        return client

    def job(self, *events):
        """A job that runs, and has told these events."""
        with tenant_session(self.engine, "ours") as session:
            job = queue.enqueue(session, self.spec)
            session.commit()
        with open_session(self.engine) as session:
            held = queue.claim(session, 60, 3, only=job.id)
            told = [Event(seq=n, time=now(), **event) for n, event in enumerate(events, 1)]
            queue.ingest(session, job.id, held.lease_token, told)
        return job.id


@pytest.fixture(scope="module")
def house(tmp_path_factory, tiny_folder, python_file):
    return House(tmp_path_factory.mktemp("pages") / "data", tiny_folder, python_file)


@pytest.fixture(scope="module")
def sweep(house):
    spec = house.spec.model_dump(exclude={"method", "budget"}, exclude_defaults=True)
    with tenant_session(house.engine, "ours") as session:
        made = queue.enqueue_sweep(session, SweepSpec.model_validate({**spec, "budgets": [{"parameters": 0.85}]}))
        session.commit()
        return made.id


def every_page(house, sweep):
    job = house.job({"kind": "started", "phase": "load", "message": "", "data": {}})
    return {
        "/ui/jobs?status=running": "/jobs?status=running",
        f"/ui/jobs/{job}": f"/jobs/{job}",
        "/ui/new": "/jobs",
        f"/ui/new?like={job}": f"/jobs/{job}",
        "/ui/models": "/models",
        f"/ui/models/{house.model}": f"/models/{house.model}",
        "/ui/datasets": "/datasets",
        f"/ui/datasets/{house.dataset}": f"/datasets/{house.dataset}",
        "/ui/sweeps": "/sweeps",
        f"/ui/sweeps/{sweep}": f"/sweeps/{sweep}",
        "/ui/keys": "/keys",
    }


def test_every_page_is_html_with_a_strict_policy_and_the_same_as_json(house, sweep):
    browser = house.browser()
    for path, api in every_page(house, sweep).items():
        answer = browser.get(path)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8"), path
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=|javascript:", answer.text), path
        assert f'<link rel="alternate" type="application/json" href="{api}">' in answer.text, path
        found = browser.get(path, headers={"Accept": "application/json"}, follow_redirects=True)
        assert (found.url.raw_path.decode(), found.headers["content-type"]) == (api, "application/json"), path
        assert f'href="{api}">This as JSON' in answer.text
    assert browser.get("/").headers["location"] == "/ui/jobs"
    assert browser.get("/", headers={"Accept": "*/*"}).status_code == 404


def test_static_files_are_kept_for_ever_under_their_digest(house):
    browser = house.browser()
    links = set(re.findall(r'"(/ui/static/[^"]+)"', browser.get("/ui/jobs").text))
    assert len(links) >= 6
    stranger = TestClient(house.app, SITE)
    contract = stranger.get("/docs")
    assert "unsafe" not in contract.headers["content-security-policy"]
    assert "https://" not in contract.text
    assert stranger.get("/redoc").status_code == 404
    links |= set(re.findall(r'"(/ui/static/[^"]+)"', contract.text))
    for link in links:
        answer = stranger.get(link)
        assert answer.status_code == 200, link
        assert "immutable" in answer.headers["cache-control"]
        assert stranger.get(re.sub(r"static/\w+", "static/0123", link)).status_code == 404
    assert "--accent: #2762cf" in stranger.get(next(link for link in links if link.endswith("report.css"))).text
    assert stranger.get("/ui/static/x/..%2fpages.py").status_code == 404


def test_a_person_logs_in_with_a_key_and_out_again(house, caplog):
    caplog.set_level(logging.DEBUG)
    key = house.keys["ours write"]
    stranger = TestClient(house.app, SITE, headers={"Accept": "text/html", **OWN}, follow_redirects=False)
    asked = stranger.get("/ui/jobs?status=failed")
    assert (asked.status_code, asked.headers["location"]) == (303, "/ui/login?next=/ui/jobs%3Fstatus%3Dfailed")
    shown = stranger.get(asked.headers["location"])
    assert 'name="next" value="/ui/jobs?status=failed"' in shown.text
    refused = stranger.post("/ui/login", data={"key": "nrw_wrong"})
    assert (refused.status_code, "set-cookie" in refused.headers) == (401, False)
    assert "not one of this service" in refused.text
    assert "nrw_wrong" not in refused.text
    entered = stranger.post("/ui/login", data={"key": f" {key} ", "next": "/ui/jobs?status=failed"})
    assert (entered.status_code, entered.headers["location"]) == (303, "/ui/jobs?status=failed")
    cookie = entered.headers["set-cookie"]
    assert cookie == f"narrow_key={key}; HttpOnly; Path=/; SameSite=strict"
    assert stranger.get("/ui/jobs").status_code == 200
    assert stranger.get("/jobs").status_code == 200, "and the API knows the cookie, for streams and downloads"
    assert "ratelimit" in stranger.get("/jobs").headers, "and counts its requests"
    for elsewhere in ("//evil.example", "https://evil.example", "/ui/../../x", "/ui//evil.example", "/jobs"):
        assert stranger.post("/ui/login", data={"key": key, "next": elsewhere}).headers["location"] == "/ui/jobs"
    secure = stranger.post("/ui/login", data={"key": key}, headers={"Origin": "https://127.0.0.1:8000"})
    assert "Secure" in secure.headers["set-cookie"]
    assert key not in stranger.get("/ui/jobs").text
    left = stranger.post("/ui/logout")
    assert 'narrow_key=""' in left.headers["set-cookie"]
    assert stranger.get("/ui/jobs").status_code == 303
    assert key not in caplog.text
    assert stranger.post("/ui/login", data={"key": "x" * 5000}).status_code == 413


def test_nothing_changes_by_a_cookie_that_a_page_of_another_site_sends(house):
    """SameSite keeps cookies from other sites; but not from another port of this host, nor in every browser."""
    browser = house.browser()
    job = house.job()
    del browser.headers["Origin"]
    own = [{"Sec-Fetch-Site": "same-origin"}, OWN, {"Sec-Fetch-Site": "same-origin", "Origin": "https://behind.a.proxy"}]
    others = [
        {},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:9000"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site", **OWN},
        {"Sec-Fetch-Site": "none"},
    ]
    for path in (f"/jobs/{job}/pause", f"/ui/jobs/{job}/pause", "/keys", "/ui/keys", "/ui/logout", "/ui/login", "/ui/plans"):
        for headers in others:
            answer = browser.post(path, headers={**headers, "Accept": "*/*"})
            assert (answer.status_code, answer.json()["code"]) == (403, "cross_origin"), (path, headers)
    with tenant_session(house.engine, "ours") as session:
        assert session.get(JobRow, job).status == "running"
    for headers in own:
        assert browser.post(f"/jobs/{job}/pause", headers=headers).status_code == 200, headers
    by_header = {"Authorization": f"Bearer {house.keys['ours write']}"}
    assert TestClient(house.app, SITE).post(f"/jobs/{job}/resume", headers=by_header).status_code == 200
    nobody = TestClient(house.open, SITE, follow_redirects=False)
    assert nobody.post("/ui/keys", data={"name": "x"}).json()["code"] == "cross_origin", "also without keys, on loopback"
    rebound = {"Host": "evil.example", "Origin": "http://evil.example", "Sec-Fetch-Site": "same-origin"}
    assert nobody.post("/ui/keys", data={"name": "x"}, headers=rebound).json()["code"] == "wrong_host"
    assert nobody.get("/ui/jobs", headers={"Cookie": "narrow_key=of-another-service"}).status_code == 200
    assert nobody.get("/ui/login").headers["location"] == "/ui/jobs"


def test_a_role_sees_the_buttons_that_it_may_press(house, sweep):
    pages = every_page(house, sweep)
    job = next(path for path in pages if path.startswith("/ui/jobs/"))
    words = {
        job: ("Cancel", "Pause", "Use as template"),
        "/ui/new": ("Start", "Upload a model"),
        "/ui/models": ("Upload a model",),
        f"/ui/datasets/{house.dataset}": ("Use as target", "Delete"),
        f"/ui/sweeps/{sweep}": ("Cancel",),
    }
    for role in auth.ROLES:
        browser = house.browser(f"ours {role}")
        for path, buttons in words.items():
            text = browser.get(path).text
            for button in buttons:
                assert (f">{button}<" in text) == (role != "read"), (role, path, button)
        assert ('href="/ui/keys"' in browser.get("/ui/jobs").text) == (role == "admin")
        assert browser.get("/ui/keys").status_code == (200 if role == "admin" else 403)
    reader = house.browser("ours read")
    for path in (f"{job}/cancel", "/ui/jobs", "/ui/models", f"/ui/models/{house.model}/delete", "/ui/keys"):
        refused = reader.post(path, data={"x": "y"})
        assert (refused.status_code, "The key’s role" in refused.text or "The key&#39;s role" in refused.text) == (403, True), (
            path
        )
    assert "37" in reader.post("/ui/plans", data=house.form, headers={"HX-Request": "true"}).text, "but to plan changes nothing"


def test_a_tenant_sees_nothing_of_another(house, sweep):
    theirs = house.browser("theirs admin")
    for path in every_page(house, sweep):
        answer = theirs.get(path)
        if re.search(r"/(job|mdl|ds|swp)_|=job_", path):
            assert answer.status_code == 404, path
        else:
            assert not re.search(r"(job|mdl|ds|swp)_\w{26}", answer.text), path
            assert "llama" not in answer.text
    for kind in ("jobs", "datasets", "models", "sweeps"):
        assert f'<a href="/ui/{kind}">All {kind}</a>' in theirs.get(f"/ui/{kind}/x_1").text
    job = house.job()
    for path in (f"/ui/jobs/{job}/cancel", f"/ui/models/{house.model}/delete", f"/ui/sweeps/{sweep}/cancel"):
        assert theirs.post(path).status_code == 404
    assert "There is no model" in theirs.post("/ui/jobs", data=house.form).text


def test_what_users_wrote_is_text(house):
    """Names in the database are cleaned when they come; here they are not, nor is anything else."""
    with tenant_session(house.engine, "ours") as session:
        session.add(ModelRow(id=new_id("mdl"), name=HOSTILE, info=session.get(ModelRow, house.model).info, created_at=now()))
        data = session.get(DatasetRow, house.dataset).model_dump() | {"id": new_id("ds"), "name": HOSTILE, "preview": [HOSTILE]}
        session.add(DatasetRow(**data))
        auth.create_key(session, HOSTILE, "read")
        session.commit()
    figures = {"done": 1, "total": 1e400, "loss": HOSTILE, "tokens": HOSTILE}
    job = house.job(
        {"kind": "notice", "phase": "load", "message": HOSTILE, "data": {"code": HOSTILE}},
        {"kind": "progress", "phase": "recover", "message": HOSTILE, "data": {**figures, "total": 5}},
        {"kind": "finished", "phase": "load", "message": HOSTILE, "data": {"seconds": HOSTILE}},
    )
    browser = house.browser()
    for path in ("/ui/models", "/ui/datasets", f"/ui/datasets/{data['id']}", "/ui/new", "/ui/keys", f"/ui/jobs/{job}"):
        answer = browser.get(path)
        assert answer.status_code == 200, path
        assert "alert(1)" in answer.text, path
        assert "<script>alert" not in answer.text, path
        assert re.search(r"<bdi>[^<]*\u202e|<option[^>]*>[^<]*\u202e", answer.text), f"{path}: and its direction is its own"
    for path in ("/ui/jobs/<script>alert(1)</script>", "/ui/new?like=<script>alert(1)", "/ui/jobs?cursor=<script>alert(1)"):
        answer = browser.get(path)
        assert answer.status_code in (404, 422), path
        assert "<script>alert" not in answer.text


def test_a_job_is_made_with_a_form_alone(house):
    browser = house.browser("ours write")
    planned = browser.post("/ui/plans", data=house.form)
    assert planned.status_code == 200
    assert re.search(r"44.4\sk <i>→</i> 3\d\.?\d*\sk", planned.text), "the plan is on the page"
    assert f' value="{house.model}" selected>' in planned.text
    for changes, sentence in (
        ({"amount": "half"}, "'half' is no number: give the budget as one."),
        ({"amount": "0,5"}, "'0,5' can be read in two ways"),
        ({"amount": "0,500"}, "'0,500' can be read in two ways"),
        ({"amount": "-1"}, "The amount should be greater than 0."),
        ({"amount": "0.0001"}, "raise the budget"),
        ({"tokens": "1.5"}, "The number of tokens to train on should be"),
        ({"target": ""}, "There is no target dataset yet"),
        ({"more": "{"}, "The advanced options are not JSON"),
        ({"more": "[]"}, "not a JSON object"),
        ({"more": "[" * 100_000}, "The advanced options are not JSON"),
        ({"more": '{"seeds": 1}'}, "there is no option 'seeds' here: is it misspelt?"),
        ({"more": '{"budget": {"retention": 2}}'}, "budget.retention should be less than or equal to 1."),
        ({"kind": "bake"}, "The method should be"),
        ({"skill_name": "a/b", "skill_dataset": house.dataset, "skill_role": "watch"}, "The name of skill 1 is not a name"),
        ({"skill_name": "", "skill_dataset": house.dataset, "skill_role": "watch"}, "Skill 1 has no name"),
        ({"skill_name": "a", "skill_dataset": "", "skill_role": "watch"}, "The skill 'a' has no dataset"),
        ({"base": "mdl_" + "0" * 26}, "There is no model"),
    ):
        refused = browser.post("/ui/jobs", data={**house.form, **changes})
        assert (refused.status_code // 100, sentence in unescape(refused.text)) == (4, True), (changes, refused.text)
        assert f'name="amount" inputmode="decimal" value="{changes.get("amount", "0.85")}"' in refused.text, (
            "nothing typed is lost"
        )
        field = (
            "skill_" + ("dataset" if changes["skill_name"] == "a" else "name") + "-0"
            if "skill_name" in changes
            else next(iter(changes))
        )
        assert re.findall(r' id="([\w-]+)" aria-invalid="true" aria-describedby="(?:[\w-]+ )?wrong"', refused.text) == [field]
        assert f'autofocus><p><b>This has to be mended first:</b> <bdi><a href="#{field}">' in refused.text
        assert refused.text.count('id="wrong"') == 1
    assert "44,400 parameters" in browser.post("/ui/plans", data={**house.form, "amount": "44,400"}).text, "groups of three"
    made = browser.post("/ui/jobs", data=house.form)
    assert made.status_code == 303
    assert browser.post("/ui/jobs", data=house.form).headers["location"] == made.headers["location"], "pressed twice"
    other = browser.post("/ui/jobs", data={**house.form, "amount": "0.9"})
    assert (other.status_code, other.headers["location"] == made.headers["location"]) == (303, False)
    job = browser.get(made.headers["location"].removeprefix("/ui"), headers={"Accept": "application/json"}).json()
    assert (job["spec"]["budget"]["parameters"], job["spec"]["block_tokens"]) == (0.85, 64)
    cancelled = browser.post(f"/ui/jobs/{job['id']}/cancel")
    assert cancelled.headers["location"] == f"/ui/jobs/{job['id']}#state"
    again = browser.post(f"/ui/jobs/{job['id']}/pause")
    assert (again.status_code, "there is nothing to pause" in again.text) == (409, True)
    assert browser.post(f"/ui/jobs/{job['id']}/delete").headers["location"] == "/ui/jobs"
    assert browser.get(f"/ui/jobs/{job['id']}").status_code == 404


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"budget": {"retention": 0.9}, "seed": 7, "relearn": None, "locality": False, "dtype": "bfloat16"},
        {"budget": {"keep": {"neuron": 0.5}}, "priority": 3, "resources": {"gpus": 2}, "controls": []},
        {"method": {"kind": "distill", "recover": {"tokens": 5000, "temperature": 1}}, "export": ["onnx"]},
        {"method": {"kind": "distill", "init": "cut", "recover": {"objective": "mixed"}}},
        {"method": {"kind": "scratch", "units": ["neuron", "kv_group"]}, "budget": {"bytes": 5_000_000}},
        {"method": {"kind": "export"}, "budget": None},
        {"method": {"recover": {"curriculum": {"until": 0.3}}}, "broad": {"dataset": "ds_" + "1" * 26}},
        {"skills": [{"name": "a", "dataset": "ds_" + "2" * 26, "role": "forget"}, {"name": "b", "dataset": "ds_" + "3" * 26}]},
        {
            "skills": [{"name": "a", "dataset": "ds_" + "2" * 26, "answer": {"column": "y"}}],
            "teacher": {"model": "mdl_" + "4" * 26},
        },
        {"target": {"dataset": "ds_" + "5" * 26, "answer": {"column": "y", "tokens": 3}}},
    ],
    ids=str,
)
def test_a_job_that_is_a_template_makes_the_same_spec(changes):
    given = {"base": {"model": "mdl_" + "0" * 26}, "target": {"dataset": "ds_" + "0" * 26}, "budget": {"parameters": 0.5}}
    spec = JobSpec.model_validate(
        {name: value for name, value in {**given, **changes}.items() if value is not None or name == "relearn"}
    )
    assert spec_of(draft_of(JobSpec.model_validate(spec.model_dump(mode="json")))) == spec


def test_uploads_by_a_form_alone(house):
    browser = house.browser("ours write")
    bad = {"file": ("bad.jsonl", b'{"text": "fine"}\n{oops\n')}
    refused = browser.post("/ui/datasets", files=bad, data={"name": "mine", "column": "text"})
    assert (refused.status_code, "line 2 of bad.jsonl" in refused.text, 'value="mine"' in refused.text) == (422, True, True)
    kept = browser.post("/ui/datasets", files=bad, data={"name": "", "column": "text", "bad_rows": "skip"})
    assert kept.status_code == 303
    shown = browser.get(kept.headers["location"])
    assert ("fine" in shown.text, "line 2 of bad.jsonl" in shown.text) == (True, True)
    to_new = browser.post(
        "/ui/datasets", files=bad, data={"column": "text", "bad_rows": "skip", "to_new": "true", "base": house.model}
    )
    picked = browser.get(to_new.headers["location"])
    assert f' value="{house.model}" selected>' in picked.text
    assert len(re.findall(r' value="ds_\w+" selected>', picked.text)) == 1
    choices = unescape(picked.text).partition('<select id="target"')[2].partition("</select>")[0]
    alike = re.findall(r"\u2068bad\u2069 · ([^<]*)</option>", choices)
    assert len(alike) == len(set(alike)) == 2, "two of one name are told apart"
    unfit = browser.post("/ui/datasets", files=bad, data={"name": "a/b", "column": "text", "bad_rows": "skip"})
    assert (unfit.status_code, "is not a name: it takes" in unfit.text) == (422, True)
    refused = browser.post("/ui/models", files={"files": ("model.bin", b"x")}, data={"name": "mine"})
    assert (refused.status_code, "model.bin" in refused.text, 'value="mine"' in refused.text) == (422, True, True)
    assert browser.post(f"{shown.url.path}/delete").headers["location"] == "/ui/datasets"


def test_a_model_is_fetched_from_the_hub_where_there_is_one(house, tiny_folder, caplog):
    browser = house.browser("ours write")
    assert "Fetch a model" not in browser.get("/ui/models").text
    assert "has set no NARROW_HUB" in browser.post("/ui/fetches", data={"hub": "owner/tiny"}).text
    with fakehub.serving() as hub:
        files = {path.name: path.read_bytes() for path in sorted(tiny_folder.iterdir())}
        hub.repos["owner/tiny"] = fakehub.Repo(files, token="hf_secret")
        house.settings.hub = hub.url
        assert f"Fetch a model from {hub.url}" in browser.get("/ui/models").text
        for wrong, sentence in (
            ({"hub": "tiny"}, "hub is not the name of a model on a hub"),
            ({"hub": "owner/tiny", "token": "no\nsecret"}, "token"),
            ({"hub": "owner/tiny"}, "owner/tiny"),
        ):
            refused = browser.post("/ui/fetches", data=wrong)
            assert (refused.status_code // 100, sentence in unescape(refused.text)) == (4, True), wrong
            assert f'name="hub" required maxlength="200" value="{wrong["hub"]}"' in refused.text
        made = browser.post("/ui/fetches", data={"hub": "owner/tiny", "revision": "", "token": "hf_secret"})
        house.settings.hub = ""
    assert made.status_code == 303, made.text
    assert "owner/tiny at" in browser.get(made.headers["location"]).text
    assert "hf_secret" not in caplog.text + made.text


def test_a_key_is_shown_once_and_the_audit_has_the_words_of_the_api(house):
    browser = house.browser()
    made = browser.post("/ui/keys", data={"name": "CI", "role": "read", "days": "1"})
    key = re.search(r"nrw_[\w-]{43}", made.text)[0]
    assert made.status_code == 201
    assert key not in browser.get("/ui/keys").text
    api = TestClient(house.app, SITE, headers={"Authorization": f"Bearer {key}"})
    assert api.get("/jobs").status_code == 200
    row = browser.get("/keys", headers={"Accept": "application/json"}).json()["data"][0]
    assert (row["name"], row["role"]) == ("CI", "read")
    assert browser.post(f"/ui/keys/{row['id']}/revoke").status_code == 303
    assert api.get("/jobs").status_code == 401
    for wrong, sentence in (({"name": ""}, "name should"), ({"name": "x", "days": "soon"}, "no number of days")):
        refused = browser.post("/ui/keys", data=wrong)
        assert (refused.status_code, sentence in unescape(refused.text)) == (422, True), wrong
    with tenant_session(house.engine, "ours") as session:
        found = session.exec(select(AuditRow).where(AuditRow.path.like("/ui/keys%"))).all()
    assert [(line.operation, line.key is not None) for line in found] == [("create_key", True), ("revoke_key", True)]


def test_a_job_tells_how_far_it_is(house):
    told = [
        {"kind": "started", "phase": "load", "message": "", "data": {}},
        {"kind": "finished", "phase": "load", "message": "", "data": {"seconds": 1.5, "reused": False}},
        {"kind": "started", "phase": "recover", "message": "", "data": {}},
        {"kind": "progress", "phase": "recover", "message": "", "data": {"done": 0, "total": 40, "tokens": 0, "validation": 4.0}},
        *(
            {
                "kind": "progress",
                "phase": "recover",
                "message": "",
                "data": {"done": n, "total": 40, "tokens": 256 * n, "loss": 3 / n},
            }
            for n in (1, 2, 3, 2, 3, 10)  # from a checkpoint on it tells again
        ),
        {"kind": "notice", "phase": "recover", "message": "something fell back", "data": {}},
    ]
    browser = house.browser()
    page = browser.get(f"/ui/jobs/{house.job(*told)}").text
    assert re.search(r'<li class="done"><b>Read</b><span>1.5 s<', page)
    assert re.search(r'<li class="at" aria-current="step"><b>Recover</b><span>recover<', page)
    assert '<li class="to-come"><b>Export</b>' in page
    assert 'max="40" value="10"' in page
    assert "left of this phase" in page
    assert re.findall(r'data-tokens="(\d+)"', page) == ["0", "256", "512", "768", "2560"]
    assert "10 of 40, loss 0.300" in page
    job = re.search(r"/jobs/(job_\w+)/events\?after=(\d+)", page)
    assert int(job[2]) == len(told) + 2
    only = browser.get(f"/ui/jobs/{job[1]}?kind=notice").text
    assert ("something fell back" in only, "10 of 40, loss" in only) == (True, False)
    assert "as planned" in page
    with tenant_session(house.engine, "ours") as session:
        row = session.get(JobRow, job[1])
        row.status, row.result_model = "succeeded", house.model
        session.commit()
    done = browser.get(f"/ui/jobs/{job[1]}").text
    assert ("as planned" in done, bool(re.search(r"44.4\sk <i>→</i> 44.4\sk", done))) == (False, True), "only what came out"
    assert {"", *(phase for phases in STEPS.values() for phase in phases)} == set(get_args(Phase))


def test_a_thousand_jobs_are_a_quick_page(house):
    with tenant_session(house.engine, "theirs") as session:
        spec = house.spec.model_dump(mode="json")
        for _ in range(1000):
            session.add(JobRow(id=new_id("job"), status="succeeded", spec=spec, created_at=now(), started_at=now(), seconds=3.0))
        session.commit()
    browser = house.browser("theirs read")
    browser.get("/ui/jobs")
    began = time.perf_counter()
    page = browser.get("/ui/jobs").text
    assert time.perf_counter() - began < 1
    seen = re.findall(r'<tr id="(job_\w+)"', page)
    assert len(seen) == SHOWN
    older = browser.get(unescape(re.search(r'href="(/ui/jobs\?cursor=[^"]+)" rel="next"', page)[1])).text
    assert min(seen) > max(re.findall(r'<tr id="(job_\w+)"', older))
    assert "No job is like this" in browser.get("/ui/jobs?status=failed").text
