"""The client against a service that misbehaves: it breaks off, refuses, stalls and lies."""

import asyncio
import contextlib
import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import narrow_client
import pytest
from narrow_client._transport import EventReader
from narrow_client.cli import main

BODY = bytes(range(256)) * 400
JOB = {
    "id": "job_0000000000000001",
    "status": "succeeded",
    "phase": "report",
    "spec": {
        "base": {"model": "mdl_0000000000000000"},
        "target": {"dataset": "ds_0000000000000000"},
        "budget": {"parameters": 0.5},
    },
    "attempt": 1,
    "created_at": "2026-01-01T00:00:00Z",
}


def event(seq):
    return {"seq": seq, "time": "2026-01-01T00:00:00Z", "kind": "progress", "phase": "load", "message": "", "data": {"done": seq}}


class Misbehaving(BaseHTTPRequestHandler):
    """Keeps what it was asked, and answers from `server.script` (path → list of functions, the last one repeated)."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _serve(self):
        length = int(self.headers.get("content-length") or 0)
        self.body = self.rfile.read(length)
        path = self.path.split("?")[0]
        self.server.asked.append((self.command, path, dict(self.headers.items())))
        steps = self.server.script[path]
        step = steps.pop(0) if len(steps) > 1 else steps[0]
        step(self)

    do_GET = do_POST = do_DELETE = _serve


@pytest.fixture
def server(monkeypatch):
    found = ThreadingHTTPServer(("127.0.0.1", 0), Misbehaving)
    found.asked, found.script = [], {}
    threading.Thread(target=found.serve_forever, daemon=True).start()
    monkeypatch.setenv("NARROW_URL", f"http://127.0.0.1:{found.server_port}")
    yield found
    found.shutdown()
    found.server_close()


def answer(body, status=200, **headers):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()

    def step(handler):
        handler.send_response(status)
        for name, value in {"content-length": str(len(raw)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(raw)

    return step


def hang_up(handler):
    handler.close_connection = True
    handler.connection.close()


def problem(status, code, detail, **headers):
    body = {"type": "x", "title": "x", "status": status, "detail": detail, "code": code, "request_id": "req_1"}
    return answer(body, status, content_type="application/problem+json", **headers)


def file(handler, broken_after=None):
    """The artifact with Range; breaks off after some bytes if asked to."""
    ask = handler.headers.get("range")
    start = int(ask.removeprefix("bytes=").rstrip("-")) if ask else 0
    rest = BODY[start:]
    handler.send_response(206 if ask else 200)
    handler.send_header("content-length", str(len(rest)))
    handler.end_headers()
    if broken_after is None:
        handler.wfile.write(rest)
    else:
        handler.wfile.write(rest[:broken_after])
        handler.wfile.flush()
        hang_up(handler)


def artifacts(sha256="", path="model/w.bin"):
    digest = sha256 or hashlib.sha256(BODY).hexdigest()
    return answer({"data": [{"path": path, "bytes": len(BODY), "sha256": digest, "media_type": "x"}]})


FILES = f"/jobs/{JOB['id']}/artifacts"


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
    server.script[f"/jobs/{JOB['id']}"] = [problem(503, "unavailable", "busy")]
    with narrow_client.Narrow() as client, pytest.raises(narrow_client.ServerError):
        client.jobs.delete(JOB["id"])
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


def sse(*seqs, end=False):
    def step(handler):
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream")
        handler.send_header("connection", "close")
        handler.end_headers()
        for seq in seqs:
            handler.wfile.write(f": ping\nid: {seq}\nevent: progress\ndata: {json.dumps(event(seq))}\n\n".encode())
        if end:
            handler.wfile.write(b"event: end\ndata: {}\n\n")
        handler.wfile.flush()
        hang_up(handler)

    return step


EVENTS = f"/jobs/{JOB['id']}/events"


def test_events_survive_broken_streams_without_gap_or_repeat(server):
    server.script[EVENTS] = [sse(1, 2), hang_up, sse(2, 3), problem(503, "x", "x"), sse(4, end=True)]
    with narrow_client.Narrow() as client:
        assert [e.seq for e in client.jobs.events(JOB["id"])] == [1, 2, 3, 4]
    assert [headers["Last-Event-ID"] for _, _, headers in server.asked] == ["0", "2", "2", "3", "3"]


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


def run_cli(*arguments):
    from click.testing import CliRunner

    return CliRunner().invoke(main, arguments, catch_exceptions=False)


def test_the_command_line_says_what_is_wrong_and_how_it_ended(server):
    server.script["/jobs"] = [problem(422, "x", "The sentence.\x1b[31m")]
    result = run_cli("jobs")
    assert (result.exit_code, "The sentence." in result.stderr, "\x1b" in result.stderr) == (1, True, False)
    assert run_cli("compress", "--base", "x").exit_code == 2
    assert run_cli("compress", "--base", "x", "--target", "y", "--skill", "nonsense").exit_code == 2
    assert run_cli("compress", "--base", "x", "--target", "y", "--budget", "-3").exit_code == 2
    missing = run_cli("compress", "--base", "no-such-folder", "--target", "y")
    assert (missing.exit_code, "no-such-folder" in missing.stderr) == (1, True)
    server.script["/jobs"] = [answer({"data": [JOB], "next_cursor": None})]
    assert json.loads(run_cli("jobs", "--json").stdout)[0]["id"] == JOB["id"]
    with contextlib.suppress(SystemExit):
        assert "serve" in run_cli("--help").stdout
