"""A job's process that somebody has taken over: whatever it writes, its job fails with a sentence, and nothing else happens."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from live import settings_of
from test_quotas import CONFIG
from test_tenants import INFO, SPEC

from narrow_engine.spec import JobSpec
from service import queue, told, worker
from service.app import create_app
from service.db.session import connect, migrate, open_session
from service.db.tables import DatasetRow, ModelRow, now
from service.runners import local

PRELUDE = """
import json, os, sys
def tell(seq=1, **changed):
    event = {"seq": seq, "time": "2026-01-01T00:00:00Z", "kind": "progress", "phase": "load", "message": "a", "data": {}}
    with open("events.jsonl", "a") as file:
        file.write(json.dumps({**event, **changed}) + "\\n")
def fail(content):
    with open("failure.json", "w") as file:
        file.write(content if isinstance(content, str) else json.dumps(content))
    sys.exit(1)
"""


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A service in this process, whose jobs are Python programs in their run folders, not shut in."""
    settings = settings_of(tmp_path_factory.mktemp("told") / "data").model_copy(update={"max_attempts": 1})
    settings.prepare()
    migrate(settings)
    engine = connect(settings)
    with open_session(engine) as session:
        info = {**INFO, "config": CONFIG, "dtype": "F32", "bytes": 100, "parameters": 50_000}
        session.add(ModelRow(id=SPEC["base"]["model"], name="m", info=info, stored=100, created_at=now()))
        data = {"file": "d.jsonl", "text_column": "text", "documents": 900, "sha256": "0", "preview": []}
        session.add(DatasetRow(id=SPEC["target"]["dataset"], name="d", bytes=90_000, stored=50, created_at=now(), **data))
        session.commit()
    client = TestClient(create_app(settings, keys_needed=False), raise_server_exceptions=False, base_url="http://localhost")

    def run(code: str) -> dict:
        def start(settings, spec, inputs, folder, *_):
            return subprocess.Popen([sys.executable, "-c", PRELUDE + code], cwd=folder, start_new_session=True)

        with open_session(engine) as session:
            job = queue.enqueue(session, JobSpec.model_validate(SPEC)).id
            session.commit()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(local, "start", start)
            worker.work_on(settings, job, threading.Event())
        for path in ("/jobs", f"/jobs/{job}", f"/jobs/{job}/events", f"/jobs/{job}/artifacts", "/models", "/usage"):
            assert client.get(path).status_code == 200, path
        assert not (settings.tenants / "default" / "runs" / job).exists()
        return client.get(f"/jobs/{job}").json()

    run.client, run.settings = client, settings
    return run


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("tell(phase='hack')", "phase"),
        ("tell(kind='state', data={'status': 'succeeded'})", "kind"),
        ("tell(seq=2**40)", "seq"),
        ("tell(seq=10**8)", "more than"),
        ("tell(message=5)", "message"),
        ("tell(data=[])", "data"),
        ("tell(data={'loss': float('nan')})", "ValueError"),
        ("tell(data={'loss': {'a': [float('-inf')]}})", "ValueError"),
        ("tell(time='0001-01-01T00:00:00+14:00')", "year 1"),
        ("tell(time='9999-12-31T23:59:59-14:00')", "year 9999"),
        ("tell(time='2026-01-01T00:00:00')", "time"),
        ("tell(message='\\ud800')", "an event is not"),
        ("open('events.jsonl', 'w').write('[' * 100000 + '\\n')", "an event is not"),
        ("open('events.jsonl', 'wb').write(b'\\xff\\n')", "an event is not"),
        ("tell(message='a' * 300000)", "KiB"),
        ("open('events.jsonl', 'w').write('a' * 3000000)", "KiB"),
        ("os.truncate(os.open('events.jsonl', os.O_CREAT | os.O_WRONLY), 2**40)", "KiB"),
        ("os.mkfifo('events.jsonl')", "no file"),
        ("os.symlink('/etc/passwd', 'events.jsonl')", "cannot be opened"),
        ("os.mkdir('events.jsonl')", "no file"),
    ],
)
def test_events_that_are_none_end_the_job(house, code, words):
    job = house(code)
    assert (job["status"], job["error"]["code"]) == ("failed", "engine_error")
    assert words in job["error"]["message"]


def test_a_folder_that_is_too_deep_to_look_through_is_removed_all_the_same(house):
    assert house("for _ in range(3000): os.mkdir('d'); os.chdir('d')")["status"] == "failed"
    job = house("os.mkdir('result'); os.chdir('result')\nfor _ in range(3000): os.mkdir('d'); os.chdir('d')")
    assert "of more than 300 bytes" in job["error"]["message"]


@pytest.mark.parametrize(
    "data", [{"done": "x"}, {"done": -1}, {"done": 1.5}, {"done": {"a": 1}}, {"done": 1, "total": 10**30}, {"done": True}]
)
def test_progress_that_is_none_is_not_shown(house, data):
    job = house(f"tell(data={data!r}); fail({{'code': 'bad_row', 'message': 'a'}})")
    assert job["error"]["code"] == "bad_row"
    event = house.client.get(f"/jobs/{job['id']}/events").json()["data"][2]
    assert told.progress(told.Event.model_validate(event)) is None


def test_what_a_database_does_not_keep_is_replaced(house):
    job = house(
        "tell(message='a\\0b', data={'a\\0': '\\0'}); fail({'code': 'bad_row', 'message': 'c\\0\\x1b[31md' + 'x' * 9999})"
    )
    assert job["error"]["message"].startswith("c\ufffd\ufffd[31mdxxx")
    assert len(job["error"]["message"]) == told.MESSAGE
    event = house.client.get(f"/jobs/{job['id']}/events").json()["data"][2]
    assert (event["message"], event["data"]) == ("a\ufffdb", {"a\ufffd": "\ufffd"})


@pytest.mark.parametrize(
    "code",
    [
        "fail({'code': 5, 'message': 'a'})",
        "fail({'code': 'bad_row', 'message': ['a']})",
        "fail({'code': '<script>', 'message': 'a'})",
        "fail({'code': 'a' * 41, 'message': 'a'})",
        "fail('[' * 60000)",
        "fail('[]')",
        "fail({'code': 'bad_row', 'message': 'a' * 100000})",
        'fail(\'{"code": "bad_row", "message": "\\\\ud800"}\')',
        "os.mkfifo('failure.json'); sys.exit(1)",
        "os.symlink('/etc/passwd', 'failure.json'); sys.exit(1)",
        "os.mkfifo('stderr.log'); sys.exit(1)",
    ],
)
def test_a_failure_that_is_none_is_the_engines(house, code):
    job = house(code)
    assert (job["status"], job["error"]["code"]) == ("failed", "engine_error")


def result(folder: Path, more: str = "") -> str:
    return f"import shutil\nshutil.copytree({str(folder)!r}, 'result/model')\n{more}"


def test_a_result_that_is_one_is_kept(house, tiny_folder):
    job = house(result(tiny_folder, "open('result/report.html', 'w').write('<script>alert(1)</script>')"))
    assert job["status"] == "succeeded", job["error"]
    page = house.client.get(f"/jobs/{job['id']}/report", headers={"Accept": "text/html"})
    assert "script-src" not in page.headers["content-security-policy"]
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    kept = house.settings.data / "models" / job["result_model"]
    assert {path.name for path in kept.iterdir()} == {path.name for path in tiny_folder.iterdir()}


def test_of_a_result_only_what_belongs_to_a_model_becomes_one(house, tiny_folder):
    job = house(result(tiny_folder, "open('result/model/modeling.py', 'w'); os.mkdir('result/model/onnx')"))
    assert job["status"] == "succeeded", job["error"]
    kept = house.settings.data / "models" / job["result_model"]
    assert {path.name for path in kept.iterdir()} == {path.name for path in tiny_folder.iterdir()}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("os.remove('result/model/config.json')", "config.json is missing"),
        ("open('result/model/tokenizer.json', 'w').write('{}')", "tokenizer.json cannot be read"),
        ("open('result/model/model.safetensors', 'a').write('x')", "not a whole safetensors file"),
        ("open('result/model/special_tokens_map.json', 'w').write('[' + '[],' * 200000 + '1]')", "more than 100,000 values"),
        ("open('result/model/generation_config.json', 'w').write('{\"auto_map\": {}}')", "code of their own"),
        ("os.symlink('/etc/passwd', 'result/model/merges.txt')", "is no file"),
        ("os.symlink('/etc', 'result/etc')", "is no file"),
        ("os.mkfifo('result/model/merges.txt')", "is no file"),
        ("shutil.rmtree('result/model')", "has no model"),
        ("shutil.rmtree('result')", "cannot be read"),
        ("os.rename('result/model', 'm'); os.symlink('../m', 'result/model')", "is no file"),
        ("[open(f'result/{n}', 'w') for n in range(1001)]", "more than 1,000 files"),
        ("[os.makedirs(f'result/{n}') for n in range(1001)]", "more than 1,000 files"),
        ("os.makedirs('result/' + '/'.join(400 * 'a'))", "of more than 300 bytes"),
        ("open('result/a\\nb', 'w')", "cannot be told"),
        ("open(b'result/\\xff', 'w')", "cannot be told"),
        ("os.truncate(os.open('result/big', os.O_CREAT | os.O_WRONLY), 2**40)", "bytes, and may have"),
    ],
)
def test_a_result_that_is_none_ends_the_job(house, tiny_folder, more, words):
    before = set((house.settings.data / "models").iterdir())
    job = house(result(tiny_folder, more))
    assert (job["status"], job["error"]["code"]) == ("failed", "engine_error")
    assert words in job["error"]["message"]
    assert set((house.settings.data / "models").iterdir()) == before
