"""The tables. SQLModel does not validate rows, so what must hold is a constraint of the database."""

import secrets
import time
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    ForeignKey,
    Index,
    Integer,
    String,
    Text,
    TypeDecorator,
)
from sqlmodel import Field, SQLModel

from narrow_engine.spec import BadRows
from service.api.schemas import Role, Status

STATUSES: tuple[Status, ...] = ("queued", "running", "pausing", "paused", "cancelling", "succeeded", "failed", "cancelled")
HELD: tuple[Status, ...] = ("running", "pausing", "cancelling")
"""Of a job that a worker has."""
TERMINAL: tuple[Status, ...] = ("succeeded", "failed", "cancelled")

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # pragma: allowlist secret


def new_id(prefix: str) -> str:
    """An id that sorts by time: 10 characters of milliseconds and 16 random ones."""
    number = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    return f"{prefix}_" + "".join(_ALPHABET[number >> shift & 31] for shift in range(125, -5, -5))


def now() -> datetime:
    return datetime.now(UTC)


class UtcDateTime(TypeDecorator[datetime]):
    """SQLite forgets time zones, and Postgres' are the session's; here everything is UTC."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Any) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


Bytes: Any = BigInteger().with_variant(Integer, "sqlite")
"""SQLite's integers have 64 bits, Postgres' have 32."""


def _time(nullable: bool = True) -> Any:
    return Field(default=None, sa_type=UtcDateTime, nullable=nullable)


DEFAULT_TENANT = "default"
"""Whose everything is where no keys are used."""


class Owned(SQLModel):
    """Rows that belong to a tenant. A session of one sees no others, and what it adds is its own (`db.session`)."""

    tenant: str = Field(default=DEFAULT_TENANT, sa_column_kwargs={"server_default": DEFAULT_TENANT})


class KeyRow(Owned, table=True):
    __tablename__ = "api_key"
    __table_args__ = (
        CheckConstraint("role IN ('read', 'write', 'admin')", name="role_known"),
        Index("api_key_tenant", "tenant", "id"),
    )

    id: str = Field(primary_key=True)
    name: str
    role: Role = Field(sa_type=String)
    hint: str = Field(description="The key's last characters.")
    sha256: str = Field(unique=True, index=True)
    created_at: datetime = _time(nullable=False)
    expires_at: datetime | None = _time()
    revoked_at: datetime | None = _time()
    used_at: datetime | None = _time()


class TenantRow(SQLModel, table=True):
    """Limits of a tenant that are others than those of the settings."""

    __tablename__ = "tenant"

    name: str = Field(primary_key=True)
    max_jobs: int | None = None
    max_bytes: int | None = Field(default=None, sa_type=Bytes)
    max_hours: float | None = None


class ModelRow(Owned, table=True):
    __tablename__ = "model"
    __table_args__ = (Index("model_tenant", "tenant", "id"), Index("model_hub", "tenant", "hub", "hub_commit", unique=True))

    id: str = Field(primary_key=True)
    name: str
    info: dict[str, Any] = Field(sa_type=JSON, description="A `ModelInfo`.")
    stored: int = Field(default=0, sa_type=Bytes, sa_column_kwargs={"server_default": "0"}, description="Bytes of its files.")
    job_id: str | None = None
    hub: str | None = Field(default=None, description="Its name on the hub that it was fetched from.")
    hub_commit: str | None = None
    created_at: datetime = _time(nullable=False)


class DatasetRow(Owned, table=True):
    __tablename__ = "dataset"
    __table_args__ = (Index("dataset_tenant", "tenant", "id"),)

    id: str = Field(primary_key=True)
    name: str
    file: str = Field(description="Name of the file in its folder.")
    text_column: str
    documents: int
    bytes: int = Field(sa_type=Bytes)
    stored: int = Field(default=0, sa_type=Bytes, sa_column_kwargs={"server_default": "0"}, description="Bytes of its file.")
    sha256: str
    preview: list[str] = Field(sa_type=JSON)
    bad_rows: BadRows = Field(default="stop", sa_type=String, sa_column_kwargs={"server_default": "stop"})
    skipped: int = Field(default=0, sa_column_kwargs={"server_default": "0"}, description="Bad rows that were left out.")
    skipped_reason: str | None = Field(default=None, description="What was wrong with the first.")
    created_at: datetime = _time(nullable=False)


class AuditRow(Owned, table=True):
    """A change over the API: added to the transaction that makes it."""

    __tablename__ = "audit"
    __table_args__ = (Index("audit_tenant", "tenant", "id"),)

    id: str = Field(primary_key=True)
    time: datetime = _time(nullable=False)
    key: str | None = Field(description="Id of the API key; none where none is needed.")
    operation: str
    path: str
    made: str | None = Field(default=None, description="Id of what was made.")
    request_id: str
    address: str | None


class WebhookRow(Owned, table=True):
    __tablename__ = "webhook"
    __table_args__ = (Index("webhook_tenant", "tenant", "id"),)

    id: str = Field(primary_key=True)
    url: str
    events: list[str] = Field(sa_type=JSON)
    secret: str = Field(description="In the clear: it is what messages are signed with.")
    created_at: datetime = _time(nullable=False)
    disabled_at: datetime | None = _time()


class MessageRow(Owned, table=True):
    """Something that a webhook is told, until it has been told."""

    __tablename__ = "message"
    __table_args__ = (Index("message_due", "next_at"), Index("message_webhook", "webhook_id", "id"))

    id: str = Field(primary_key=True)
    webhook_id: str = Field(sa_column=Column(ForeignKey("webhook.id", ondelete="CASCADE"), nullable=False))
    body: dict[str, Any] = Field(sa_type=JSON)
    created_at: datetime = _time(nullable=False)
    next_at: datetime | None = _time()
    attempts: int = 0
    status: int | None = None
    error: str | None = None
    delivered_at: datetime | None = _time()


class UploadRow(Owned, table=True):
    """A file that comes in pieces, which lie in the storage; how far it is follows from them."""

    __tablename__ = "upload"
    __table_args__ = (Index("upload_tenant", "tenant", "id"),)

    id: str = Field(primary_key=True)
    name: str
    bytes: int = Field(sa_type=Bytes)
    sha256: str | None
    created_at: datetime = _time(nullable=False)
    expires_at: datetime = _time(nullable=False)


class SweepRow(Owned, table=True):
    __tablename__ = "sweep"
    __table_args__ = (Index("sweep_tenant", "tenant", "id"),)

    id: str = Field(primary_key=True)
    spec: dict[str, Any] = Field(sa_type=JSON)
    created_at: datetime = _time(nullable=False)


class JobRow(Owned, table=True):
    __tablename__ = "job"
    __table_args__ = (
        CheckConstraint(f"status IN {STATUSES}", name="status_known"),
        Index("job_claim", "status", "tenant", "priority", "id"),
        Index("job_sweep", "sweep"),
        Index("job_tenant", "tenant", "id"),
    )

    id: str = Field(primary_key=True)
    status: str
    spec: dict[str, Any] = Field(sa_type=JSON)
    phase: str = ""
    progress: dict[str, Any] | None = Field(default=None, sa_type=JSON)
    error: dict[str, Any] | None = Field(default=None, sa_type=JSON)
    result_model: str | None = None
    attempt: int = 0
    priority: int = Field(default=0, sa_column_kwargs={"server_default": "0"})
    seconds: float = Field(default=0.0, sa_column_kwargs={"server_default": "0"}, description="That workers had it, in all.")
    claimed_at: datetime | None = _time()
    last_seq: int = Field(default=0, description="Number of the job's newest event.")
    engine_seq: int = Field(default=0, description="Number of the run's last event that is in the event table.")
    lease_token: str | None = Field(default=None, description="Who holds the job; every write of a worker is guarded by it.")
    lease_until: datetime | None = _time()
    created_at: datetime = _time(nullable=False)
    started_at: datetime | None = _time()
    finished_at: datetime | None = _time()
    sweep: str | None = Field(default=None, foreign_key="sweep.id", description="The sweep that it is a point of.")
    method: str | None = Field(default=None, description="The name that the sweep has for its method.")
    trace: str | None = Field(default=None, description="The span of the request that made it, as W3C's traceparent.")


class OutcomeRow(SQLModel, table=True):
    """What a frontier needs of a finished point: it is stored with the job's end, so that no report is read for it again."""

    __tablename__ = "outcome"

    job_id: str = Field(sa_column=Column(ForeignKey("job.id", ondelete="CASCADE"), primary_key=True))
    outcome: dict[str, Any] = Field(sa_type=JSON, description="An `Outcome`.")


class EventRow(SQLModel, table=True):
    __tablename__ = "event"

    job_id: str = Field(sa_column=Column(ForeignKey("job.id", ondelete="CASCADE"), primary_key=True))
    seq: int = Field(primary_key=True)
    time: datetime = _time(nullable=False)
    kind: str
    phase: str
    message: str = Field(sa_column=Column(Text, nullable=False))
    data: dict[str, Any] = Field(sa_type=JSON)


class ArtifactRow(SQLModel, table=True):
    __tablename__ = "artifact"

    job_id: str = Field(sa_column=Column(ForeignKey("job.id", ondelete="CASCADE"), primary_key=True))
    path: str = Field(primary_key=True)
    bytes: int = Field(sa_type=Bytes)
    sha256: str = Field(index=True)
    media_type: str


class IdempotencyRow(Owned, table=True):
    __tablename__ = "idempotency"

    tenant: str = Field(default=DEFAULT_TENANT, primary_key=True, sa_column_kwargs={"server_default": DEFAULT_TENANT})
    key: str = Field(primary_key=True)
    body_sha256: str
    job_id: str | None = Field(sa_column=Column(ForeignKey("job.id", ondelete="CASCADE")))
    sweep_id: str | None = Field(sa_column=Column(ForeignKey("sweep.id", ondelete="CASCADE")))
    created_at: datetime = _time(nullable=False)
