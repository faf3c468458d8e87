"""What event streams listen to: one look at the database for all of them, however many there are.

Each stream asking for itself cost 200 listeners more than a core. Here a single task looks which of the jobs that somebody
listens to have new events, reads these once and writes them down once as they go over the wire; a stream that is further
behind than a channel remembers reads for itself.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fastapi.concurrency import run_in_threadpool
from fastapi.sse import format_sse_event
from sqlalchemy import Engine, or_
from sqlmodel import Session, col, select

from service.api.schemas import Event, Phase
from service.db.session import AWAY, read_session
from service.db.tables import TERMINAL, EventRow, JobRow

BATCH = 500
TRAINED: tuple[Phase, ...] = ("sparsify", "recover")
"""Phases whose progress is the curve of the result: of these there are some hundred events, however long they take."""

log = logging.getLogger("narrow.streams")


@dataclass
class Channel:
    """What is known of a job that somebody listens to: its events after number `since`, as they are sent."""

    listeners: int = 0
    since: int | None = None
    recent: deque[tuple[int, bytes]] = field(default_factory=deque)
    finished: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def last(self) -> int | None:
        return self.recent[-1][0] if self.recent else self.since

    def after(self, known: int) -> list[tuple[int, bytes]] | None:
        """The events after number `known`; None if the channel does not know them all."""
        if self.since is None or known < self.since:
            return None
        return [item for item in self.recent if item[0] > known]

    def take(self, found: list[tuple[int, bytes]]) -> None:
        self.recent.extend(found)
        while len(self.recent) > BATCH:
            self.since = self.recent.popleft()[0]

    def tell(self) -> None:
        """Wakes all who wait. They take `changed` before they look, so nobody misses what comes in between."""
        self.changed.set()
        self.changed = asyncio.Event()


class Hub:
    """The channels of a server. `drain` ends its streams."""

    def __init__(self, engine: Engine, poll_seconds: float, drain: asyncio.Event) -> None:
        self.engine, self.poll_seconds, self.drain = engine, poll_seconds, drain
        self.channels: dict[str, Channel] = {}
        self.joined = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    @contextmanager
    def listening(self, job_id: str) -> Iterator[Channel]:
        """The channel of a job, while somebody listens."""
        channel = self.channels.setdefault(job_id, Channel())
        channel.listeners += 1
        self.joined.set()
        if self.task is None or self.task.done():
            self.task = asyncio.create_task(self._look())
        try:
            yield channel
        finally:
            channel.listeners -= 1
            if not channel.listeners:
                del self.channels[job_id]

    async def _look(self) -> None:
        while self.channels and not self.drain.is_set():
            self.joined.clear()
            try:
                found = await run_in_threadpool(self._read, {job: channel.last for job, channel in self.channels.items()})
            except AWAY as error:
                log.error("events are looked for again in %g s: %s", self.poll_seconds, str(error).partition("\n")[0])
                found = {}
            for job, (since, events, finished) in found.items():
                channel = self.channels.get(job)
                if channel is None:
                    continue
                new = channel.since is None
                if new:
                    channel.since = since
                elif channel.last != since:  # everybody left and somebody came while this was read
                    continue
                channel.take(events)
                if new or events or finished != channel.finished:
                    channel.finished = finished
                    channel.tell()
            await self._pause()
        for channel in self.channels.values():
            channel.tell()

    async def _pause(self) -> None:
        """Until the next look: sooner for somebody new, and when the server stops."""
        waits = [asyncio.ensure_future(event.wait()) for event in (self.joined, self.drain)]
        await asyncio.wait(waits, timeout=self.poll_seconds, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    def _read(self, known: dict[str, int | None]) -> dict[str, tuple[int, list[tuple[int, bytes]], bool]]:
        """Of each job the number from which on, its events after that, and whether there will be no more."""
        with read_session(self.engine) as session:
            # Status first: a job that is finished by now has all its events in the table.
            wanted = select(JobRow.id, JobRow.last_seq, JobRow.status).where(col(JobRow.id).in_(known))
            jobs = {job: (last, status in TERMINAL) for job, last, status in session.exec(wanted)}
            found = {}
            for job, since in known.items():
                last, finished = jobs.get(job, (0, True))  # a deleted job has none either
                start = last if since is None else since
                events = [sent(event) for event in read(session, job, start, BATCH)] if last > start else []
                found[job] = (start, events, finished and (events[-1][0] if events else start) >= last)
            return found


def read(session: Session, job_id: str, known: int, limit: int) -> list[Event]:
    """A job's events after number `known`."""
    statement = (
        select(EventRow).where(EventRow.job_id == job_id, col(EventRow.seq) > known).order_by(col(EventRow.seq)).limit(limit)
    )
    return [Event.model_validate(row.model_dump(exclude={"job_id"})) for row in session.exec(statement)]


def story(session: Session, job_id: str, limit: int) -> list[Event]:
    """The last events that say what has become of a job: all but the progress of phases that have no curve."""
    telling = or_(col(EventRow.kind) != "progress", col(EventRow.phase).in_(TRAINED))
    statement = select(EventRow).where(EventRow.job_id == job_id, telling).order_by(col(EventRow.seq).desc()).limit(limit)
    return [Event.model_validate(row.model_dump(exclude={"job_id"})) for row in session.exec(statement)][::-1]


def sent(event: Event) -> tuple[int, bytes]:
    return event.seq, format_sse_event(id=str(event.seq), event=event.kind, data_str=event.model_dump_json())
