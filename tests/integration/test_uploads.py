"""Uploads in pieces, by the rules of tus 1.0, broken off in every way, on a folder and on a bucket."""

import asyncio
import base64
import hashlib
import json
import os
import shutil
import socket
import time
from contextlib import ExitStack

import narrow_client
import objects
import pytest
import zstandard
from live import running, settings_of
from narrow_client import _calls
from sqlalchemy import text
from tiny import documents

from service import janitor
from service.db.session import connect
from service.storage import open_storage

PIECE = {"Content-Type": "application/offset+octet-stream", "Tus-Resumable": "1.0.0"}


@pytest.fixture(scope="module", params=["folder", pytest.param("bucket", marks=objects.needed)])
def place(request):
    return objects.server().bucket(f"u{time.time_ns()}") if request.param == "bucket" else {}


@pytest.fixture(scope="module")
def service(place, tmp_path_factory):
    with running(tmp_path_factory.mktemp("uploads") / "data", workers=0, **place, NARROW_MAX_DATASET_BYTES="1000000") as found:
        yield found


def metadata(**told: str) -> str:
    return ",".join(f"{key} {base64.b64encode(value.encode()).decode()}" for key, value in told.items())


def begin(service, body: bytes, name="text.jsonl", **told) -> str:
    headers = {"Upload-Length": str(len(body)), "Upload-Metadata": metadata(filename=name, **told), "Tus-Resumable": "1.0.0"}
    answer = service.http.post("/uploads", headers=headers)
    assert answer.status_code == 201, answer.text
    assert answer.headers["location"] == f"/uploads/{answer.json()['id']}"
    assert "upload-expires" in answer.headers
    return answer.json()["id"]


def send(service, upload, offset, piece, **headers):
    return service.http.patch(f"/uploads/{upload}", content=piece, headers={**PIECE, "Upload-Offset": str(offset), **headers})


def offset(service, upload) -> int:
    answer = service.http.head(f"/uploads/{upload}", headers={"Tus-Resumable": "1.0.0"})
    assert (answer.status_code, answer.headers["cache-control"], answer.content) == (200, "no-store", b"")
    return int(answer.headers["upload-offset"])


def refused(answer, status, code):
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text


@pytest.fixture
def body() -> bytes:
    """A dataset that no other test has."""
    rows = [*documents(), os.urandom(8).hex()]
    return "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()


def test_a_file_in_pieces_becomes_a_dataset(service, body):
    upload = begin(service, body, sha256=hashlib.sha256(body).hexdigest())
    assert offset(service, upload) == 0
    answer = send(service, upload, 0, body[:1000])
    assert (answer.status_code, answer.headers["upload-offset"], answer.content) == (204, "1000", b"")
    refused(send(service, upload, 0, body), 409, "wrong_offset")
    refused(send(service, upload, 1001, body[1001:]), 409, "wrong_offset")
    incomplete = service.http.post("/datasets", data={"upload": upload})
    refused(incomplete, 409, "upload_incomplete")
    assert "1,000 bytes of" in incomplete.json()["detail"]
    wrong = base64.b64encode(hashlib.sha256(b"other").digest()).decode()
    refused(send(service, upload, 1000, body[1000:], **{"Upload-Checksum": f"sha256 {wrong}"}), 460, "wrong_checksum")
    assert offset(service, upload) == 1000
    right = base64.b64encode(hashlib.sha1(body[1000:]).digest()).decode()
    assert send(service, upload, 1000, body[1000:], **{"Upload-Checksum": f"sha1 {right}"}).status_code == 204
    assert service.http.get(f"/uploads/{upload}").json()["offset"] == len(body)
    made = service.http.post("/datasets", data={"upload": upload, "name": "pieces"})
    assert made.status_code == 201, made.text
    assert (made.json()["sha256"], made.json()["name"]) == (hashlib.sha256(body).hexdigest(), "pieces")
    refused(service.http.get(f"/uploads/{upload}"), 404, "upload_not_found")
    # A form may have a million bytes here, and pieces no more.
    large = begin(service, body := body * (1_000_000 // len(body) + 1))
    assert send(service, large, 0, body).status_code == 204
    refused(service.http.post("/datasets", data={"upload": large}), 413, "too_large")
    assert service.http.delete(f"/uploads/{large}", headers={"Tus-Resumable": "1.0.0"}).status_code == 204


def test_what_came_before_a_break_is_kept(service, body):
    upload = begin(service, body)
    host, port = service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as broken:
        head = f"PATCH /uploads/{upload} HTTP/1.1\r\nHost: localhost\r\nUpload-Offset: 0\r\nContent-Length: {len(body)}\r\n"
        lines = "".join(f"{name}: {value}\r\n" for name, value in PIECE.items())
        broken.sendall((head + lines + "\r\n").encode() + body[:700])
        time.sleep(0.5)
    deadline = time.monotonic() + 20
    while offset(service, upload) != 700 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert send(service, upload, 700, body[700:]).status_code == 204
    made = service.http.post("/datasets", data={"upload": upload})
    assert made.json()["sha256"] == hashlib.sha256(body).hexdigest()


def test_what_is_wrong_is_told_and_keeps_nothing(service, body):
    told = {"Tus-Resumable": "1.0.0"}
    long = {**told, "Upload-Length": str(2**50), "Upload-Metadata": metadata(filename="a.txt")}
    refused(service.http.post("/uploads", headers=long), 413, "too_large")
    for given, code in (
        ("filename !!!", "bad_metadata"),
        (metadata(name="a"), "bad_metadata"),
        (metadata(filename="../a"), "unexpected_file"),
        (metadata(filename="a", sha256="zz"), "bad_metadata"),
    ):
        refused(service.http.post("/uploads", headers={**told, "Upload-Length": "5", "Upload-Metadata": given}), 422, code)
    refused(service.http.post("/uploads", headers=told), 422, "invalid_request")
    answer = service.http.post("/uploads", headers={"Tus-Resumable": "0.2.2", "Upload-Length": "1", "Upload-Metadata": "a"})
    refused(answer, 412, "tus_version")
    assert answer.headers["tus-version"] == "1.0.0"
    upload = begin(service, body, sha256="0" * 64)
    refused(send(service, upload, 0, body + b"more"), 413, "too_large")
    refused(send(service, upload, 0, body, **{"Content-Type": "text/plain"}), 415, "not_a_piece")
    refused(send(service, upload, 0, body, **{"Upload-Checksum": "crc32 AAAA"}), 422, "bad_checksum")
    refused(send(service, upload, 0, body, **{"Upload-Checksum": "md5 !"}), 422, "bad_checksum")
    refused(send(service, upload, 0, body, **{"Upload-Checksum": "md5 größer".encode("latin-1")}), 422, "bad_checksum")
    assert offset(service, upload) == 0
    assert send(service, upload, 0, body).status_code == 204
    refused(service.http.post("/datasets", data={"upload": upload}), 422, "wrong_digest")
    both = service.http.post("/datasets", data={"upload": upload}, files={"file": ("a.txt", b"text " * 100)})
    refused(both, 422, "invalid_request")
    refused(service.http.post("/datasets", data={"upload": upload[:-3] + "000"}), 404, "upload_not_found")
    refused(service.http.post("/models", data={"uploads": [upload]}), 422, "unexpected_file")
    assert service.http.delete(f"/uploads/{upload}").status_code == 204
    assert service.http.head(f"/uploads/{upload}").status_code == 404
    answer = service.http.options("/uploads")
    assert (answer.status_code, "creation" in answer.headers["tus-extension"]) == (204, True)


class Flaky:
    """Every other piece breaks off on its way."""

    def __init__(self, send) -> None:
        self.send, self.pieces = send, 0

    def __call__(self, call):
        if call.method == "PATCH":
            self.pieces += 1
            if self.pieces % 2:
                raise narrow_client.ConnectionFailed("cut")
        return self.send(call)


def test_the_client_goes_on_where_it_was(service, body, tiny_folder, tmp_path, monkeypatch):
    """Also one that was ended and started again; a model's large files come with its small ones."""
    monkeypatch.setattr(_calls, "LARGE", 5000)
    monkeypatch.setattr("narrow_client._transport.pause", lambda *_: 0.0)
    path = tmp_path / "text.jsonl"
    path.write_bytes(body)
    packed = tmp_path / "Text.CSV.zst"
    packed.write_bytes(
        zstandard.compress(b"text,n\n" + b"".join(b"%s,1\n" % os.urandom(50).hex().encode() for _ in range(200)) + b"bad\n")
    )
    with ExitStack() as stack:
        client = stack.enter_context(narrow_client.Narrow(service.url))
        flaky = Flaky(client.datasets._transport.send)
        monkeypatch.setattr(client.datasets._transport, "send", flaky)
        upload = begin(service, body, sha256=hashlib.sha256(body).hexdigest())
        assert send(service, upload, 0, body[:3000]).status_code == 204
        made = client.datasets.upload(path)
        assert made.sha256 == hashlib.sha256(body).hexdigest()
        assert flaky.pieces == 2 * -(-(len(body) - 3000) // 5000), "what was there is not sent again"
        pieces = flaky.pieces
        assert client.datasets.upload(packed, bad_rows="skip").skipped == 1
        assert flaky.pieces > pieces, "it went in pieces"
        model = client.models.upload(tiny_folder)
        assert model.family == "llama"
        assert client.models.get(model.id).sha256 == service.http.get(f"/models/{model.id}").json()["sha256"]
        assert service.http.get("/uploads").json()["data"] == []


def test_what_is_there_is_not_sent_again(service, tiny_folder, tmp_path, monkeypatch):
    path, table = tmp_path / "text.jsonl", tmp_path / "text.csv"
    path.write_text('{"text": "a", "other": "b"}\n' * 5)
    table.write_bytes(path.read_bytes())
    sent = []
    post = _calls.upload_dataset
    monkeypatch.setattr(_calls, "upload_dataset", lambda *told: sent.append(told) or post(*told))
    with narrow_client.Narrow(service.url) as client:
        first = client.datasets.upload(path)
        assert client.datasets.upload(path) == first
        assert len(sent) == 1
        others = [
            client.datasets.upload(path, "another"),
            client.datasets.upload(path, column="other"),
            client.datasets.upload(path, bad_rows="skip"),
        ]
        assert len({first.id, *(other.id for other in others)}) == 4
        with pytest.raises(narrow_client.InvalidRequest):
            client.datasets.upload(table)  # the same bytes, read as something else
        model = client.models.upload(tiny_folder)
        assert client.models.upload(tiny_folder) == model
        assert client.models.upload(tiny_folder, "another").id != model.id
        assert {found.id for found in client.models.list(sha256=model.sha256)} >= {model.id}
        assert list(client.models.list(sha256="0" * 64)) == []
        odd = shutil.copy(path, tmp_path / "My data (v1).JSONL")
        assert client.datasets.upload(odd) == client.datasets.upload(odd) != first
        copy = shutil.copytree(tiny_folder, tmp_path / tiny_folder.name)
        (copy / "consolidated.safetensors").write_bytes(b"the same weights in another layout")
        assert client.models.upload(copy).id == model.id
        config = (copy / "config.json").read_text()
        (copy / "config.json").write_text(config + "\n")
        assert client.models.upload(copy).id != model.id

    async def again():
        async with narrow_client.AsyncNarrow(service.url) as client:
            return await client.models.upload(tiny_folder), await client.datasets.upload(path)

    assert asyncio.run(again()) == (model, first)


def test_uploads_of_which_nothing_is_made_go(service, place, body, monkeypatch):
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    settings = settings_of(service.data).model_copy(update={"storage_url": place.get("NARROW_STORAGE_URL", "")})
    engine, storage = connect(settings), open_storage(settings)
    kept, old = begin(service, body), begin(service, body)
    for upload in (kept, old):
        assert send(service, upload, 0, body[:500]).status_code == 204
    with engine.begin() as connection:
        connection.execute(text(f"UPDATE upload SET expires_at = '2020-01-01' WHERE id = '{old}'"))
    janitor.tidy(engine, settings, storage)
    assert [s.key.split("/")[1] for s in storage.below("uploads/") if "upl_" in s.key] == [kept]
    assert service.http.get(f"/uploads/{old}").status_code == 404
    assert service.http.delete(f"/uploads/{kept}").status_code == 204
