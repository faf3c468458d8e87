"""Sweeps: methods × budgets × seeds over one base and one domain, as jobs that share their first stages, and the frontier."""

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse
from sqlmodel import Session, col, func, select

from narrow_engine.errors import NarrowError
from narrow_engine.report.frontier import Figures, Finished, Frontier, Outcome, frontier
from narrow_engine.spec import Budget, SweepSpec, points
from service import janitor, queue, quotas
from service.api import idempotency
from service.api.jobs import check_spec, forget
from service.api.paging import Cursor, Limit, page
from service.api.schemas import JobError, Page, Point, Status, Sweep, SweepPoints
from service.api.sessions import Db, ReadDb
from service.db.tables import TERMINAL, JobRow, OutcomeRow, SweepRow
from service.problems import ApiError, responses
from service.requests import PAGE
from service.storage import Storage
from service.uploads import require_space

router = APIRouter(prefix="/sweeps", tags=["sweeps"])

_PAGE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/html": {"schema": {"type": "string"}}}, "description": "The frontier."}
}


@router.post("", status_code=201, responses=responses(404, 409, 413, 507))
def create_sweep(
    spec: SweepSpec, request: Request, response: Response, session: Db, idempotency_key: idempotency.Key = None
) -> SweepPoints:
    """Queue a job for each method, budget and seed. An `Idempotency-Key` makes a retry safe, as for a job."""
    known = idempotency.made_before(session, idempotency_key, spec)
    if known and known.sweep_id:
        sweep = queue.find_sweep(session, known.sweep_id)
    else:
        require_space(request.app.state.settings)
        _check(session, spec, request.app.state.storage)
        quotas.require(session, request.app.state.settings, jobs=len(points(spec)))
        sweep = queue.enqueue_sweep(session, spec)
        idempotency.commit(session, idempotency_key, spec, sweep_id=sweep.id)
    response.headers["Location"] = f"/sweeps/{sweep.id}"
    return _with_points(session, sweep)


@router.get("", responses=responses())
def list_sweeps(session: ReadDb, cursor: Cursor = None, limit: Limit = 20) -> Page[Sweep]:
    """Sweeps, newest first, without their points."""
    return page(session, select(SweepRow), SweepRow, cursor, limit, lambda row: _as_sweep(row, _counts(session, row.id)))


@router.get("/{sweep_id}", responses=responses(404))
def get_sweep(sweep_id: str, session: ReadDb) -> SweepPoints:
    """One sweep, with its points and what came of them so far."""
    return _with_points(session, queue.find_sweep(session, sweep_id))


@router.post("/{sweep_id}/cancel", responses=responses(404, 409, 507))
def cancel_sweep(sweep_id: str, request: Request, session: Db) -> SweepPoints:
    """Ask all points to end that have not. What has finished stays, and its frontier."""
    jobs = queue.cancel_sweep(session, sweep_id)
    session.commit()
    for job in jobs:
        if job.status == "cancelled":
            janitor.remove_run(request.app.state.settings, request.app.state.storage, job.id)
    return _with_points(session, queue.find_sweep(session, sweep_id))


@router.delete("/{sweep_id}", status_code=204, responses=responses(404, 409, 507))
def delete_sweep(sweep_id: str, request: Request, session: Db) -> None:
    """Forget a sweep whose points have all ended, with their jobs and artifacts. The models that came out stay."""
    sweep = queue.find_sweep(session, sweep_id)
    jobs = session.exec(select(JobRow).where(JobRow.sweep == sweep_id)).all()
    going_on = sum(job.status not in TERMINAL for job in jobs)
    if going_on:
        raise ApiError(409, "sweep_not_finished", f"{going_on} points of the sweep have not ended: cancel it first.")
    digests = forget(session, request, jobs)
    session.flush()
    session.delete(sweep)
    session.commit()
    janitor.tidy_artifacts(session, request.app.state.settings, request.app.state.storage, digests)


@router.get("/{sweep_id}/frontier", response_model=Frontier, responses={**responses(404), **_PAGE})
def get_frontier(sweep_id: str, request: Request, session: ReadDb) -> Response:
    """Loss against parameters and tokens, of what has finished so far: JSON or, by `Accept: text/html`, a page with plots."""
    queue.find_sweep(session, sweep_id)
    found = frontier_of(session, sweep_id)
    if "text/html" not in request.headers.get("accept", ""):
        return Response(found.model_dump_json(), media_type="application/json", headers={"Vary": "Accept"})
    # Imported here: it brings matplotlib, which the service needs for nothing else.
    from narrow_engine.report.frontier_page import render_frontier

    return HTMLResponse(render_frontier(found), headers={"Content-Security-Policy": PAGE, "Vary": "Accept"})


def frontier_of(session: Session, sweep_id: str) -> Frontier:
    of = sum(_counts(session, sweep_id).values())
    finished = [
        Finished(
            method=job.method or "",
            budget=Budget.model_validate(job.spec["budget"]),
            seed=job.spec["seed"],
            outcome=Outcome.model_validate(row.outcome),
        )
        for job, row in session.exec(select(JobRow, OutcomeRow).join(OutcomeRow).where(JobRow.sweep == sweep_id))
    ]
    return frontier(finished, of)


def _check(session: Session, spec: SweepSpec, storage: Storage) -> None:
    """Refuses a sweep of which a point could not run, and says which."""
    for name, method in spec.methods.items():
        for budget in spec.budgets:
            try:
                check_spec(session, spec.job(method, budget, spec.seeds[0]), storage)
            except NarrowError as error:
                told = budget.model_dump_json(exclude_none=True)
                raise NarrowError(error.code, f"The method {name!r} with the budget {told}: {error}") from error


def _as_sweep(row: SweepRow, counts: dict[Status, int]) -> Sweep:
    return Sweep(
        id=row.id,
        spec=SweepSpec.model_validate(row.spec),
        counts=counts,
        finished=all(status in TERMINAL for status in counts),
        created_at=row.created_at,
    )


def _counts(session: Session, sweep_id: str) -> dict[Status, int]:
    statement = select(JobRow.status, func.count()).where(JobRow.sweep == sweep_id).group_by(col(JobRow.status))
    return dict(session.exec(statement).all())  # type: ignore[return-value]


def _with_points(session: Session, row: SweepRow) -> SweepPoints:
    statement = select(JobRow, OutcomeRow).join(OutcomeRow, isouter=True).where(JobRow.sweep == row.id).order_by(col(JobRow.id))
    found = [_as_point(job, known) for job, known in session.exec(statement)]
    counts: dict[Status, int] = {}
    for point in found:
        counts[point.status] = counts.get(point.status, 0) + 1
    return SweepPoints(**_as_sweep(row, counts).model_dump(), points=found)


def _as_point(job: JobRow, known: OutcomeRow | None) -> Point:
    return Point(
        job=job.id,
        method=job.method or "",
        budget=Budget.model_validate(job.spec["budget"]),
        seed=job.spec["seed"],
        status=job.status,
        error=JobError.model_validate(job.error) if job.error else None,
        figures=Figures.model_validate(known.outcome) if known else None,
    )
