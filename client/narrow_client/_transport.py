"""Sending calls: retries, event streams and downloads, once for httpx's sync client and once for its async one.

What decides is in plain functions that both share (what is worth another try, how long to wait, how a stream or a part
of a file is read); the twins below differ in `await` alone.
"""

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import httpx

from narrow_client import _calls
from narrow_client._calls import ANSWER_SECONDS, Call, LocalFile, file_sha256
from narrow_client._errors import (
    ApiError,
    ConnectionFailed,
    DigestMismatch,
    InvalidArgument,
    ServerError,
    from_response,
    not_narrow,
    retry_after,
)
from narrow_client._pages import AsyncPages, Page, Pages
from narrow_client.models import Artifact, Event

T = TypeVar("T")
OnTransfer = Callable[[str, int, int], None]
"""Is told of a large file that goes up, and of every file that comes down: its name, the bytes that are through, and all."""

RETRIES = 4
RETRIED = (408, 429, 500, 502, 503, 504)
REFUSED = (408, 429)
"""Answers that say that nothing was done, so that a call may be sent again whatever it is."""
CONNECT_SECONDS = 5.0
MOST_WAIT = 60.0
"""Seconds. A service that asks to be left alone for longer is told to the caller, and not waited for."""
STREAM_SILENCE = 45.0
"""The service pings every 15 s: a stream that is silent for longer is dead."""
CLOSED = "The client is closed: make another one, and call it inside of its 'with'."
PATIENCE = 60.0
"""Seconds without the service after which following or waiting for a job gives up: a restart takes less."""


def configure(url: str | None, api_key: str | None) -> dict[str, Any]:
    """Arguments of an httpx client, from arguments and environment (NARROW_URL, NARROW_API_KEY)."""
    url = url or os.environ.get("NARROW_URL") or "http://127.0.0.1:8000"
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError):
        parsed = httpx.URL()
    if parsed.scheme not in ("http", "https") or not parsed.host or (parsed.port or 1) > 65535:
        raise InvalidArgument(f"{url!r} is not the URL of a service: NARROW_URL must look like http://127.0.0.1:8000.")
    if api_key is not None and not isinstance(api_key, str):
        raise InvalidArgument(f"api_key is a text like nrw_..., and not {_calls.article(api_key)}.")
    # What is copied brings spaces and ends of lines along, which no key has.
    key = (api_key or os.environ.get("NARROW_API_KEY") or "").strip()
    if not (key.isascii() and key.isprintable()):
        raise InvalidArgument("The API key has characters other than printable ASCII: is NARROW_API_KEY right?")
    headers = {"User-Agent": f"narrow-client/{version('narrow-client')}"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    return {"base_url": url.rstrip("/"), "headers": headers, "timeout": timeout_of(None, ANSWER_SECONDS)}


def check_patience(timeout: float | None, retries: int) -> None:
    """Raises InvalidArgument."""
    _calls.check_seconds("timeout", timeout)
    if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
        raise InvalidArgument(f"max_retries is a whole number, 0 or more, and not {retries!r}.")


def timeout_of(asked: float | None, patience: float) -> httpx.Timeout:
    """Of a call: a connection is there soon or never; what counts after that is silence, never the whole time."""
    return httpx.Timeout(asked or patience, connect=min(asked or CONNECT_SECONDS, CONNECT_SECONDS))


def arguments(call: Call[Any], stack: ExitStack, timeout: float | None) -> dict[str, Any]:
    """Arguments of httpx's `request`; files are opened on `stack`, and streamed."""
    files = [(field, (path.name, stack.enter_context(path.open("rb")))) for field, path in call.files]
    body: dict[str, Any] = {"files": files, "data": dict(call.form)} if files or call.form else {}
    if call.json is not None or call.content is not None:
        body = {"json": call.json} if call.content is None else {"content": call.content}
    more = {"params": dict(call.params), "headers": dict(call.headers), "timeout": timeout_of(timeout, call.patience)}
    return {"method": call.method, "url": call.path, **more, **body}


def pause(attempt: int, asked: float | None = None) -> float:
    """Seconds before try `attempt` + 1: what Retry-After asks, or 0.25 s doubling, with jitter lest many come at once."""
    return asked if asked is not None else min(8.0, 0.25 * 2.0**attempt) * random.uniform(0.75, 1.25)  # noqa: S311


def asked_by(error: Exception) -> float | None:
    """How long an error asks to wait, as far as that is waited for."""
    asked = error.retry_after if isinstance(error, ApiError) else None
    return asked if asked is None else min(asked, MOST_WAIT)


def resend(call: Call[Any], attempt: int, retries: int, outcome: httpx.Response | httpx.TransportError) -> float | None:
    """Seconds after which a call that was not answered well is sent again; None if it is not."""
    if attempt >= retries:
        return None
    if isinstance(outcome, httpx.TransportError):
        # A connection that was never made has sent nothing.
        unsent = isinstance(outcome, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
        return pause(attempt) if call.safe or unsent else None
    again = outcome.status_code in (RETRIED if call.safe else REFUSED) or _in_progress(outcome)
    seconds = pause(attempt, retry_after(outcome))
    return seconds if again and seconds <= MOST_WAIT else None


def _in_progress(response: httpx.Response) -> bool:
    """Whether an earlier try with the same Idempotency-Key is still being answered: what it makes is what we asked for."""
    return response.status_code == 409 and from_response(response).code == "request_in_progress"


def is_answer(call: Call[Any], attempt: int, response: httpx.Response) -> bool:
    """Whether this is what was asked for. What is not there any more, an earlier try has deleted whose answer was lost."""
    deleted = attempt > 0 and call.method == "DELETE" and response.status_code == 404
    return response.status_code < 400 or response.status_code in call.answers or deleted


def worth_retrying(error: httpx.TransportError | ApiError) -> bool:
    return not isinstance(error, ApiError) or error.status in RETRIED


def unreachable(error: httpx.TransportError, url: object) -> ConnectionFailed:
    reason = str(error) or ("no answer in time" if isinstance(error, httpx.TimeoutException) else type(error).__name__)
    return ConnectionFailed(f"The service at {url} was not reached ({reason}): is it running, and is NARROW_URL right?")


class Patience:
    """Bears that the service is away for a while, as in a restart: `bear` raises an error that has lasted for too long."""

    def __init__(self) -> None:
        self.since: float | None = None

    def bear(self, error: ConnectionFailed | ServerError) -> None:
        self.since = self.since or time.monotonic()
        if time.monotonic() - self.since > PATIENCE:
            raise error

    def content(self) -> None:
        """The service has answered."""
        self.since = None


class EventReader:
    """Reads the lines of an event stream. `end` is set once the service says that nothing more will come."""

    def __init__(self, known: int) -> None:
        self.known, self.end = known, False
        self.name, self.data = "", [""][:0]
        self.failures, self.lost = 0, 0.0

    def request(self, job_id: str) -> dict[str, Any]:
        """Arguments of httpx's `stream`."""
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(self.known)}
        timeout = httpx.Timeout(STREAM_SILENCE, connect=CONNECT_SECONDS)
        return {"method": "GET", "url": _calls.path_of("job", job_id, "events"), "headers": headers, "timeout": timeout}

    def begin(self, response: httpx.Response) -> None:
        """Looks at the head of an answer, of whose body an error's has been read."""
        if response.status_code >= 400:
            raise from_response(response)
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            raise not_narrow(response.request.url)
        self.name, self.data = "", []

    def again(self, error: httpx.TransportError | ApiError, url: object) -> float:
        """Seconds before the next try. Raises what was wrong if no try helps, or there was no contact for too long."""
        self.failures += 1
        if self.failures == 1:
            self.lost = time.monotonic()
        if not worth_retrying(error) or time.monotonic() - self.lost >= PATIENCE:
            raise error if isinstance(error, ApiError) else unreachable(error, url) from error
        return pause(self.failures, asked_by(error))

    def feed(self, line: str) -> Event | None:
        """Takes a line; returns an event that it completes and that is new."""
        self.failures = 0
        if line:
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if field == "event":
                self.name = value
            elif field == "data":
                self.data.append(value)
            return None
        name, data = self.name, "\n".join(self.data)
        self.name, self.data = "", []
        if name == "end":
            self.end = True
        if not data or name == "end":
            return None
        event = _calls.read_event(data)
        if event.seq <= self.known:
            return None
        self.known = event.seq
        return event


class Part:
    """A download that is not finished: the file beside its final name, and what a request for the rest must say."""

    def __init__(self, artifact: Artifact, target: Path) -> None:
        self.artifact, self.target = artifact, target
        self.path = target.with_name(target.name + ".part")
        target.parent.mkdir(parents=True, exist_ok=True)

    def there(self) -> bool:
        """Whether the file is there already, with the right content."""
        return self.target.is_file() and file_sha256(self.target) == self.artifact.sha256

    def headers(self) -> dict[str, str]:
        have = self.path.stat().st_size if self.path.exists() else 0
        if have >= self.artifact.bytes:
            # Longer than it can be, or complete: begin anew, or let `finish` look at it.
            return {}
        # Without If-Range: the service may send us on to a bucket, which has ETags of its own. The digest tells in the end.
        return {"Range": f"bytes={have}-"} if have else {}

    def complete(self) -> bool:
        return self.path.exists() and self.path.stat().st_size == self.artifact.bytes

    def mode(self, response: httpx.Response) -> str:
        return "ab" if response.status_code == 206 else "wb"

    def finish(self) -> bool:
        """Gives the file its name if it is right; removes it if it is not."""
        if file_sha256(self.path) != self.artifact.sha256:
            self.path.unlink()
            return False
        self.path.replace(self.target)
        return True


def worth_resending(error: ConnectionFailed | ApiError) -> bool:
    """Whether a piece that was not taken may be: after a break, and where another one came first."""
    return not isinstance(error, ApiError) or error.status in (*RETRIED, 409, 460)


def _tell_nobody(name: str, done: int, total: int) -> None:
    pass


class Transport:
    """Sends calls with httpx.Client."""

    def __init__(
        self, url: str | None, api_key: str | None, timeout: float | None, retries: int, on_transfer: OnTransfer | None = None
    ) -> None:
        check_patience(timeout, retries)
        self._http = httpx.Client(**configure(url, api_key))
        self.url = str(self._http.base_url).rstrip("/")
        self.timeout, self.retries, self.on_transfer = timeout, retries, on_transfer or _tell_nobody

    @property
    def http(self) -> httpx.Client:
        if self._http.is_closed:
            raise InvalidArgument(CLOSED)
        return self._http

    def close(self) -> None:
        self._http.close()

    def send(self, call: Call[T]) -> T:
        return call.read(self.answer(call))

    def answer(self, call: Call[Any]) -> httpx.Response:
        """The answer to a call, of a status below 400."""
        attempt = 0
        while True:
            try:
                with ExitStack() as stack:
                    response = self.http.request(**arguments(call, stack, self.timeout))
            except httpx.TransportError as error:
                seconds = resend(call, attempt, self.retries, error)
                if seconds is None:
                    raise unreachable(error, self.url) from error
            else:
                if is_answer(call, attempt, response):
                    return response
                seconds = resend(call, attempt, self.retries, response)
                if seconds is None:
                    raise from_response(response)
            time.sleep(seconds)
            attempt += 1

    def all(
        self, call: Callable[[str | None, int], Call[Page[T]]], cursor: str | None = None, limit: int | None = None
    ) -> Pages[T]:
        return Pages(lambda at, most: self.send(call(at, most)), cursor, limit)

    def events(self, job_id: str, after: int) -> Iterator[Event]:
        reader = EventReader(after)
        while True:
            try:
                with self.http.stream(**reader.request(job_id)) as response:
                    if response.status_code >= 400:
                        response.read()
                    reader.begin(response)
                    for line in response.iter_lines():
                        event = reader.feed(line)
                        if event is not None:
                            yield event
                        if reader.end:
                            return
                raise httpx.ReadError("the event stream broke off")
            except (httpx.TransportError, ApiError) as error:
                time.sleep(reader.again(error, self.url))

    def upload(self, local: LocalFile) -> str:
        """Sends a file in pieces and returns the id of the upload. What an earlier try has sent is not sent again."""
        told = local.path.name, local.bytes, local.sha256
        known = (upload for upload in self.all(_calls.list_uploads) if (upload.name, upload.bytes, upload.sha256) == told)
        found = next(known, None) or self.send(_calls.create_upload(*told))
        failures = 0
        with local.path.open("rb") as file:
            self.on_transfer(local.path.name, found.offset, found.bytes)
            while found.offset < found.bytes:
                file.seek(found.offset)
                try:
                    self.send(_calls.send_piece(found.id, found.offset, file.read(_calls.LARGE)))
                    failures = 0
                except (ConnectionFailed, ApiError) as error:
                    failures += 1
                    if failures > self.retries or not worth_resending(error):
                        raise
                    time.sleep(pause(failures, asked_by(error)))
                found = self.send(_calls.get_upload(found.id))
                self.on_transfer(local.path.name, found.offset, found.bytes)
        return found.id

    def download(self, job_id: str, artifact: Artifact, target: Path) -> None:
        part = Part(artifact, target)
        if part.there():
            return
        wrong, failures = 0, 0
        while True:
            try:
                if not part.complete():
                    path = _calls.path_of("job", job_id, "artifacts", artifact.path)
                    with self.http.stream("GET", path, headers=part.headers(), follow_redirects=True) as response:
                        if response.status_code >= 400:
                            response.read()
                            raise from_response(response)
                        with part.path.open(part.mode(response)) as file:
                            for chunk in response.iter_bytes():
                                file.write(chunk)
                                self.on_transfer(artifact.path, file.tell(), artifact.bytes)
                if part.finish():
                    return
                wrong += 1
                if wrong > 1:
                    raise DigestMismatch(f"{artifact.path} does not have the digest that the service announced, twice.")
            except (httpx.TransportError, ApiError) as error:
                if not worth_retrying(error):
                    raise
                failures += 1
                if failures > self.retries:
                    raise error if isinstance(error, ApiError) else unreachable(error, self.url) from error
                time.sleep(pause(failures, asked_by(error)))


class AsyncTransport:
    """Sends calls with httpx.AsyncClient. The twin of `Transport`."""

    def __init__(
        self, url: str | None, api_key: str | None, timeout: float | None, retries: int, on_transfer: OnTransfer | None = None
    ) -> None:
        check_patience(timeout, retries)
        self._http = httpx.AsyncClient(**configure(url, api_key))
        self.url = str(self._http.base_url).rstrip("/")
        self.timeout, self.retries, self.on_transfer = timeout, retries, on_transfer or _tell_nobody

    @property
    def http(self) -> httpx.AsyncClient:
        if self._http.is_closed:
            raise InvalidArgument(CLOSED)
        return self._http

    async def close(self) -> None:
        await self._http.aclose()

    async def send(self, call: Call[T]) -> T:
        return call.read(await self.answer(call))

    async def answer(self, call: Call[Any]) -> httpx.Response:
        attempt = 0
        while True:
            try:
                with ExitStack() as stack:
                    response = await self.http.request(**arguments(call, stack, self.timeout))
            except httpx.TransportError as error:
                seconds = resend(call, attempt, self.retries, error)
                if seconds is None:
                    raise unreachable(error, self.url) from error
            else:
                if is_answer(call, attempt, response):
                    return response
                seconds = resend(call, attempt, self.retries, response)
                if seconds is None:
                    raise from_response(response)
            await asyncio.sleep(seconds)
            attempt += 1

    def all(
        self, call: Callable[[str | None, int], Call[Page[T]]], cursor: str | None = None, limit: int | None = None
    ) -> AsyncPages[T]:
        return AsyncPages(lambda at, most: self.send(call(at, most)), cursor, limit)

    async def events(self, job_id: str, after: int) -> AsyncIterator[Event]:
        reader = EventReader(after)
        while True:
            try:
                async with self.http.stream(**reader.request(job_id)) as response:
                    if response.status_code >= 400:
                        await response.aread()
                    reader.begin(response)
                    async for line in response.aiter_lines():
                        event = reader.feed(line)
                        if event is not None:
                            yield event
                        if reader.end:
                            return
                raise httpx.ReadError("the event stream broke off")
            except (httpx.TransportError, ApiError) as error:
                await asyncio.sleep(reader.again(error, self.url))

    async def upload(self, local: LocalFile) -> str:
        told = local.path.name, local.bytes, local.sha256
        uploads = self.all(_calls.list_uploads)
        known = [upload async for upload in uploads if (upload.name, upload.bytes, upload.sha256) == told]
        found = known[0] if known else await self.send(_calls.create_upload(*told))
        failures = 0
        with local.path.open("rb") as file:
            self.on_transfer(local.path.name, found.offset, found.bytes)
            while found.offset < found.bytes:
                file.seek(found.offset)
                try:
                    await self.send(_calls.send_piece(found.id, found.offset, file.read(_calls.LARGE)))
                    failures = 0
                except (ConnectionFailed, ApiError) as error:
                    failures += 1
                    if failures > self.retries or not worth_resending(error):
                        raise
                    await asyncio.sleep(pause(failures, asked_by(error)))
                found = await self.send(_calls.get_upload(found.id))
                self.on_transfer(local.path.name, found.offset, found.bytes)
        return found.id

    async def download(self, job_id: str, artifact: Artifact, target: Path) -> None:
        part = Part(artifact, target)
        if await asyncio.to_thread(part.there):
            return
        wrong, failures = 0, 0
        while True:
            try:
                if not part.complete():
                    path = _calls.path_of("job", job_id, "artifacts", artifact.path)
                    async with self.http.stream("GET", path, headers=part.headers(), follow_redirects=True) as response:
                        if response.status_code >= 400:
                            await response.aread()
                            raise from_response(response)
                        with part.path.open(part.mode(response)) as file:
                            async for chunk in response.aiter_bytes():
                                file.write(chunk)
                                self.on_transfer(artifact.path, file.tell(), artifact.bytes)
                if await asyncio.to_thread(part.finish):
                    return
                wrong += 1
                if wrong > 1:
                    raise DigestMismatch(f"{artifact.path} does not have the digest that the service announced, twice.")
            except (httpx.TransportError, ApiError) as error:
                if not worth_retrying(error):
                    raise
                failures += 1
                if failures > self.retries:
                    raise error if isinstance(error, ApiError) else unreachable(error, self.url) from error
                await asyncio.sleep(pause(failures, asked_by(error)))
