"""The pages: what the API says and does, for people with a browser. Each handler parses, calls what the API calls, and renders.

They work as plain HTML: forms are sent and answered with 303. Scripts only keep them up to date. A handler that changes something
has the name that the API has for it, so the audit log and the figures have one word for one thing.
"""

import json
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, NamedTuple, get_args
from urllib.parse import urlencode

from fastapi import APIRouter, File, Form, HTTPException, Query, Request, Response, UploadFile
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import RedirectResponse
from pydantic import ValidationError
from sqlalchemy.exc import NoResultFound
from sqlmodel import Session, col, select

from narrow_engine.errors import NarrowError
from narrow_engine.events import Event, Kind
from narrow_engine.sizing import Sizes
from narrow_engine.spec import BadRows, Format, JobSpec, SweepSpec, first_fault
from narrow_engine.spec import Kind as MethodKind
from narrow_engine.spec import Role as SkillRole
from service import auth, queue
from service.api import artifacts, datasets, fetches, jobs, keys, models, plans, sweeps
from service.api.paging import Cursor
from service.api.schemas import HubModel, Job, NewKey, Page, Phase, Plan, Role
from service.api.sessions import Db, ReadDb, Who
from service.db.tables import HELD, STATUSES, TERMINAL, DatasetRow, ModelRow, now
from service.estimates import estimate
from service.problems import ApiError
from service.streams import TRAINED, story
from service.uploads import as_dataset, as_model
from service.web.draft import BUDGETS, Draft, Fault, draft_of, fault_of, spec_of
from service.web.render import FILES, HEADERS, TYPES, VERSION, page

router = APIRouter(prefix="/ui", include_in_schema=False)
open_router = APIRouter(include_in_schema=False)
"""For those who have no key, or none yet."""
model_router, dataset_router = (APIRouter(prefix="/ui", include_in_schema=False) for _ in range(2))
"""What is sent here may be as large as a model, or a dataset."""

SHOWN = 50
"""Of a list, on one page."""
CHOICES = 100
"""Newest models and datasets that a form has to pick from: any other comes in by its own page."""
EVENTS, LINES = 2000, 200
"""Of a job's events that its page is made of, and lines of its log."""
CONFIG = 20_000
"""Characters of a model's config that are shown."""
LOGIN_BYTES = 4096
MODEL = {"name": "", "hub": "", "revision": "main"}
DATASET = {"name": "", "column": "text", "bad_rows": "stop"}
KEY = {"name": "", "role": "write", "days": ""}
"""What forms hold at first."""

STEPS: dict[str, tuple[Phase, ...]] = {
    "Read": ("load", "measure_base"),
    "Choose": ("score", "allocate", "sparsify", "plan"),
    "Cut": ("slice", "reconstruct"),
    "Recover": ("correct", "teach", "recover"),
    "Measure": ("controls", "measure", "answer", "locality", "relearn"),
    "Export": ("export_base", "export", "report"),
}
"""The phases of a job, as its page groups them."""


class Step(NamedTuple):
    name: str
    state: str
    """done, now, stopped or to come."""
    seconds: float
    phases: Sequence[tuple[str, float | None]]
    """That have begun, with the seconds that they took once they are over."""


# Everybody's.


@open_router.get("/")
def front(request: Request) -> Response:
    """Where a browser begins. Programs have nothing here."""
    if "text/html" not in request.headers.get("accept", ""):
        raise HTTPException(404)
    return RedirectResponse("/ui/jobs", 303)


@open_router.get("/ui")
def begin() -> Response:
    return RedirectResponse("/ui/jobs", 303)


@open_router.get("/docs")
def api_page(request: Request) -> Response:
    """The contract, to read and to try. It says nothing of what is in the service, so it needs no key."""
    return page(request, "api.html")


@open_router.get("/ui/static/{version}/{name}")
def static_file(version: str, name: str) -> Response:
    """A file of ours. Its URL changes with it, so it is kept for ever."""
    if version != VERSION or name not in FILES:
        raise HTTPException(404)
    headers = {"Cache-Control": "public, max-age=31536000, immutable", "Cross-Origin-Resource-Policy": "same-origin"}
    return Response(FILES[name], media_type=TYPES[name[name.rindex(".") :]], headers=headers)


@open_router.get("/ui/login")
def login_page(request: Request, next: Annotated[str, Query(max_length=500)] = "") -> Response:
    if not request.app.state.keys_needed:
        return RedirectResponse("/ui/jobs", 303)
    return page(request, "login.html", next=_inside(next), refusal="")


@open_router.post("/ui/login", max_body_size=LOGIN_BYTES)
async def login(request: Request, key: Annotated[str, Form()] = "", next: Annotated[str, Form()] = "") -> Response:
    """Takes a key into a cookie, for as long as the browser is open."""
    auth.require_own_page(request)
    try:
        await auth.holder(request, key.strip())
    except ApiError as error:
        return page(request, "login.html", status=error.status, next=_inside(next), refusal=error.detail)
    answer = RedirectResponse(_inside(next), 303, HEADERS)
    secure = request.url.scheme == "https" or request.headers.get("origin", "").startswith("https://")
    answer.set_cookie(auth.COOKIE, key.strip(), path="/", httponly=True, samesite="strict", secure=secure)
    return answer


@open_router.post("/ui/logout", max_body_size=LOGIN_BYTES)
def logout(request: Request) -> Response:
    auth.require_own_page(request)
    answer = RedirectResponse("/ui/login", 303, HEADERS)
    answer.delete_cookie(auth.COOKIE, path="/", httponly=True, samesite="strict")
    return answer


def _inside(path: str) -> str:
    """A page of ours, whatever the URL said."""
    return path if re.fullmatch(r"/ui/[\w/?=&%-]*", path, re.ASCII) and "//" not in path else "/ui/jobs"


# Jobs.


@router.get("/jobs")
def jobs_page(
    request: Request,
    session: ReadDb,
    cursor: Cursor = None,
    status: Annotated[str, Query(max_length=20)] = "",
    sweep: Annotated[str, Query(max_length=60)] = "",
) -> Response:
    chosen = next((known for known in STATUSES if known == status), None)
    found = jobs.list_jobs(session, cursor, SHOWN, chosen, sweep or None)
    asked = {name: value for name, value in (("status", chosen or ""), ("sweep", sweep)) if value}
    return page(
        request,
        "jobs.html",
        api=_path("/jobs", **asked, cursor=cursor),
        jobs=found.data,
        names=_names(session, [job.spec for job in found.data]),
        statuses=STATUSES,
        chosen=chosen,
        sweep=sweep,
        live=any(job.status not in TERMINAL for job in found.data),
        older=_path("/ui/jobs", **asked, cursor=found.next_cursor) if found.next_cursor else None,
        newest=_path("/ui/jobs", **asked) if cursor else None,
        now=now(),
    )


@router.post("/jobs")
def create_job(request: Request, session: Db, draft: Annotated[Draft, Form()]) -> Response:
    try:
        spec = spec_of(draft)
        job = jobs.create_job(spec, request, Response(), session, draft.key(spec))
    except (ApiError, NarrowError) as error:
        session.rollback()
        return _new_page(request, session, draft, fault=fault_of(error, draft), status=getattr(error, "status", 422))
    return _see(f"/ui/jobs/{job.id}")


@router.get("/jobs/{job_id}")
def job_page(job_id: str, request: Request, session: ReadDb, kind: Annotated[str, Query(max_length=20)] = "") -> Response:
    job = jobs.as_job(queue.find(session, job_id))
    told = story(session, job_id, EVENTS)
    began = next((event.time for event in reversed(told) if event.kind == "started" and event.phase == job.phase), None)
    shown = next((known for known in get_args(Kind) if known == kind), "")
    result = session.get(ModelRow, job.result_model) if job.result_model else None
    return page(
        request,
        "job.html",
        api=f"/jobs/{job_id}",
        job=job,
        spec=job.spec.model_dump_json(indent=1),
        names=_names(session, [job.spec]),
        steps=_steps(job, told),
        began=began,
        left=_left(job, began),
        ran=_ran(job, told),
        curve=_curve(told),
        kinds=get_args(Kind),
        kind=shown,
        log=[event for event in reversed(told) if shown in ("", event.kind)][:LINES],
        # What comes after is told by the stream.
        after=told[-1].seq if told else 0,
        sizes=_sizes(session, job.spec),
        files=artifacts.list_artifacts(job_id, session).data,
        result=as_model(result) if result else None,
        live=job.status not in TERMINAL,
        held=job.status in HELD,
        now=now(),
    )


@router.post("/jobs/{job_id}/cancel")
def cancel_job(job_id: str, request: Request, session: Db) -> Response:
    jobs.cancel_job(job_id, request, session)
    return _see(f"/ui/jobs/{job_id}#state")


@router.post("/jobs/{job_id}/pause")
def pause_job(job_id: str, session: Db) -> Response:
    jobs.pause_job(job_id, session)
    return _see(f"/ui/jobs/{job_id}#state")


@router.post("/jobs/{job_id}/resume")
def resume_job(job_id: str, session: Db) -> Response:
    jobs.resume_job(job_id, session)
    return _see(f"/ui/jobs/{job_id}#state")


@router.post("/jobs/{job_id}/delete")
def delete_job(job_id: str, request: Request, session: Db) -> Response:
    jobs.delete_job(job_id, request, session)
    return _see("/ui/jobs")


# A new job.


@router.get("/new")
def new_page(
    request: Request,
    session: ReadDb,
    base: Annotated[str, Query(max_length=60)] = "",
    target: Annotated[str, Query(max_length=60)] = "",
    like: Annotated[str, Query(max_length=60, description="A job that is the template.")] = "",
) -> Response:
    draft = draft_of(jobs.as_job(queue.find(session, like)).spec) if like else Draft(export=list(get_args(Format)[:2]))
    draft.base, draft.target = base or draft.base, target or draft.target
    return _new_page(request, session, draft, api=f"/jobs/{like}" if like else "/jobs")


@router.post("/plans")
def create_plan(request: Request, session: ReadDb, draft: Annotated[Draft, Form()]) -> Response:
    """What the form would make: beside it as it is filled in or, for a browser without scripts, on the whole page."""
    plan, fault = None, None
    if draft.base and draft.target:
        try:
            plan = plans.create_plan(spec_of(draft), request, session)
        except (ApiError, NarrowError) as error:
            fault = fault_of(error, draft)
    if "hx-request" in request.headers:
        return page(request, "plan.html", plan=plan, fault=fault)
    return _new_page(request, session, draft, plan, fault)


def _new_page(
    request: Request,
    session: Session,
    draft: Draft,
    plan: Plan | None = None,
    fault: Fault | None = None,
    status: int = 200,
    api: str = "/jobs",
) -> Response:
    bases, data = models.list_models(session, None, CHOICES).data, datasets.list_datasets(session, None, CHOICES).data
    # What was picked is there, however old it is.
    picked = {draft.base, draft.target, *draft.skill_dataset}
    older_models = select(ModelRow).where(col(ModelRow.id).in_(picked - {model.id for model in bases}))
    older_data = select(DatasetRow).where(col(DatasetRow.id).in_(picked - {dataset.id for dataset in data}))
    bases += [as_model(row) for row in session.exec(older_models)]
    data += [as_dataset(row) for row in session.exec(older_data)]
    return page(
        request,
        "new.html",
        api=api,
        status=status,
        draft=draft,
        models=bases,
        datasets=data,
        budgets=BUDGETS,
        kinds=get_args(MethodKind),
        formats=get_args(Format),
        roles=get_args(SkillRole),
        plan=plan,
        fault=fault,
    )


# Models and datasets.


@router.get("/models")
def models_page(request: Request, session: ReadDb, cursor: Cursor = None) -> Response:
    return _models_page(request, session, cursor)


@router.get("/models/{model_id}")
def model_page(model_id: str, request: Request, session: ReadDb) -> Response:
    model = models.get_model(model_id, session)
    config = json.dumps(model.config, indent=1, ensure_ascii=False)[:CONFIG]
    return page(request, "model.html", api=f"/models/{model_id}", model=model, config=config)


@router.post("/models/{model_id}/delete")
def delete_model(model_id: str, request: Request, session: Db) -> Response:
    models.delete_model(model_id, request, session)
    return _see("/ui/models")


@router.get("/datasets")
def datasets_page(request: Request, session: ReadDb, cursor: Cursor = None) -> Response:
    return _datasets_page(request, session, cursor)


@router.get("/datasets/{dataset_id}")
def dataset_page(dataset_id: str, request: Request, session: ReadDb) -> Response:
    return page(request, "dataset.html", api=f"/datasets/{dataset_id}", dataset=datasets.get_dataset(dataset_id, session))


@router.post("/datasets/{dataset_id}/delete")
def delete_dataset(dataset_id: str, request: Request, session: Db) -> Response:
    datasets.delete_dataset(dataset_id, request, session)
    return _see("/ui/datasets")


@model_router.post("/models")
def upload_model(
    request: Request,
    session: Db,
    files: Annotated[list[UploadFile], File()] = [],  # noqa: B006
    name: Annotated[str, Form(max_length=100)] = "",
    to_new: Annotated[bool, Form()] = False,
    target: Annotated[str, Form(max_length=60)] = "",
) -> Response:
    try:
        made = models.upload_model(request, session, files, [], name)
    except (ApiError, NarrowError) as error:
        session.rollback()
        return _models_page(request, session, None, {**MODEL, "name": name}, str(error), getattr(error, "status", 422))
    return _see(_path("/ui/new", base=made.id, target=target) if to_new else f"/ui/models/{made.id}")


@router.post("/fetches")
async def fetch_model(
    request: Request,
    session: Db,
    who: Who,
    hub: Annotated[str, Form()] = "",
    revision: Annotated[str, Form()] = "",
    token: Annotated[str, Form()] = "",
) -> Response:
    """Answers when the model is there, as the API does; the fetch goes on without the browser."""
    try:
        wanted = HubModel.model_validate(
            {"hub": hub.strip(), "revision": revision.strip() or "main", "token": token.strip() or None}
        )
        made = await fetches.fetch_model(wanted, request, Response(), session, who)
    except (ValidationError, ApiError, NarrowError) as error:
        refusal = first_fault(error) if isinstance(error, ValidationError) else str(error)
        typed = {**MODEL, "hub": hub, "revision": revision}
        await run_in_threadpool(session.rollback)
        return await run_in_threadpool(_models_page, request, session, None, typed, refusal, getattr(error, "status", 422))
    return _see(f"/ui/models/{made.id}")


@dataset_router.post("/datasets")
def upload_dataset(
    request: Request,
    session: Db,
    file: UploadFile,
    name: Annotated[str, Form(max_length=100)] = "",
    column: Annotated[str, Form(max_length=200)] = "",
    bad_rows: Annotated[BadRows, Form()] = "stop",
    to_new: Annotated[bool, Form()] = False,
    base: Annotated[str, Form(max_length=60)] = "",
) -> Response:
    try:
        made = datasets.upload_dataset(request, session, file, None, name, column or "text", bad_rows)
    except (ApiError, NarrowError) as error:
        session.rollback()
        typed = {"name": name, "column": column, "bad_rows": bad_rows}
        return _datasets_page(request, session, None, typed, str(error), getattr(error, "status", 422))
    return _see(_path("/ui/new", base=base, target=made.id) if to_new else f"/ui/datasets/{made.id}")


def _models_page(
    request: Request,
    session: Session,
    cursor: str | None,
    typed: dict[str, str] | None = None,
    refusal: str = "",
    status: int = 200,
) -> Response:
    found = models.list_models(session, cursor, SHOWN)
    given = {"models": found.data, "typed": typed or MODEL, "refusal": refusal, **_pages("/ui/models", cursor, found)}
    given["hub"] = request.app.state.settings.hub
    return page(request, "models.html", api=_path("/models", cursor=cursor), status=status, **given)


def _datasets_page(
    request: Request,
    session: Session,
    cursor: str | None,
    typed: dict[str, str] | None = None,
    refusal: str = "",
    status: int = 200,
) -> Response:
    found = datasets.list_datasets(session, cursor, SHOWN)
    given = {"datasets": found.data, "typed": typed or DATASET, "refusal": refusal, **_pages("/ui/datasets", cursor, found)}
    return page(request, "datasets.html", api=_path("/datasets", cursor=cursor), status=status, **given)


# Sweeps.


@router.get("/sweeps")
def sweeps_page(request: Request, session: ReadDb, cursor: Cursor = None) -> Response:
    found = sweeps.list_sweeps(session, cursor, SHOWN)
    names = _names(session, [sweep.spec for sweep in found.data])
    shown = _pages("/ui/sweeps", cursor, found)
    return page(request, "sweeps.html", api=_path("/sweeps", cursor=cursor), sweeps=found.data, names=names, **shown)


@router.get("/sweeps/{sweep_id}")
def sweep_page(sweep_id: str, request: Request, session: ReadDb) -> Response:
    sweep = sweeps.get_sweep(sweep_id, session)
    figures = [point.figures for point in sweep.points if point.figures]
    best = [(point.method, point.budget) for point in sweeps.frontier_of(session, sweep_id).points if not point.dominated]
    return page(
        request,
        "sweep.html",
        api=f"/sweeps/{sweep_id}",
        sweep=sweep,
        base=figures[0] if figures else None,
        best={point.job for point in sweep.points if (point.method, point.budget) in best},
        names=_names(session, [sweep.spec]),
        spec=sweep.spec.model_dump_json(indent=1),
    )


@router.post("/sweeps/{sweep_id}/cancel")
def cancel_sweep(sweep_id: str, request: Request, session: Db) -> Response:
    sweeps.cancel_sweep(sweep_id, request, session)
    return _see(f"/ui/sweeps/{sweep_id}#state")


@router.post("/sweeps/{sweep_id}/delete")
def delete_sweep(sweep_id: str, request: Request, session: Db) -> Response:
    sweeps.delete_sweep(sweep_id, request, session)
    return _see("/ui/sweeps")


# Keys.


@router.get("/keys")
def keys_page(request: Request, session: ReadDb, cursor: Cursor = None) -> Response:
    return _keys_page(request, session, cursor)


@router.post("/keys")
def create_key(
    request: Request,
    session: Db,
    name: Annotated[str, Form()] = "",
    role: Annotated[Role, Form()] = "write",
    days: Annotated[str, Form(max_length=20)] = "",
) -> Response:
    """The answer is the page itself, since it is the only one that ever shows the key."""
    typed = {"name": name, "role": role, "days": days}
    try:
        made = keys.create_key(NewKey(name=name, role=role, expires_in_days=float(days) if days.strip() else None), session)
    except ValidationError as error:
        return _keys_page(request, session, None, typed, refusal=first_fault(error), status=422)
    except ValueError:
        return _keys_page(request, session, None, typed, refusal=f"{days!r} is no number of days.", status=422)
    return _keys_page(request, session, None, secret=made.key, status=201)


@router.post("/keys/{key_id}/revoke")
def revoke_key(key_id: str, request: Request, session: Db) -> Response:
    keys.revoke_key(key_id, request, session)
    return _see(f"/ui/keys#{key_id}")


def _keys_page(
    request: Request,
    session: Session,
    cursor: str | None,
    typed: dict[str, str] | None = None,
    secret: str = "",
    refusal: str = "",
    status: int = 200,
) -> Response:
    found = keys.list_keys(session, cursor, SHOWN)
    given = {"keys": found.data, "typed": typed or KEY, "secret": secret, "refusal": refusal, "now": now()}
    return page(
        request, "keys.html", api=_path("/keys", cursor=cursor), status=status, **given, **_pages("/ui/keys", cursor, found)
    )


# What pages show that no single call of the API has.


def _names(session: Session, specs: Sequence[JobSpec | SweepSpec]) -> dict[str, str]:
    """Names of the bases and targets of jobs or sweeps, by their ids, as far as they are still there."""
    bases, data = [spec.base.model for spec in specs], [spec.target.dataset for spec in specs]
    found = dict(session.exec(select(ModelRow.id, ModelRow.name).where(col(ModelRow.id).in_(bases))).all())
    return found | dict(session.exec(select(DatasetRow.id, DatasetRow.name).where(col(DatasetRow.id).in_(data))).all())


def _sizes(session: Session, spec: JobSpec) -> Sizes | None:
    """What was planned; None where the base is gone."""
    try:
        return estimate(session, spec)
    except (NoResultFound, NarrowError):
        return None


def _steps(job: Job, told: list[Event]) -> list[Step]:
    """How far the job is, by what it has told. An attempt after the first tells again what was done before it."""
    took: dict[str, float | None] = {}
    for event in told:
        if event.phase and event.kind in ("started", "progress"):
            took[event.phase] = None
        elif event.phase and event.kind == "finished":
            seconds = event.data.get("seconds")
            took[event.phase] = float(seconds) if isinstance(seconds, int | float) else 0.0
    at = next((number for number, phases in enumerate(STEPS.values()) if job.phase in phases), -1)
    found = []
    for number, (name, phases) in enumerate(STEPS.items()):
        begun = [(phase, took[phase]) for phase in phases if phase in took]
        if job.status == "succeeded" or number < at:
            state = "done"
        elif number == at:
            state = "now" if job.status in HELD else "stopped"
        else:
            state = "to come"
        found.append(Step(name, state, sum(seconds or 0.0 for _, seconds in begun), begun))
    return found


def _left(job: Job, began: datetime | None) -> float | None:
    """Seconds until the phase ends, if it goes on as fast as so far."""
    if job.status != "running" or job.progress is None or began is None or not 0 < job.progress.done <= job.progress.total:
        return None
    return (now() - began).total_seconds() * (job.progress.total - job.progress.done) / job.progress.done


def _ran(job: Job, told: list[Event]) -> float:
    """Seconds that workers have had the job, with the attempt that runs now."""
    began = [event.time for event in told if event.kind == "state" and event.data.get("status") == "running"]
    return job.seconds + ((now() - began[-1]).total_seconds() if began and job.status in HELD else 0.0)


class CurveRow(NamedTuple):
    phase: str
    tokens: int
    loss: float | None
    """None before the first step."""
    validation: float | None


def _curve(told: list[Event]) -> list[CurveRow]:
    """Losses by tokens, over the phases that train the result. Where a job went on from a checkpoint the later one counts."""
    found: dict[tuple[str, int], CurveRow] = {}
    for event in told:
        tokens, loss, held_out = (event.data.get(name) for name in ("tokens", "loss", "validation"))
        trained, measured = (value if isinstance(value, int | float) else None for value in (loss, held_out))
        if event.kind != "progress" or event.phase not in TRAINED or not isinstance(tokens, int):
            continue
        if trained is not None or measured is not None:
            found[event.phase, tokens] = CurveRow(event.phase, tokens, trained, measured)
    return sorted(found.values(), key=lambda row: (TRAINED.index(row.phase), row.tokens))


def _pages(path: str, cursor: str | None, found: Page[Any]) -> dict[str, Any]:
    """Links to the pages around this one of a list."""
    return {"older": _path(path, cursor=found.next_cursor) if found.next_cursor else None, "newest": path if cursor else None}


def _path(path: str, **query: str | None) -> str:
    asked = {name: value for name, value in query.items() if value}
    return f"{path}?{urlencode(asked)}" if asked else path


def _see(path: str) -> Response:
    """The page that shows what was done. Behind a `#` is what gets the focus, in the place of the button that was pressed."""
    return RedirectResponse(path, 303, HEADERS)
