"""Everything in the hostile corpus is refused with a sentence, in bounded time and memory, and disturbs nobody."""

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hostile
import httpx
import psutil
import pytest
from live import SLOW, running, spec_of

SECONDS = 45
"""For one of them, on a busy machine; a tokenizer that never ends takes the thirty that it is given."""
MEMORY = 300 * 2**20
"""By which the server may grow in all."""


@pytest.fixture(scope="module")
def house(tmp_path_factory, tiny_folder, python_file):
    """A service with a job that goes on all the while."""
    data = tmp_path_factory.mktemp("hostile") / "data"
    with running(data, NARROW_MAX_DATASET_BYTES=str(2**26), NARROW_LEASE_SECONDS="15") as service:
        spec = spec_of(service, tiny_folder, python_file, SLOW)
        service.running_job = service.http.post("/jobs", json=spec).json()["id"]
        service.wait(service.running_job, lambda job: job["phase"] == "recover")
        yield service
        service.http.post(f"/jobs/{service.running_job}/cancel")


@pytest.mark.slow
def test_a_bomb_is_read_up_to_its_cap_and_refused(house):
    refused(house, [("/datasets", "file", hostile.bomb())])


def test_every_hostile_file_is_refused_with_a_sentence(house, tiny_folder):
    cases = [("/models", "files", case) for case in hostile.models(tiny_folder)]
    cases += [("/datasets", "file", case) for case in hostile.datasets()]
    assert len(cases) >= 60
    refused(house, cases)


def refused(house, cases):
    """Each within its time, with its sentence, and the service is as before."""
    server = psutil.Process(house.process.pid)
    kept = {kind: len(house.http.get(f"/{kind}").json()["data"]) for kind in ("models", "datasets")}
    before, faults = server.memory_info().rss, []
    for path, field, case in cases:
        began = time.monotonic()
        answer = house.http.post(path, files=[(field, file) for file in case.files])
        seconds = time.monotonic() - began
        told = answer.json()
        if not (
            400 <= answer.status_code < 500
            and answer.headers["content-type"] == "application/problem+json"
            and re.fullmatch(case.code, told["code"])
            and re.search(case.words, told["detail"])
            and seconds < SECONDS
        ):
            faults.append((case.name, answer.status_code, told.get("code"), told.get("detail"), round(seconds, 1)))
    assert not faults, "\n".join(map(str, faults))
    assert server.memory_info().rss - before < MEMORY
    assert {kind: len(house.http.get(f"/{kind}").json()["data"]) for kind in kept} == kept
    assert not Path("/tmp/narrow-was-here").exists()
    log = Path(house.log.name).read_text()
    assert "Traceback" not in log
    assert " 500" not in log
    assert "database is locked" not in log, "nothing slow is done in a transaction"
    job = house.job(house.running_job)
    assert (job["status"], job["attempt"]) == ("running", 1)
    for folder in (house.data / "models", house.data / "datasets", house.data / "uploads"):
        assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_files_that_are_as_wide_as_may_be_keep_nobody_waiting(house, tiny_folder):
    """What is just within the limits, several at a time: they are parsed where nobody waits for it."""
    whole = {path.name: path.read_bytes() for path in sorted(tiny_folder.iterdir())}

    def lists(count: int) -> bytes:
        return b"[" + b"[]," * (count // 2 - 2) + b"[]]"

    def with_lists(name: str, count: int) -> bytes:
        return whole[name].rstrip().removesuffix(b"}") + b', "wide": ' + lists(count) + b"}"

    cases = [
        {"vocab.json": lists(1_000_000), "added_tokens.json": lists(1_000_000), "special_tokens_map.json": lists(100_000)},
        {"vocab.json": b"{" + b",".join(b'"%x":%d' % (n, n) for n in range(990_000)) + b"}"},
        {"vocab.json": b"[" + b",".join([b"9" * 4000] * 4000) + b"]"},
        {"tokenizer.json": with_lists("tokenizer.json", 3_900_000)},
        {
            "tokenizer_config.json": lists(200_000),
            "generation_config.json": lists(100_000),
            "config.json": with_lists("config.json", 9_000),
        },
        {"model.safetensors": hostile.header(b"{" + b",".join(b'"%x":[]' % n for n in range(490_000)) + b"}")},
        {"model.safetensors.index.json": b'{"weight_map": {' + b",".join(b'"%x":"a"' % n for n in range(990_000)) + b"}}"},
    ]
    server, waits, done = psutil.Process(house.process.pid), [0.0], threading.Event()
    before, most = server.memory_info().rss, [0]

    def watch() -> None:
        with httpx.Client(base_url=house.url, timeout=60) as http:
            while not done.wait(0.02):
                began = time.monotonic()
                assert http.get("/healthz").status_code == 200
                waits.append(time.monotonic() - began)
                most.append(server.memory_info().rss)

    def send(files: dict[str, bytes]) -> int:
        with httpx.Client(base_url=house.url, timeout=120) as http:
            answer = http.post("/models", files=[("files", file) for file in {**whole, **files}.items()])
            return answer.status_code

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(send, cases))
    done.set()
    watcher.join()
    assert set(got) <= {201, 422}, got
    assert max(waits) < 1
    assert max(most) - before < MEMORY


TEMPLATE = (
    "{{ cycler.__init__.__globals__.os.popen('touch /tmp/narrow-was-here').read() }}"
    "{% for a in range(10**9) %}{% for b in range(10**9) %}x{% endfor %}{% endfor %}"
)


def test_a_chat_template_is_text_that_nobody_renders(house, tiny_folder):
    files = [("files", (path.name, path.read_bytes())) for path in sorted(tiny_folder.iterdir())]
    answer = house.http.post("/models", files=[*files, ("files", ("chat_template.jinja", TEMPLATE.encode()))])
    assert answer.status_code == 201, answer.text
    assert not Path("/tmp/narrow-was-here").exists()
    house.http.delete(f"/models/{answer.json()['id']}").raise_for_status()


@pytest.mark.parametrize(
    "base",
    [
        {"hub": "nobody/model"},
        {"path": "/etc"},
        {"model": "http://169.254.169.254/latest/meta-data"},
        {"model": "file:///etc/passwd"},
        {"model": "../models/other"},
        {"model": "mdl_" + "0" * 26, "path": "/etc"},
        "nobody/model",
    ],
)
def test_a_job_names_what_was_uploaded_and_nothing_else(house, base):
    spec = house.job(house.running_job)["spec"]
    for part in ("base", "teacher"):
        answer = house.http.post("/jobs", json={**spec, part: base})
        assert answer.status_code == 422, answer.text
        assert part in answer.json()["detail"]
