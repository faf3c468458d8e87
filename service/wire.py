"""What comes over a connection before it is a request, and when it is none."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from service.api.schemas import Problem
from service.problems import MEDIA_TYPE, TITLES

MOST_HEAD = 16 * 2**10
"""Of a head that comes in pieces."""

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


class Connection(H11Protocol):
    """uvicorn's, which waits for the rest of a head for ever: here a head that is not whole in `silence_seconds` ends it."""

    def __init__(self, silence_seconds: float, **given: Any) -> None:
        super().__init__(**given)
        self.conn = Strict(h11.SERVER, MOST_HEAD)
        self.silence_seconds = silence_seconds
        self.patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
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

    def _stop_waiting(self) -> None:
        if self.patience is not None:
            self.patience.cancel()
            self.patience = None

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
