"""The line from a spec to a narrow model: stages that each write a folder, once.

A stage reads what the stages before it wrote and writes into a temporary folder, which is renamed when it is complete;
then its record (input hash, seconds, notices) is written. A stage whose record carries the hash of today's inputs is not
run again. Resuming a run that was killed is nothing more than running it again, plus the checkpoint inside training.
"""

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from narrow_engine import stages
from narrow_engine.events import Sink
from narrow_engine.model_files import inspect_model
from narrow_engine.report.model import Notice
from narrow_engine.run import Run, write_json
from narrow_engine.spec import CompressionSpec


class Stage(NamedTuple):
    """A step of the line: what it runs, the options of the spec that its output depends on, and whether it is wanted."""

    name: str
    run: Callable[[Run, Path], None]
    options: Callable[[CompressionSpec], Any] = lambda spec: None
    folder: str = ""
    wanted: Callable[[CompressionSpec], bool] = lambda spec: True


LINE = (
    Stage("load", stages.load, lambda s: [s.block_tokens, s.skill_tokens, s.seed, s.budget, s.method.units, s.target_name]),
    Stage("measure_base", stages.measure_base),
    Stage("score", stages.score, lambda s: [s.method.importance, s.method.calibration_tokens]),
    Stage("sparsify", stages.sparsify, lambda s: s.method.regularizer, wanted=lambda s: s.method.regularizer is not None),
    Stage("plan", stages.plan),
    Stage("slice", stages.cut),
    Stage("reconstruct", stages.reconstruct, lambda s: s.method.refit),
    Stage("recover", stages.recover, lambda s: s.method.recover),
    Stage("measure", stages.measure),
    Stage("export", stages.export, lambda s: s.export),
    Stage("report", stages.report, folder="result"),
)


def run(spec: CompressionSpec, folder: Path, sink: Sink, stop: threading.Event | None = None) -> Path:
    """Runs what is not done yet and returns the folder of the results.

    Raises NarrowError for what the user can mend, Cancelled once `stop` is set.
    """
    context = Run(spec, folder, sink, stop or threading.Event())
    (folder / "stages").mkdir(parents=True, exist_ok=True)
    key = _inputs(spec)
    for stage in LINE:
        context.check()
        options = json.dumps(stage.options(spec), default=lambda m: m.model_dump(mode="json"), sort_keys=True)
        key = hashlib.sha256(f"{key} {stage.name} {options}".encode()).hexdigest()
        if stage.wanted(spec):
            _run_stage(context, stage, key)
        else:
            _forget_stage(context, stage)
    return folder / "result"


def _forget_stage(context: Run, stage: Stage) -> None:
    """What an earlier spec left of a stage that this one leaves out."""
    context.record(stage.name).unlink(missing_ok=True)
    shutil.rmtree(context.folder / (stage.folder or stage.name), ignore_errors=True)


def _run_stage(context: Run, stage: Stage, key: str) -> None:
    out = context.folder / (stage.folder or stage.name)
    record = context.record(stage.name)
    if record.exists() and out.exists():
        known = json.loads(record.read_text())
        if known["key"] == key:
            context.notices += [Notice.model_validate(notice) for notice in known["notices"]]
            context.sink("finished", stage.name, "already done", {"seconds": known["seconds"], "reused": True})
            return
    record.unlink(missing_ok=True)
    temporary = out.with_name(out.name + ".tmp")
    for stale in (out, temporary):
        shutil.rmtree(stale, ignore_errors=True)
    temporary.mkdir(parents=True)
    stamp = context.work(stage.name) / "key"
    if not stamp.exists() or stamp.read_text() != key:
        # A checkpoint of other inputs is not a checkpoint of this run.
        shutil.rmtree(stamp.parent)
        context.work(stage.name)
        stamp.write_text(key)

    context.sink("started", stage.name, "", {})
    first, started = len(context.notices), time.monotonic()
    stage.run(context, temporary)
    seconds = round(time.monotonic() - started, 3)
    _sync(temporary)
    temporary.rename(out)
    notices = [notice.model_dump() for notice in context.notices[first:]]
    write_json(record, {"key": key, "seconds": seconds, "notices": notices})
    shutil.rmtree(context.folder / "work" / stage.name)
    context.sink("finished", stage.name, "", {"seconds": seconds, "reused": False})


def _inputs(spec: CompressionSpec) -> str:
    """Digest of everything outside the spec that a run depends on: the model's files and the datasets'."""
    parts = [inspect_model(spec.base.path).sha256]
    for data in (spec.target, *spec.skills):
        parts += [stages.dataset_sha256(data.path), data.column]
    parts += [f"{skill.name} {skill.role}" for skill in spec.skills]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
