"""What a job will take, from its spec and the models that it names."""

import re
from pathlib import Path

from sqlmodel import Session

from narrow_engine.footprint import UNKNOWN, Machine
from narrow_engine.model_files import DTYPES
from narrow_engine.sizing import Sizes, plan_sizes
from narrow_engine.spec import JobSpec
from service.db.tables import ModelRow
from service.runners.local import memory_of
from service.settings import Settings

DEVICES = Path("/dev")


def estimate(session: Session, spec: JobSpec, machine: Machine = UNKNOWN) -> Sizes:
    """Sizes before and after, memory and time. Raises NoResultFound where a model is gone, and NarrowError like `solve`."""
    base = session.get_one(ModelRow, spec.base.model).info
    other = session.get_one(ModelRow, spec.teacher.model).info if spec.teacher else None
    teacher = (other["config"], other["dtype"]) if other else None
    return plan_sizes(base["config"], spec, DTYPES[base["dtype"]], [skill.role for skill in spec.skills], teacher, machine)


def machine_of(settings: Settings, spec: JobSpec) -> Machine:
    """What a job has here, if that is known: not of a cluster's nodes, nor of GPUs, of which the service sees only how many."""
    if settings.runner != "local" or any(_gpus()):
        return UNKNOWN
    there = memory_of(settings, spec.resources.memory)
    # Jobs are shut in, where what they map counts.
    return Machine(there, there, processes=max(1, spec.resources.gpus), mapped=True)


def _gpus() -> tuple[int, bool]:
    """How many of NVIDIA's there are, and whether any of AMD's."""
    names = [path.name for path in DEVICES.iterdir()]
    return sum(re.fullmatch(r"nvidia\d+", name) is not None for name in names), "kfd" in names


def gpus_that_lack(settings: Settings, spec: JobSpec) -> list[str]:
    """A notice, if a job asks for more GPUs than are here: what nodes a cluster has is not known, nor how many GPUs of AMD's."""
    (there, others), asked = _gpus(), spec.resources.gpus
    if settings.runner != "local" or others or asked <= there:
        return []
    outcome = "such a job fails" if there else f"training is spread over {asked} processes on its CPUs"
    return [f"resources.gpus asks for {asked}, and this service's machine has {there or 'no GPU'}: {outcome}."]
