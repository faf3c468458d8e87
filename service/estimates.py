"""What a job will take, from its spec and the models that it names."""

from sqlmodel import Session

from narrow_engine.model_files import DTYPES
from narrow_engine.sizing import Sizes, plan_sizes
from narrow_engine.spec import JobSpec
from service.db.tables import ModelRow


def estimate(session: Session, spec: JobSpec) -> Sizes:
    """Sizes before and after, memory and time. Raises NoResultFound where a model is gone, and NarrowError like `solve`."""
    base = session.get_one(ModelRow, spec.base.model).info
    teacher = session.get_one(ModelRow, spec.teacher.model).info["config"] if spec.teacher else None
    return plan_sizes(base["config"], spec, DTYPES[base["dtype"]], [skill.role for skill in spec.skills], teacher)
