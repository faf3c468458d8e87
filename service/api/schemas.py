"""What the API says: the resources as a client sees them. What a client may send is `JobSpec`, in the engine's spec."""

from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, Secret

from narrow_engine.events import Event
from narrow_engine.report.frontier import Figures
from narrow_engine.report.model import Size
from narrow_engine.spec import BadRows, Budget, HubName, JobSpec, Revision, SweepSpec, Unit

Role = Literal["read", "write", "admin"]
Status = Literal["queued", "running", "pausing", "paused", "cancelling", "succeeded", "failed", "cancelled"]
Phase = Literal[
    "",
    "load",
    "measure_base",
    "score",
    "allocate",
    "sparsify",
    "plan",
    "slice",
    "reconstruct",
    "correct",
    "teach",
    "recover",
    "controls",
    "measure",
    "answer",
    "locality",
    "relearn",
    "export_base",
    "export",
    "report",
]

T = TypeVar("T")


class Page(BaseModel, Generic[T]):
    """A page of a list, newest first. Ask again with `cursor=next_cursor` until it is null."""

    data: list[T]
    next_cursor: str | None = None


class FieldError(BaseModel):
    pointer: str = Field(description="JSON pointer into what was sent, or /line/N of a dataset.")
    detail: str = Field(description="What is wrong there.")


class Problem(BaseModel):
    """RFC 9457. `code` is stable and for programs; `detail` is a sentence for people."""

    type: str = Field(description="`urn:narrow:problem:` and the code.")
    title: str = Field(description="The status in words.")
    status: int = Field(description="That of the answer.")
    detail: str = Field(description="What was wrong, where, and what to do.")
    instance: str | None = Field(None, description="The path that was asked for.")
    code: str
    errors: list[FieldError] = Field([], description="Each fault of what was sent, where there are several.")
    request_id: str = Field(description="As in the header `X-Request-Id`, and in the server's log.")


class JobError(BaseModel):
    code: str
    message: str = Field(description="What was wrong, where, and what to do.")


class Progress(BaseModel):
    """How far the current phase is."""

    done: int
    total: int
    message: str = ""


class Job(BaseModel):
    id: str = Field(examples=["job_01h455vb4pex5vsknk084sn02q"])
    status: Status
    phase: Phase
    progress: Progress | None = None
    spec: JobSpec
    attempt: int = Field(description="How often the job has been started; more than 1 after a crash.")
    error: JobError | None = None
    result_model: str | None = Field(None, description="Id of the model that came out: it can be the base of another job.")
    sweep: str | None = Field(None, description="The sweep that it is a point of, if it is.")
    seconds: float = Field(0.0, description="That it has run so far, without the attempt that runs now.")
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None


class Sweep(BaseModel):
    id: str = Field(examples=["swp_01h455vb4pex5vsknk084sn02q"])
    spec: SweepSpec
    counts: dict[Status, int] = Field(description="Points by the status of their jobs.")
    finished: bool = Field(description="Whether every point has ended, however it did.")
    created_at: datetime


class Point(BaseModel):
    """A point of a sweep, which is a job."""

    job: str
    method: str = Field(description="The name of its method in the sweep.")
    budget: Budget
    seed: int
    status: Status
    error: JobError | None = None
    figures: Figures | None = Field(None, description="What came out, once it has succeeded.")


class SweepPoints(Sweep):
    """A sweep with its points, in the order in which they run."""

    points: list[Point]


class Artifact(BaseModel):
    path: str = Field(description="model/..., onnx/..., report.json, report.html, plan.json, ...")
    bytes: int
    sha256: str
    media_type: str


class Upload(BaseModel):
    """A file that comes in pieces."""

    id: str = Field(examples=["upl_01h455vb4pex5vsknk084sn02q"])
    name: str
    bytes: int
    offset: int = Field(description="Bytes that have come.")
    sha256: str | None
    created_at: datetime
    expires_at: datetime


class Source(BaseModel):
    """Where on the hub a model is from."""

    hub: str = Field(examples=["HuggingFaceTB/SmolLM2-135M"])
    commit: str = Field(description="Of which the files are.")


class Model(BaseModel):
    id: str = Field(examples=["mdl_01h455vb4pex5vsknk084sn02q"])
    name: str = Field(description="What reports call it.")
    family: str = Field(description="Its type, as its config names it.")
    parameters: int
    bytes: int = Field(description="Of the weights.")
    sha256: str = Field(description="Over `NAME\\0SHA-256\\n` of each of its files, in the order of their names.")
    units: list[Unit] = Field(description="Kinds of unit that can be cut from it.")
    config: dict[str, Any] = Field(description="Its config.json.")
    job: str | None = Field(None, description="The job that made it, if one did.")
    source: Source | None = Field(None, description="Where it was fetched from, if it was.")
    created_at: datetime


class HubModel(BaseModel):
    """A model that the server is to fetch."""

    model_config = ConfigDict(extra="forbid")

    hub: HubName = Field(description="Its name on the hub.")
    revision: Revision = Field("main", description="A branch, a tag or a commit.")
    name: str | None = Field(None, max_length=100, description="What reports call it; by default as the hub does.")
    token: Secret[Annotated[str, Field(min_length=1, max_length=500, pattern="^[!-~]+$")]] | None = Field(
        None, description="Of the hub, for a model that it does not show to everybody. It is not kept."
    )


class Dataset(BaseModel):
    id: str = Field(examples=["ds_01h455vb4pex5vsknk084sn02q"])
    name: str = Field(description="What reports call it.")
    column: str = Field(description="The field of a row that holds its text.")
    documents: int
    bytes: int = Field(description="Of the text, uncompressed.")
    format: str = Field(description="How its file's name ends.", examples=[".jsonl.gz"])
    sha256: str = Field(description="Of its file.")
    preview: list[str] = Field(description="The first documents, shortened.")
    bad_rows: BadRows
    skipped: int = Field(description="Bad rows that were left out.")
    skipped_reason: str | None = Field(description="What was wrong with the first.")
    created_at: datetime


class Plan(BaseModel):
    """A dry run: what a job would make, with nothing queued."""

    family: str = Field(description="The type of the model, as its config names it.")
    before: Size = Field(description="The base.")
    after: Size = Field(description="The result.")
    keep: dict[Unit, int] = Field(description="Units kept in each layer; for `layer`, `residual` and `token`, in the model.")
    memory_bytes: int = Field(description="Estimated peak of the job: the most of `memory`.")
    memory: dict[str, int] = Field(description="Estimated peak of each stage, in bytes, where there is enough.")
    least_memory_bytes: int = Field(
        description="What the job can be done in, with the base's layers left in their file, training in smaller pieces, "
        "activations computed again and weights in bfloat16, each where it has to be. A tenth of a machine's memory is left free."
    )
    seconds: float = Field(description="Rough estimate of the job's time on this server's machine.")
    notices: list[str] = Field(description="What would be rounded, or is not known before the job runs.")


Told = Literal[
    "job.queued", "job.running", "job.pausing", "job.paused", "job.cancelling", "job.succeeded", "job.failed", "job.cancelled"
]


class NewWebhook(BaseModel):
    model_config = ConfigDict(extra="forbid")

    url: str = Field(max_length=2000, examples=["https://example.com/narrow"])
    events: list[Told] = Field(["job.succeeded", "job.failed", "job.cancelled"], min_length=1, max_length=10)


class Webhook(BaseModel):
    id: str
    url: str
    events: list[str]
    created_at: datetime
    disabled_at: datetime | None = Field(description="When it was given up: it answered 410, or nothing good for three days.")


class SecretWebhook(Webhook):
    secret: str = Field(description="For verifying `webhook-signature`. It is shown only here.")


class Message(BaseModel):
    """Something that a webhook is told: once more until it answers with 2xx."""

    id: str = Field(description="The header `webhook-id`, the same with each try.")
    type: str = Field(description="job.succeeded, ..., or test.")
    created_at: datetime
    attempts: int
    status: int | None = Field(description="Of the last answer.")
    error: str | None = Field(description="What was wrong with the last try.")
    next_at: datetime | None = Field(description="When it will be sent.")
    delivered_at: datetime | None


class Change(BaseModel):
    """A line of the audit log."""

    id: str
    time: datetime
    key: str | None = Field(description="Id of the API key that was used; null where none is needed.")
    operation: str = Field(description="As the OpenAPI document calls it.", examples=["create_job"])
    path: str
    made: str | None = Field(description="Id of what was made.")
    request_id: str
    address: str | None = Field(description="Where the request came from.")


class Limits(BaseModel):
    """None where there is none."""

    jobs: int | None = Field(description="That wait, run or are paused at a time.")
    bytes: int | None = Field(description="That are kept.")
    hours: float | None = Field(description="That jobs run in thirty days.")


class Usage(BaseModel):
    """What a tenant uses."""

    jobs: int = Field(description="That wait, run or are paused.")
    bytes: int = Field(description="Of models, datasets, uploads and what jobs made.")
    hours: float = Field(description="Of job processes, in the last thirty days.")
    limits: Limits
    role: Role | None = Field(None, description="What the key that asks may do; without keys, everything.")


class NewKey(BaseModel):
    """What a new key is asked for with."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(
        min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]+$", description="For people: who or what uses it."
    )
    role: Role = Field(
        "write", description="`read` looks, `write` makes and ends things too, `admin` makes and revokes keys too."
    )
    expires_in_days: float | None = Field(
        None, gt=0, le=3650, strict=True, description="By default it counts until it is revoked."
    )


class Key(BaseModel):
    """An API key, without itself."""

    id: str
    name: str
    role: Role
    tenant: str = Field(description="Whose it is, and all that is made with it.")
    hint: str = Field(description="Its last characters.")
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    used_at: datetime | None = Field(description="Its last use, to the hour.")


class SecretKey(Key):
    """A new API key."""

    key: str = Field(description="To be sent as `Authorization: Bearer ...`. It is shown only here.")


class Health(BaseModel):
    status: Literal["ok", "unavailable"]
    version: str = Field(description="Of the service.")
    checks: dict[str, str] = Field({}, description="What was looked at, and how it is.")


__all__ = [
    "Artifact",
    "Change",
    "Dataset",
    "Event",
    "Health",
    "HubModel",
    "Job",
    "JobError",
    "Key",
    "Limits",
    "Message",
    "Model",
    "NewKey",
    "NewWebhook",
    "Page",
    "Plan",
    "Problem",
    "Progress",
    "Role",
    "SecretKey",
    "SecretWebhook",
    "Status",
    "Upload",
    "Usage",
    "Webhook",
]
