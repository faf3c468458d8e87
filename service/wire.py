"""What comes over a connection before it is a request, and when it is none."""

import asyncio
import resource
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from service import metrics
from service.api.schemas import Problem
from service.problems import MEDIA_TYPE, TITLES

MOST_HEAD = 16 * 2**10
"""Of a head that comes in pieces."""
BACKLOG = 128
"""Connections that asyncio accepts at a time before one of them is looked at. If it runs out of files meanwhile, it logs that for
each that it tries to accept, which were 25,000 lines a second."""
FILES, OTHER_FILES = 16_384, 256
"""Open files that the server asks the system for, and those that are not connections: of the database, of processes."""

_NO_REQUEST = Problem(
    type="urn:narrow:problem:bad_request",
    title=TITLES[400],
    status=400,
    detail=f"What came is no request of HTTP/1.1 that can be read, or its head is longer than {MOST_HEAD >> 10} KiB.",
    code="bad_request",
    request_id="",
)


class Strict(h11.Connection):
    """Refuses a body of two lengths. h11 takes the one that a proxy in front may not take, which is how requests are smuggled."""

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            names = {name for name, _ in event.headers}
            if b"transfer-encoding" in names and b"content-length" in names:
                raise h11.RemoteProtocolError("two lengths")
        return event


def most_connections(wanted: int) -> int:
    """How many may be open at a time: `wanted`, or as many as this process may have files for. Lets it have as many as it may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = FILES if hard == resource.RLIM_INFINITY else min(hard, FILES)
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    # Each may have a file open that is sent or received.
    return max(1, min(wanted, (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - OTHER_FILES - BACKLOG) // 2))


class Connection(H11Protocol):
    """uvicorn's, which waits for the rest of a head for ever: here a head that is not whole in `silence_seconds` ends it.

    There are no more than `most`: for a new one the one goes that has waited longest for a head, or if none does, itself. Were
    new ones refused, whoever opens many and says nothing would keep everybody else out.
    """

    waiting: ClassVar[dict["Connection", None]] = {}
    """For a head, those that have waited longest first."""

    def __init__(self, silence_seconds: float, most: int, **given: Any) -> None:
        super().__init__(**given)
        self.conn = Strict(h11.SERVER, MOST_HEAD)
        self.silence_seconds, self.most = silence_seconds, most
        self.patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            metrics.given_up.inc()
            given_up = next(iter(self.waiting), self)
            given_up._stop_waiting()
            given_up.transport.abort()
            if given_up is self:
                return
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self.patience is None:
            self.patience = self.loop.call_later(self.silence_seconds, self.transport.abort)
            self.waiting[self] = None

    def _stop_waiting(self) -> None:
        if self.patience is not None:
            self.patience.cancel()
            self.patience = None
            del self.waiting[self]

    def send_400_response(self, msg: str) -> None:
        """To what h11 cannot read. uvicorn's would be a second answer where the first one has begun, which h11 does not allow."""
        if self.cycle is not None:  # whoever still works on a request before must not answer any more
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = _NO_REQUEST.model_dump_json().encode()
            headers = [("Content-Type", MEDIA_TYPE), ("Content-Length", str(len(body))), ("Connection", "close")]
            for event in (
                h11.Response(status_code=400, headers=headers, reason=STATUS_PHRASES[400]),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
