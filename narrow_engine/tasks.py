"""Tasks of lm-evaluation-harness (Gao et al., doi 10.5281/zenodo.10256836), put to two models on the same rows, offline.

A task is the user's own YAML file, which may name Python code to run, or one of the harness's own, whose data must be in the
cache of `datasets`. So this is for whoever has the models on their own machine: the service runs no tasks.
"""

import logging
import os
from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, Field

from narrow_engine import skills
from narrow_engine.errors import NarrowError
from narrow_engine.models import load_model
from narrow_engine.report.model import Interval

BATCH = 8


class Score(BaseModel):
    """One metric of one task, for both models."""

    task: str
    metric: str = Field(description="As the harness names it: acc, exact_match, ...; with the filter that it is taken after.")
    rows: int
    higher_is_better: bool | None
    base: float
    narrow: float
    difference: Interval | None = Field(
        description="Of the two over the same rows, with a 95 % interval from resampling them; none for metrics that are not a "
        "mean over rows, such as perplexity."
    )


class Evaluation(BaseModel):
    """What two models get in the same tasks."""

    base: str
    narrow: str
    limit: int | None = Field(description="Rows of each task that were asked, at most.")
    versions: dict[str, str]
    scores: list[Score]


def evaluate(base: Path, narrow: Path, tasks: Sequence[str], limit: int | None) -> Evaluation:
    """Of two model folders. A task is a name of the harness's, a YAML file, or a folder of such, all of which are put.

    Raises NarrowError (missing_extra, bad_task, bad_model).
    """
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise NarrowError("missing_extra", "Tasks need lm-evaluation-harness: pip install 'narrow[eval]'.") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    places = [str(Path(task).resolve()) for task in tasks if Path(task).exists()]
    names = [task for task in tasks if not Path(task).exists()]
    try:
        own = TaskManager(include_path=places, include_defaults=False).all_subtasks if places else []
        manager = TaskManager(include_path=places, include_defaults=bool(names))
    except Exception as error:  # of the task's own files
        raise _bad_task(error) from error
    wanted = [*names, *own]
    if not wanted:
        raise NarrowError("bad_task", f"There is no task in {', '.join(tasks)}: a task is a YAML file with the key 'task'.")
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise NarrowError("bad_task", f"{unknown[0]!r} is no file or folder, and no task of lm-evaluation-harness {_version()}.")
    found = [_results(folder, wanted, manager, limit) for folder in (base, narrow)]
    return Evaluation(
        base=str(base),
        narrow=str(narrow),
        limit=limit,
        versions={"lm_eval": _version()},
        scores=[score for task in found[0]["samples"] for score in _scores(task, *found)],
    )


def _results(folder: Path, names: list[str], manager: Any, limit: int | None) -> dict[str, Any]:
    """What the harness finds of one model: its figures, and those of each row."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    model = load_model(folder).eval()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # as for the model: what a wrong file raises is up to the code that meets it
        raise NarrowError("bad_model", f"transformers cannot read the tokenizer of {folder}: {error}") from error
    reader = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH, device=str(model.device))
    try:
        found: dict[str, Any] = simple_evaluate(model=reader, tasks=names, task_manager=manager, limit=limit, bootstrap_iters=0)
    except Exception as error:  # of a task's own code and data
        raise _bad_task(error) from error
    return found


def _scores(task: str, base: dict[str, Any], narrow: dict[str, Any]) -> list[Score]:
    """The metrics of a task."""
    better = base["higher_is_better"].get(task, {})
    rows: list[dict[str, list[Any]]] = []
    for found in (base, narrow):
        by_metric = defaultdict(list)
        for row in found["samples"][task]:
            for metric in row["metrics"]:
                by_metric[f"{metric},{row['filter']}"].append(row[metric])
        rows.append(by_metric)
    made = []
    for name, value in base["results"][task].items():
        metric, _, filtered = name.partition(",")
        if metric.endswith("_stderr") or name not in rows[0]:
            continue
        made.append(
            Score(
                task=task,
                metric=metric if filtered == "none" else f"{metric} after {filtered}",
                rows=len(rows[0][name]),
                higher_is_better=better.get(metric),
                base=value,
                narrow=narrow["results"][task][name],
                difference=_difference(rows[0][name], rows[1][name]),
            )
        )
    return made


def _difference(before: list[Any], after: list[Any]) -> Interval | None:
    if not all(isinstance(value, bool | int | float | np.number) for value in (*before, *after)):
        return None
    apart = np.array(after, dtype=np.float64) - np.array(before, dtype=np.float64)
    return skills.interval(apart, np.ones_like(apart), 0)


def _bad_task(error: Exception) -> NarrowError:
    return NarrowError("bad_task", f"lm-evaluation-harness cannot put these tasks: {type(error).__name__}: {error}")


def _version() -> str:
    return version("lm_eval")


def lines(found: Evaluation) -> list[str]:
    """The scores for a terminal."""
    width = max(len(score.task) for score in found.scores)
    said = [f"{'task':<{width}}  {'metric':<24} {'rows':>6} {'base':>9} {'narrow':>9}  difference, 95 % interval"]
    for score in found.scores:
        apart = score.difference
        told = f"{apart.value:+.4f}, {apart.low:+.4f} to {apart.high:+.4f}" if apart else ""
        if apart and apart.low <= 0 <= apart.high:
            told += ": within the error"
        said.append(
            f"{score.task:<{width}}  {score.metric:<24} {score.rows:>6,} {score.base:>9.4f} {score.narrow:>9.4f}  {told}".rstrip()
        )
    return said
