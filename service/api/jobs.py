"""Jobs: make one, look at it, end it."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from sqlalchemy import Engine, Row, bindparam
from sqlalchemy import select as sql_select
from sqlmodel import Session, col, delete, select

from narrow_engine.documents import BadRow, Skipped, read_documents
from narrow_engine.errors import NarrowError
from narrow_engine.model_files import DTYPES, Tried, check_teacher
from narrow_engine.sizing import solve
from narrow_engine.spec import JobSpec, ModelId
from service import janitor, queue, quotas
from service.api import idempotency
from service.api.paging import Cursor, Limit, page
from service.api.schemas import Job, JobError, Page, Progress, Status
from service.api.sessions import Db, ReadDb, Who
from service.db.session import reading
from service.db.tables import TERMINAL, ArtifactRow, DatasetRow, JobRow, ModelRow, SweepRow
from service.problems import ApiError, not_found, responses
from service.storage import Storage, artifact_key
from service.uploads import require_space

router = APIRouter(prefix="/jobs", tags=["jobs"])

LOOK = 1000
"""Bad rows in a dataset that are passed over in search of one with an answer."""


_JOBS: Any = JobRow.__table__  # type: ignore[attr-defined]
_BY_ID = sql_select(_JOBS).where(_JOBS.c.id == bindparam("id"), _JOBS.c.tenant == bindparam("tenant"))


def as_job(row: JobRow | Row[Any]) -> Job:
    return Job(
        id=row.id,
        status=row.status,
        phase=row.phase,
        progress=Progress.model_validate(row.progress) if row.progress else None,
        spec=JobSpec.model_validate(row.spec),
        attempt=row.attempt,
        error=JobError.model_validate(row.error) if row.error else None,
        result_model=row.result_model,
        sweep=row.sweep,
        seconds=row.seconds,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
    )


@router.post("", status_code=201, responses=responses(404, 409, 413, 507))
def create_job(spec: JobSpec, request: Request, response: Response, session: Db, idempotency_key: idempotency.Key = None) -> Job:
    """Queue a compression. With an `Idempotency-Key`, the same request sent again answers with the job it made first."""
    known = idempotency.made_before(session, idempotency_key, spec)
    if known and known.job_id:
        job = queue.find(session, known.job_id)
        session.commit()
    else:
        require_space(request.app.state.settings)
        check_spec(session, spec, request.app.state.storage)
        quotas.require(session, request.app.state.settings, jobs=1)
        job = queue.enqueue(session, spec)
        idempotency.commit(session, idempotency_key, spec, job_id=job.id)
    response.headers["Location"] = f"/jobs/{job.id}"
    return as_job(job)


@router.get("", responses=responses(404))
def list_jobs(
    session: ReadDb,
    cursor: Cursor = None,
    limit: Limit = 20,
    status: Annotated[Status | None, Query(description="Only jobs in this state.")] = None,
    sweep: Annotated[str | None, Query(max_length=60, description="Only the points of this sweep.")] = None,
) -> Page[Job]:
    """Jobs, newest first."""
    statement = select(JobRow)
    if status:
        statement = statement.where(JobRow.status == status)
    if sweep is not None:
        if session.get(SweepRow, sweep) is None:
            raise not_found("sweep", sweep)
        statement = statement.where(JobRow.sweep == sweep)
    return page(session, statement, JobRow, cursor, limit, as_job)


@router.get("/{job_id}", responses=responses(404))
async def get_job(job_id: str, request: Request, who: Who) -> Job:
    """One job: its status, phase and spec."""
    # What is asked most. It is one visit to a thread, where FastAPI makes three of a plain handler with a session, and asks the
    # table and not the mapper: together that is half of what a request took.
    return await run_in_threadpool(_read, request.app.state.engine, who.tenant, job_id)


def _read(engine: Engine, tenant: str, job_id: str) -> Job:
    with reading(engine).connect() as connection:
        row = connection.execute(_BY_ID, {"id": job_id, "tenant": tenant}).first()
    if row is None:
        raise not_found("job", job_id)
    return as_job(row)


@router.post("/{job_id}/cancel", responses=responses(404, 409, 507))
def cancel_job(job_id: str, request: Request, session: Db) -> Job:
    """Ask a job to end. A queued one is cancelled at once, a running one within seconds."""
    job = queue.cancel(session, job_id)
    session.commit()
    if job.status == "cancelled":
        # A job that was put back into the queue has a run folder that no worker will come for.
        janitor.remove_run(request.app.state.settings, request.app.state.storage, job.id)
    return as_job(job)


@router.post("/{job_id}/pause", responses=responses(404, 409, 507))
def pause_job(job_id: str, session: Db) -> Job:
    """Ask a job to stop where it is, and to free its machine. It goes on from there with `resume`; inputs and work are kept."""
    job = queue.pause(session, job_id)
    session.commit()
    return as_job(job)


@router.post("/{job_id}/resume", responses=responses(404, 409, 507))
def resume_job(job_id: str, session: Db) -> Job:
    """Put a paused job back into the queue, at its old place."""
    job = queue.resume(session, job_id)
    session.commit()
    return as_job(job)


@router.delete("/{job_id}", status_code=204, responses=responses(404, 409, 507))
def delete_job(job_id: str, request: Request, session: Db) -> None:
    """Forget a finished job with its events and artifacts. The model that came out of it stays."""
    job = queue.find(session, job_id)
    if job.status not in TERMINAL:
        raise ApiError(409, "job_not_finished", f"The job is {job.status}: cancel it first.")
    digests = forget(session, request, [job])
    session.commit()
    janitor.tidy_artifacts(session, request.app.state.settings, request.app.state.storage, digests)


def forget(session: Session, request: Request, jobs: Sequence[JobRow]) -> list[str]:
    """Removes finished jobs and returns the digests of their files, which may be nobody's after the commit."""
    digests: list[str] = []
    storage: Storage = request.app.state.storage
    for job in jobs:
        digests += session.exec(select(ArtifactRow.sha256).where(ArtifactRow.job_id == job.id))
        session.exec(delete(ArtifactRow).where(col(ArtifactRow.job_id) == job.id))
        session.delete(job)
        janitor.remove_run(request.app.state.settings, request.app.state.storage, job.id)
    with suppress(OSError):  # a full disk must not keep anybody from making room
        storage.doubt(*(artifact_key(sha256) for sha256 in set(digests)))
    return digests


def check_spec(session: Session, spec: JobSpec, storage: Storage) -> ModelRow:
    """Refuses a spec whose inputs are not there or whose budget cannot be met; returns the base."""
    base, *_ = (_model(session, reference) for reference in (spec.base, spec.teacher) if reference)
    if spec.teacher:
        trimmed = "token" in spec.method.units
        read, taught_by = (_tried(_model(session, reference)) for reference in (spec.base, spec.teacher))
        check_teacher(read.config, taught_by.config, (read.reading, taught_by.reading), trimmed, spec.block_tokens)
    names = [skill.name for skill in spec.skills]
    for reference in spec.data:
        data = session.get(DatasetRow, reference.dataset)
        if data is None:
            raise not_found("dataset", reference.dataset)
        if reference is spec.target and data.name in names:
            raise ApiError(422, "invalid_request", f"A skill is called {data.name!r} like the target: give it another name.")
        if reference.answer:
            _check_answers(storage.folder(f"datasets/{data.id}") / data.file, data, reference.answer.column)
    solve(base.info["config"], spec, DTYPES[base.info["dtype"]])
    _check_length(session.get_one(DatasetRow, spec.target.dataset), spec.block_tokens)
    return base


def _model(session: Session, reference: ModelId) -> ModelRow:
    found = session.get(ModelRow, reference.model)
    if found is None:
        raise not_found("model", reference.model)
    return found


def _tried(model: ModelRow) -> Tried:
    if "reading" not in model.info:
        detail = f"{model.name!r} was kept by an older version, which did not note how a model reads text: upload it again."
        raise ApiError(422, "invalid_request", detail)
    return Tried.model_validate(model.info)


def _check_answers(path: Path, data: DatasetRow, answer: str) -> None:
    """By the first row that is good, which must be among the first; the job reads the others."""
    bad = Skipped()

    def skip(error: BadRow) -> None:
        bad(error)
        if bad.count == LOOK:
            raise error

    try:
        next(read_documents(path, data.text_column, answer, skip if data.bad_rows == "skip" else None), None)
    except NarrowError as error:
        raise NarrowError(error.code, str(error).replace(path.name, data.name)) from error


def _check_length(data: DatasetRow, block_tokens: int) -> None:
    # A token is at least a byte, and a document brings one more. The engine needs a block, room for its offset and a token
    # to hold out; only it can count exactly.
    most, needed = data.bytes + data.documents, 2 * block_tokens + 2
    if most < needed:
        detail = (
            f"The target {data.name!r} holds {most} tokens at most, and a block takes {block_tokens}: bring at least "
            f"{needed} tokens or lower block_tokens."
        )
        raise ApiError(422, "text_too_short", detail)
