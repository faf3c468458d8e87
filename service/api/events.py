"""A job's events: as a page of JSON, or as a stream of Server-Sent Events that resumes where it broke."""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event

from service import metrics, queue
from service.api.schemas import Event, Page
from service.api.sessions import ReadDb
from service.db.session import read_session
from service.problems import ApiError, responses
from service.streams import BATCH, Hub, read, sent

router = APIRouter(prefix="/jobs/{job_id}", tags=["events"])

PING_SECONDS = 15.0
LAST = 2**31 - 1
"""Number of the last event that the table could hold."""


@router.get(
    "/events",
    responses={
        **responses(404),
        200: {
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
            "description": "A page, or a stream by `Accept`.",
        },
    },
    response_model=Page[Event],
)
async def list_events(
    job_id: str,
    request: Request,
    session: ReadDb,
    after: Annotated[int, Query(ge=0, le=LAST, description="Number of the last event that is known.")] = 0,
    limit: Annotated[int, Query(ge=1, le=BATCH, description="How many, at most.")] = 100,
    last_event_id: Annotated[str | None, Header(max_length=20, description="Of a stream: as `after`.")] = None,
) -> object:
    """Events of a job in order. With `Accept: text/event-stream` it is a live stream: each event's `id` is its number, and
    a client that reconnects with `Last-Event-ID` misses nothing and gets nothing twice. The stream ends with an event
    named `end` once the job is finished, or silently when the server stops: reconnect then."""
    await run_in_threadpool(queue.find, session, job_id)
    if "text/event-stream" in request.headers.get("accept", ""):
        known = _number(last_event_id, after)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(_stream(request, job_id, known), media_type="text/event-stream", headers=headers)
    rows = await run_in_threadpool(read, session, job_id, after, limit + 1)
    return Page(data=rows[:limit], next_cursor=str(rows[limit - 1].seq) if len(rows) > limit else None)


def _number(last_event_id: str | None, after: int) -> int:
    """The number in a `Last-Event-ID`. What cannot be one of ours is refused: from the beginning everything would come twice."""
    if not last_event_id:
        return after
    if not (last_event_id.isascii() and last_event_id.isdigit()) or int(last_event_id) > LAST:
        detail = f"Last-Event-ID {last_event_id!r} is not the number of an event, as the `id` of each one says it."
        raise ApiError(422, "invalid_request", detail)
    return int(last_event_id)


async def _stream(request: Request, job_id: str, known: int) -> AsyncIterator[bytes]:
    with metrics.streams.track_inprogress():
        async for chunk in _events(request, job_id, known):
            yield chunk


async def _events(request: Request, job_id: str, known: int) -> AsyncIterator[bytes]:
    hub: Hub = request.app.state.hub
    yield format_sse_event(retry=1000)
    with hub.listening(job_id) as channel:
        while not hub.drain.is_set():
            changed = channel.changed
            found = channel.after(known)
            if found is None:
                found = await run_in_threadpool(_read, hub, job_id, known)
            for number, text in found:
                known = number
                yield text
            if found:
                continue
            if channel.finished:
                yield format_sse_event(event="end", data_str="{}")
                return
            try:
                await asyncio.wait_for(changed.wait(), PING_SECONDS)
            except TimeoutError:
                yield format_sse_event(comment="still here")


def _read(hub: Hub, job_id: str, known: int) -> list[tuple[int, bytes]]:
    with read_session(hub.engine) as session:
        return [sent(event) for event in read(session, job_id, known, BATCH)]
