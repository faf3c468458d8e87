"""The life of a job, as transitions of its row. Nothing else changes a job's status.

    queued ──claim──▶ running ──▶ succeeded | failed
     ▲ │ ◀──release / lease ran out──┘ │ │
     │ │                               │ └──pause──▶ pausing ──▶ paused (or succeeded, if it was faster)
     │ └──pause──▶ paused              └──cancel──▶ cancelling ──▶ cancelled (or succeeded, if it was faster)
     └──resume───────┘

What no worker has is cancelled at once, whether it waits or is paused.

A worker holds a job by a lease: a random token and a time until which it counts. Every write of the worker is guarded
by the token, so a worker that was thought dead and comes back finds that it writes nothing (fencing). Times of leases are
the database's; should its clock jump, a job may be started again from its last checkpoint, and no more. Each change of
status appends a `state` event in the same transaction; a job's events are numbered without gaps because the number is
taken from the row that the transaction has locked.
"""

import secrets
from collections import Counter
from collections.abc import Collection, Iterator
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import func, or_, select, update
from sqlmodel import Session, col

from narrow_engine.events import Event
from narrow_engine.spec import JobSpec, SweepSpec, points
from service import told, traces, webhooks
from service.api.schemas import Status
from service.db.session import clock
from service.db.tables import HELD, TERMINAL, EventRow, JobRow, ModelRow, SweepRow, new_id, now
from service.problems import ApiError, not_found

NO_LEASE = 10
"""Times a lease's length: one that ends later than that was taken before the clock was set back, and counts no more."""


class LeaseLost(Exception):
    """The job belongs to another worker now: stop, and write nothing."""


def enqueue(session: Session, spec: JobSpec) -> JobRow:
    """A new job at the end of the queue. The caller commits."""
    made = spec.model_dump(mode="json")
    job = JobRow(id=new_id("job"), status="queued", spec=made, priority=spec.priority, created_at=now())
    _add(session, job)
    return job


def enqueue_sweep(session: Session, spec: SweepSpec) -> SweepRow:
    """A sweep, and its points as new jobs at the end of the queue, in their order. The caller commits."""
    sweep = SweepRow(id=new_id("swp"), spec=spec.model_dump(mode="json"), created_at=now())
    session.add(sweep)
    session.flush()
    found = points(spec)
    # Ids of one millisecond come in any order, and the queue goes by them.
    for identifier, point in zip(sorted(new_id("job") for _ in found), found, strict=True):
        made = point.spec.model_dump(mode="json")
        job = JobRow(id=identifier, status="queued", spec=made, priority=spec.priority, created_at=now())
        job.sweep, job.method = sweep.id, point.method
        _add(session, job)
    return sweep


def _add(session: Session, job: JobRow) -> None:
    job.trace = traces.here()
    session.add(job)
    session.flush()
    _set(session, job, "queued")


def find_sweep(session: Session, identifier: str) -> SweepRow:
    sweep = session.get(SweepRow, identifier)
    if sweep is None:
        raise not_found("sweep", identifier)
    return sweep


def find(session: Session, identifier: str) -> JobRow:
    job = session.get(JobRow, identifier)
    if job is None:
        raise not_found("job", identifier)
    return job


def claim(session: Session, lease_seconds: float, max_attempts: int, only: str | None = None) -> JobRow | None:
    """A job that waits or whose worker is gone, now leased to the caller; None if there is none. `only`: no other than this.

    Of the tenant that has fewest running, the oldest of the highest priority: one who queues a thousand jobs keeps nobody else
    waiting. A job that has been started `max_attempts` times without an end is failed instead of claimed.
    """
    moment = clock(session)
    job = _next(session, moment, lease_seconds, max_attempts, only=only)
    if job is None:
        return None
    job.status, job.attempt = "running", job.attempt + 1
    _count(session, job)  # of a worker that is gone, until now
    job.claimed_at = moment
    job.started_at = job.started_at or now()
    job.lease_token, job.lease_until = secrets.token_hex(8), moment + timedelta(seconds=lease_seconds)
    _append(session, job, now(), "state", "", "running", {"status": "running", "attempt": job.attempt})
    session.commit()
    return job


def upcoming(session: Session, lease_seconds: float, max_attempts: int, placed: Collection[str]) -> JobRow | None:
    """The job that `claim` would take, but for those that have a place to run on already; it stays as it is."""
    job = _next(session, clock(session), lease_seconds, max_attempts, placed)
    if job is not None:
        session.refresh(job)
        session.expunge(job)
        session.rollback()
    return job


def not_placed(session: Session, job_id: str, seq: int, max_attempts: int, reason: str) -> None:
    """Counts an attempt of a job that was to be started somewhere and was not, unless something has happened to it since event
    number `seq`."""
    job = session.scalars(select(JobRow).where(col(JobRow.id) == job_id).with_for_update()).first()
    if job is None or job.last_seq != seq or job.status in TERMINAL:
        session.rollback()
        return
    job.attempt += 1
    if job.attempt >= max_attempts:
        detail = f"The cluster could not start the job, {job.attempt} times. The last time: {reason}"
        _finish(session, job, "failed", {"code": "not_started", "message": detail})
    else:
        _append(session, job, now(), "notice", "", f"The cluster could not start the job: {reason}", {"code": "not_started"})
    session.commit()


def _next(
    session: Session,
    moment: datetime,
    lease_seconds: float,
    max_attempts: int,
    placed: Collection[str] = (),
    only: str | None = None,
) -> JobRow | None:
    """The job that comes next, locked. One for which there is nothing to run is ended on the way, and then it is none."""
    job = next(_waiting(session, moment, lease_seconds, placed, only), None)
    if job is None:
        session.rollback()
        return None
    if job.status in ("cancelling", "pausing"):
        _let_go(session, job)
        session.commit()
        return None
    if job.attempt >= max_attempts:
        detail = f"The job was started {job.attempt} times and each time its process or worker died."
        _finish(session, job, "failed", {"code": "too_many_attempts", "message": detail})
        session.commit()
        return None
    return job


def _waiting(
    session: Session, moment: datetime, lease_seconds: float, placed: Collection[str], only: str | None
) -> Iterator[JobRow]:
    """The first job of each tenant that has one, locked, in the order of tenants. What others have locked is passed over, and
    what is `placed` counts as running."""
    tenant, status, identifier = col(JobRow.tenant), col(JobRow.status), col(JobRow.id)
    is_held = status.in_(HELD)
    asked = identifier == only if only else identifier.not_in(placed)
    rows = session.execute(select(tenant, col(JobRow.lease_until), identifier).where(is_held)).all()
    latest = moment + NO_LEASE * timedelta(seconds=lease_seconds)
    leased = {row.id for row in rows if row.lease_until and moment <= row.lease_until <= latest}
    running = Counter(row.tenant for row in rows if row.id in leased)
    if placed:
        running.update(session.scalars(select(tenant).where(identifier.in_(set(placed) - leased))))
    first = select(tenant, func.min(identifier)).where(status == "queued", asked).group_by(tenant)
    oldest = {row[0]: row[1] for row in session.execute(first)}
    for row in rows:
        if row.id not in leased and (row.id == only if only else row.id not in placed):
            oldest[row.tenant] = min(row.id, oldest.get(row.tenant, row.id))
    until = col(JobRow.lease_until)
    wanted = or_(status == "queued", is_held & ((until < moment) | (until > latest)))
    for owner in sorted(oldest, key=lambda owner: (running[owner], oldest[owner])):
        locked = (
            select(identifier)
            .where(tenant == owner, wanted, asked)
            .order_by(col(JobRow.priority).desc(), identifier)
            .limit(1)
            .with_for_update(skip_locked=True)
        )
        found = session.scalar(locked)
        if found is not None:
            # In a statement of its own: it sees the row as it was when it was locked.
            yield session.get_one(JobRow, found)


def heartbeat(session: Session, job_id: str, token: str, lease_seconds: float) -> Status:
    """Extends the lease and returns the status, which may have become `cancelling` or `pausing`. Raises LeaseLost."""
    statement = (
        update(JobRow)
        .where(col(JobRow.id) == job_id, col(JobRow.lease_token) == token)
        .values(lease_until=clock(session) + timedelta(seconds=lease_seconds))
        .returning(col(JobRow.status))
    )
    status = session.scalar(statement)
    session.commit()
    if status is None:
        raise LeaseLost
    return status  # type: ignore[return-value]


def ingest(session: Session, job_id: str, token: str, events: list[Event]) -> None:
    """Takes over engine events that are not in the table yet, and with them phase and progress. Raises LeaseLost."""
    job = _held(session, job_id, token)
    for item in events:
        if item.seq <= job.engine_seq:
            continue
        job.engine_seq = item.seq
        _append(session, job, item.time, item.kind, item.phase, item.message, item.data)
        if item.kind in ("started", "progress", "finished"):
            job.phase = item.phase
            job.progress = told.progress(item) if item.kind == "progress" else None
    session.commit()


def finish(session: Session, job_id: str, token: str, status: Status, error: dict[str, str] | None, rows: list[Any]) -> None:
    """Ends a held job and stores `rows` (artifacts, model) in the same transaction. Raises LeaseLost."""
    job = _held(session, job_id, token)
    for row in rows:
        # A copy: the caller comes with the same rows again when the database has failed.
        kept = type(row)(**row.model_dump())
        if isinstance(kept, ModelRow):
            job.result_model, kept.tenant = kept.id, job.tenant
        session.add(kept)
    _finish(session, job, status, error)
    session.commit()


def release(session: Session, job_id: str, token: str, counts: bool) -> None:
    """Puts a held job back: into the queue, or where else somebody wanted it meanwhile. `counts`: whether this start was an
    attempt that failed. Raises LeaseLost."""
    job = _held(session, job_id, token)
    job.attempt -= 0 if counts else 1
    _let_go(session, job)
    session.commit()


def cancel(session: Session, job_id: str) -> JobRow:
    """Asks for the end of a job. A finished job stays as it is. The caller commits."""
    job = _locked(session, job_id)
    if job.status in ("succeeded", "failed"):
        raise ApiError(409, "job_finished", f"The job has already {job.status}: there is nothing to cancel.")
    _cancel(session, job)
    return job


def pause(session: Session, job_id: str) -> JobRow:
    """Asks that a job stops where it is, until `resume`. The caller commits."""
    job = _unfinished(session, job_id, "pause")
    if job.status == "queued":
        _set(session, job, "paused")
    elif job.status == "running":
        _set(session, job, "pausing")
    return job


def resume(session: Session, job_id: str) -> JobRow:
    """Puts a paused job back into the queue, at its old place. The caller commits."""
    job = _unfinished(session, job_id, "resume")
    if job.status == "paused":
        _set(session, job, "queued")
    elif job.status == "pausing":
        # Its worker may be ending the process by now; it will find that the job goes on, and puts it into the queue.
        _set(session, job, "running")
    return job


def cancel_sweep(session: Session, sweep_id: str) -> list[JobRow]:
    """Asks for the end of all jobs of a sweep that have none, and returns the sweep's jobs. The caller commits."""
    find_sweep(session, sweep_id)
    statement = select(JobRow).where(col(JobRow.sweep) == sweep_id).order_by(col(JobRow.id)).with_for_update()
    jobs = list(session.scalars(statement))
    if all(job.status in ("succeeded", "failed") for job in jobs):
        raise ApiError(409, "sweep_finished", "Every point of the sweep has ended already: there is nothing to cancel.")
    for job in jobs:
        _cancel(session, job)
    return jobs


def _cancel(session: Session, job: JobRow) -> None:
    if job.status in ("queued", "paused"):
        _finish(session, job, "cancelled", None)
    elif job.status in ("running", "pausing"):
        _set(session, job, "cancelling")


def _locked(session: Session, job_id: str) -> JobRow:
    job = session.scalars(select(JobRow).where(col(JobRow.id) == job_id).with_for_update()).first()
    if job is None:
        raise not_found("job", job_id)
    return job


def _unfinished(session: Session, job_id: str, verb: str) -> JobRow:
    job = _locked(session, job_id)
    if job.status in TERMINAL:
        ended = "was cancelled" if job.status == "cancelled" else f"has already {job.status}"
        raise ApiError(409, "job_finished", f"The job {ended}: there is nothing to {verb}.")
    if job.status == "cancelling":
        raise ApiError(409, "job_cancelling", f"The job is being cancelled: there is nothing to {verb}.")
    return job


def _let_go(session: Session, job: JobRow) -> None:
    """What becomes of a held job that its worker has no more."""
    if job.status == "cancelling":
        _finish(session, job, "cancelled", None)
        return
    _count(session, job)
    job.lease_token, job.lease_until = None, None
    _set(session, job, "paused" if job.status == "pausing" else "queued", "" if job.status == "pausing" else "queued again")


def _count(session: Session, job: JobRow) -> None:
    """Adds the time that a worker has had the job."""
    if job.claimed_at:
        # Not beyond its lease: what nobody held is nobody's use.
        moment = clock(session)
        until = min(moment, job.lease_until or moment)
        job.seconds, job.claimed_at = job.seconds + max(0.0, (until - job.claimed_at).total_seconds()), None


def _set(session: Session, job: JobRow, status: Status, message: str = "") -> None:
    job.status = status
    _append(session, job, now(), "state", "", message or status, {"status": status})


def _finish(session: Session, job: JobRow, status: Status, error: dict[str, str] | None) -> None:
    _count(session, job)
    job.status, job.error, job.finished_at = status, error, now()
    job.lease_token, job.lease_until, job.progress = None, None, None
    message = error["message"] if error else status
    _append(session, job, now(), "state", "", message, {"status": status, **(error or {})})


def _append(session: Session, job: JobRow, time: datetime, kind: str, phase: str, message: str, data: dict[str, Any]) -> None:
    job.last_seq += 1
    if kind == "state":
        webhooks.note(session, job)
    session.add(EventRow(job_id=job.id, seq=job.last_seq, time=time, kind=kind, phase=phase, message=message, data=data))


def _held(session: Session, job_id: str, token: str) -> JobRow:
    statement = select(JobRow).where(col(JobRow.id) == job_id, col(JobRow.lease_token) == token).with_for_update()
    job = session.scalars(statement).first()
    if job is None:
        session.rollback()
        raise LeaseLost
    return job


__all__ = [
    "TERMINAL",
    "LeaseLost",
    "cancel",
    "cancel_sweep",
    "claim",
    "enqueue",
    "enqueue_sweep",
    "find",
    "find_sweep",
    "finish",
    "heartbeat",
    "ingest",
    "not_placed",
    "pause",
    "release",
    "resume",
    "upcoming",
]
