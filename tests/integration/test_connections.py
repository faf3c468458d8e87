"""What a service is sent by people who mean it ill, over real connections: each time it answers with a 4xx or hangs up, and goes
on with everybody else. tests/contract/test_requests.py has what keeps to HTTP and to the contract, more or less."""

import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Barrier

import httpx
import psutil
import pytest
from live import POSTGRES, QUICK, Service, running

HOST = b"Host: localhost"
JSON = b"Content-Type: application/json"
CHUNKED = b"Transfer-Encoding: chunked"
FORM = b"Content-Type: multipart/form-data; boundary=x"


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """Without workers: everything stays in its queue."""
    with running(tmp_path_factory.mktemp("hostile") / "data", workers=0, NARROW_SILENCE_SECONDS="2") as found:
        yield found


def head(first: str | bytes, *lines: bytes) -> bytes:
    first = first.encode() if isinstance(first, str) else first
    return b"\r\n".join([first + b" HTTP/1.1", HOST, *lines, b"", b""])


def sized(first: str, kind: bytes, body: bytes) -> bytes:
    return head(first, kind, b"Content-Length: %d" % len(body)) + body


def connect(service: Service) -> socket.socket:
    host, port = service.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def answers(service: Service, sent: bytes) -> bytes:
    """All that comes back until the server hangs up; what it does on its own, some seconds after the last answer."""
    got = b""
    with connect(service) as connection:
        try:
            connection.sendall(sent)
            while chunk := connection.recv(2**16):
                got += chunk
        except ConnectionError:
            pass
    return got


def statuses(got: bytes) -> list[int]:
    return [int(number) for number in re.findall(rb"HTTP/1\.1 (\d{3}) ", got)]


NO_HTTP = {
    "0.9": b"GET /jobs\r\n\r\n",
    "half of a line": b"GET /jobs",
    "every byte": bytes(range(256)) * 20,
    "TLS": bytes.fromhex("1603010200010001fc0303") + bytes(500),
    "empty lines": b"\r\n" * 5000,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(100),
    "no host": b"GET /jobs HTTP/1.1\r\n\r\n",
    "two hosts": head("GET /jobs", b"Host: localhost"),
    "no target": head("GET "),
    "a target that is not ASCII": head("GET /jobs/ü"),
    "a space in the target": head("GET /jobs/a b"),
    "NUL in a header": head("GET /jobs", b"X: a\0b"),
    "CR in a header": head("GET /jobs", b"X: a\rb"),
    "a space before the colon": head("GET /jobs", b"X : a"),
    "a header without a name": head("GET /jobs", b": a"),
    "a head of 300 KB": head("GET /jobs", *(b"X%d: a" % number for number in range(30_000))),
    "two lengths": head("POST /jobs", JSON, b"Content-Length: 2", b"Content-Length: 3") + b"{}x",
    "a length below zero": head("POST /jobs", JSON, b"Content-Length: -2") + b"{}",
    "a length with a plus": head("POST /jobs", JSON, b"Content-Length: +2") + b"{}",
    "a length of 25 digits": head("POST /jobs", JSON, b"Content-Length: " + b"9" * 25),
    "a length and chunks": head("POST /jobs", JSON, b"Content-Length: 2", CHUNKED) + b"2\r\n{}\r\n0\r\n\r\n" + head("GET /keys"),
    "chunks and something": head("POST /jobs", JSON, CHUNKED, b"Transfer-Encoding: identity") + b"2\r\n{}\r\n0\r\n\r\n",
    "chunks of gzip": head("POST /jobs", JSON, b"Transfer-Encoding: gzip, chunked") + b"2\r\n{}\r\n0\r\n\r\n",
    "a chunk without a size": head("POST /jobs", JSON, CHUNKED) + b"zz\r\n{}\r\n0\r\n\r\n",
    "a chunk below zero": head("POST /jobs", JSON, CHUNKED) + b"-1\r\n{}\r\n0\r\n\r\n",
    "a chunk that is longer than it says": head("POST /jobs", JSON, CHUNKED) + b"1\r\n{}\r\n0\r\n\r\n",
}
"""What is none, or could be read in two ways."""

UNFIT = {
    "an odd method": head("FUZZ /jobs"),
    "a method in small letters": head("get /jobs"),
    "a method of 5 KB": head("A" * 5000 + " /jobs"),
    "TRACE": head("TRACE /jobs"),
    "CONNECT": head("CONNECT localhost:80"),
    "an asterisk": head("OPTIONS *"),
    "another server's URL": head("GET http://evil.example/jobs"),
    "another server's port": head("GET evil.example:80"),
    "a path of 64 KB": head("GET /" + "a" * 65536),
    "NUL in a path": head("GET /jobs/%00"),
    "dots": head("GET /jobs/../keys"),
    "dots in disguise": head("GET /jobs/%2e%2e%2fkeys"),
    "a file outside": head("GET /jobs/x/artifacts/..%2f..%2fnarrow.db"),
    "a file from the root": head("GET /jobs/x/artifacts//etc/passwd"),
    "two slashes": head("GET //jobs"),
    "a slash at the end": head("GET /jobs/"),
    "a semicolon": head("GET /jobs;x=1"),
    "half an escape": head("GET /jobs/%zz%"),
    "escapes that are not UTF-8": head("GET /jobs/%ff%fe"),
    "an escaped surrogate": head("GET /jobs/%ed%a0%80"),
    "escaped line breaks": head("GET /jobs/%0d%0aSet-Cookie:%20a=b%0a2026-01-01%20a%20line%20of%20the%20log"),
    "a query that is not UTF-8": head("GET /jobs?cursor=%ff"),
    "two keys": head("GET /jobs", b"Authorization: Bearer a", b"Authorization: Bearer b"),
    "a key that is not ASCII": head("GET /jobs", b"Authorization: Bearer \xff\xfe"),
    "a length of 19 digits": head("POST /jobs", JSON, b"Content-Length: " + b"9" * 19),
    "3 MB": sized("POST /jobs", JSON, b"[" * 3_000_000),
    "3 MB in chunks": head("POST /jobs", JSON, CHUNKED) + (b"10000\r\n" + b"[" * 65536 + b"\r\n") * 48 + b"0\r\n\r\n",
    "a million brackets": sized("POST /jobs", JSON, b"[" * 1_000_000),
    "a number of a million digits": sized("POST /jobs", JSON, b'{"seed": ' + b"1" * 1_000_000 + b"}"),
    "an infinite number": sized("POST /keys", JSON, b'{"name": "a", "expires_in_days": 1e999}'),
    "half a surrogate pair": sized("POST /keys", JSON, b'{"name": "\\ud800", "\\udfff": 1}'),
    "a kind that is a list": sized("POST /plans", JSON, b'{"method": {"kind": []}}'),
    "a URL that is none": sized("POST /webhooks", JSON, b'{"url": "https://["}'),
    "no UTF-8": sized("POST /jobs", JSON, b"\xff\xfe{\0}\0"),
    "chunks with 100 KB of extensions": head("POST /jobs", JSON, CHUNKED) + b"2;" + b"a" * 100_000 + b"\r\n{}\r\n0\r\n\r\n",
    "20,000 trailers": head("POST /jobs", JSON, CHUNKED) + b"2\r\n{}\r\n0\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
    "an odd expectation": head("POST /jobs", JSON, b"Expect: tea", b"Content-Length: 2") + b"{}",
    "an odd type": head("POST /jobs", b"Content-Type: \xff/;;=", b"Content-Length: 2") + b"{}",
    "a form without a boundary": head("POST /datasets", b"Content-Type: multipart/form-data", b"Content-Length: 2") + b"{}",
    "a form that ends early": sized("POST /datasets", FORM, b"--x\r\nContent-Disposition: form-data; na"),
    "20,000 fields": sized("POST /models", FORM, b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\na\r\n' * 20_000),
    "a field's name of 1 MB": sized("POST /models", FORM, b'--x\r\nContent-Disposition: form-data; name="' + b"a" * 2**20),
}
"""What can be read, and asks for nothing that there is."""


def test_what_is_no_request_and_what_asks_for_nothing(service):
    server = psutil.Process(service.process.pid)
    service.http.get("/jobs")
    before, log = server.memory_info().rss, Path(service.log.name)
    with ThreadPoolExecutor(40) as pool:
        got = dict(
            zip(
                [*NO_HTTP, *UNFIT],
                pool.map(lambda sent: answers(service, sent), [*NO_HTTP.values(), *UNFIT.values()]),
                strict=True,
            )
        )
    for name in NO_HTTP:
        # HTTP/2 begins like a request, which is answered, and goes on like none.
        assert statuses(got[name]) in ([], [400], [404, 400]), (name, got[name][:1000])
    for name in UNFIT:
        assert len(statuses(got[name])) == 1, (name, got[name][:1000])
        assert 400 <= statuses(got[name])[0] < 500, (name, got[name][:1000])
    for name, answer in got.items():
        assert answer.count(b"application/problem+json") == len(statuses(answer)), (name, answer[:1000])
        assert b"Set-Cookie: a=b\r\n" not in answer, name
    assert statuses(answers(service, NO_HTTP["a length and chunks"])) == [400], "and what hides behind it is not answered"
    assert service.http.get("/jobs").json()["data"] == []
    assert server.memory_info().rss - before < 60 * 2**20
    said = log.read_text()
    assert "Traceback" not in said
    assert not re.search(r"^2026-01-01 a line", said, re.MULTILINE)
    assert max(map(len, said.splitlines())) < 1000


def test_requests_at_once_on_a_connection(service):
    """A client that sends the next request before it has an answer has them in order; after garbage there is no more."""
    many = head("GET /healthz") * 100
    assert statuses(answers(service, many)) == [200] * 100
    assert statuses(answers(service, head("GET /healthz") + b"\0garbage\r\n\r\n" + head("GET /healthz"))) == [200, 400]
    assert statuses(answers(service, sized("POST /jobs", JSON, b"{}") + b"more than was said\r\n\r\n")) == [422, 400]
    # The answer comes before the body is read, and then the body is none.
    with connect(service) as connection:
        connection.sendall(head("POST /nothing", CHUNKED))
        answer = connection.recv(2**16)
        while not answer.endswith(b"}"):
            answer += connection.recv(2**16)
        assert statuses(answer) == [404]
        connection.sendall(b"zz\r\n")
        assert connection.recv(2**16) == b""
    assert "Traceback" not in Path(service.log.name).read_text()


def test_heads_that_never_end_are_not_waited_for(service):
    with ExitStack() as stack:
        slow = [stack.enter_context(connect(service)) for _ in range(300)]
        began, alive = time.monotonic(), list(slow)
        while alive and time.monotonic() - began < 15:
            for number, connection in enumerate(list(alive)):
                try:
                    connection.send(b"GET /jobs HTTP/1.1\r\nX: "[number % 20 :][:1] or b"a")
                except ConnectionError:
                    alive.remove(connection)
            asked = time.monotonic()
            assert service.http.get("/jobs").status_code == 200
            assert time.monotonic() - asked < 2
            time.sleep(0.2)
        assert not alive
    # One that began well, and slowly, is answered.
    with connect(service) as connection:
        for piece in (b"GET /healthz HT", b"TP/1.1\r\nHost: local", b"host\r\n\r\n"):
            connection.sendall(piece)
            time.sleep(0.3)
        assert statuses(connection.recv(2**16)) == [200]


def test_many_connections_that_say_nothing_keep_nobody_out(tmp_path):
    with running(tmp_path / "data", workers=0, NARROW_MAX_CONNECTIONS="50") as service, ExitStack() as stack:
        server = psutil.Process(service.process.pid)
        before = server.num_fds()
        for begun in (b"", b"GET /healthz HTTP/1.1\r\nX: "):
            for _ in range(300):
                with suppress(ConnectionError):  # given up already
                    stack.enter_context(connect(service)).sendall(begun)
            for _ in range(3):
                with connect(service) as connection:
                    connection.sendall(head("GET /healthz"))
                    assert statuses(connection.recv(2**16)) == [200]
            assert server.num_fds() - before < 80
        # Whoever is being answered is not given up.
        slow = stack.enter_context(connect(service))
        slow.sendall(head("POST /datasets", FORM, b"Content-Length: 100000") + b"--x\r\n")
        time.sleep(0.5)  # it has to be read first: more come at a time than may be open
        for _ in range(300):
            stack.enter_context(connect(service))
        slow.sendall(bytes(100_000 - 5))
        assert 400 <= statuses(slow.recv(2**16))[0] < 500
        assert "Traceback" not in Path(service.log.name).read_text()


def test_open_files_are_as_many_as_the_system_allows_and_enough_for_the_connections():
    code = (
        "import resource; from service.wire import most_connections; resource.setrlimit(resource.RLIMIT_NOFILE, ({0}, {1}));"
        "print(most_connections(4096), resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )

    def most(soft: int, hard: int) -> list[int]:
        told = subprocess.run([sys.executable, "-c", code.format(soft, hard)], capture_output=True, text=True, check=True).stdout
        return [int(number) for number in told.split()]

    assert most(1024, 1024) == [320, 1024]
    assert most(1024, 4096) == [1856, 4096]
    assert most(256, 300) == [1, 300]
    assert most(1024, 20_000) == [4096, 16_384]


def test_who_has_no_key_has_no_body_read(tmp_path):
    with running(tmp_path / "data", workers=0, NARROW_KEYS="always") as service:
        for path in ("/models", "/datasets", "/jobs", "/uploads/upl_x"):
            method = "PATCH" if path.startswith("/uploads/") else "POST"
            with connect(service) as connection:
                connection.sendall(head(f"{method} {path}", FORM, b"Upload-Offset: 0", b"Content-Length: 100000") + b"--x\r\n")
                assert statuses(connection.recv(2**16)) == [401], path


FOREIGN = [
    ({"Origin": "https://evil.example"}, "cross_origin"),
    ({"Origin": "null"}, "cross_origin"),
    ({"Origin": "http://["}, "cross_origin"),
    ({"Origin": "http://localhost:1"}, "cross_origin"),
    ({"Sec-Fetch-Site": "cross-site"}, "cross_origin"),
    ({"Sec-Fetch-Site": "same-site"}, "cross_origin"),
    # DNS rebinding: evil.example leads to this machine by now.
    ({"Host": "evil.example", "Origin": "http://evil.example"}, "wrong_host"),
    ({"Host": "evil.example:8000"}, "wrong_host"),
    ({"Host": "localhost.evil.example"}, "wrong_host"),
    ({"Host": "127.0.0.1.evil.example"}, "wrong_host"),
    ({"Host": "10.0.0.1"}, "wrong_host"),
    ({"Host": "["}, "wrong_host"),
    ({"Host": "", "Origin": "null"}, "wrong_host"),
]


def test_without_keys_no_other_site_comes_in_through_a_browser(service):
    for headers, code in FOREIGN:
        for method, path in (("POST", "/jobs"), ("DELETE", "/jobs/x"), ("POST", "/datasets"), ("GET", "/jobs")):
            if method == "GET" and "Sec-Fetch-Site" in headers:
                continue  # a link that somebody follows
            answer = service.http.request(method, path, headers=headers)
            assert (answer.status_code, answer.json()["code"]) == (403, code), (headers, method, path)
    port = service.url.rpartition(":")[2]
    for host in (f"localhost:{port}", "LOCALHOST", "127.0.0.1", f"127.8.9.1:{port}", f"[::1]:{port}"):
        own = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
        assert service.http.post("/plans", json={}, headers=own).json()["code"] == "invalid_request", host
    assert service.http.get("/jobs", headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}).status_code == 200


@pytest.fixture(scope="module")
def inputs(service, tiny_folder, python_file):
    model, data = service.upload_model(tiny_folder), service.upload_dataset(python_file)
    return {"base": {"model": model}, "target": {"dataset": data}, "block_tokens": 64}


@pytest.mark.parametrize("path", ["/jobs", "/sweeps"])
@pytest.mark.parametrize("same", [True, False], ids=["one body", "many bodies"])
def test_many_at_once_with_one_idempotency_key_make_one(service, inputs, path, same):
    one = (
        {"budgets": [{"parameters": 0.85}], "methods": {"default": QUICK}}
        if path == "/sweeps"
        else {"budget": {"parameters": 0.85}}
    )
    before = {row["id"] for row in service.http.get(path, params={"limit": 100}).json()["data"]}
    together = Barrier(20)

    def post(number: int) -> httpx.Response:
        body = {**inputs, **one, "skill_tokens": 1024 if same else 1024 + number}
        with httpx.Client(base_url=service.url, timeout=60) as http:
            together.wait()
            return http.post(path, json=body, headers={"Idempotency-Key": f"{path} {same}"})

    with ThreadPoolExecutor(20) as pool:
        got = list(pool.map(post, range(20)))
    made = {answer.json()["id"] for answer in got if answer.status_code == 201}
    assert len(made) == 1, [answer.text for answer in got]
    assert {row["id"] for row in service.http.get(path, params={"limit": 100}).json()["data"]} == before | made
    refused = {(answer.status_code, answer.json()["code"]) for answer in got if answer.status_code != 201}
    # On SQLite whoever writes is alone, and finds what the one before has made; on Postgres some may meet it half done.
    may = ({(409, "request_in_progress")} if POSTGRES else set()) | (set() if same else {(422, "idempotency_key_reused")})
    assert refused <= may
    assert same or len([answer for answer in got if answer.status_code == 201]) == 1
