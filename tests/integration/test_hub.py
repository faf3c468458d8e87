"""Models from a hub: fetched whole and once, with whatever the hub or who stands in for it does wrong, and from nowhere else."""

import asyncio
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import fakehub
import httpcore
import httpx
import narrow_client
import narrow_client._sweep
import pytest
from click.testing import CliRunner
from live import QUICK, running
from narrow_client.cli import main
from sqlmodel import select
from test_quotas import house, refused  # noqa: F401

from service import hub as hubs
from service import janitor, outward, uploads
from service.api.schemas import HubModel, Source
from service.db.session import open_session, tenant_session
from service.db.tables import ModelRow
from service.problems import ApiError
from service.settings import Settings
from service.storage import open_storage

NAME = "owner/tiny"
SECRET = "hf_" + "Se" * 17 + "Q"  # pragma: allowlist secret
OTHERS = {
    "README.md": b"# Tiny",
    ".gitattributes": b"* lfs",
    "pytorch_model.bin": b"\x80\x04." * 2000,
    "modeling_tiny.py": b"print('hello')",
    "onnx/model.onnx": b"0" * 3000,
    "original/model.safetensors": b"0" * 3000,
}
"""What lies beside a model's files on a hub."""


@pytest.fixture
def hub():
    with fakehub.serving() as found:
        yield found


@pytest.fixture
def repo(hub, tiny_folder) -> fakehub.Repo:
    files = {path.name: path.read_bytes() for path in sorted(tiny_folder.iterdir())}
    hub.repos[NAME] = fakehub.Repo({**OTHERS, **files}, revisions=("main", "refs/pr/1"))
    return hub.repos[NAME]


@pytest.fixture
def fetch(hub, repo, house):  # noqa: F811
    """Asks the service, which has this hub, for the model. What is refused must have left nothing."""
    house.settings.hub, house.settings.silence_seconds = hub.url, 1.0

    def ask(tenant="ours", **changes):
        answer = house("POST", "/fetches", tenant, json={"hub": NAME, **changes})
        if answer.status_code not in (200, 201):
            for name in ("models", "uploads"):
                assert [path for path in (house.settings.data / name).iterdir() if path.name.startswith((".", "mdl"))] == []
            with open_session(house.engine) as session:
                assert session.exec(select(ModelRow.id).where(ModelRow.hub == NAME)).all() == []
        return answer

    ask.house, ask.settings = house, house.settings
    return ask


def file_of(name: str, repo: fakehub.Repo) -> str:
    return f"/{NAME}/resolve/{repo.commit}/{name}"


def lies(hub: fakehub.Hub, repo: fakehub.Repo, name: str, **told) -> None:
    """Has the hub tell something else of a file than what it has."""
    entries = repo.tree()
    entry = next(entry for entry in entries if entry["path"] == name)
    lfs = told.pop("lfs", {})
    entry.update(told)
    entry.get("lfs", {}).update(lfs)
    hub.does[f"/api/models/{NAME}/tree/"] = lambda handler: handler.json(entries)


def test_the_hub_of_these_tests_is_one_for_its_own_library(hub, repo, tmp_path):
    code = "import sys, huggingface_hub as h; print(h.snapshot_download(sys.argv[1], endpoint=sys.argv[2], revision=sys.argv[3]))"
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", code, NAME, hub.url, "refs/pr/1"]
    folder = Path(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip())
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == repo.files


def test_a_model_is_fetched_whole_and_once_a_tenant(fetch, hub, repo, tiny_folder):
    answer = fetch()
    assert answer.status_code == 201, answer.text
    model = answer.json()
    assert (model["name"], model["source"]) == ("tiny", {"hub": NAME, "commit": repo.commit})
    kept = {path.name: path.read_bytes() for path in (fetch.settings.data / "models" / model["id"]).iterdir()}
    assert kept == {path.name: path.read_bytes() for path in tiny_folder.iterdir()}
    resolved = hub.paths("/resolve/")
    assert sorted(path.rpartition("/")[2] for path in resolved) == sorted(kept), "nothing else was asked for"
    for revision in ("main", "refs/pr/1", repo.commit):
        again = fetch(revision=revision, name="other")
        assert (again.status_code, again.json()) == (200, model)
    assert hub.paths("/resolve/") == resolved
    assert f"/api/models/{NAME}/revision/refs%2Fpr%2F1" in hub.paths()
    theirs = fetch("theirs", name="Mine")
    assert (theirs.status_code, theirs.json()["name"]) == (201, "Mine")
    assert theirs.json()["id"] != model["id"]
    assert len(hub.paths("/resolve/")) == 2 * len(resolved)
    files = [("files", (path.name, path.read_bytes())) for path in tiny_folder.iterdir()]
    uploaded = fetch.house("POST", "/models", files=files).json()
    assert (uploaded["source"], uploaded["sha256"]) == (None, model["sha256"])
    assert fetch.house("DELETE", f"/models/{model['id']}").status_code == 204
    assert fetch().status_code == 201
    assert not list(fetch.settings.uploads.glob(".fetch-*"))


def test_a_gated_model_takes_a_token_that_is_nowhere_afterwards(hub, repo, tmp_path, tiny_folder):
    repo.token = SECRET
    wanted = HubModel(hub=NAME, token=SECRET)
    assert SECRET not in f"{wanted!r} {wanted} {wanted.model_dump()} {wanted.model_dump_json()}"
    with running(tmp_path / "data", workers=0, NARROW_HUB=hub.url, NARROW_LOG="json") as service:

        def ask(**told):
            return service.http.post("/fetches", json={"hub": NAME, **told})

        answers = [ask(), ask(token=SECRET[:-1] + "x"), ask(token=SECRET + " "), ask(token=[SECRET]), ask(hub="a", token=SECRET)]
        refused(answers[0], 403, "gated_model", "send as 'token'")
        refused(answers[1], 403, "gated_model", "with this token")
        for answer in answers[2:]:
            refused(answer, 422, "invalid_request")
        hub.does["/lfs/"] = lambda handler: handler.send(500, b"")
        answers.append(ask(token=SECRET))
        refused(answers[-1], 502, "hub_away", "answered with 500")
        del hub.does["/lfs/"]
        answers.append(ask(token=SECRET))
        assert answers[-1].status_code == 201, answers[-1].text
        answers += [ask(token=SECRET), service.http.get("/models"), service.http.get("/audit")]
        log = Path(service.log.name).read_bytes()
    assert f"Bearer {SECRET}" in {shown for _, shown in hub.asked}
    assert not any(SECRET[:-1] in answer.text for answer in answers)
    assert SECRET[:-1].encode() not in log
    for path in service.data.rglob("*"):  # the database, too, where it is SQLite
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def test_a_token_is_shown_to_the_hub_alone(fetch, hub, repo, monkeypatch):
    """Not to where it sends us, and not to itself if it is sent back to from there."""
    monkeypatch.setattr(outward, "is_public", lambda address: True)
    repo.token = SECRET
    with fakehub.serving() as other:
        other.repos = {NAME: fakehub.Repo(repo.files)}
        hub.does["/lfs/"] = lambda handler: handler.redirect(other.url + handler.path)
        other.does["/lfs/"] = lambda handler: handler.redirect(f"{hub.url}/back{handler.path}")
        bodies = {entry["lfs"]["oid"]: repo.files[entry["path"]] for entry in repo.tree() if "lfs" in entry}
        hub.does["/back/"] = lambda handler: handler.send(200, bodies[handler.path.rpartition("/")[2]])
        assert fetch(token=SECRET).status_code == 201
        assert {shown for _, shown in other.asked} == {None}
        assert {shown for path, shown in hub.asked if "/back/" in path} == {None}
        assert {shown for path, shown in hub.asked if "/back/" not in path} == {f"Bearer {SECRET}"}


PLACES = {
    "another port": "http://127.0.0.1:{port}/x",
    "its name": "http://localhost:{port}/x",
    "a number": "http://2130706433:{port}/x",
    "IPv6": "http://[::ffff:127.0.0.1]:{port}/x",
    "a name that leads here": "http://rebound.example:{port}/x",
    "the machine's metadata": "http://169.254.169.254/latest/meta-data",
    "a private network": "https://10.0.0.1/x",
    "a file": "file:///etc/passwd",
    "another scheme": "ftp://127.0.0.1:{port}/x",
    "a user": "http://hub@127.0.0.1:{port}/x",
    "a line break": "http://example.com/\u00a0x",
    "no port": "http://example.com:99999/",
    "nowhere": "",
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_redirects_lead_to_no_private_place(fetch, hub, repo, monkeypatch, place):
    real = socket.getaddrinfo

    def rebound(host, *rest, **more):
        return real("127.0.0.1" if host in ("rebound.example", b"rebound.example") else host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", rebound)
    with fakehub.serving() as other:
        place = place.format(port=other.url.rpartition(":")[2])
        other.does["/"] = lambda handler: handler.send(200, b"{}")
        for path in ("/lfs/", f"/api/models/{NAME}/tree/", f"/api/models/{NAME}/revision/"):
            hub.does[path] = lambda handler: handler.redirect(place)
            refused(fetch(), 502, "bad_hub", "redirects to")
        assert other.asked == []


def test_what_was_looked_at_is_what_is_connected_to(monkeypatch):
    """Also by a name that leads elsewhere the next time that it is asked for."""
    places = ["93.184.216.34", "127.0.0.1"] * 2
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, **_: [(2, 1, 6, "", (places.pop(0), port))])
    tried = []

    async def connect(self, host, *_):
        tried.append(host)

    monkeypatch.setattr(httpcore.AnyIOBackend, "connect_tcp", connect)
    monkeypatch.setattr(httpcore.SyncBackend, "connect_tcp", lambda self, host, *_: tried.append(host))
    for connect_tcp in (
        lambda: asyncio.run(outward.AsyncOnlyPublic(("hub.example", 443)).connect_tcp("rebound.example", 443)),
        lambda: outward.OnlyPublic().connect_tcp("rebound.example", 443),
    ):
        connect_tcp()
        with pytest.raises(outward.NotPublic):
            connect_tcp()
    assert tried == ["93.184.216.34"] * 2
    asyncio.run(outward.AsyncOnlyPublic(("hub.example", 443)).connect_tcp("hub.example", 443))
    assert tried[2:] == ["hub.example"]


def test_from_an_encrypted_hub_nothing_leads_to_a_connection_that_is_not():
    settings = Settings(hub="https://hub.example/mirror")
    for place in ("http://example.com/x", "http://hub.example/x"):
        with pytest.raises(ApiError, match="not be encrypted"):
            hubs._redirected(settings, "https://hub.example/mirror/x", place)
    assert hubs._redirected(settings, "https://hub.example/mirror/x", "https://cdn.example/y#z") == "https://cdn.example/y"
    assert hubs._redirected(settings, "https://hub.example/mirror/x", "y?z=1") == "https://hub.example/mirror/y?z=1"


def test_redirects_end(fetch, hub):
    hub.does["/lfs/"] = lambda handler: handler.redirect(handler.path)
    refused(fetch(), 502, "bad_hub", "more than 3 times")
    assert len(hub.paths("/lfs/")) == 3


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_files_have_the_bytes_that_were_told(fetch, hub, repo, name):
    size = len(repo.files[name])
    lies(hub, repo, name, size=size + 1, lfs={"size": size + 1})
    refused(fetch(), 422, "wrong_size", f"{name} has {size + 1:,} bytes, but {size:,} came")
    lies(hub, repo, name, size=size - 1, lfs={"size": size - 1})
    refused(fetch(), 422, "wrong_size", "more came")


def test_what_never_ends_is_not_taken(fetch, hub, repo):
    """Files, and the hub's own answers."""
    sent = []

    def endless(handler):
        handler.stream(sent.append(1) or bytes(2**16) for _ in range(10_000))

    hub.does["/lfs/"] = endless
    refused(fetch(), 422, "wrong_size", "more came")
    for path in (f"/api/models/{NAME}/revision/", f"/api/models/{NAME}/tree/"):
        hub.does[path] = endless
        refused(fetch(), 502, "bad_hub", "more than 1 MiB")
    assert len(sent) < 1000


def test_a_file_that_breaks_off_falls_silent_or_comes_too_slowly(fetch, hub, repo):
    body = repo.files["model.safetensors"]

    def breaks(handler):
        handler.close_connection = True
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[:1000])

    def falls_silent(handler):
        handler.stream(itertools.chain([body[:1000]], (time.sleep(3) or b"" for _ in range(1))))

    def drips(handler):
        handler.stream(time.sleep(0.1) or body[n : n + 1] for n in range(100))

    fetch.settings.silence_seconds, fetch.settings.hub_seconds = 0.7, 2.0
    for does, status, code, words in (
        (breaks, 502, "hub_away", "broke off"),
        (falls_silent, 502, "hub_away", "nothing for 0.7 s"),
        (drips, 422, "hub_too_slow", "within 2 s (NARROW_HUB_SECONDS)"),
    ):
        hub.does["/lfs/"] = does
        began = time.monotonic()
        refused(fetch(), status, code, words)
        assert time.monotonic() - began < 4
    hub.does = {f"/api/models/{NAME}/tree/": drips}
    refused(fetch(), 422, "hub_too_slow")


def test_a_large_file_is_the_one_that_was_told(fetch, hub, repo):
    lies(hub, repo, "model.safetensors", lfs={"oid": "0" * 64})
    refused(fetch(), 422, "wrong_digest", "model.safetensors")


def test_what_is_no_model_is_not_fetched(fetch, hub, repo):
    weights, config = repo.files.pop("model.safetensors"), repo.files["config.json"]
    refused(fetch(), 422, "unsafe_weights", "'pytorch_model.bin': only safetensors")
    del repo.files["pytorch_model.bin"]
    refused(fetch(), 422, "missing_file", "model.safetensors is missing")
    assert hub.paths("/resolve/") == []
    repo.files["model.safetensors"] = weights
    repo.files["config.json"] = json.dumps({**json.loads(config), "model_type": "bert"}).encode()
    refused(fetch(), 422, "unsupported_architecture")
    assert hub.paths("/resolve/")
    assert not any("safetensors" in path for path in hub.paths("/resolve/")), "its weights could have taken hours"
    repo.files["config.json"], repo.files["model.safetensors"] = config, weights[:-1]
    refused(fetch(), 422, "bad_safetensors")


def test_names_that_nobody_gives_a_file_of_a_model_are_no_files(fetch, hub, repo):
    tricks = (
        "../config.json",
        "a/../config.json",
        "/etc/passwd",
        "..",
        "./config.json",
        "config.json\0",
        "config.json/",
        "C:config.json",
    )
    entries = [{**repo.tree()[0], "path": path} for path in tricks] + [{"type": "directory", "path": "config.json"}]
    hub.does[f"/api/models/{NAME}/tree/"] = lambda handler: handler.json([*entries, *repo.tree()])
    assert fetch().status_code == 201
    assert all(path.removeprefix(file_of("", repo)) in repo.files for path in hub.paths("/resolve/"))
    hub.does[f"/api/models/{NAME}/tree/"] = lambda handler: handler.json([*repo.tree(), repo.tree()[-1]])
    refused(fetch.house("POST", "/fetches", "theirs", json={"hub": NAME}), 502, "bad_hub", "twice")


def test_answers_that_no_hub_gives(fetch, hub, repo):
    revision, tree = f"/api/models/{NAME}/revision/", f"/api/models/{NAME}/tree/"
    good = repo.tree()
    for body in (b"", b"<html>", b"[" * 500_000, b'{"sha": "main"}', b'{"sha": "../../x"}', b'{"sha": null}', b"\xff", b"[]"):
        hub.does = {revision: lambda handler, body=body: handler.send(200, body)}
        refused(fetch(), 502, "bad_hub", "something else")
    for change in ({"size": -1}, {"size": "x"}, {"size": 1e400}, {"path": None}, {"lfs": {"oid": "0", "size": 1}}, {"lfs": [1]}):
        hub.does = {tree: lambda handler, change=change: handler.json([{**good[0], **change}, *good])}
        refused(fetch(), 502, "bad_hub", "something else")
    link = {"Link": '<https://elsewhere.example/x?cursor=1>; rel="next"'}
    hub.does = {tree: lambda handler: handler.json(good[:1], **link)}
    refused(fetch(), 422, "too_many_files")
    assert len(hub.paths("?cursor=1")) == hubs.MOST_PAGES - 1, "and none of them elsewhere"
    shards = [{**good[0], "path": f"model-{n:05d}-of-02000.safetensors"} for n in range(2000)]
    hub.does = {tree: lambda handler: handler.json(shards)}
    refused(fetch(), 422, "too_many_files", "1,000")
    assert hub.paths("/resolve/") == []


def test_what_is_not_there_and_who_is_away(fetch, hub, repo):
    refused(fetch(hub="owner/other"), 403, "gated_model", "is it misspelt?")
    refused(fetch(revision="other"), 404, "not_on_hub", "'other'")
    for status in (204, 304, 400, 429, 500, 503):
        hub.does["/api/"] = lambda handler, status=status: handler.send(status, b"")
        refused(fetch(), 502, "hub_away", f"answered with {status}")
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        fetch.settings.hub = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    refused(fetch(), 502, "hub_away", "not reached")
    fetch.settings.hub = ""
    refused(fetch(), 403, "no_hub", "NARROW_HUB")


@pytest.mark.parametrize(
    "wanted",
    [
        *(
            {"hub": text}
            for text in ("tiny", "a/b/c", "../b", "a/..", "a/b?c", "a/b#c", "a//b", "a/b%2e", "a/.b", "a/b\n", "ä/b", "")
        ),
        *({"revision": text} for text in ("..", "a/../b", "a?b", "a#b", "/a", "a/", "a b", "a..b", "ma\nin", "")),
        *({"token": text} for text in ("a b", "a\r\nX: y", "ü", "")),
        {"url": "http://example.com"},
    ],
)
def test_names_that_are_none_ask_nobody(fetch, hub, wanted):
    refused(fetch(**wanted), 422, "invalid_request")
    assert hub.asked == []


def test_what_there_is_no_room_for_is_not_fetched(fetch, hub, repo, tiny_folder, monkeypatch):
    size, free = sum(path.stat().st_size for path in tiny_folder.iterdir()), 10**12
    monkeypatch.setattr("service.uploads.shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    for change, status, code, words in (
        ({"max_model_bytes": size - 1}, 413, "too_large", f"{size:,} bytes"),
        ({"max_bytes": size + 149}, 507, "quota_full", "150 bytes are kept"),  # `house` has a model and a dataset
        ({"min_free_bytes": free - size // 2}, 507, "disk_full", ""),
    ):
        before = {name: getattr(fetch.settings, name) for name in change}
        for name, value in change.items():
            setattr(fetch.settings, name, value)
        refused(fetch(), status, code, words)
        for name, value in before.items():
            setattr(fetch.settings, name, value)
    assert hub.paths("/resolve/") == []
    fetch.settings.max_model_bytes, fetch.settings.max_bytes = size, size + 150
    assert fetch().status_code == 201


@pytest.fixture
def held(hub, repo):
    """Weights that come when `held.go` is set."""
    go = threading.Event()
    bodies = {entry["lfs"]["oid"]: repo.files[entry["path"]] for entry in repo.tree() if "lfs" in entry}

    def wait(handler):
        go.wait(60)
        handler.send(200, bodies[handler.path.rpartition("/")[2]])

    hub.does["/lfs/"] = wait
    hub.go = go
    yield hub
    go.set()


def test_who_asks_meanwhile_waits_for_the_same_and_nobody_else_waits(held, repo, tmp_path, tiny_folder, python_file):
    """No transaction is open and no thread is taken, and whoever went away finds the model there."""
    for n in range(3):
        held.repos[f"owner/tiny{n}"] = fakehub.Repo({**repo.files, "merges.txt": b"%d" % n})
    settings = {"NARROW_HUB": held.url, "NARROW_SILENCE_SECONDS": "30"}
    with running(tmp_path / "data", workers=0, **settings) as service, ThreadPoolExecutor(20) as pool:

        def ask(name=NAME):
            return service.http.post("/fetches", json={"hub": name}, timeout=120)

        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{service.url}/fetches", json={"hub": NAME}, timeout=1)
        waiting = [pool.submit(ask) for _ in range(10)]
        other = pool.submit(ask, "owner/tiny0")
        until(lambda: len(held.paths("/lfs/")) >= 2)
        time.sleep(0.5)
        began = time.monotonic()
        assert service.http.get("/healthz").status_code == 200
        assert service.upload_dataset(python_file)
        assert time.monotonic() - began < 3
        refused(ask("owner/tiny1"), 429, "too_many_fetches", "2 models")
        held.go.set()
        answers = [asked.result() for asked in waiting]
        assert {answer.status_code for answer in answers} == {200}, "it was fetched for the one that went away"
        assert len({answer.json()["id"] for answer in answers}) == 1
        assert other.result().status_code == 201
        assert len(held.paths(f"/{NAME}/resolve/")) == len(list(tiny_folder.iterdir()))
        assert ask("owner/tiny2").status_code == 201


def test_a_server_that_stops_ends_what_it_fetches(hub, repo, tmp_path):
    hub.does["/lfs/"] = lambda handler: handler.stream(time.sleep(0.1) or b"x" for _ in range(600))
    with running(tmp_path / "data", workers=0, NARROW_HUB=hub.url) as service, ThreadPoolExecutor() as pool:
        asked = [pool.submit(service.http.post, "/fetches", json={"hub": NAME}) for _ in range(2)]
        until(lambda: hub.paths("/lfs/"))
        began = time.monotonic()
        assert service.stop() == 0
        assert time.monotonic() - began < 8
        for answer in asked:
            refused(answer.result(), 503, "stopping", "ask again")
        assert list((service.data / "uploads").iterdir()) == []


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


def test_of_two_servers_that_fetch_the_same_one_keeps_it(fetch, hub, repo, tmp_path, tiny_folder):
    settings, storage = fetch.settings, open_storage(fetch.settings)
    source = Source(hub=NAME, commit=repo.commit)
    made = []
    for name in ("a", "b"):
        folder = shutil.copytree(tiny_folder, settings.uploads / name)
        with tenant_session(fetch.house.engine, "ours") as session:
            made.append(uploads.store_fetched(session, settings, storage, folder, source, None))
    assert made[0].source == source
    assert made[1] is None
    assert [path.name for path in (settings.data / "models").iterdir()] == [made[0].id]
    assert storage.doubted("models/") == []
    assert (fetch().status_code, fetch().json()["id"]) == (200, made[0].id)


def test_what_a_server_that_was_killed_has_fetched_goes(fetch):
    old, new = (fetch.settings.uploads / f".fetch-{name}" for name in ("old", "new"))
    for folder in (old, new):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    os.utime(old, (0, 0))
    janitor.tidy(fetch.house.engine, fetch.settings, open_storage(fetch.settings))
    assert (old.exists(), new.exists()) == (False, True)


@pytest.mark.parametrize("url", ["huggingface.co", "ftp://x", "https://", "https://a:b@x", "https://x/?y", "https://x y"])
def test_a_hub_is_a_url(url):
    with pytest.raises(ValueError, match="hub"):
        Settings(hub=url)


@pytest.mark.slow
def test_compress_from_a_hub(hub, repo, tmp_path, python_file, monkeypatch):
    """The whole way, with a token and as a sweep's base too; and the report says where the base is from."""
    repo.token = SECRET
    options = {"block_tokens": 64, "skill_tokens": 1024}
    with running(tmp_path / "data", NARROW_HUB=hub.url) as service, narrow_client.Narrow(service.url) as client:
        arguments = {"export": ["safetensors"], "method": QUICK, "options": options, "client": client, "progress": False}
        with pytest.raises(narrow_client.NotAllowed, match="token"):
            narrow_client.compress(f"hub:{NAME}", python_file, 0.85, tmp_path / "out", **arguments)
        monkeypatch.setenv("NARROW_HUB_TOKEN", SECRET)
        result = narrow_client.compress(f"hub:{NAME}@refs/pr/1", python_file, 0.85, tmp_path / "out", **arguments)
        base = result.report.provenance.inputs[0]
        assert (base.part, base.hub, base.commit) == ("base", NAME, repo.commit)
        assert result.report.provenance.base_model == NAME
        card = (result.model_path / "README.md").read_text()
        assert f"base_model: {NAME}\n" in card
        assert repo.commit in card
        monkeypatch.setenv("NARROW_URL", service.url)
        fetched = CliRunner().invoke(main, ["fetch", NAME])
        assert (fetched.exit_code, fetched.output.strip()) == (0, result.job.spec.base.model)
        command = ["compress", "--base", f"hub:{NAME}", "--target", str(python_file), "--dry-run"]
        assert CliRunner().invoke(main, command).exit_code == 0
        assert CliRunner().invoke(main, ["fetch", "tiny"]).exit_code == 2
        assert CliRunner().invoke(main, ["compress", "--base", "hub:tiny", "--target", str(python_file)]).exit_code == 2
        spec = {"base": {"hub": NAME, "revision": "main"}, "target": {"path": str(python_file)}, "budgets": [{"parameters": 0.8}]}
        (tmp_path / "sweep.json").write_text(json.dumps(spec))
        made = narrow_client._sweep.upload_sweep(client, narrow_client._sweep.read_sweep(tmp_path / "sweep.json"))
        assert made["base"] == {"model": result.job.spec.base.model}
    assert len(hub.paths("/resolve/model.safetensors")) <= 1
