"""The API over real jobs: the main line, its files, its events, and what it refuses."""

import base64
import gzip
import hashlib
import html
import json
import pickle
import re
import shutil
import time
from importlib.metadata import version

import httpx
import pyarrow as pa
import pytest
import zstandard
from live import QUICK, SLOW, running, spec_of
from pyarrow.parquet import write_table
from pydantic import TypeAdapter
from tiny import write_jsonl

from narrow_engine.spec import Name

TERMINAL = ("succeeded", "failed", "cancelled")


@pytest.fixture(scope="module")
def done(service, tiny_folder, python_file):
    """A job that has succeeded."""
    spec = spec_of(service, tiny_folder, python_file, QUICK)
    spec["teacher"] = {"model": service.upload_model(tiny_folder)}
    answer = service.http.post("/jobs", json=spec)
    assert answer.status_code == 201, answer.text
    assert answer.headers["location"] == f"/jobs/{answer.json()['id']}"
    job = service.wait(answer.json()["id"], lambda j: j["status"] in TERMINAL)
    assert job["status"] == "succeeded", job["error"]
    return job


def problem(answer, status, code, words=""):
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert (body["status"], body["code"]) == (status, code), body
    assert words in body["detail"], body["detail"]
    assert body["request_id"] == answer.headers["x-request-id"]
    assert "Traceback" not in answer.text
    return body


def test_the_line_from_job_to_files(service, done):
    assert done["attempt"] == 1
    listed = service.http.get(f"/jobs/{done['id']}/artifacts").json()["data"]
    assert {"model/config.json", "model/model.safetensors", "report.json", "report.html", "plan.json"} <= {
        a["path"] for a in listed
    }
    for artifact in listed:
        body = service.http.get(f"/jobs/{done['id']}/artifacts/{artifact['path']}").content
        assert hashlib.sha256(body).hexdigest() == artifact["sha256"]
        assert len(body) == artifact["bytes"]
    report = service.http.get(f"/jobs/{done['id']}/report").json()
    assert report["skills"]["python"]["retention"]["value"] > 0
    page = service.http.get(f"/jobs/{done['id']}/report", headers={"accept": "text/html"})
    assert page.headers["content-type"].startswith("text/html")
    assert "script-src" not in page.headers["content-security-policy"]
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_a_result_is_a_model_that_can_be_cut_again(service, done, python_file):
    model = service.http.get(f"/models/{done['result_model']}").json()
    assert model["job"] == done["id"]
    spec = {**done["spec"], "base": {"model": model["id"]}, "budget": {"keep": {"neuron": 0.5}}}
    plan = service.http.post("/plans", json=spec).json()
    assert plan["before"]["parameters"] == model["parameters"]
    assert plan["after"]["parameters"] < plan["before"]["parameters"]


def test_a_plan_says_what_does_not_fit(service, done):
    """And so does the job, in the same words."""
    little = {**done["spec"], "resources": {"memory": 2**28}}
    notices = service.http.post("/plans", json=little).json()["notices"]
    (told,) = [notice for notice in notices if "refused as it begins" in notice]
    assert "The stage load takes" in told
    assert not [n for n in service.http.post("/plans", json=done["spec"]).json()["notices"] if "refused" in n]
    job = service.wait(service.http.post("/jobs", json=little).json()["id"], lambda j: j["status"] in TERMINAL)
    assert job["error"]["code"] in ("too_little_memory", "out_of_memory")
    assert "resources.memory" in job["error"]["message"]
    less = {**little, "resources": {"memory": 2**20}}
    problem(service.http.post("/plans", json=less), 422, "invalid_request", "resources.memory")


def test_downloads_are_resumable_and_verifiable(service, done):
    url = f"/jobs/{done['id']}/artifacts/model/model.safetensors"
    whole = service.http.get(url)
    etag, digest = whole.headers["etag"], hashlib.sha256(whole.content).digest()
    assert whole.headers["repr-digest"] == f"sha-256=:{base64.b64encode(digest).decode()}:"
    part = service.http.get(url, headers={"range": "bytes=1000-", "if-range": etag})
    assert (part.status_code, whole.content[:1000] + part.content) == (206, whole.content)
    assert service.http.get(url, headers={"range": "bytes=1000-", "if-range": '"other"'}).status_code == 200
    assert service.http.get(url, headers={"if-none-match": etag}).status_code == 304
    assert service.http.head(url).headers["content-length"] == str(len(whole.content))
    beyond = service.http.get(url, headers={"range": "bytes=99999999-"})
    problem(beyond, 416, "range_not_satisfiable", str(len(whole.content)))
    assert beyond.headers["content-range"] == f"bytes */{len(whole.content)}"
    for ignored in ("bytes=5-2", "bytes=a-b", "bytes=", "bytes", "lines=1-2", "bytes=1-" + "9" * 5000):
        assert service.http.get(url, headers={"range": ignored}).status_code == 200, ignored
    assert len(service.http.get(url, headers={"range": "bytes=-10"}).content) == 10
    for path in ("../spec.json", "nothing", "model/..%2f..%2fnarrow.db"):
        answer = service.http.get(f"/jobs/{done['id']}/artifacts/{path}")
        assert answer.status_code == 404, path


def stream(service, job_id, last=0, limit=None):
    """Reads an event stream: ids and whether it ended by itself."""
    ids, ended = [], False
    headers = {"accept": "text/event-stream", "last-event-id": str(last)}
    with service.http.stream("GET", f"/jobs/{job_id}/events", headers=headers) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line.startswith("id: "):
                ids.append(int(line[4:]))
            if line == "event: end":
                ended = True
            if limit and len(ids) >= limit:
                break
    return ids, ended


def test_events_are_numbered_and_a_broken_stream_resumes(service, done):
    events = service.events(done["id"])
    assert [e["seq"] for e in events] == list(range(1, len(events) + 1))
    states = [e["data"]["status"] for e in events if e["kind"] == "state"]
    assert states == ["queued", "running", "succeeded"]
    first, ended = stream(service, done["id"], limit=5)
    assert (first, ended) == ([1, 2, 3, 4, 5], False)
    rest, ended = stream(service, done["id"], last=5)
    assert first + rest == [e["seq"] for e in events]
    assert ended
    refused = service.http.get(f"/jobs/{done['id']}/events", headers={"accept": "text/event-stream", "last-event-id": "9" * 20})
    assert refused.status_code == 422, "not a number of ours"


def test_a_retry_with_the_same_key_makes_no_second_job(service, done):
    key = {"Idempotency-Key": "abc-1"}
    spec = {**done["spec"], "seed": 7}
    one = service.http.post("/jobs", json=spec, headers=key)
    two = service.http.post("/jobs", json=spec, headers=key)
    assert one.json()["id"] == two.json()["id"]
    problem(service.http.post("/jobs", json={**spec, "seed": 8}, headers=key), 422, "idempotency_key_reused")
    service.http.post(f"/jobs/{one.json()['id']}/cancel")
    service.wait(one.json()["id"], lambda j: j["status"] == "cancelled")


def test_cancel_is_quick_and_the_queue_goes_on(service, tiny_folder, python_file):
    spec = spec_of(service, tiny_folder, python_file, SLOW)
    spec["teacher"] = {"model": service.upload_model(tiny_folder)}
    running = service.http.post("/jobs", json=spec).json()["id"]
    waiting = service.http.post("/jobs", json=spec).json()["id"]
    for model in (spec["base"], spec["teacher"]):
        problem(service.http.delete(f"/models/{model['model']}"), 409, "model_in_use")
    problem(service.http.delete(f"/datasets/{spec['target']['dataset']}"), 409, "dataset_in_use")
    problem(service.http.delete(f"/jobs/{running}"), 409, "job_not_finished")
    assert service.http.post(f"/jobs/{waiting}/cancel").json()["status"] == "cancelled"
    service.wait(running, lambda j: j["phase"] == "recover")
    problem(service.http.get(f"/jobs/{running}/report"), 409, "job_not_succeeded")
    asked = time.monotonic()
    assert service.http.post(f"/jobs/{running}/cancel").json()["status"] == "cancelling"
    service.wait(running, lambda j: j["status"] == "cancelled")
    assert time.monotonic() - asked < 4
    assert not service.children("narrow_engine")
    assert service.http.delete(f"/jobs/{running}").status_code == 204
    problem(service.http.get(f"/jobs/{running}"), 404, "job_not_found")


def test_a_job_that_cannot_be_done_fails_with_its_sentence(service, tiny_folder, tmp_path):
    spec = spec_of(service, tiny_folder, write_jsonl(tmp_path / "tiny.jsonl", ["too short", "by far"]), QUICK)
    for path in ("/plans", "/jobs"):
        problem(service.http.post(path, json=spec), 422, "text_too_short", "130 tokens or lower block_tokens")
    # Enough bytes, but too few tokens: only the engine can know.
    spec["target"] = {"dataset": service.upload_dataset(write_jsonl(tmp_path / "short.jsonl", ["def self" * 17]))}
    job_id = service.http.post("/jobs", json=spec).json()["id"]
    deadline = time.monotonic() + 60
    while (job := service.job(job_id))["status"] not in TERMINAL and time.monotonic() < deadline:
        time.sleep(0.1)
    assert job["status"] == "failed"
    assert job["error"]["code"] == "text_too_short"
    assert "block_tokens" in job["error"]["message"]
    assert service.events(job_id)[-1]["data"]["status"] == "failed"


def test_lists_have_pages(service, done):
    seen, cursor = [], None
    while True:
        page = service.http.get("/jobs", params={"limit": 2, **({"cursor": cursor} if cursor else {})}).json()
        seen += [job["id"] for job in page["data"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert done["id"] in seen
    assert seen == sorted(seen, reverse=True)
    only = service.http.get("/jobs", params={"status": "succeeded"}).json()["data"]
    assert {job["status"] for job in only} == {"succeeded"}


FILES = {"config.json", "model.safetensors", "tokenizer.json"}


def test_bad_models_are_refused_and_leave_nothing(service, tiny_folder, tmp_path):
    good = {p.name: p.read_bytes() for p in tiny_folder.iterdir() if p.name in FILES}
    before = len(service.http.get("/models", params={"limit": 100}).json()["data"])

    def send(**changes):
        files = {name.replace("__", "/"): body for name, body in {**good, **changes}.items() if body is not None}
        return service.http.post("/models", files=[("files", item) for item in files.items()])

    config = json.loads(good["config.json"])
    problem(send(**{"model.safetensors": pickle.dumps([1])}), 422, "bad_safetensors")
    problem(send(**{"pytorch_model.bin": b"x"}), 422, "unsafe_weights")
    problem(send(**{"modeling.py": b"x"}), 422, "remote_code")
    problem(send(**{"model.safetensors": good["model.safetensors"][:-50]}), 422, "bad_safetensors", "cut short")
    problem(
        send(**{"config.json": json.dumps({**config, "model_type": "mamba"}).encode()}), 422, "unsupported_architecture", "llama"
    )
    problem(send(**{"config.json": json.dumps({**config, "hidden_size": 10**12}).encode()}), 422, "bad_config")
    problem(send(**{"tokenizer.json": None}), 422, "missing_file", "tokenizer.json")
    problem(send(**{"..__config.json": b"{}"}), 422, "unexpected_file")
    problem(send(**{"config.json": json.dumps({**config, "x": "\ud800"}).encode()}), 422, "bad_config")
    deep = json.dumps(config)[:-1] + ', "x": ' + "[" * 500 + "]" * 500 + "}"
    problem(send(**{"config.json": deep.encode()}), 422, "bad_config")
    problem(service.http.post("/models", data={"name": "x"}), 422, "missing_file", "config.json is missing")
    misnamed = service.http.post("/models", files={"file": ("config.json", b"{}")})
    problem(misnamed, 422, "invalid_request", "there is no field 'file' here: it takes files, uploads, name")
    assert len(service.http.get("/models", params={"limit": 100}).json()["data"]) == before
    assert service.http.get("/readyz").status_code == 200


def test_bad_datasets_are_refused_by_line(service):
    def send(body, name="d.jsonl", **form):
        return service.http.post("/datasets", files={"file": (name, body)}, data=form)

    good = b'{"text": "hello"}\n'
    problem(send(good * 3 + b"{oops\n"), 422, "bad_row", "line 4 of d.jsonl")
    problem(send(b""), 422, "empty_dataset")
    problem(send(good, column="body"), 422, "wrong_column", "'body'")
    problem(send(b"\xff\xfe\n"), 422, "bad_encoding", "line 1")
    problem(send(good, name="d.json"), 422, "unknown_format")
    problem(send(good, name="d.parquet"), 422, "bad_parquet", "d.parquet cannot be read")
    problem(send(good, name="../../etc/d.jsonl"), 422, "unexpected_file")
    problem(send(gzip.compress(good * 10)[:-8], name="d.jsonl.gz"), 422, "bad_compression")
    problem(send(good * 20_000), 413, "too_large")
    problem(
        send(good, colour="red"), 422, "invalid_request", "no field 'colour' here: it takes file, upload, name, column, bad_rows"
    )
    twice = service.http.post("/datasets", files=[("file", ("a.jsonl", good)), ("file", ("b.jsonl", good))])
    problem(twice, 422, "invalid_request", "file is there more than once: send it once.")
    named = service.http.post("/datasets", files={"file": ("a.jsonl", good)}, data={"name": "日本 <b>x</b>"})
    problem(named, 422, "invalid_request", "The name '日本 <b>x</b>' is not a name: it takes letters")
    made = send(gzip.compress(good), name="naïve <b>.jsonl.gz")
    assert made.status_code == 201
    assert made.json()["documents"] == 1
    assert "<" not in made.json()["name"]
    assert made.json()["preview"] == ["hello"]
    assert send(b'{"text": "%s"}' % (b"a" * 400)).json()["preview"] == ["a" * 300 + "…"]
    problem(send(good, name="字" * 150 + ".x"), 422, "unexpected_file", "200 bytes")
    for given in ("½ m²①.jsonl", "²①.jsonl", "-_ x" + "é" * 90 + ".jsonl"):
        TypeAdapter(Name).validate_python(send(good, name=given).json()["name"])
    assert service.http.delete(f"/datasets/{made.json()['id']}").status_code == 204


@pytest.mark.slow
def test_bad_rows_are_left_out_where_that_is_asked_for(service, done, tmp_path, python_file):
    texts = [json.loads(line)["text"] for line in python_file.read_text().splitlines()]
    path = tmp_path / "d.parquet"
    write_table(pa.table({"body": [None, *texts, None]}), path)
    bad = b"a,b,c\n"
    table = b"".join([b"body,n\n", *(b'"%d ""fine""\nrow",1\n' % number for number in range(5)), bad, b'"\xff",1\n'])

    def send(body, name="d.csv.zst", bad_rows="skip"):
        form = {"column": "body", "bad_rows": bad_rows}
        return service.http.post("/datasets", files={"file": (name, body)}, data=form)

    problem(send(zstandard.compress(table), bad_rows="stop"), 422, "bad_row", "line 12 of d.csv.zst has 3 fields")
    problem(send(bad, bad_rows="ignore"), 422, "invalid_request", "bad_rows")
    problem(send(zstandard.compress(table)[:-3]), 422, "bad_compression")
    problem(send(b"body,n\n" + bad * 3, "d.csv"), 422, "empty_dataset", "3 of them. The first: line 2 of d.csv has 3 fields")
    made = send(zstandard.compress(table)).json()
    assert (made["documents"], made["bad_rows"], made["skipped"]) == (5, "skip", 2), made
    assert made["skipped_reason"] == "line 12 of d.csv.zst has 3 fields, and the header 2."
    assert made["preview"][1] == '1 "fine"\nrow'
    clean = send(b"body,n\nfine,1\n", "d.csv", "stop").json()
    assert (clean["bad_rows"], clean["skipped"], clean["skipped_reason"]) == ("stop", 0, None)

    made = send(path.read_bytes(), "d.parquet").json()
    assert (made["documents"], made["skipped"]) == (len(texts), 2)
    spec = {
        **done["spec"],
        "target": {"dataset": made["id"]},
        "budget": {"keep": {"neuron": 0.5}},
        "teacher": None,
        "controls": [],
    }
    asked = {**spec, "target": {"dataset": made["id"], "answer": {"column": "n"}}}
    problem(service.http.post("/jobs", json=asked), 422, "wrong_column", "has no column 'n'")
    job = service.wait(service.http.post("/jobs", json=spec).json()["id"], lambda j: j["status"] in TERMINAL)
    assert job["status"] == "succeeded", job
    first = "column 'body' in row 1 of data.parquet is not a text but null."
    notice = f"Bad rows of data.parquet that were left out: 2. The first: {first}"
    report = service.http.get(f"/jobs/{job['id']}/report").json()
    assert notice in [told["message"] for told in report["notices"]]
    [target] = [item for item in report["provenance"]["inputs"] if item["part"] == "target"]
    assert (target["name"], target["bad_rows"]) == ("d.parquet", "skip")
    base = service.http.get(f"/models/{spec['base']['model']}").json()["name"]
    assert [item["name"] for item in report["provenance"]["inputs"] if item["part"] == "base"] == [base]
    page = service.http.get(f"/jobs/{job['id']}/report", headers={"accept": "text/html"}).text
    assert notice in html.unescape(page)


def test_a_teacher_that_reads_other_tokens_is_a_problem(service, done, tmp_path, tiny_folder):
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    spec = {**done["spec"], "teacher": {"model": service.upload_model(other)}}
    sweep = {key: spec[key] for key in ("base", "teacher", "target")} | {"budgets": [spec["budget"]]}
    for path, body in (("/jobs", spec), ("/plans", spec), ("/sweeps", {**sweep, "block_tokens": 64})):
        problem(service.http.post(path, json=body), 422, "other_tokenizer", "they differ in 'normalizer' of tokenizer.json")
    problem(service.http.post("/jobs", json={**spec, "teacher": {"model": "mdl_0000000000000000"}}), 404, "model_not_found")


def test_bad_requests_are_problems(service, done):
    spec = done["spec"]
    bad = [
        ({**spec, "budget": {}}, 422, "invalid_request"),
        ({**spec, "banana": 1}, 422, "invalid_request"),
        ({**spec, "budget": {"parameters": 0.001}}, 422, "budget_too_small"),
        ({**spec, "block_tokens": 100_000}, 422, "block_too_long"),
        ({**spec, "base": {"model": "mdl_0000000000000000"}}, 404, "model_not_found"),
        ({**spec, "target": {"dataset": "ds_0000000000000000"}}, 404, "dataset_not_found"),
        ({**spec, "skills": [{"name": "python", "dataset": spec["target"]["dataset"]}]}, 422, "invalid_request"),
        ({**spec, "base": {"path": "/etc/passwd"}}, 422, "invalid_request"),
    ]
    for body, status, code in bad:
        problem(service.http.post("/jobs", json=body), status, code)
        problem(service.http.post("/plans", json=body), status, code)
    json_type = {"content-type": "application/json"}
    said = problem(service.http.post("/jobs", content=b"{broken", headers=json_type), 422, "invalid_request", "not valid JSON: ")
    assert said["errors"][0]["pointer"] == ""
    problem(service.http.post("/jobs", content=b"\xff", headers=json_type), 400, "bad_request", "JSON in UTF-8")
    problem(service.http.post("/jobs", content=b" " * 3_000_000, headers=json_type), 413, "too_large")
    problem(service.http.get("/jobs/nothing"), 404, "job_not_found")
    problem(service.http.get("/jobs", params={"limit": 0}), 422, "invalid_request")
    problem(service.http.get("/jobs", params={"cursor": "'; DROP TABLE job"}), 422, "invalid_request")
    problem(service.http.put("/jobs"), 405, "method_not_allowed")
    problem(service.http.get("/nowhere"), 404, "not_found")
    assert service.http.get("/jobs").status_code == 200


def test_what_is_wrong_with_a_field_is_told_in_words(service, done):
    spec = done["spec"]
    cases = [
        (
            {**spec, "method": {"recover": {"token": 1}}},
            "/method/recover/token",
            "there is no option 'token' here: is it misspelt?",
        ),
        (
            {**spec, "method": {"recover": {"mixture": 0.5}}},
            "/method/recover",
            "'mixture' is the β or α of js, skew_kl, skew_reverse_kl, and 'kl' has none: choose one of those",
        ),
        ({**spec, "budget": {"parameters": 1.5}}, "/budget", "'parameters' above 1 is a count"),
        ({k: v for k, v in spec.items() if k != "target"}, "/target", "is missing"),
        ({**spec, "base": {"model": "llama"}}, "/base/model", "is not an id like mdl_01h4"),
        ({**spec, "seed": -1}, "/seed", "should be greater than or equal to 0"),
        ({**spec, "skills": [{**spec["target"], "name": "-"}]}, "/skills/0/name", "is not a name"),
        ({**spec, "a/b": 1}, "/a~1b", "there is no option 'a/b' here"),
    ]
    for body, pointer, words in cases:
        told = problem(service.http.post("/plans", json=body), 422, "invalid_request", words)
        assert told["errors"][0]["pointer"] == pointer
        assert told["errors"][0]["detail"].startswith(words)
        assert told["detail"].startswith(pointer[1:].replace("/", ".").replace("~1", "/"))
        assert told["detail"][-2:] not in ("..", "?.")
    half = json.dumps({**spec, "\ud800": 1})
    problem(service.http.post("/plans", content=half, headers={"content-type": "application/json"}), 422, "invalid_request")
    for nothing in (None, 3, []):
        told = problem(service.http.post("/plans", json={**spec, "budget": nothing}), 422, "invalid_request")
        assert told["detail"] == "budget is not a JSON object."
    problem(service.http.post("/plans", content=b"{}"), 422, "invalid_request", "The body is not a JSON object")


def test_health(service):
    assert service.http.get("/healthz").json() == {"status": "ok", "version": version("narrow"), "checks": {}}
    checks = service.http.get("/readyz").json()["checks"]
    assert checks == {"accepting": "ok", "database": "ok", "disk": "ok"}
    assert re.fullmatch(r"req_[0-9a-f]{16}", service.http.get("/healthz").headers["x-request-id"])


def test_many_at_once_make_one_job_a_key(service, done):
    """Twenty requests with one key at the same time: one job, no error that a client could not retry."""
    import concurrent.futures

    spec = {**done["spec"], "seed": 99}

    def post(_):
        with httpx.Client(base_url=service.url, timeout=60) as http:
            return http.post("/jobs", json=spec, headers={"Idempotency-Key": "race"})

    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(post, range(20)))
    assert {a.status_code for a in answers} <= {201, 409}
    ids = {a.json()["id"] for a in answers if a.status_code == 201}
    assert len(ids) == 1
    service.http.post(f"/jobs/{ids.pop()}/cancel")


@pytest.mark.slow
def test_a_job_with_several_processes_is_told_of_stopped_and_started_again_like_any_other(tmp_path, tiny_folder, python_file):
    """On the CPU here: it is as many processes as the job asks for GPUs, whatever they run on."""
    with running(tmp_path / "data") as service:
        spec = spec_of(service, tiny_folder, python_file, SLOW, resources={"gpus": 2})
        job_id = service.http.post("/jobs", json=spec).json()["id"]
        service.wait(job_id, lambda j: j["phase"] == "recover" and j["progress"])
        engines = service.children("--events-after")
        assert len(engines) == 3, "torchrun, and two that it started"
        assert service.http.post(f"/jobs/{job_id}/pause").json()["status"] == "pausing"
        service.wait(job_id, lambda j: j["status"] == "paused")
        assert not service.children("--events-after")
        assert service.http.post(f"/jobs/{job_id}/cancel").json()["status"] == "cancelled"

        quick = {**spec, "method": {**QUICK, "recover": {"tokens": 8192, "batch_tokens": 256}}}
        job_id = service.http.post("/jobs", json=quick).json()["id"]
        service.wait(job_id, lambda j: j["phase"] == "recover")
        service.children("--events-after")[-1].kill()
        done = service.wait(job_id, lambda j: j["status"] == "succeeded", seconds=240)
        assert done["attempt"] == 2, "as when its only process is killed"
        report = service.http.get(f"/jobs/{job_id}/report").json()
        assert report["provenance"]["machine"]["processes"] == 2
