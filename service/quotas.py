"""What a tenant may use: jobs at a time, bytes that are kept, hours of job processes in thirty days; and requests a minute.

Settings say it for every tenant, `narrow tenants limit` for one. What a job makes is kept even where it goes over the limit on
bytes, since the job was accepted; then nothing new is, until there is room again.
"""

import threading
import time
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import func, text
from sqlmodel import Session, col, select

from service.api.schemas import Limits, Usage
from service.db.tables import HELD, TERMINAL, ArtifactRow, DatasetRow, JobRow, KeyRow, ModelRow, TenantRow, UploadRow, now
from service.problems import ApiError
from service.settings import Settings

WINDOW = timedelta(days=30)


def usage(session: Session, settings: Settings, tenant: str) -> Usage:
    """What a tenant uses, and what it may."""
    own = session.get(TenantRow, tenant) or TenantRow(name=tenant)
    return Usage(
        jobs=_jobs(session, tenant),
        bytes=_bytes(session, tenant),
        hours=_hours(session, tenant),
        limits=Limits(
            jobs=settings.max_jobs if own.max_jobs is None else own.max_jobs,
            bytes=settings.max_bytes if own.max_bytes is None else own.max_bytes,
            hours=settings.max_hours if own.max_hours is None else own.max_hours,
        ),
    )


def require(session: Session, settings: Settings, jobs: int = 0, size: int = 0) -> None:
    """Refuses so many more jobs, or bytes, where they are more than the session's tenant may have. Raises ApiError (403, 507)."""
    tenant = session.info["tenant"]
    if session.get_bind().dialect.name == "postgresql":
        # Two requests at once must not both find the last place free. On SQLite one that writes is alone anyway.
        session.execute(text("SELECT pg_advisory_xact_lock(hashtext(:name))"), {"name": f"narrow.quota.{tenant}"})
    found = usage(session, settings, tenant)
    most = found.limits
    if jobs and most.jobs is not None and found.jobs + jobs > most.jobs:
        detail = f"{found.jobs} jobs wait or run, and the limit is {most.jobs}: wait for some to end, or cancel them."
        raise ApiError(403, "too_many_jobs", detail)
    if jobs and most.hours is not None and found.hours >= most.hours:
        detail = f"{found.hours:.1f} hours of jobs were used in the last {WINDOW.days} days, and the limit is {most.hours:g}."
        raise ApiError(403, "hours_used_up", detail)
    if most.bytes is not None and found.bytes + size > most.bytes:
        detail = (
            f"{found.bytes:,} bytes are kept, and the limit is {most.bytes:,}: delete models, datasets, uploads or finished jobs."
        )
        raise ApiError(507, "quota_full", detail)


def _jobs(session: Session, tenant: str) -> int:
    wanted = select(func.count()).where(col(JobRow.tenant) == tenant, col(JobRow.status).not_in(TERMINAL))
    return session.scalar(wanted) or 0


def _bytes(session: Session, tenant: str) -> int:
    kept = [
        select(func.sum(ModelRow.stored)).where(col(ModelRow.tenant) == tenant),
        select(func.sum(DatasetRow.stored)).where(col(DatasetRow.tenant) == tenant),
        select(func.sum(UploadRow.bytes)).where(col(UploadRow.tenant) == tenant),
        select(func.sum(ArtifactRow.bytes)).join(JobRow).where(col(JobRow.tenant) == tenant),
    ]
    return sum(int(session.scalar(wanted) or 0) for wanted in kept)


def _hours(session: Session, tenant: str) -> float:
    recent = col(JobRow.started_at) > now() - WINDOW
    ended = session.scalar(select(func.sum(JobRow.seconds)).where(col(JobRow.tenant) == tenant, recent)) or 0.0
    running = select(JobRow.claimed_at).where(col(JobRow.tenant) == tenant, col(JobRow.status).in_(HELD))
    return (float(ended) + sum((now() - since).total_seconds() for since in session.exec(running) if since)) / 3600


@dataclass(frozen=True)
class Allowance:
    """What is left to a caller. `wait`: seconds until a request is taken again, 0 if this one is."""

    limit: int
    left: int
    reset: int
    wait: float

    @property
    def headers(self) -> dict[str, str]:
        """As draft-ietf-httpapi-ratelimit-headers has them."""
        return {
            "RateLimit-Policy": f'"requests";q={self.limit};w=60',
            "RateLimit": f'"requests";r={self.left};t={self.reset}',
        }


class RateLimiter:
    """A full bucket of `limit` requests for each caller, which fills up within a minute. Of one server: each has its own."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.full_at: dict[str, float] = {}
        self.lock = threading.Lock()

    def take(self, caller: str) -> Allowance:
        """Generic cell rate algorithm (ITU-T I.371): all that is kept of a caller is when its bucket will be full again."""
        with self.lock:
            if len(self.full_at) > 100_000:
                self.full_at = {name: full for name, full in self.full_at.items() if full > time.monotonic()}
            moment, each = time.monotonic(), 60 / self.limit
            full = max(self.full_at.get(caller, 0.0), moment)
            wait = max(0.0, full + each - 60 - moment)
            if not wait:
                full += each
                self.full_at[caller] = full
        return Allowance(self.limit, int((60 - (full - moment)) / each + 1e-9), int(full - moment) + 1, wait)


def by_tenant(session: Session) -> list[str]:
    """All tenants that have anything: a key, a job, a limit."""
    names = [session.exec(select(column).distinct()) for column in (KeyRow.tenant, JobRow.tenant, TenantRow.name)]
    return sorted({name for found in names for name in found})
