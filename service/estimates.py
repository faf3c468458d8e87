"""What a job will take, from its spec and the models that it names."""

import re
from pathlib import Path

from sqlmodel import Session

from narrow_engine.model_files import DTYPES
from narrow_engine.sizing import Sizes, plan_sizes
from narrow_engine.spec import JobSpec
from service.db.tables import ModelRow
from service.settings import Settings

DEVICES = Path("/dev")


def estimate(session: Session, spec: JobSpec) -> Sizes:
    """Sizes before and after, memory and time. Raises NoResultFound where a model is gone, and NarrowError like `solve`."""
    base = session.get_one(ModelRow, spec.base.model).info
    teacher = session.get_one(ModelRow, spec.teacher.model).info["config"] if spec.teacher else None
    return plan_sizes(base["config"], spec, DTYPES[base["dtype"]], [skill.role for skill in spec.skills], teacher)


def gpus_that_lack(settings: Settings, spec: JobSpec) -> list[str]:
    """A notice, if a job asks for more GPUs than are here: what nodes a cluster has is not known, nor how many GPUs of AMD's."""
    names = [path.name for path in DEVICES.iterdir()]
    there = sum(re.fullmatch(r"nvidia\d+", name) is not None for name in names)
    asked = spec.resources.gpus
    if settings.runner != "local" or "kfd" in names or asked <= there:
        return []
    outcome = "such a job fails" if there else f"training is spread over {asked} processes on its CPUs"
    return [f"resources.gpus asks for {asked}, and this service's machine has {there or 'no GPU'}: {outcome}."]
