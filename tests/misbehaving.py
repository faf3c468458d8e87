"""A service that misbehaves, on a real socket: it breaks off, refuses, stalls and lies."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

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
        path, _, query = self.path.partition("?")
        if query.endswith("sha256=" + query[-64:]):
            return answer({"data": [], "next_cursor": None})(self)  # nothing is there before it is uploaded
        self.server.asked.append((self.command, path, dict(self.headers.items())))
        steps = self.server.script[path]
        step = steps.pop(0) if len(steps) > 1 else steps[0]
        return step(self)

    do_GET = do_POST = do_DELETE = _serve


@contextmanager
def misbehaving():
    found = ThreadingHTTPServer(("127.0.0.1", 0), Misbehaving)
    found.asked, found.script = [], {}
    threading.Thread(target=found.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield found
    finally:
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
EVENTS = f"/jobs/{JOB['id']}/events"


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


def run_cli(*arguments):
    from click.testing import CliRunner
    from narrow_client.cli import main

    return CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)


MODEL = {"id": "mdl_0000000000000000", "name": "b", "family": "llama", "parameters": 1, "bytes": 1, "sha256": "", "units": []}
MODEL |= {"config": {}, "created_at": "2026-01-01T00:00:00Z"}
DATASET = {
    "id": "ds_0000000000000000",
    "name": "t",
    "column": "text",
    "documents": 1,
    "bytes": 1,
    "sha256": "",
    "format": ".txt",
    "preview": [],
}
DATASET |= {"created_at": "2026-01-01T00:00:00Z", "bad_rows": "stop", "skipped": 0, "skipped_reason": None}
SIZE = {
    "parameters": 1000,
    "bytes": 4000,
    "flops_per_token": 2000,
    "layers": 2,
    "hidden": 8,
    "width": 16,
    "heads": 2,
    "kv_heads": 1,
}
SIZE |= {"vocabulary": 64}
PLAN = {"family": "llama", "before": SIZE, "after": {**SIZE, "parameters": 500}, "keep": {"neuron": 8, "token": 1200}}
PLAN |= {"memory": {"recover": 2_500_000_000}, "least_memory_bytes": 1_000_000_000}
PLAN |= {"memory_bytes": 2_500_000_000, "seconds": 90.0, "notices": ["Rounded.\x1b[31m"]}
