"""Models from a hub that speaks Hugging Face's HTTP API, where the administrator names one (`NARROW_HUB`).

    GET HUB/api/models/REPO/revision/REVISION    the commit
    GET HUB/api/models/REPO/tree/COMMIT          its files: names, sizes, SHA-256 of the large ones
    GET HUB/REPO/resolve/COMMIT/FILE             a file, which may lie elsewhere

What is fetched goes the way of an upload from there on. The hub itself is the administrator's word, and may be at a private
address; where it sends us is not: redirects are followed to public addresses alone. A tenant names a model and a commit and no
more, and nothing that the hub says is believed: sizes are counted, digests compared, and answers have limits.
"""

import asyncio
import hashlib
import os
import re
import shutil
import ssl
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, TypeVar
from urllib.parse import quote, urljoin, urlsplit

import httpcore
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from sqlmodel import Session

from narrow_engine.errors import NarrowError
from narrow_engine.model_files import accepted_name, inspect_config, is_weights, no_weights
from narrow_engine.spec import Commit
from service.api.schemas import HubModel, Model, Source
from service.outward import AsyncOnlyPublic, NotPublic
from service.problems import ApiError
from service.settings import Settings
from service.storage import Storage
from service.uploads import fetched_before, require_room, store_fetched

MOST_JSON = 2**20
MOST_PAGES, MOST_FILES = 10, 1000
MOST_REDIRECTS = 3
MOST_FETCHES, MOST_OF_TENANT = 8, 2
"""Models that a server fetches at a time."""
MOST_LOOKS = 8
"""And about how many it asks the hub: others wait."""
CONNECT_SECONDS = 10.0
LOOK_SECONDS = 0.2
"""Between two looks whether the server stops."""
REDIRECTS = (301, 302, 303, 307, 308)

T = TypeVar("T")
Key = tuple[str, str, str]
"""Tenant, name on the hub, commit."""


@dataclass
class Fetches:
    """What a server is fetching: who asks for the same waits for it. `drain` ends it all."""

    drain: asyncio.Event
    looking: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MOST_LOOKS))
    running: dict[Key, asyncio.Event] = field(default_factory=dict)


class _Commit(BaseModel):
    sha: Commit


class _Large(BaseModel):
    oid: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    size: int = Field(ge=0)


class _Entry(BaseModel):
    type: str
    path: str
    size: int = Field(0, ge=0)
    lfs: _Large | None = None


@dataclass(frozen=True)
class File:
    name: str
    bytes: int
    sha256: str | None


@dataclass(frozen=True)
class Asked:
    """Who is asked, and for what."""

    settings: Settings
    wanted: HubModel
    pool: httpcore.AsyncConnectionPool

    def url(self, *parts: str) -> str:
        return "/".join([self.settings.hub.rstrip("/"), *parts])


async def bring(
    session: Session, settings: Settings, storage: Storage, fetches: Fetches, tenant: str, wanted: HubModel
) -> tuple[Model, bool]:
    """A model from the hub, and whether it was fetched for this request: one that the tenant has of the same commit is answered
    with, so that a client whose connection broke can ask again. A fetch goes on without its client for that reason.

    Raises ApiError and NarrowError. No transaction is open while it takes its time.
    """
    if not settings.hub:
        detail = "This server fetches no models: its administrator has set no NARROW_HUB. Upload the model's files instead."
        raise ApiError(403, "no_hub", detail)
    async with _asking(settings, wanted) as asked:
        async with fetches.looking, _in_time(settings, fetches.drain):
            source, files = await _find(asked)
        key = (tenant, source.hub, source.commit)
        while True:
            known = await run_in_threadpool(fetched_before, session, source)
            if known:
                return known, False
            if key in fetches.running:
                await fetches.running[key].wait()
                continue
            with _place(fetches, key):
                await run_in_threadpool(require_room, session, settings, sum(file.bytes for file in files))
                folder = Path(await run_in_threadpool(tempfile.mkdtemp, prefix=".fetch-", dir=settings.uploads))
                try:
                    async with _in_time(settings, fetches.drain):
                        await _fetch(asked, source, files, folder)
                    arguments = (session, settings, storage, folder, source, wanted.name)
                    made = await run_in_threadpool(store_fetched, *arguments)
                finally:
                    await run_in_threadpool(shutil.rmtree, folder, ignore_errors=True)
            if made:
                return made, True


@asynccontextmanager
async def _asking(settings: Settings, wanted: HubModel) -> AsyncIterator[Asked]:
    """Connections to the hub, and to where it sends us."""
    _, host, port = _origin(settings.hub)
    async with httpcore.AsyncConnectionPool(_tls(), network_backend=AsyncOnlyPublic((host, port))) as pool:
        yield Asked(settings, wanted, pool)


@asynccontextmanager
async def _in_time(settings: Settings, drain: asyncio.Event) -> AsyncIterator[None]:
    """Ends what takes too long, or longer than the server has."""

    async def end_with_server() -> None:
        # An Event can be waited for in one loop alone, and each request of a TestClient has its own.
        while not drain.is_set():  # noqa: ASYNC110
            await asyncio.sleep(LOOK_SECONDS)
        limit.reschedule(0)

    try:
        async with asyncio.timeout(settings.hub_seconds) as limit:
            ending = asyncio.create_task(end_with_server())
            try:
                yield
            finally:
                ending.cancel()
    except TimeoutError as error:
        if drain.is_set():
            detail = "The server stops, and what it has fetched of the model is gone: ask again in a moment."
            raise ApiError(503, "stopping", detail, headers={"Retry-After": "10"}) from error
        seconds = f"{settings.hub_seconds:g} s (NARROW_HUB_SECONDS)"
        raise NarrowError("hub_too_slow", f"The model did not come within {seconds}: fetch it yourself and upload it.") from error


@contextmanager
def _place(fetches: Fetches, key: Key) -> Iterator[None]:
    own = sum(tenant == key[0] for tenant, *_ in fetches.running)
    if own >= MOST_OF_TENANT or len(fetches.running) >= MOST_FETCHES:
        detail = f"{own or len(fetches.running)} models are being fetched already: ask again when one of them is here."
        raise ApiError(429, "too_many_fetches", detail, headers={"Retry-After": "10"})
    fetches.running[key] = asyncio.Event()
    try:
        yield
    finally:
        fetches.running.pop(key).set()


async def _find(asked: Asked) -> tuple[Source, list[File]]:
    """The commit that a revision is, and those of its files that belong to a model."""
    api = asked.url("api/models", quote(asked.wanted.hub))
    revision = f"{api}/revision/{quote(asked.wanted.revision, safe='')}"
    commit = (await _json(asked, revision, TypeAdapter(_Commit)))[0].sha
    entries: list[_Entry] = []
    page = tree = f"{api}/tree/{commit}"
    for _ in range(MOST_PAGES):
        more, link = await _json(asked, page, TypeAdapter(list[_Entry]))
        entries += more
        # Only the query is taken, so that a next page is never elsewhere.
        following = re.search(r'<[^<>?]*\?([!-;=?-~]+)>\s*;\s*rel="next"', link)
        if not following:
            break
        page = f"{tree}?{following[1]}"
    else:
        raise _too_many_files()
    return Source(hub=asked.wanted.hub, commit=commit), _files(entries)


def _files(entries: list[_Entry]) -> list[File]:
    """Those that belong to a model, by names that nobody can have made up; all others stay where they are."""
    names = [entry.path for entry in entries if entry.type == "file"]
    if not any(is_weights(name) for name in names):
        raise no_weights(name for name in names if "/" not in name)
    found = {}
    for entry in entries:
        if entry.type == "file" and accepted_name(entry.path):
            if entry.path in found:
                raise _bad_hub(f"names {entry.path} twice")
            size, sha256 = (entry.lfs.size, entry.lfs.oid) if entry.lfs else (entry.size, None)
            found[entry.path] = File(entry.path, size, sha256)
    if len(found) > MOST_FILES:
        raise _too_many_files()
    return list(found.values())


async def _fetch(asked: Asked, source: Source, files: list[File], folder: Path) -> None:
    """The files, small ones first: what is wrong with the config is told before hours go into weights."""
    small, weights = ([file for file in files if is_weights(file.name) == large] for large in (False, True))
    for file in small:
        await _download(asked, source, file, folder / file.name)
    await run_in_threadpool(inspect_config, folder)
    for file in weights:
        await _download(asked, source, file, folder / file.name)


async def _download(asked: Asked, source: Source, file: File, path: Path) -> None:
    digest, size = hashlib.sha256(), 0
    with await run_in_threadpool(path.open, "xb") as out:

        def take(chunk: bytes) -> None:
            digest.update(chunk)
            out.write(chunk)

        def keep() -> None:
            out.flush()
            os.fsync(out.fileno())

        async with _answer(asked, asked.url(quote(source.hub), "resolve", source.commit, quote(file.name))) as answer:
            async for chunk in answer.aiter_stream():
                size += len(chunk)
                if size > file.bytes:
                    break
                await run_in_threadpool(take, chunk)
        await run_in_threadpool(keep)
    if size != file.bytes:
        came = "more came" if size > file.bytes else f"{size:,} came"
        raise NarrowError("wrong_size", f"The hub says that {file.name} has {file.bytes:,} bytes, but {came}: nothing was kept.")
    if file.sha256 not in (None, digest.hexdigest()):
        raise NarrowError("wrong_digest", f"{file.name} came with another SHA-256 than the hub has told: nothing was kept.")


async def _json(asked: Asked, url: str, kind: TypeAdapter[T]) -> tuple[T, str]:
    """A small answer, and its header `Link`."""
    body = b""
    async with _answer(asked, url) as answer:
        async for chunk in answer.aiter_stream():
            body += chunk
            if len(body) > MOST_JSON:
                raise _bad_hub(f"answers with more than {MOST_JSON >> 20} MiB")
        link = _header(answer, b"link")
    try:
        return kind.validate_json(body), link
    except ValidationError as error:
        raise _bad_hub("answers with something else than was asked for") from error


@asynccontextmanager
async def _answer(asked: Asked, url: str) -> AsyncIterator[httpcore.Response]:
    """The answer at a URL of the hub, or where that leads, if it is a good one. Raises ApiError, also while it is read."""
    hub, token = _origin(asked.settings.hub), asked.wanted.token
    silence = asked.settings.silence_seconds
    timeout = {"connect": CONNECT_SECONDS, "read": silence, "write": silence, "pool": silence}
    try:
        for _ in range(1 + MOST_REDIRECTS):
            if _origin(url) != hub:
                token = None  # nor later, should it lead back: what is asked for there is another's choice
            headers = {"Host": urlsplit(url).netloc, "User-Agent": "narrow", "Accept-Encoding": "identity"}
            if token:
                headers["Authorization"] = f"Bearer {token.get_secret_value()}"
            async with asked.pool.stream("GET", url, headers=list(headers.items()), extensions={"timeout": timeout}) as answer:
                if answer.status == 200:
                    yield answer
                    return
                if answer.status not in REDIRECTS:
                    raise _refusal(answer.status, asked.wanted, of_hub=_origin(url) == hub)
                url = _redirected(asked.settings, url, _header(answer, b"location"))
        raise _bad_hub(f"redirects more than {MOST_REDIRECTS} times")
    except NotPublic as error:
        raise _bad_hub(f"redirects to where nobody may be sent: {error}") from error
    except httpcore.TimeoutException as error:
        raise _away(f"it has sent nothing for {silence:g} s") from error
    except (httpcore.NetworkError, httpcore.ProtocolError) as error:
        raise _away("it was not reached, or broke off") from error


def _redirected(settings: Settings, url: str, place: str) -> str:
    """Where a redirect leads. Raises ApiError where nobody may be sent to; addresses are looked at when they are connected to."""
    try:
        found = urlsplit(urljoin(url, place))
        named = found.hostname and not found.username and not found.password and found.port != 0
    except ValueError:
        named = False
    if not place or not named or any(not "!" <= c <= "~" for c in place):
        raise _bad_hub("redirects to something that is no URL")
    if found.scheme != "https" and not (found.scheme == "http" and settings.hub.startswith("http:")):
        raise _bad_hub("redirects to where the connection would not be encrypted")
    return found._replace(fragment="").geturl()


def _refusal(status: int, wanted: HubModel, of_hub: bool) -> ApiError:
    if of_hub and status == 404:
        return ApiError(404, "not_on_hub", f"The hub has no {wanted.hub!r} with a revision {wanted.revision!r}: is it misspelt?")
    if of_hub and status in (401, 403):
        # Of what is not there at all the hub says the same.
        who = "with this token" if wanted.token else "without a token"
        detail = (
            f"The hub does not give {wanted.hub!r} out {who}: accept its terms there, and send as 'token' one that may read it. "
            "Or it is not there: is it misspelt?"
        )
        return ApiError(403, "gated_model", detail)
    return _away(f"it has answered with {status}")


def _away(why: str) -> ApiError:
    return ApiError(502, "hub_away", f"The hub cannot be used now: {why}. Ask again in a moment.")


def _bad_hub(why: str) -> ApiError:
    return ApiError(502, "bad_hub", f"The hub {why}: nothing was kept. Tell the administrator, or upload the model.")


def _too_many_files() -> NarrowError:
    return NarrowError("too_many_files", f"The model has more than {MOST_FILES:,} files: upload those that belong to it.")


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def _header(answer: httpcore.Response, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in answer.headers if key.lower() == name), "")


@lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()
