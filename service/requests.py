"""What every request has: an id, and when it is answered a line in the log and a figure. As plain ASGI, because every request
pays for it."""

import asyncio
import logging
import secrets
import time

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import logs, metrics
from service.auth import know
from service.problems import METHODS, replacement, routed

PAGE = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
"""The Content-Security-Policy of our pages, which are whole in one file and run nothing."""

log = logging.getLogger("narrow.access")


class HeadOnly(Exception):
    """Ends an answer of which nothing more is wanted."""


class Requests:
    def __init__(self, app: ASGIApp, silence_seconds: float) -> None:
        self.app, self.silence_seconds = app, silence_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["id"] = f"req_{secrets.token_hex(8)}"
        method = scope["method"]
        if method == "HEAD" and "HEAD" not in routed(scope):
            # What GET would answer, without its body (RFC 9110, 9.3.2).
            scope, send = {**scope, "method": "GET"}, _without_body(send)
        receive = self._careful(scope, receive)
        began, replaced = time.perf_counter(), False

        async def answer(message: Message) -> None:
            nonlocal replaced
            if replaced:
                return
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                other = replacement(scope, message["status"], headers)
                headers["X-Request-Id"] = state["id"]
                # What users sent is never taken by a browser for anything else than what it is called.
                headers["X-Content-Type-Options"] = "nosniff"
                headers.update(state.get("allowance", {}))
                self._tell(method, scope, message["status"], time.perf_counter() - began)
                if other:
                    replaced = True
                    await other(scope, receive, send)
                    return
            await send(message)

        with logs.concerning(request=state["id"]):
            try:
                await self.app(scope, receive, answer)
            except HeadOnly:
                pass
            except Exception:
                # It becomes a 500 outside of here.
                self._tell(method, scope, 500, time.perf_counter() - began)
                raise

    def _careful(self, scope: Scope, receive: Receive) -> Receive:
        """Of nobody who may not send it a body is read, which would go to the disk. And one that does not go on ends the request:
        else everybody who began one and left would keep a connection for ever."""
        begun, whole = False, False

        async def listen() -> Message:
            nonlocal begun, whole
            if whole:  # what follows is that the client leaves, whenever it likes
                return await receive()
            if not begun:
                begun = True
                await know(Request(scope))
            try:
                message = await asyncio.wait_for(receive(), self.silence_seconds)
            except TimeoutError:
                detail = f"Nothing of the body came for {self.silence_seconds:g} s: send it again, or in pieces over /uploads."
                raise HTTPException(408, detail, {"Connection": "close"}) from None
            whole = not message.get("more_body", False)
            return message

        return listen

    def _tell(self, sent: str, scope: Scope, status: int, seconds: float) -> None:
        # The operation, not the path, which has ids in it: there would be a figure for each job.
        operation = getattr(scope.get("endpoint"), "__name__", "none")
        method = sent if sent in METHODS else "other"
        metrics.requests_.labels(method, operation, status).observe(seconds)
        caller = scope["state"].get("caller")
        fields = {"method": sent[:20], "path": scope["path"][:500], "status": status, "ms": round(1000 * seconds, 1)}
        fields |= {"tenant": caller.tenant, "key": caller.key} if caller and caller.key else {}
        log.info("%s %s", method, operation, extra={"fields": fields})


def _without_body(send: Send) -> Send:
    async def answer(message: Message) -> None:
        if message["type"] == "http.response.start":
            await send(message)
        elif message["type"] == "http.response.body":
            await send({"type": "http.response.body"})
            if message.get("more_body", False):
                raise HeadOnly

    return answer
