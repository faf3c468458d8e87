"""The client against a service that misbehaves: it breaks off, refuses, stalls and lies."""

import asyncio
import contextlib
import io
import json
import re
import threading
import time
from datetime import UTC, datetime, timedelta
from typing import get_args

import narrow_client
import pytest
from misbehaving import BODY, DATASET, EVENTS, FILES, JOB, PLAN, answer, artifacts, event, file, hang_up, problem, run_cli, sse
from narrow_client import _calls, _compress, _sweep, _transport, models
from narrow_client._options import words
from narrow_client._render import ProgressDisplay
from narrow_client._transport import EventReader
from rich.console import Console

FETCHED = {
    **{"id": "mdl_0000000000000000", "name": "m", "family": "llama", "parameters": 1, "bytes": 1, "sha256": "0", "units": []},
    **{"config": {}, "source": {"hub": "owner/m", "commit": "0" * 40}, "created_at": "2026-01-01T00:00:00Z"},
}


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_model_that_a_proxy_did_not_wait_for_is_asked_for_again(server, impatient, monkeypatch, kind):
    sent = []

    def gives_up(handler):
        sent.append(json.loads(handler.body))
        answer(b"<html>", 504)(handler)

    server.script["/fetches"] = [gives_up, gives_up, answer(FETCHED)]
    monkeypatch.setenv("NARROW_HUB_TOKEN", "hf_1")

    async def fetch():
        async with narrow_client.AsyncNarrow() as client:
            return await client.models.fetch("owner/m", token="hf_2")

    if kind == "async":
        found = asyncio.run(fetch())
    else:
        with narrow_client.Narrow() as client:
            found = client.models.fetch("owner/m", "v1", "M")
    assert found.source.hub == "owner/m"
    more = {"revision": "v1", "name": "M", "token": "hf_1"} if kind == "sync" else {"revision": "main", "token": "hf_2"}
    assert sent == [{"hub": "owner/m", **more}] * 2


def test_a_busy_service_is_asked_again_when_it_says_so(server):
    server.script[f"/jobs/{JOB['id']}"] = [problem(503, "unavailable", "busy", retry_after="1"), hang_up, answer(JOB)]
    started = time.monotonic()
    with narrow_client.Narrow() as client:
        assert client.jobs.get(JOB["id"]).status == "succeeded"
    assert time.monotonic() - started > 1
    assert len(server.asked) == 3


def test_a_new_job_is_retried_with_the_same_key(server):
    server.script["/jobs"] = [hang_up, problem(502, "bad_gateway", "x"), answer(JOB, 201)]
    with narrow_client.Narrow() as client:
        client.jobs.create(JOB["spec"])
    keys = {headers["Idempotency-Key"] for _, _, headers in server.asked}
    assert (len(server.asked), len(keys)) == (3, 1)


def test_what_is_not_safe_is_not_repeated(server):
    server.script["/keys"] = [problem(503, "unavailable", "busy")]
    with narrow_client.Narrow() as client, pytest.raises(narrow_client.ServerError):
        client.keys.create("mine")
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (404, narrow_client.NotFound),
        (409, narrow_client.Conflict),
        (422, narrow_client.InvalidRequest),
        (413, narrow_client.InvalidRequest),
    ],
)
def test_problems_become_errors_with_their_fields(server, status, kind):
    server.script["/jobs"] = [problem(status, "some_code", "A sentence.")]
    with narrow_client.Narrow() as client, pytest.raises(kind) as raised:
        client.jobs.create(JOB["spec"])
    assert (raised.value.status, raised.value.code, str(raised.value)) == (status, "some_code", "A sentence.")
    assert raised.value.request_id == "req_1"


def test_an_answer_that_is_no_problem_is_an_error_too(server):
    server.script["/jobs"] = [answer(b"<html>proxy</html>", 404)]
    with narrow_client.Narrow() as client, pytest.raises(narrow_client.NotFound, match="HTTP 404"):
        client.jobs.create(JOB["spec"])


def test_no_service_at_all_is_one_sentence():
    with narrow_client.Narrow("http://127.0.0.1:9") as client, pytest.raises(narrow_client.ConnectionFailed, match="NARROW_URL"):
        client.ready()


def test_a_broken_download_goes_on_where_it_broke(server, tmp_path):
    server.script[FILES] = [artifacts()]
    server.script[FILES + "/model/w.bin"] = [lambda h: file(h, 30_000), lambda h: file(h, 20_000), file]
    with narrow_client.Narrow() as client:
        (path,) = client.jobs.download(JOB["id"], tmp_path)
        assert path.read_bytes() == BODY
        ranges = [headers.get("Range") for _, asked, headers in server.asked if asked.endswith("w.bin")]
        assert ranges[0] is None
        assert all(r and int(r[6:-1]) > 0 for r in ranges[1:])
        assert not list(tmp_path.rglob("*.part"))
        before = len(server.asked)
        client.jobs.download(JOB["id"], tmp_path)
    assert len(server.asked) == before + 1, "what is there and right is not fetched again"


def test_a_wrong_digest_is_never_given_its_name(server, tmp_path):
    server.script[FILES] = [artifacts(sha256="0" * 64)]
    server.script[FILES + "/model/w.bin"] = [file]
    with narrow_client.Narrow() as client, pytest.raises(narrow_client.DigestMismatch):
        client.jobs.download(JOB["id"], tmp_path)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.mark.parametrize("path", ["../evil", "/etc/passwd", "a/../../evil", "..\\evil"])
def test_files_stay_inside_the_folder(server, tmp_path, path):
    server.script[FILES] = [artifacts(path=path)]
    with narrow_client.Narrow() as client, pytest.raises(narrow_client.NarrowClientError, match="inside"):
        client.jobs.download(JOB["id"], tmp_path / "out")


def test_events_survive_broken_streams_without_gap_or_repeat(server):
    server.script[EVENTS] = [sse(1, 2), hang_up, sse(2, 3), problem(503, "x", "x"), sse(4, end=True)]
    with narrow_client.Narrow() as client:
        assert [e.seq for e in client.jobs.events(JOB["id"])] == [1, 2, 3, 4]
    assert [headers["Last-Event-ID"] for _, _, headers in server.asked] == ["0", "2", "2", "3", "3"]


def drain(twin):
    """The numbers of the job's events, by either client."""

    async def run():
        async with narrow_client.AsyncNarrow() as client:
            return [e.seq async for e in client.jobs.events(JOB["id"])]

    if twin == "async":
        return asyncio.run(run())
    with narrow_client.Narrow() as client:
        return [e.seq for e in client.jobs.events(JOB["id"])]


@pytest.mark.parametrize("twin", ["sync", "async"])
def test_events_outlast_a_restart_but_not_an_end(server, impatient, twin):
    away = [hang_up, problem(503, "x", "x"), sse()] * 3
    server.script[EVENTS] = [sse(1), *away, sse(2, end=True)]
    assert drain(twin) == [1, 2]
    for forever, kind in ((hang_up, narrow_client.ConnectionFailed), (problem(500, "x", "Broken."), narrow_client.ServerError)):
        server.asked.clear()
        server.script[EVENTS] = [forever]
        with pytest.raises(kind):
            drain(twin)
        assert len(server.asked) > _transport.RETRIES + 1


@pytest.mark.parametrize("twin", ["sync", "async"])
def test_what_is_no_event_stream_is_told_at_once(server, twin):
    for wrong in (answer(b"<html>", content_type="text/html"), answer({"data": []}, content_type="application/json")):
        server.script[EVENTS] = [wrong]
        with pytest.raises(narrow_client.NarrowClientError, match="does not answer like a Narrow service"):
            drain(twin)
    with pytest.raises(narrow_client.NarrowClientError, match="cannot read"):
        [*map(EventReader(0).feed, ("data: {}", ""))]


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"data": 1}', b"{}"])
def test_answers_of_something_else_are_one_sentence(server, body):
    for path in ("/jobs", f"/jobs/{JOB['id']}", FILES, "/readyz"):
        server.script[path] = [answer(body)]
    with narrow_client.Narrow() as client:
        for ask in (lambda: list(client.jobs.list()), lambda: client.jobs.get(JOB["id"]), client.ready):
            with pytest.raises(narrow_client.NarrowClientError, match="is NARROW_URL right"):
                ask()
        with pytest.raises(narrow_client.NarrowClientError, match="is NARROW_URL right"):
            client.jobs.download(JOB["id"], "unused")


@pytest.mark.parametrize("wrong", ["", "../models", "?x", "job_", "job_1/cancel", "mdl_0000000000000001", "job_1\n", "job_é"])
def test_what_is_no_id_gets_into_no_url(server, wrong):
    with narrow_client.Narrow() as client:
        for ask in (client.jobs.get, client.jobs.cancel, client.jobs.delete, client.jobs.report, client.jobs.artifacts):
            with pytest.raises(narrow_client.NarrowClientError, match="is not the id of a job"):
                ask(wrong)
        with pytest.raises(narrow_client.NarrowClientError, match="is not the id of a job"):
            next(client.jobs.events(wrong))
        with pytest.raises(narrow_client.NarrowClientError, match="is not the id of a model"):
            client.models.delete("../jobs")
    assert not server.asked


@pytest.mark.parametrize(
    "url", ["localhost:8000", "127.0.0.1", "http://", "ftp://x", "http://x:port", "http://x:99999", "http://[::"]
)
def test_a_url_that_is_none_is_one_sentence(monkeypatch, url):
    monkeypatch.setenv("NARROW_URL", url)
    for client in (narrow_client.Narrow, narrow_client.AsyncNarrow):
        with pytest.raises(narrow_client.NarrowClientError, match="NARROW_URL must look like"):
            client()


@pytest.mark.parametrize("key", ["nrw_schlüssel", "nrw_a\nb", "nrw_a\x7f"])
def test_a_key_that_no_header_carries_is_one_sentence_without_it(monkeypatch, key):
    monkeypatch.setenv("NARROW_API_KEY", key)
    with pytest.raises(narrow_client.InvalidArgument, match="NARROW_API_KEY") as raised:
        narrow_client.Narrow()
    result = run_cli("jobs")
    assert (result.exit_code, "nrw_" in str(raised.value) + result.output) == (2, False)


@pytest.mark.parametrize(("key", "sent"), [(" nrw_1 ", "Bearer nrw_1"), ("nrw_1\r\n", "Bearer nrw_1"), (" ", None), ("", None)])
def test_the_space_around_a_key_is_not_sent(server, monkeypatch, key, sent):
    server.script["/jobs"] = [answer({"data": [], "next_cursor": None})] * 2
    monkeypatch.setenv("NARROW_API_KEY", key)
    assert run_cli("jobs").exit_code == 0
    monkeypatch.delenv("NARROW_API_KEY")
    with narrow_client.Narrow(api_key=key) as client:
        assert not list(client.jobs.list())
    assert [headers.get("Authorization") for _, _, headers in server.asked] == [sent, sent]


@pytest.mark.parametrize("client", [narrow_client.Narrow, narrow_client.AsyncNarrow])
@pytest.mark.parametrize(
    "wrong",
    [
        {"url": 5},
        {"api_key": 5},
        *({"timeout": value} for value in (-1, 0, float("nan"), "x", True)),
        *({"max_retries": value} for value in (-1, 1.5, "x", None, True)),
    ],
)
def test_what_a_client_cannot_be_made_of_is_one_sentence(client, wrong):
    with pytest.raises(narrow_client.InvalidArgument, match=r"\.$"):
        client(**wrong)


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.plan("x"),
        lambda client: client.plan({"seed": float("nan")}),
        lambda client: client.jobs.create(["base"]),
        lambda client: client.jobs.create({"base": object()}),
        lambda client: client.sweeps.create(None),
        lambda client: client.jobs.get(None),
        lambda client: client.jobs.wait(JOB["id"], timeout="x"),
        lambda client: client.jobs.download(JOB["id"], 5),
        lambda client: client.jobs.list(limit=0),
        lambda client: client.jobs.list(limit="x"),
        lambda client: client.jobs.list(sweep="x"),
        lambda client: client.models.upload("no-such-folder"),
        lambda client: client.models.upload(5),
        lambda client: client.datasets.upload("no-such-file"),
        lambda client: client.datasets.upload(None),
    ],
)
def test_what_cannot_be_asked_is_one_sentence_and_nothing_is_sent(server, call):
    async def ask():
        async with narrow_client.AsyncNarrow() as client:
            await call(client)

    with narrow_client.Narrow() as client, pytest.raises(narrow_client.InvalidArgument, match=r"\.$"):
        call(client)
    with pytest.raises(narrow_client.InvalidArgument, match=r"\.$"):
        asyncio.run(ask())
    assert not server.asked


def test_a_client_that_is_closed_says_so(server):
    client = narrow_client.Narrow()
    client.close()
    client.close()
    for ask in (client.ready, lambda: next(client.jobs.events(JOB["id"])), lambda: list(client.jobs.list())):
        with pytest.raises(narrow_client.InvalidArgument, match="is closed"):
            ask()
    assert client.url in repr(client)

    async def closed():
        client = narrow_client.AsyncNarrow()
        await client.close()
        await client.ready()

    with pytest.raises(narrow_client.InvalidArgument, match="is closed"):
        asyncio.run(closed())


def test_a_limit_is_of_the_whole_list_as_in_the_command_line(server):
    limits = []

    def page(handler):
        limit = int(re.search(r"limit=(\d+)", handler.path)[1])
        limits.append(limit)
        answer({"data": [JOB] * limit, "next_cursor": "job_x"})(handler)

    server.script["/jobs"] = [page] * 4

    async def count(limit):
        async with narrow_client.AsyncNarrow() as client:
            return len([job async for job in client.jobs.list(limit=limit)])

    with narrow_client.Narrow() as client:
        assert len(list(client.jobs.list(limit=2))) == 2
        assert [len(page.data) for page in client.jobs.list(limit=150).pages()] == [100, 50]
        assert "for item in" in repr(client.jobs.list())
    assert asyncio.run(count(3)) == 3
    assert limits == [2, 100, 50, 3]


@pytest.mark.parametrize("status", ["running", "failed", "cancelled"])
def test_a_download_of_nothing_says_why(server, tmp_path, status):
    server.script[FILES] = [answer({"data": []})]
    server.script[f"/jobs/{JOB['id']}"] = [answer({**JOB, "status": status})]
    result = run_cli("download", JOB["id"], "--out", tmp_path)
    assert (result.exit_code, f"no files since it is {status}" in result.stderr) == (1, True)

    async def run():
        async with narrow_client.AsyncNarrow() as client:
            await client.jobs.download(JOB["id"], tmp_path)

    with pytest.raises(narrow_client.NarrowClientError, match=f"since it is {status}"):
        asyncio.run(run())


def test_a_prefix_of_nothing_says_which_there_are(server, tmp_path):
    server.script[FILES] = [artifacts()]
    result = run_cli("download", JOB["id"], "--out", tmp_path, "--only", "onnx/")
    assert (result.exit_code, "'onnx/'; there are model/" in result.stderr) == (1, True)


def test_the_async_twin_does_the_same(server, tmp_path):
    server.script[EVENTS] = [sse(1), sse(2, end=True)]
    server.script[FILES] = [artifacts()]
    server.script[FILES + "/model/w.bin"] = [lambda h: file(h, 10_000), file]
    server.script["/jobs"] = [
        hang_up,
        answer({"data": [JOB], "next_cursor": "job_2"}),
        answer({"data": [JOB], "next_cursor": None}),
    ]

    async def run():
        async with narrow_client.AsyncNarrow() as client:
            seqs = [e.seq async for e in client.jobs.events(JOB["id"])]
            (path,) = await client.jobs.download(JOB["id"], tmp_path)
            jobs = [job.id async for job in client.jobs.list()]
            return seqs, path.read_bytes(), jobs

    assert asyncio.run(run()) == ([1, 2], BODY, [JOB["id"]] * 2)


def test_waiting_ends_with_the_job_or_its_time(server):
    running = {**JOB, "status": "running"}
    server.script[f"/jobs/{JOB['id']}"] = [answer(running), answer({**JOB, "status": "failed"})]
    with narrow_client.Narrow() as client:
        assert client.jobs.wait(JOB["id"]).status == "failed"
        server.script[f"/jobs/{JOB['id']}"] = [answer(running)]
        with pytest.raises(narrow_client.JobTimeout):
            client.jobs.wait(JOB["id"], timeout=0.6)


def test_event_lines_are_read_however_they_are_cut():
    reader = EventReader(0)
    text = f"retry: 5\n\n: comment\nid: 1\ndata: {json.dumps(event(1))}\n\nevent: end\ndata: {{}}\n\n"
    found = [reader.feed(line) for line in text.split("\n")]
    assert [e.seq for e in found if e] == [1]
    assert reader.end


def test_the_command_line_says_what_is_wrong_and_how_it_ended(server, monkeypatch):
    server.script["/jobs"] = [problem(422, "x", "The sentence.\x1b[31m")]
    result = run_cli("jobs")
    assert (result.exit_code, "The sentence." in result.stderr, "\x1b" in result.stderr) == (2, True, False)
    server.script["/jobs"] = [answer({"data": [JOB], "next_cursor": None})]
    assert json.loads(run_cli("jobs", "--json").stdout)[0]["id"] == JOB["id"]
    with contextlib.suppress(SystemExit):
        assert "serve" in run_cli("--help").stdout
    monkeypatch.setattr("narrow_client.cli.entry_points", lambda group: [])
    for name in ("run", "serve"):
        result = run_cli(name, "spec.json")
        assert (result.exit_code, "pip install narrow" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--skill", "nonsense"), "NAME=FILE:ROLE"),
        (("--skill", "a=ds_1", "--skill", "a=ds_2"), "named twice"),
        (("--skill", "a=no-such-file"), "no-such-file"),
        (("--skill", f"a={__file__}:nonsense"), "'nonsense' is not a role: there are keep, forget, watch"),
        (("--column", ""), "it is empty"),
        (("--seed", "x"), "'x' is not a whole number"),
        (("--base", "no-such-folder"), "no-such-folder"),
        (("--base", "mdl_../jobs"), "no model folder"),
        (("--target", "no-such-file"), "no-such-file"),
        (("--unit", "nonsense"), "kv_group"),
        (("--importance", "nonsense"), "fisher"),
        (("--export", "nonsense"), "onnx"),
        *((("--budget", value), "neither a share") for value in ("-3", "0", "nan", "inf", "1e400", "0,5", "parts=1", "bytes=")),
        (("--budget", "1.5"), "must be whole"),
        (("--budget", "flops=1000.5"), "must be whole"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_sent(server, local, arguments, said):
    result = run_cli("compress", *local, *arguments)
    assert (result.exit_code, said in result.stderr) == (2, True), result.stderr
    assert not server.asked


@pytest.mark.parametrize("arguments", [("--limit", "0"), ("--limit", "x"), ("--status", "nonsense"), ("--sweep", "nope")])
def test_wrong_usage_of_lists_is_told_too(server, arguments):
    assert run_cli("jobs", *arguments).exit_code == 2
    assert not server.asked


@pytest.mark.parametrize(("text", "number"), [("0.5", 0.5), ("1", 1), ("4_000_000", 4e6), ("4,000,000", 4e6), ("4e6", 4e6)])
def test_budgets_are_read_however_they_are_written(text, number):
    from narrow_client._options import parse_budget

    assert parse_budget(None, None, f"bytes={text}") == {"bytes": number}


def test_compress_looks_for_every_file_before_it_uploads_one(server, local):
    _, base, _, target = local
    with narrow_client.Narrow() as client, pytest.raises(narrow_client.NarrowClientError, match="no-such-file"):
        narrow_client.compress(base, target, skills={"a": ("no-such-file", "watch")}, client=client)
    assert not server.asked


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"skills": ["x"]}, "skills is a dict"),
        ({"skills": {"a": ("ds_1",)}}, "'a' is a file or an id, or \\(file or id, role\\)"),
        ({"skills": {"a": 5}}, "'a' is a file or an id"),
        ({"skills": {"a": ("ds_1", "nonsense")}}, "keep, forget, watch"),
        ({"skills": {"a": ("ds_1", "keep", "x")}}, "answer of the skill 'a' is a dict"),
        ({"method": "prune"}, "method is a dict"),
        ({"options": [1]}, "options is a dict"),
        ({"answer": "a"}, "answer is a dict"),
        ({"budget": "0.5"}, "budget is a share"),
        ({"budget": True}, "budget is a share"),
        ({"export": 5}, "export is the name of a format"),
        ({"base": 5}, "is a path"),
        ({"target": None}, "is a path"),
        ({"out": 5}, "out is a path"),
    ],
)
def test_what_compress_cannot_take_is_one_sentence(server, local, wrong, said):
    _, base, _, target = local
    with pytest.raises(narrow_client.InvalidArgument, match=said):
        narrow_client.compress(**{"base": base, "target": target, **wrong})
    assert not server.asked


def test_a_skill_alone_is_watched_and_a_format_alone_is_one(local):
    _, base, _, target = local
    wanted = _compress.Wanted("mdl_1", "ds_1", skills={"a": "ds_2", "b": ("ds_3", "keep")}, export="onnx")
    spec = wanted.spec({})
    assert (spec["export"], [skill["role"] for skill in spec["skills"]]) == (["onnx"], ["watch", "keep"])
    assert _compress.Wanted(base, target, skills={"a": target}).inputs() == [("model", str(base)), ("dataset", str(target))]


def test_compress_looks_whether_its_results_can_be_written_before_it_sends_anything(server, local, tmp_path):
    (tmp_path / "file").write_text("")
    result = run_cli("compress", *local, "--out", str(tmp_path / "file" / "below"))
    assert (result.exit_code, "Nothing can be written to" in result.stderr) == (1, True), result.output
    assert not server.asked


def test_a_place_that_cannot_be_written_is_a_sentence(server):
    server.script[FILES] = [artifacts()]
    result = run_cli("download", JOB["id"], "--out", "/proc/x")
    assert (result.exit_code, result.stderr) == (1, "narrow: /proc/x: no such file or directory.\n")


def test_a_folder_of_texts_is_no_model(server, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    result = run_cli("upload", str(tmp_path))
    assert (result.exit_code, "no config.json in" in result.stderr) == (2, True)
    assert not server.asked


def test_a_budget_that_is_too_small_names_the_option_of_the_command(uploads, local):
    uploads.script["/jobs"] = [problem(422, "budget_too_small", "Raise the budget or add layer to method.units.")]
    result = run_cli("compress", *local)
    assert (result.exit_code, "--unit neuron" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"controls": []}, "controls: there is no option 'controls' here: is it misspelt?"),
        ({"budgets": []}, "budgets should have at least 1 item, not 0."),
        ({"target": None}, "target should be a valid dictionary or instance of DatasetId."),
    ],
)
def test_a_fault_of_a_sweep_is_told_as_the_service_would(server, tmp_path, more, told):
    inputs = {"base": {"model": "mdl_0000000000000000"}, "target": {"dataset": "ds_0000000000000000"}}
    (tmp_path / "sweep.json").write_text(json.dumps({**inputs, "budgets": [{"parameters": 0.5}], **more}))
    result = run_cli("sweep", str(tmp_path / "sweep.json"))
    assert (result.exit_code, result.stderr) == (2, f"narrow: sweep.json: {told}\n")


def test_what_bad_rows_do_is_sent_with_every_file_and_what_was_left_out_is_told(uploads, local, tmp_path):
    sent = []

    def keep(handler):
        sent.extend(re.findall(rb'name="bad_rows"\r\n\r\n(\w+)', handler.body))
        answer({**DATASET, "bad_rows": "skip", "skipped": 1200, "skipped_reason": "line 2 has\x1b[31m 1 fields."}, 201)(handler)

    uploads.script["/datasets"] = [keep]
    _, base, _, target = local
    result = run_cli("upload", target, "--bad-rows", "skip")
    assert (result.exit_code, result.stdout) == (0, DATASET["id"] + "\n"), result.output
    assert result.stderr == "Bad rows that were left out: 1,200. The first: line 2 has [31m 1 fields.\n"
    assert run_cli("upload", target).exit_code == 0
    with narrow_client.Narrow() as client:
        skills = {"a": (target, "watch")}
        _compress.upload_spec(client, _compress.Wanted(base, target, skills=skills, broad=target, bad_rows="skip"))
        spec = tmp_path / "sweep.json"
        data = {"path": str(target), "bad_rows": "skip"}
        spec.write_text(json.dumps({"base": {"path": str(base)}, "target": data, "budgets": [{"parameters": 0.5}]}))
        made = _sweep.upload_sweep(client, _sweep.read_sweep(spec))
    assert made["target"] == {"dataset": DATASET["id"]}
    assert sent == [b"skip", b"stop", b"skip", b"skip"], "one file is uploaded once"


def test_a_dry_run_is_a_table_of_the_whole_spec(uploads, local):
    sent = {}

    def plan(handler):
        sent.update(json.loads(handler.body))
        answer(PLAN)(handler)

    uploads.script["/plans"] = [plan]
    options = (*local, "--dry-run", "--skill", "a=ds_1:keep", "--export", "onnx", "--seed", "7", "--unit", "head")
    result = run_cli("compress", *options)
    for said in ("0.50", "8 neurons a layer, 1,200 tokens ", "2.5 GB", "1.5 minutes", "note: Rounded."):
        assert said in result.stdout, result.stdout
    assert "\x1b" not in result.stdout
    assert sent["skills"] == [{"name": "a", "dataset": "ds_1", "role": "keep"}]
    assert (sent["export"], sent["seed"], sent["method"]["units"]) == (["onnx"], 7, ["head"])
    assert json.loads(run_cli("compress", *options, "--json").stdout)["after"]["parameters"] == 500
    assert "/jobs" not in {path for _, path, _ in uploads.asked}


def test_a_connection_lost_in_compress_says_how_to_get_back(uploads, local, impatient):
    uploads.script[EVENTS] = [sse(1), hang_up]
    result = run_cli("compress", *local)
    assert result.exit_code == 3
    first, last = result.stderr.splitlines()[0], result.stderr.splitlines()[-1]
    assert f"job {JOB['id']}: 'narrow watch {JOB['id']}' follows it from anywhere" in first
    for said in ("was not reached", "goes on", f"'narrow watch {JOB['id']}'", f"'narrow download {JOB['id']} --out"):
        assert said in last


def test_a_connection_lost_in_the_download_says_how_to_get_the_files(uploads, local, impatient):
    uploads.script |= {EVENTS: [sse(1, end=True)], FILES: [problem(503, "x", "Busy.")]}
    result = run_cli("compress", *local)
    assert (result.exit_code, f"Busy. The job {JOB['id']} has succeeded: 'narrow download" in result.stderr) == (3, True)


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("cancelled", "said"),
    [
        (answer({**JOB, "status": "cancelling"}), "was cancelled"),
        (problem(409, "job_finished", "x"), "had ended already"),
        (hang_up, "was not cancelled, so try 'narrow cancel"),
    ],
)
def test_an_interrupt_says_what_becomes_of_the_job(uploads, local, impatient, monkeypatch, cancelled, said):
    monkeypatch.setattr(ProgressDisplay, "__call__", interrupt)
    uploads.script |= {EVENTS: [sse(1)], f"/jobs/{JOB['id']}/cancel": [cancelled]}
    result = run_cli("compress", *local)
    assert (result.exit_code, f"interrupted: the job {JOB['id']} {said}" in result.stderr) == (130, True), result.stderr
    uploads.asked.clear()
    result = run_cli("watch", JOB["id"])
    assert (result.exit_code, f"interrupted: the job {JOB['id']} goes on" in result.stderr) == (130, True)
    assert "POST" not in {method for method, _, _ in uploads.asked}


@pytest.mark.parametrize(
    ("second", "said"),
    [(answer(JOB, 201), f"the job {JOB['id']} was cancelled"), (hang_up, "it may have been queued, and 'narrow jobs' shows")],
)
def test_an_interrupt_that_comes_before_the_id_leaves_nothing_running(uploads, local, impatient, monkeypatch, second, said):
    """What was sent may have been queued: its key finds it again."""
    send = _transport.Transport.send

    def interrupted(self, call):
        made = send(self, call)
        if call.path == "/jobs" and [path for _, path, _ in uploads.asked].count("/jobs") == 1:
            raise KeyboardInterrupt
        return made

    monkeypatch.setattr(_transport.Transport, "send", interrupted)
    uploads.script |= {
        "/jobs": [answer(JOB, 201), second],
        f"/jobs/{JOB['id']}/cancel": [answer({**JOB, "status": "cancelling"})],
    }
    result = run_cli("compress", *local)
    assert (result.exit_code, f"interrupted: {said}" in result.stderr) == (130, True), result.stderr
    keys = {headers["Idempotency-Key"] for _, path, headers in uploads.asked if path == "/jobs"}
    assert len(keys) == 1


def state(seq, status, message):
    return models.Event(
        seq=seq, time=NOON + timedelta(seconds=9), kind="state", phase="", message=message, data={"status": status}
    )


NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def test_a_failed_job_is_told_once(server):
    failed = {**JOB, "status": "failed", "error": {"code": "x", "message": "The sentence."}}
    server.script[f"/jobs/{JOB['id']}"] = [answer(failed)]

    def stream(handler):
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream")
        handler.send_header("connection", "close")
        handler.end_headers()
        data = state(1, "failed", "The sentence.").model_dump_json()
        handler.wfile.write(f"id: 1\ndata: {data}\n\nevent: end\ndata: {{}}\n\n".encode())

    server.script[EVENTS] = [stream]
    result = run_cli("watch", JOB["id"])
    assert (result.exit_code, result.stderr.count("The sentence.")) == (1, 1)


def phase(kind, second, name="load", **data):
    return models.Event(seq=1, time=NOON + timedelta(seconds=second), kind=kind, phase=name, message="[/]", data=data)


def shown(*events, terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    display = ProgressDisplay(console)
    for item in events:
        display(item)
    if terminal:
        console.print(display.bars.get_renderable())
    return console.file.getvalue()


def test_lines_carry_the_time_of_their_events():
    text = shown(phase("finished", 5, seconds=5.0), state(2, "succeeded", "succeeded"), terminal=False)
    stamps = [(NOON + timedelta(seconds=s)).astimezone().strftime("%H:%M:%S") for s in (5, 9)]
    assert [line.split()[0] for line in text.splitlines()] == stamps


def test_bars_tell_share_and_time_by_the_events():
    text = shown(phase("started", 0), phase("finished", 90, seconds=83.0), terminal=True)
    assert "100%" in text
    assert "0:01:23" in text
    text = shown(phase("started", 0), phase("progress", 4, done=3, total=4), state(2, "failed", "x"), terminal=True)
    assert "75%" in text
    assert "0:00:09" in text, "what was under way when the job ended does not run on"
    ahead = models.Event(seq=1, time=datetime.now(UTC) + timedelta(hours=1), kind="started", phase="load", message="", data={})
    assert "0:00:00" in shown(ahead, terminal=True)
    again = shown(phase("started", 0), phase("started", 7), state(2, "failed", "x"), terminal=True)
    assert again.count("read model") == 1
    assert "0:00:02" in again


def test_the_table_of_jobs_tells_budget_and_error(server):
    error = {"code": "out_of_memory\x1b[31m", "message": "x"}
    keep = {**JOB["spec"], "budget": {"keep": {"neuron": 0.25}}}
    listed = [{**JOB, "status": "failed", "error": error}, {**JOB, "spec": {**JOB["spec"], "budget": {"bytes": 8e6}}}]
    server.script["/jobs"] = [answer({"data": [*listed, {**JOB, "spec": keep}], "next_cursor": None})]
    console = Console(file=io.StringIO(), width=90)
    with narrow_client.Narrow() as client:
        from narrow_client._render import jobs_table

        console.print(jobs_table(list(client.jobs.list())))
    text = console.file.getvalue()
    assert text.count(JOB["id"]) == 3, "ids are never cut"
    for said in (" 0.5 ", "bytes=8,000,000", "neuron=0.25", "out_of_memory"):
        assert said in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("wanted", "cancelled"), [(True, True), (False, False), (lambda job: job.id == JOB["id"], True), (lambda job: False, False)]
)
def test_a_cancelled_task_and_an_interrupted_call_do_with_the_job_what_was_asked(
    uploads, local, tmp_path, monkeypatch, wanted, cancelled
):
    _, base, _, target = local
    uploads.script |= {EVENTS: [sse(1)], f"/jobs/{JOB['id']}/cancel": [answer({**JOB, "status": "cancelling"})]}

    def asked():
        found = ("POST", f"/jobs/{JOB['id']}/cancel") in [(method, path) for method, path, _ in uploads.asked]
        uploads.asked.clear()
        return found

    said = "was cancelled" if cancelled else "goes on"
    with pytest.raises(KeyboardInterrupt, match=said):
        narrow_client.compress(base, target, out=tmp_path / "o", progress=interrupt, cancel_on_interrupt=wanted)
    assert asked() == cancelled

    async def run():
        started = asyncio.Event()
        task = asyncio.create_task(
            narrow_client.compress_async(
                base, target, out=tmp_path / "o", progress=lambda event: started.set(), cancel_on_interrupt=wanted
            )
        )
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as raised:
            await task
        return raised.value.__notes__

    assert said in asyncio.run(run())[0]
    assert asked() == cancelled


def test_a_task_that_is_cancelled_before_the_id_came_leaves_nothing_running(uploads, local, tmp_path):
    _, base, _, target = local
    arrived = threading.Event()

    def slow(handler):
        arrived.set()
        time.sleep(0.3)
        answer(JOB, 201)(handler)

    uploads.script |= {"/jobs": [slow, answer(JOB, 201)], f"/jobs/{JOB['id']}/cancel": [answer({**JOB, "status": "cancelling"})]}

    async def run():
        task = asyncio.create_task(narrow_client.compress_async(base, target, out=tmp_path / "o", progress=False))
        await asyncio.to_thread(arrived.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as raised:
            await task
        return raised.value.__notes__

    assert "was cancelled" in asyncio.run(run())[0]
    assert len({headers["Idempotency-Key"] for _, path, headers in uploads.asked if path == "/jobs"}) == 1
    assert uploads.asked[-1][1].endswith("/cancel")


def test_compress_async_brings_what_came_out(uploads, local, tmp_path):
    _, base, _, target = local
    seen = []
    failed = {**JOB, "status": "failed", "error": {"code": "x", "message": "The sentence."}}
    uploads.script |= {EVENTS: [sse(1, 2, end=True)], f"/jobs/{JOB['id']}": [answer(failed)]}
    with pytest.raises(narrow_client.JobFailed, match="The sentence"):
        asyncio.run(narrow_client.compress_async(base, target, out=tmp_path / "o", progress=seen.append))
    assert [event.seq for event in seen] == [1, 2]


def test_the_words_that_methods_take_are_those_of_the_contract():
    assert get_args(_calls.Status) == words(models.Job, "status")
    assert get_args(_calls.Role) == words(models.NewKey, "role")
    assert get_args(_calls.SkillRole) == words(models.SkillId, "role")
    assert get_args(_calls.BadRows) == words(models.Dataset, "bad_rows")


def test_every_public_name_is_there():
    for name in narrow_client.__all__:
        assert getattr(narrow_client, name).__name__ == name
    assert dir(narrow_client) == sorted({*narrow_client.__all__, "models"})
    with pytest.raises(AttributeError):
        narrow_client.nothing  # noqa: B018
