"""The pages as people use them, in a real Chromium: no page logs an error, and none asks any other host for anything."""

import hashlib
import json
import re
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from live import QUICK, SLOW, running, settings_of, spec_of
from sqlmodel import select

from narrow_engine.events import Event
from narrow_engine.spec import JobSpec, SweepSpec
from service import auth, queue
from service.db.session import connect, migrate, open_session
from service.db.tables import ArtifactRow, DatasetRow, JobRow, ModelRow, OutcomeRow, new_id, now

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install '.[dev]'")
expect = playwright.expect

FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
MAYBE = 60_000
"""Milliseconds that something may take which a job does first."""
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\x1b[31m\u202e" + "x" * 150


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as started:
        names = ("chromium", "chromium-browser", "google-chrome")
        found = next(filter(None, map(shutil.which, names)), started.chromium.executable_path)
        if not Path(found).exists():
            pytest.skip(f"There is neither {' nor '.join(names)} on the path, nor Playwright's own: make browser")
        browser = started.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def browse(chromium):
    """Opens a browser window of its own on a service, and looks at what it logs and where it goes."""
    windows, wrong = [], []

    def open_window(url, key=None, refusing=(), **options):
        def note(message):
            # Browsers call it an error when a server refuses what was sent.
            if message.type == "error" and message.location["url"] not in [f"{url}{path}" for path in refusing]:
                wrong.append(message.text)

        context = chromium.new_context(base_url=url, locale="en-GB", timezone_id="Asia/Tokyo", **options)
        windows.append(context)
        context.set_default_timeout(20_000)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", note)
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        context.on("request", lambda request: None if request.url.startswith((url, "data:")) else wrong.append(request.url))
        if key:
            page.goto("/ui/login")
            page.get_by_label("API key").fill(key)
            page.get_by_role("button", name="Log in").click()
            page.wait_for_url("**/ui/jobs")
        return page

    yield open_window
    for window in windows:
        window.close()
    assert wrong == []


class Still:
    """A service that needs keys and has no worker, with things in it of every kind, as they are in the middle of their lives."""

    def __init__(self, data, model, text):
        settings = settings_of(data)
        settings.prepare()
        migrate(settings)
        engine = connect(settings)
        with open_session(engine) as session:
            self.keys = {role: auth.create_key(session, role, role)[1] for role in auth.ROLES}
            auth.create_key(session, HOSTILE[:100].replace("\x1b", ""), "read")
            session.commit()
        self.service = running(data, workers=0, NARROW_KEYS="always")
        self.live = self.service.__enter__()
        self.live.http.headers["Authorization"] = f"Bearer {self.keys['admin']}"
        self.url = self.live.url
        spec = spec_of(self.live, model, text, QUICK)
        with open_session(engine) as session:
            session.exec(select(ModelRow)).one().name = "base"
            dataset = session.exec(select(DatasetRow)).one().model_dump()
            hostile = {"id": new_id("ds"), "name": HOSTILE, "preview": [HOSTILE] * 3, "skipped_reason": HOSTILE}
            session.add(DatasetRow(**dataset | hostile))
            job = queue.enqueue(session, JobSpec.model_validate(spec))
            ended = queue.enqueue(session, JobSpec.model_validate({**spec, "target": {"dataset": hostile["id"]}}))
            sweep = {
                **spec,
                "budgets": [{"parameters": 0.9}, {"parameters": 0.8}],
                "methods": {"prune": QUICK, "scratch": {"kind": "scratch"}},
            }
            del sweep["budget"], sweep["method"]
            found = queue.enqueue_sweep(session, SweepSpec.model_validate(sweep))
            session.commit()
            for number, point in enumerate(session.exec(select(JobRow).where(JobRow.sweep == found.id)).all()):
                point.status, point.phase = "succeeded", "report"
                figures = {
                    "target": "python",
                    "base_parameters": 44416,
                    "base_loss": 3.0,
                    "cut_loss": 3.6,
                    "tokens": 1024,
                    "seconds": 9,
                }
                figures |= {"parameters": (40000, 37000, 38000, 31000)[number], "loss": 3.1 + 0.1 * number, "curve": []}
                session.add(OutcomeRow(job_id=point.id, outcome={**figures, "retention": {"value": 0.9, "low": 0.8, "high": 1}}))
            session.commit()
            told = [("started", "load", {}), ("finished", "load", {"seconds": 1.5}), ("started", "recover", {})]
            curve = [{"done": n, "total": 40, "tokens": 256 * n, "loss": 4 / n, "validation": 5 / n} for n in range(1, 9)]
            told += [("progress", "recover", data) for data in curve]
            self.tell(session, job.id, [*told, ("notice", "recover", {})], "something was rounded")
            self.tell(session, ended.id, [("notice", "load", {})], HOSTILE)
            token = session.get(JobRow, ended.id).lease_token
            artifact = ArtifactRow(job_id=ended.id, path="model/x.safetensors", bytes=1, sha256="0" * 64, media_type="text/plain")
            queue.finish(session, ended.id, token, "failed", {"code": "bad", "message": HOSTILE}, [artifact])
        self.hostile, self.job, self.ended, self.sweep = hostile["id"], job.id, ended.id, found.id
        self.engine, self.spec = engine, spec
        self.paths = {
            "jobs": "/ui/jobs",
            "job": f"/ui/jobs/{job.id}",
            "failed job": f"/ui/jobs/{ended.id}",
            "new": "/ui/new",
            "new, filled": f"/ui/new?like={job.id}",
            "sweeps": "/ui/sweeps",
            "sweep": f"/ui/sweeps/{found.id}",
            "models": "/ui/models",
            "model": f"/ui/models/{spec['base']['model']}",
            "datasets": "/ui/datasets",
            "dataset": f"/ui/datasets/{hostile['id']}",
            "keys": "/ui/keys",
        }

    @staticmethod
    def tell(session, job_id, told, words):
        held = queue.claim(session, 3600, 3, only=job_id)
        events = [
            Event(seq=seq, time=now(), kind=kind, phase=phase, message=words if kind == "notice" else "", data=data)
            for seq, (kind, phase, data) in enumerate(told, 1)
        ]
        queue.ingest(session, job_id, held.lease_token, events)


@pytest.fixture(scope="module")
def still(tmp_path_factory, tiny_folder, python_file):
    made = Still(tmp_path_factory.mktemp("still") / "data", tiny_folder, python_file)
    yield made
    made.service.__exit__(None, None, None)


def test_from_files_to_the_report(service, browse, tiny_folder, python_file, tmp_path):
    """Upload both, see the plan change, start, watch it to the end on one page, read the report, download and compare."""
    page = browse(service.url, refusing=["/datasets"])
    page.goto("/")
    page.get_by_role("link", name="Make the first one").click()
    model, data = page.locator("details.upload").nth(0), page.locator("details.upload").nth(1)
    model.get_by_label("Files").set_input_files(sorted(tiny_folder.iterdir()))
    model.get_by_label("Name").fill("llama")
    model.get_by_role("button", name="Upload").click()
    expect(model.get_by_text("llama is here, and picked.")).to_be_visible(timeout=MAYBE)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{oops\n')
    data.get_by_label("File").set_input_files(bad)
    data.get_by_role("button", name="Upload").click()
    expect(data.locator(".told")).to_contain_text("line 2 of bad.jsonl")
    data.get_by_label("File").set_input_files(python_file)
    data.get_by_role("button", name="Upload").click()
    expect(data.get_by_text("python is here, and picked.")).to_be_visible()

    plan = page.get_by_role("region", name="Plan")
    expect(plan).to_contain_text("44.4")
    page.get_by_label("Amount").fill("0.0001")
    expect(plan.get_by_role("alert")).to_contain_text("raise the budget")
    expect(page.get_by_label("Amount")).to_have_attribute("aria-invalid", "true")
    expect(page.get_by_label("Amount")).to_have_accessible_description(re.compile("^Up to 1 .* raise the budget"))
    page.get_by_label("Amount").fill("0.85")
    expect(plan.get_by_role("alert")).to_be_hidden()
    expect(page.locator("[aria-invalid]")).to_have_count(0)
    page.get_by_label("onnx", exact=True).uncheck()
    page.get_by_text("Advanced").click()
    more = {
        "method": {**QUICK, "refit": False, "importance": "magnitude"},
        "controls": [],
        "block_tokens": 64,
        "skill_tokens": 1024,
    }
    page.get_by_label("Any other option").fill(json.dumps(more))
    page.get_by_label("Tokens to train on").fill("1024")
    expect(plan).to_contain_text("24 kept in each layer")
    page.get_by_role("button", name="Start").click()
    page.wait_for_url("**/ui/jobs/job_*")

    expect(page.get_by_role("heading", level=1)).to_have_text("llama for python")
    page.evaluate("window.sameDocument = true")
    expect(page.locator(".steps [aria-current=step]")).to_be_visible(timeout=MAYBE)
    expect(page.locator("#loss canvas").first).to_be_visible(timeout=MAYBE)
    expect(page.get_by_role("status")).to_have_text("succeeded", timeout=MAYBE)
    assert page.evaluate("window.sameDocument"), "it was brought up to date, not loaded again"
    expect(page.locator("#loss tbody tr").last).to_contain_text("1,024")
    expect(page.locator(".steps .done")).to_have_count(6)
    expect(page.locator("time").first).to_have_text(re.compile(r"^\d+ \w+ \d{4}, \d\d:\d\d$"))

    row = page.locator("#files tr", has_text="model.safetensors")
    with page.expect_download() as download:
        row.get_by_role("link").click()
    body = Path(download.value.path()).read_bytes()
    expect(row.locator(".digest")).to_have_text(hashlib.sha256(body).hexdigest())
    page.get_by_role("link", name="Open the report").click()
    expect(page.locator(".eyebrow")).to_contain_text("Narrow report")
    page.go_back()
    page.get_by_role("link", name="The model", exact=True).click()
    expect(page.get_by_role("heading", level=1)).to_have_text("python from llama")


def test_a_job_is_paused_goes_on_and_is_cancelled(service, browse, tiny_folder, python_file):
    spec = spec_of(service, tiny_folder, python_file, SLOW)
    gone = []
    page = browse(service.url, refusing=gone)
    page.goto("/ui/jobs")
    job = service.http.post("/jobs", json=spec).json()["id"]
    row = page.locator(f"#{job}")
    expect(row).to_contain_text("running", timeout=MAYBE)  # the list came up to date by itself
    row.get_by_role("link").click()
    state = page.get_by_role("status")
    page.get_by_role("button", name="Pause").press("Enter")
    page.wait_for_url("**/ui/jobs/job_*#state")
    expect(state).to_be_focused()
    expect(state).to_have_text("paused", timeout=MAYBE)
    page.get_by_role("button", name="Resume").click()
    expect(state).to_contain_text("running", timeout=MAYBE)
    page.get_by_text("Cancel", exact=True).press("Enter")
    page.get_by_role("button", name="Cancel this job").press("Enter")
    expect(state).to_have_text("cancelled", timeout=MAYBE)
    expect(page.get_by_text("Cancel", exact=True)).to_have_count(0)
    page.get_by_text("Delete", exact=True).click()
    gone += [f"/ui/jobs/{job}", f"/jobs/{job}/events"]  # what the page asks while it is being deleted
    page.get_by_role("button", name="Delete this job").click()
    page.wait_for_url("**/ui/jobs")
    expect(row).to_have_count(0)


def test_keys_and_roles(still, browse):
    page = browse(still.url)
    page.goto(still.paths["job"])
    page.wait_for_url(re.compile(r"/ui/login\?next="))
    page.get_by_label("API key").fill(still.keys["admin"])
    page.get_by_role("button", name="Log in").click()
    page.wait_for_url(f"**{still.paths['job']}")
    expect(page.get_by_text("Cancel", exact=True)).to_be_visible()
    assert page.evaluate("document.cookie") == "", "no script can read the key"
    page.get_by_role("link", name="Keys").click()
    page.get_by_label("Name").fill("a reader")
    page.get_by_label("Role").select_option("read")
    page.get_by_role("button", name="Make the key").click()
    made = page.locator("#secret").inner_text()
    page.get_by_role("button", name="Log out").click()
    page.wait_for_url("**/ui/login")

    reader = browse(still.url, made)
    reader.goto(still.paths["job"])
    expect(reader.get_by_role("heading", level=1)).to_have_text("base for python")
    for name in ("Cancel", "Pause"):
        expect(reader.get_by_text(name, exact=True)).to_have_count(0)
    expect(reader.get_by_role("link", name="Keys")).to_have_count(0)
    reader.goto("/ui/jobs")
    reader.context.clear_cookies()
    reader.wait_for_url(re.compile(r"/ui/login\?"))  # a page that is open notices that its key is gone


def test_a_click_on_the_frontier_opens_the_run(still, browse):
    page = browse(still.url, still.keys["read"])
    page.goto(still.paths["sweep"])
    plot = page.locator("#frontier .u-over")
    expect(plot).to_be_visible()
    expect(page.locator("#frontier .u-legend")).to_contain_text("scratch, beaten")
    expect(page.locator("#points .best")).to_have_count(3)
    point = page.locator("#points tr[data-method]").nth(1)
    job = point.get_attribute("id")
    # Where its mark is: each axis goes a little beyond the least and the most that is shown, the base among it.
    box, least, most = plot.bounding_box(), 31_000 - 0.06 * 44_416, 1.06 * 44_416
    x = box["width"] * (37_000 - least) / (most - least)
    y = box["height"] * (3.44 - 3.2) / (3.44 - 2.96)
    page.mouse.click(box["x"] + x, box["y"] + y)
    page.wait_for_url(f"**/ui/jobs/{job}")
    page.go_back()
    page.get_by_label("Against size").select_option("retention")
    expect(plot).to_be_visible()
    page.locator("#points a").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/ui/jobs/job_*")


def test_without_scripts_every_page_is_there_and_forms_work(still, browse):
    page = browse(still.url, still.keys["admin"], refusing=["/ui/jobs"], java_script_enabled=False)
    for name, path in still.paths.items():
        page.goto(path)
        expect(page.get_by_role("heading", level=1)).to_be_visible()
        assert page.get_by_role("link", name="This as JSON").count() == 1, name
    page.goto(still.paths["job"])
    expect(page.locator("#loss tbody tr")).to_have_count(8)
    page.get_by_role("link", name="notice").click()
    expect(page.locator("#events tbody tr")).to_have_count(1)
    page.goto("/ui/new")
    page.get_by_label("Base model").select_option(still.spec["base"]["model"])
    page.get_by_label("Target").select_option(still.spec["target"]["dataset"])
    page.get_by_text("Advanced").click()
    page.get_by_label("Method").select_option("export")
    expect(page.get_by_label("Amount")).to_be_hidden()
    page.get_by_label("Method").select_option("prune")
    page.get_by_label("Any other option").fill('{"block_tokens": 64')
    page.get_by_role("button", name="Start").click()
    expect(page.get_by_role("alert")).to_be_focused()
    expect(page.get_by_role("alert")).to_be_in_viewport()
    page.get_by_role("alert").get_by_role("link").click()
    expect(page.get_by_label("Any other option")).to_be_focused()
    expect(page.get_by_label("Any other option")).to_have_accessible_description(re.compile("are not JSON"))
    page.get_by_label("Any other option").fill('{"block_tokens": 64}')
    page.get_by_label("Amount").fill("0.001")
    page.get_by_role("button", name="Show the plan").click()
    expect(page.get_by_role("alert")).to_contain_text("raise the budget")
    page.get_by_label("Amount").fill("0.9")
    page.get_by_role("button", name="Show the plan").click()
    expect(page.get_by_role("region", name="Plan")).to_contain_text("estimated peak")
    page.get_by_role("button", name="Start").click()
    page.wait_for_url("**/ui/jobs/job_*")
    page.get_by_text("Cancel", exact=True).click()
    page.get_by_role("button", name="Cancel this job").click()
    expect(page.get_by_role("status")).to_have_text("cancelled")
    page.goto("/ui/datasets")
    page.get_by_text("Upload a dataset").click()
    page.get_by_label("File").set_input_files({"name": "more.txt", "mimeType": "text/plain", "buffer": b"some text\n"})
    page.get_by_role("button", name="Upload").click()
    page.wait_for_url("**/ui/datasets/ds_*")
    expect(page.locator("pre")).to_contain_text("some text")


def test_axe_finds_nothing_wrong_in_light_or_dark(still, browse):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed: pip install '.[dev]'").Axe()
    page = browse(still.url)
    found = {}

    def look(name):
        expect(page.get_by_role("heading", level=1)).to_be_visible()
        # All rules, and of the dark theme that one which looks at colours.
        for scheme, options in (("light", {}), ("dark", {"runOnly": ["color-contrast"]})):
            page.emulate_media(color_scheme=scheme)
            for violation in axe.run(page, options=options).response["violations"]:
                found[f"{name}, {scheme}: {violation['id']}"] = [node["html"][:200] for node in violation["nodes"]]

    page.goto("/ui/login")
    look("login")
    page.get_by_label("API key").fill(still.keys["admin"])
    page.get_by_role("button", name="Log in").click()
    page.wait_for_url("**/ui/jobs")
    for name, path in still.paths.items():
        page.goto(path)
        page.evaluate("for (const details of document.querySelectorAll('details')) details.open = true")
        look(name)
    assert found == {}


def test_a_narrow_phone_never_scrolls_sideways_and_a_keyboard_gets_everywhere(still, browse):
    page = browse(still.url, still.keys["admin"], viewport={"width": 360, "height": 740})
    for name, path in still.paths.items():
        page.goto(path)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, name
    page.goto("/ui/jobs")
    page.keyboard.press("Tab")
    skip = page.get_by_role("link", name="Skip to the content")
    expect(skip).to_be_focused()
    expect(skip).to_be_in_viewport()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    link = page.locator(f"#{still.job} a")
    link.focus()
    with page.expect_response(lambda answer: urlsplit(answer.url).path == "/ui/jobs"):
        pass  # the list comes up to date
    with page.expect_response(lambda answer: urlsplit(answer.url).path == "/ui/jobs"):
        expect(link).to_be_focused()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_the_contract_is_there_without_the_internet(still, browse):
    page = browse(still.url)
    page.goto("/docs")
    page.locator("#operations-plans-create_plan button").first.click()
    expect(page.get_by_text("what is kept, and estimates of memory").first).to_be_visible()


def test_what_users_wrote_does_nothing(still, browse):
    """Names in the database are cleaned when they come; here they are not. That nothing is run is seen at the end of the test."""
    page = browse(still.url, still.keys["admin"])
    for name in ("jobs", "failed job", "dataset", "datasets", "new", "keys", "sweeps"):
        page.goto(still.paths[name])
        expect(page.get_by_role("heading", level=1)).to_be_visible()
        assert page.locator("img, main script").count() == 0, name
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
    page.goto(still.paths["failed job"])
    expect(page.locator(".refusal")).to_contain_text("<script>alert(1)</script>")
