"""Webhooks: what is sent and how it is signed, what happens when nobody takes it, and where they may never go."""

import ipaddress
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from sqlmodel import select
from standardwebhooks import Webhook
from test_operations import key
from test_quotas import JOB, house, spec  # noqa: F401

from service import outward, queue, webhooks
from service.db.session import open_session, tenant_session
from service.db.tables import MessageRow, WebhookRow, new_id, now
from service.problems import ApiError
from service.webhooks import Courier

private = pytest.mark.parametrize("house", [{"webhook_private": True}], indirect=True)


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.got.append((dict(self.headers.items()), body))
        status = self.server.answers.pop(0) if len(self.server.answers) > 1 else self.server.answers[0]
        if status == "silence":
            time.sleep(2)
            return
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def receiver():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    server.got, server.answers = [], [204]
    server.url = f"http://127.0.0.1:{server.server_port}/hook"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@contextmanager
def sending(house, count=1):  # noqa: F811
    couriers = [Courier(house.engine, house.settings) for _ in range(count)]
    try:
        yield
    finally:
        for courier in couriers:
            courier.close()


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(webhooks, "RETRIES", (0,) * 4)
    monkeypatch.setattr(webhooks, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(webhooks, "TIMEOUT", 0.5)


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


@pytest.fixture
def hook(house, receiver):  # noqa: F811
    admin = key(house.engine, "ours", "admin")
    made = house("POST", "/webhooks", headers=admin, json={"url": receiver.url})
    assert made.status_code == 201, made.text

    def messages(**params):
        return house("GET", f"/webhooks/{made.json()['id']}/messages", headers=admin, params=params).json()["data"]

    messages.id, messages.secret, messages.admin = made.json()["id"], made.json()["secret"], admin
    return messages


@private
def test_a_job_that_ends_is_told_once_signed_and_to_its_tenant_alone(house, hook, receiver):  # noqa: F811
    other = key(house.engine, "theirs", "admin")
    house("POST", "/webhooks", headers=other, json={"url": receiver.url + "/theirs"})
    ids = [house("POST", "/jobs", json=spec(**JOB)).json()["id"] for _ in range(30)]
    with open_session(house.engine) as session:
        first = queue.claim(session, 60, 3)
        error = {"code": "disk_full", "message": "The disk was full."}
        queue.finish(session, first.id, first.lease_token, "failed", error, [])
    for identifier in ids[1:]:
        assert house("POST", f"/jobs/{identifier}/cancel").status_code == 200
    with sending(house, 3):
        until(lambda: not hook(pending=True) and len(receiver.got) >= 30)
        time.sleep(0.3)
    assert len(receiver.got) == 30, "each once, though three servers send"
    told = [Webhook(hook.secret).verify(body, {k.lower(): v for k, v in headers.items()}) for headers, body in receiver.got]
    assert sorted(body["data"]["job"] for body in told) == sorted(ids)
    failed = next(body for body in told if body["type"] == "job.failed")
    assert (failed["data"]["job"], failed["data"]["error"]) == (first.id, error)
    assert {body["type"] for body in told} == {"job.failed", "job.cancelled"}
    line = hook()[0]
    assert (line["status"], line["attempts"], line["error"], line["next_at"]) == (204, 1, None, None)
    shown = house("GET", f"/webhooks/{hook.id}", headers=hook.admin).json()
    assert "secret" not in shown
    assert house("GET", "/webhooks").status_code == 403


@private
@pytest.mark.parametrize("answer", [500, 302, "silence"])
def test_what_is_not_taken_is_sent_again_with_the_same_id(house, hook, receiver, answer):  # noqa: F811
    receiver.answers = [answer, answer, 200]
    assert house("POST", f"/webhooks/{hook.id}/test", headers=hook.admin).status_code == 202
    with sending(house):
        until(lambda: hook()[0]["delivered_at"])
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1
    assert hook()[0]["attempts"] == 3 == len(receiver.got)
    assert {json.loads(body)["type"] for _, body in receiver.got} == {"test"}


@private
@pytest.mark.parametrize(("answer", "tries"), [(410, 1), (500, 5)])
def test_a_receiver_that_is_gone_is_told_nothing_more_until_it_is_tested(house, hook, receiver, answer, tries):  # noqa: F811
    receiver.answers = [answer]
    house("POST", f"/webhooks/{hook.id}/test", headers=hook.admin)
    with sending(house):
        until(lambda: house("GET", f"/webhooks/{hook.id}", headers=hook.admin).json()["disabled_at"])
    assert len(receiver.got) == tries
    job = house("POST", "/jobs", json=spec(**JOB)).json()["id"]
    house("POST", f"/jobs/{job}/cancel")
    assert len(hook()) == 1
    receiver.answers = [200]
    house("POST", f"/webhooks/{hook.id}/test", headers=hook.admin)
    with sending(house):
        until(lambda: hook()[0]["delivered_at"])
    assert house("DELETE", f"/webhooks/{hook.id}", headers=hook.admin).status_code == 204
    assert house("GET", f"/webhooks/{hook.id}", headers=hook.admin).status_code == 404
    with open_session(house.engine) as session:
        assert session.exec(select(MessageRow)).all() == []


@private
@pytest.mark.parametrize("name", ["127.0.0.1", "rebound.example"])
def test_private_addresses_are_never_connected_to(house, receiver, monkeypatch, name):  # noqa: F811
    """Not by a name either, whatever it led to when the webhook was made."""
    import socket

    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: real(host.replace(name, "127.0.0.1"), *rest, **more))
    with tenant_session(house.engine, "ours") as session:
        url = f"http://{name}:{receiver.server_port}/"
        row = WebhookRow(id=new_id("whk"), url=url, events=[], secret=webhooks.new_secret(), created_at=now())
        session.add(row)
        session.flush()
        identifier = webhooks.post(session, row, "test", {}).id
        session.commit()
    house.settings = house.settings.model_copy(update={"webhook_private": False})

    def message():
        with open_session(house.engine) as session:
            return session.get(MessageRow, identifier)

    with sending(house):
        until(lambda: message().error)
    assert "leads to 127.0.0.1, which is no public address" in message().error
    assert receiver.got == []


@pytest.mark.parametrize(
    ("address", "public"),
    [
        *(
            (text, False)
            for text in ("127.0.0.1", "10.1.2.3", "169.254.169.254", "192.168.0.1", "100.64.0.1", "0.0.0.0", "224.0.0.1")
        ),
        *(
            (text, False)
            for text in ("::1", "fe80::1", "fc00::1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "ff02::1")
        ),
        *((text, True) for text in ("93.184.216.34", "2606:2800:220:1::1", "::ffff:93.184.216.34")),
    ],
)
def test_which_addresses_are_public(address, public):
    assert outward.is_public(ipaddress.ip_address(address)) == public


@private
def test_urls_that_are_refused_when_a_webhook_is_made(house):  # noqa: F811
    for url in (
        *("http://example.com/", "ftp://example.com/", "https://", "https:///x", "https://a:b@example.com/", "https://x:99999/"),
        *("https://127.0.0.1/", "https://[::1]/", "https://localhost/", "https://a.localhost/", "https://2130706433/"),
        *(
            "https://0x7f.1/",
            "https://127.1/",
            "https://169.254.169.254/latest",
            "https://example.com/\r\nX: y",
            "file:///etc/passwd",
        ),
    ):
        with pytest.raises(ApiError):
            webhooks.check_url(url, private=False)
    assert webhooks.check_url("https://example.com:8443/x?y=z", private=False)
    admin = key(house.engine, "ours", "admin")
    assert house("POST", "/webhooks", headers=admin, json={"url": "ftp://x/"}).json()["code"] == "bad_url"
    assert house("POST", "/webhooks", headers=admin, json={"url": "http://x/", "events": ["job.baked"]}).status_code == 422
