"""Webhooks: what becomes of jobs, told to a URL of the tenant's, as Standard Webhooks (https://www.standardwebhooks.com) has it.

A message is written down in the transaction that changes the job, so none is lost and none is made up. A thread of each server
sends what is due: it takes a message by moving its next try, so several servers do not send it at once, and a server that is
killed meanwhile has it sent again (`webhook-id` is the same). Anything but 2xx is tried again, for three days in all.

What a tenant names as a URL is hostile: only public addresses are connected to, whatever a name resolves to at that moment,
redirects are not followed, and answers are not read.
"""

import base64
import hashlib
import hmac
import json
import logging
import secrets
import ssl
import threading
import time
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import httpcore
from sqlalchemy import Engine
from sqlmodel import Session, col, select

from service.db.session import AWAY, open_session
from service.db.tables import JobRow, MessageRow, WebhookRow, new_id, now
from service.outward import OnlyPublic, is_public, literal_address
from service.problems import ApiError
from service.settings import Settings

RETRIES = (5, 300, 1800, 2 * 3600, 5 * 3600, 10 * 3600, 14 * 3600, 20 * 3600, 24 * 3600)
"""Seconds after each try that failed, as the standard proposes."""
TIMEOUT = 10.0
TAKEN_SECONDS = 60
"""For which a message is one server's: longer than a try takes."""
LOOK_SECONDS = 1.0

log = logging.getLogger("narrow.webhooks")


def check_url(url: str, private: bool) -> str:
    """Refuses what could never be sent to; where a name leads is looked at when something is sent. Raises ApiError."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise ApiError(422, "bad_url", f"The host or port of the URL is none: {url[:80]!r}.") from error
    if parts.scheme != "https" and not (private and parts.scheme == "http"):
        raise ApiError(422, "bad_url", "A webhook's URL begins with https://.")
    if not host or parts.username or parts.password or port == 0 or any(c <= " " for c in url):
        raise ApiError(422, "bad_url", "A webhook's URL is https://HOST/PATH, without a user name.")
    literal = literal_address(host)
    if not private and (host == "localhost" or host.endswith(".localhost") or (literal and not is_public(literal))):
        raise ApiError(422, "private_url", f"{host[:80]!r} is no public address, and webhooks go to no other.")
    return url


def sign(secret: str, identifier: str, timestamp: int, body: bytes) -> str:
    """The header `webhook-signature`."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signed = hmac.new(key, f"{identifier}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return "v1," + base64.b64encode(signed).decode()


def new_secret() -> str:
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()


def note(session: Session, job: JobRow) -> None:
    """Writes down what its tenant's webhooks are told of a job's new status, within the transaction that changes it."""
    statement = select(WebhookRow).where(col(WebhookRow.tenant) == job.tenant, col(WebhookRow.disabled_at).is_(None))
    for hook in session.exec(statement):
        if f"job.{job.status}" in hook.events:
            data = {"job": job.id, "status": job.status, "attempt": job.attempt, "error": job.error}
            data |= {"result_model": job.result_model, "sweep": job.sweep}
            post(session, hook, f"job.{job.status}", data)


def post(session: Session, hook: WebhookRow, kind: str, data: dict[str, Any]) -> MessageRow:
    """Writes a message down. The caller commits."""
    body = {"type": kind, "timestamp": now().isoformat(), "data": data}
    row = MessageRow(id=new_id("msg"), tenant=hook.tenant, webhook_id=hook.id, body=body, created_at=now(), next_at=now())
    session.add(row)
    return row


class Courier:
    """The thread of a server that sends messages."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.stop = engine, threading.Event()
        backend = httpcore.SyncBackend() if settings.webhook_private else OnlyPublic()
        self.pool = httpcore.ConnectionPool(ssl_context=ssl.create_default_context(), network_backend=backend, max_connections=20)
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.stop.set()
        self.thread.join(TIMEOUT + 1)

    def _work(self) -> None:
        while not self.stop.wait(LOOK_SECONDS):
            try:
                while (message := self._take()) and not self.stop.is_set():
                    self._send(*message)
            except AWAY as error:
                log.warning("webhooks wait for the database: %s", str(getattr(error, "orig", error)).partition("\n")[0])

    def _take(self) -> tuple[MessageRow, WebhookRow] | None:
        with open_session(self.engine) as session:
            statement = (
                select(MessageRow, WebhookRow)
                .join(WebhookRow)
                .where(col(MessageRow.next_at) <= now(), col(WebhookRow.disabled_at).is_(None))
                .order_by(col(MessageRow.next_at))
                .limit(1)
                .with_for_update(skip_locked=True, of=MessageRow)
            )
            found = session.exec(statement).first()
            if found is None:
                return None
            message, hook = found
            message.attempts, message.next_at = message.attempts + 1, now() + timedelta(seconds=TAKEN_SECONDS)
            session.commit()
            return message, hook

    def _send(self, message: MessageRow, hook: WebhookRow) -> None:
        status, told = self._try(message, hook)
        with open_session(self.engine) as session:
            row = session.get(MessageRow, message.id)
            if row is None:
                return
            row.status, row.error = status, told
            if status is not None and 200 <= status < 300:
                row.next_at, row.delivered_at = None, now()
            else:
                log.info("%s to %s: %s", message.id, hook.id, told or status)
                again = row.attempts <= len(RETRIES)
                row.next_at = now() + timedelta(seconds=RETRIES[row.attempts - 1]) if again else None
                if status == 410 or not again:
                    # Nobody is there any more: the receiver has said so, or was silent for three days.
                    gone = session.get_one(WebhookRow, hook.id)
                    gone.disabled_at, row.next_at = now(), None
            session.commit()

    def _try(self, message: MessageRow, hook: WebhookRow) -> tuple[int | None, str | None]:
        body, moment = json.dumps(message.body).encode(), int(time.time())
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "narrow",
            "webhook-id": message.id,
            "webhook-timestamp": str(moment),
            "webhook-signature": sign(hook.secret, message.id, moment, body),
        }
        timeout = dict.fromkeys(("connect", "read", "write", "pool"), TIMEOUT)
        try:
            request = ("POST", hook.url.encode())
            sent = [(b"Host", urlsplit(hook.url).netloc.encode()), *((k.encode(), v.encode()) for k, v in headers.items())]
            with self.pool.stream(*request, headers=sent, content=body, extensions={"timeout": timeout}) as answer:
                return answer.status, None if answer.status < 300 else f"answered with {answer.status}"
        except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError, OSError, ValueError) as error:
            return None, (str(error) or type(error).__name__)[:200]
