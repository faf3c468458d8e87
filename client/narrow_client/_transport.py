"""Sending calls: retries, event streams and downloads, once for httpx's sync client and once for its async one.

What decides is in plain functions that both share (what is worth another try, how long to wait, how a stream or a part
of a file is read); the twins below differ in `await` alone.
"""

import asyncio
import hashlib
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, TypeVar

import httpx

from narrow_client import _calls
from narrow_client._calls import Call
from narrow_client._errors import ApiError, ConnectionFailed, DigestMismatch, NarrowClientError, from_response, not_narrow
from narrow_client.models import Artifact, Event

T = TypeVar("T")
Item = TypeVar("Item", covariant=True)


class Page(Protocol[Item]):
    """A page of a list, as the generated models have them."""

    @property
    def data(self) -> Sequence[Item]: ...

    @property
    def next_cursor(self) -> str | None: ...


RETRIES = 4
RETRIED = (408, 429, 500, 502, 503, 504)
TIMEOUT = httpx.Timeout(60, connect=5, read=300, write=300)
STREAM_SILENCE = 45.0
"""The service pings every 15 s: a stream that is silent for longer is dead."""
PATIENCE = 60.0
"""Seconds without contact after which an event stream gives up: a restart of the service takes less."""


def configure(url: str | None, api_key: str | None) -> dict[str, Any]:
    """Arguments of an httpx client, from arguments and environment (NARROW_URL, NARROW_API_KEY)."""
    url = url or os.environ.get("NARROW_URL") or "http://127.0.0.1:8000"
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL()
    if parsed.scheme not in ("http", "https") or not parsed.host or (parsed.port or 1) > 65535:
        raise NarrowClientError(f"{url!r} is not the URL of a service: NARROW_URL must look like http://127.0.0.1:8000.")
    key = api_key or os.environ.get("NARROW_API_KEY")
    if key and not (key.isascii() and key.isprintable()):
        raise NarrowClientError("The API key has characters other than printable ASCII: is NARROW_API_KEY right?")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return {"base_url": url.rstrip("/"), "headers": headers, "timeout": TIMEOUT}


def arguments(call: Call[Any], stack: ExitStack) -> dict[str, Any]:
    """Arguments of httpx's `request`; files are opened on `stack`, and streamed."""
    files = [(field, (path.name, stack.enter_context(path.open("rb")))) for field, path in call.files]
    body: dict[str, Any] = {"files": files, "data": dict(call.form)} if files or call.form else {}
    if call.json is not None or call.content is not None:
        body = {"json": call.json} if call.content is None else {"content": call.content}
    if call.patience:
        body["timeout"] = httpx.Timeout(60, connect=5, read=call.patience)
    return {"method": call.method, "url": call.path, "params": dict(call.params), "headers": dict(call.headers), **body}


def pause(attempt: int, response: httpx.Response | None) -> float:
    """Seconds before try `attempt` + 1: what Retry-After says, or 0.25 s doubling, with jitter."""
    asked = response.headers.get("retry-after", "") if response is not None else ""
    if asked.isdigit():
        return min(60.0, float(asked))
    return min(8.0, 0.25 * 2.0**attempt) * random.uniform(0.75, 1.25)  # noqa: S311


def worth_retrying(error: httpx.TransportError | ApiError) -> bool:
    return not isinstance(error, ApiError) or error.status in RETRIED


def unreachable(error: httpx.TransportError, url: object) -> ConnectionFailed:
    reason = str(error) or type(error).__name__
    return ConnectionFailed(f"The service at {url} was not reached ({reason}): is it running, and is NARROW_URL right?")


class EventReader:
    """Reads the lines of an event stream. `end` is set once the service says that nothing more will come."""

    def __init__(self, known: int) -> None:
        self.known, self.end = known, False
        self.name, self.data = "", [""][:0]
        self.failures, self.lost = 0, 0.0

    def request(self, job_id: str) -> dict[str, Any]:
        """Arguments of httpx's `stream`."""
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(self.known)}
        timeout = httpx.Timeout(STREAM_SILENCE, connect=5)
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
        return pause(self.failures, None)

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
        return self.target.is_file() and _sha256(self.target) == self.artifact.sha256

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
        if _sha256(self.path) != self.artifact.sha256:
            self.path.unlink()
            return False
        self.path.replace(self.target)
        return True


def describe(path: Path) -> tuple[str, int, str]:
    """Name, bytes and SHA-256 of a file that is to be uploaded."""
    return path.name, path.stat().st_size, _sha256(path)


def worth_resending(error: ConnectionFailed | ApiError) -> bool:
    """Whether a piece that was not taken may be: after a break, and where another one came first."""
    return not isinstance(error, ApiError) or error.status in (*RETRIED, 409, 460)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Transport:
    """Sends calls with httpx.Client."""

    def __init__(self, url: str | None, api_key: str | None) -> None:
        self.http = httpx.Client(**configure(url, api_key))

    def send(self, call: Call[T]) -> T:
        for attempt in range(RETRIES + 1):
            last = attempt == RETRIES or not call.safe
            try:
                with ExitStack() as stack:
                    response = self.http.request(**arguments(call, stack))
            except httpx.TransportError as error:
                # A connection that was never made has sent nothing: that is safe to repeat whatever the call.
                if attempt == RETRIES or (last and not isinstance(error, httpx.ConnectError)):
                    raise unreachable(error, self.http.base_url) from error
                time.sleep(pause(attempt, None))
                continue
            if response.status_code < 400:
                return call.read(response)
            if last or response.status_code not in RETRIED:
                raise from_response(response)
            time.sleep(pause(attempt, response))
        raise AssertionError("the last try returns or raises")

    def all(self, call: Callable[[str | None], Call[Page[T]]]) -> Iterator[T]:
        """All of a list; its pages are fetched as they are needed."""
        cursor: str | None = None
        while True:
            page = self.send(call(cursor))
            yield from page.data
            cursor = page.next_cursor
            if cursor is None:
                return

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
                time.sleep(reader.again(error, self.http.base_url))

    def upload(self, path: Path) -> str:
        """Sends a file in pieces and returns the id of the upload. What an earlier try has sent is not sent again."""
        file_of = describe(path)
        known = (upload for upload in self.all(_calls.list_uploads) if (upload.name, upload.bytes, upload.sha256) == file_of)
        found = next(known, None) or self.send(_calls.create_upload(*file_of))
        failures = 0
        with path.open("rb") as file:
            while found.offset < found.bytes:
                file.seek(found.offset)
                try:
                    self.send(_calls.send_piece(found.id, found.offset, file.read(_calls.LARGE)))
                    failures = 0
                except (ConnectionFailed, ApiError) as error:
                    failures += 1
                    if failures > RETRIES or not worth_resending(error):
                        raise
                    time.sleep(pause(failures, None))
                found = self.send(_calls.get_upload(found.id))
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
                if part.finish():
                    return
                wrong += 1
                if wrong > 1:
                    raise DigestMismatch(f"{artifact.path} does not have the digest that the service announced, twice.")
            except (httpx.TransportError, ApiError) as error:
                if not worth_retrying(error):
                    raise
                failures += 1
                if failures > RETRIES:
                    raise error if isinstance(error, ApiError) else unreachable(error, self.http.base_url) from error
                time.sleep(pause(failures, None))


class AsyncTransport:
    """Sends calls with httpx.AsyncClient. The twin of `Transport`."""

    def __init__(self, url: str | None, api_key: str | None) -> None:
        self.http = httpx.AsyncClient(**configure(url, api_key))

    async def send(self, call: Call[T]) -> T:
        for attempt in range(RETRIES + 1):
            last = attempt == RETRIES or not call.safe
            try:
                with ExitStack() as stack:
                    response = await self.http.request(**arguments(call, stack))
            except httpx.TransportError as error:
                if attempt == RETRIES or (last and not isinstance(error, httpx.ConnectError)):
                    raise unreachable(error, self.http.base_url) from error
                await asyncio.sleep(pause(attempt, None))
                continue
            if response.status_code < 400:
                return call.read(response)
            if last or response.status_code not in RETRIED:
                raise from_response(response)
            await asyncio.sleep(pause(attempt, response))
        raise AssertionError("the last try returns or raises")

    async def all(self, call: Callable[[str | None], Call[Page[T]]]) -> AsyncIterator[T]:
        cursor: str | None = None
        while True:
            page = await self.send(call(cursor))
            for item in page.data:
                yield item
            cursor = page.next_cursor
            if cursor is None:
                return

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
                await asyncio.sleep(reader.again(error, self.http.base_url))

    async def upload(self, path: Path) -> str:
        file_of = describe(path)
        uploads = self.all(_calls.list_uploads)
        known = [upload async for upload in uploads if (upload.name, upload.bytes, upload.sha256) == file_of]
        found = known[0] if known else await self.send(_calls.create_upload(*file_of))
        failures = 0
        with path.open("rb") as file:
            while found.offset < found.bytes:
                file.seek(found.offset)
                try:
                    await self.send(_calls.send_piece(found.id, found.offset, file.read(_calls.LARGE)))
                    failures = 0
                except (ConnectionFailed, ApiError) as error:
                    failures += 1
                    if failures > RETRIES or not worth_resending(error):
                        raise
                    await asyncio.sleep(pause(failures, None))
                found = await self.send(_calls.get_upload(found.id))
        return found.id

    async def download(self, job_id: str, artifact: Artifact, target: Path) -> None:
        part = Part(artifact, target)
        if part.there():
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
                if part.finish():
                    return
                wrong += 1
                if wrong > 1:
                    raise DigestMismatch(f"{artifact.path} does not have the digest that the service announced, twice.")
            except (httpx.TransportError, ApiError) as error:
                if not worth_retrying(error):
                    raise
                failures += 1
                if failures > RETRIES:
                    raise error if isinstance(error, ApiError) else unreachable(error, self.http.base_url) from error
                await asyncio.sleep(pause(failures, None))
