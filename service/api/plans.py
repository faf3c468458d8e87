"""A dry run: what a job would make and cost, with nothing queued."""

from fastapi import APIRouter, Request

from narrow_engine.spec import JobSpec
from service.api.jobs import check_spec
from service.api.schemas import Plan
from service.api.sessions import ReadDb
from service.estimates import estimate, gpus_that_lack, machine_of
from service.problems import responses

TOO_LARGE = "On this service's machine such a job is refused as it begins."

router = APIRouter(prefix="/plans", tags=["plans"])


@router.post("", responses=responses(404, 413))
def create_plan(spec: JobSpec, request: Request, session: ReadDb) -> Plan:
    """The sizes before and after, what is kept, and estimates of memory and time."""
    base = check_spec(session, spec, request.app.state.storage)
    settings = request.app.state.settings
    sizes = estimate(session, spec, machine_of(settings, spec))
    lacking = [f"{TOO_LARGE} {sizes.lacking}"] if sizes.lacking else []
    return Plan(
        family=base.info["family"],
        before=sizes.before,
        after=sizes.after,
        keep=sizes.keep,
        memory_bytes=sizes.memory_bytes,
        memory=sizes.memory,
        least_memory_bytes=sizes.least_memory_bytes,
        seconds=round(sizes.seconds),
        notices=[*sizes.notices, *gpus_that_lack(settings, spec), *lacking],
    )
