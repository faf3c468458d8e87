"""The line from a spec to a narrow model: stages that each write a folder, once.

A stage reads what the stages before it wrote and writes into a temporary folder, which is renamed when it is complete;
then its record (input hash, seconds, memory, notices) is written. A stage whose record carries the hash of today's inputs is not
run again. Resuming a run that was killed is nothing more than running it again, plus the checkpoint inside training.

The first stages depend on little of the spec, so runs that differ in the rest can share them: see `shelf`. A run of several
processes has them all in the stages that train the large model: see `shard`.
"""

import hashlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed.device_mesh import DeviceMesh

from narrow_engine import earlier, measures, memory, shard, shelf, stages
from narrow_engine.events import Sink
from narrow_engine.model_files import inspect_model
from narrow_engine.models import device
from narrow_engine.report.model import Notice
from narrow_engine.run import Run, write_json
from narrow_engine.sizing import vocabulary_is_fixed
from narrow_engine.spec import CompressionSpec, chooses, controls, leaves_a_choice, probes_locality, relearned, taught


class Stage(NamedTuple):
    """A step of the line: what it runs, the options of the spec that its output depends on, whether it is wanted, whether runs
    share it, as what the points of a sweep have in common, whether it stands aside: then of what comes before, it depends on
    `load` alone; and whether all processes of a run do it together, for which it must find all that it reads in the run's folder.
    """

    name: str
    run: Callable[[Run, Path], None]
    options: Callable[[CompressionSpec], Any] = lambda spec: None
    folder: str = ""
    wanted: Callable[[CompressionSpec], bool] = lambda spec: True
    shared: bool = False
    aside: bool = False
    together: bool = False


def _load_options(spec: CompressionSpec) -> Any:
    trimmed = "token" in spec.method.units
    # Only a vocabulary whose size is asked for, and not found in the text, follows the budget.
    size = [spec.budget, spec.method.units] if trimmed and vocabulary_is_fixed(spec) else []
    read = [spec.block_tokens, spec.skill_tokens, spec.seed, spec.target_name, relearned(spec)]
    return [*read, trimmed, *size]


def _allocation_options(spec: CompressionSpec) -> Any:
    trials = [spec.method.refit, spec.method.recover] if leaves_a_choice(spec) else []
    saved = [spec.dtype if spec.budget.bytes else None, "gguf-q8_0" in spec.export]
    return [spec.budget, spec.method.units, spec.method.multiple, *saved, *trials]


def _correction_options(spec: CompressionSpec) -> Any:
    recover = spec.method.recover
    return [recover.correction, recover.optimizer, recover.schedule, recover.batch_tokens] if recover.correction else None


def _locality_options(spec: CompressionSpec) -> Any:
    return [spec.method.units, spec.method.importance, spec.method.calibration_tokens]


def _other_formats(spec: CompressionSpec) -> list[str]:
    return sorted(set(spec.export) - {"safetensors"})


def _teaching_options(spec: CompressionSpec) -> Any:
    recover = spec.method.recover
    read = [recover.tokens, recover.batch_tokens, recover.curriculum]
    return [recover.cache, recover.top, recover.temperature if recover.cache == "top" else None, read, _correction_options(spec)]


LINE = (
    Stage("load", stages.load, _load_options, shared=True),
    Stage("measure_base", measures.measure_base, shared=True),
    Stage(
        "score",
        stages.score,
        lambda s: [s.method.importance, s.method.calibration_tokens, "residual" in s.method.units],
        wanted=lambda s: chooses(s.method),
        shared=True,
    ),
    Stage("allocate", stages.allocate, _allocation_options),
    Stage(
        "sparsify",
        stages.sparsify,
        lambda s: s.method.regularizer,
        wanted=lambda s: s.method.regularizer is not None,
        together=True,
    ),
    Stage("plan", stages.plan, lambda s: s.method.init),
    Stage("slice", stages.cut),
    Stage("reconstruct", stages.reconstruct, lambda s: s.method.refit),
    Stage(
        "correct",
        stages.correct,
        _correction_options,
        wanted=lambda s: taught(s.method) and s.method.recover.correction is not None,
        shared=True,
        aside=True,
        together=True,
    ),
    Stage(
        "teach",
        stages.teach,
        _teaching_options,
        wanted=lambda s: taught(s.method) and s.method.recover.cache is not None,
        shared=True,
        aside=True,
    ),
    Stage("recover", stages.recover, lambda s: [s.method.recover, s.dtype], together=True),
    Stage("controls", measures.controls, controls, wanted=lambda s: bool(controls(s))),
    Stage("measure", measures.measure, controls),
    Stage("answer", measures.answer, wanted=lambda s: any(data.answer for data in (s.target, *s.skills))),
    Stage("locality", measures.locality, _locality_options, wanted=probes_locality, shared=True, aside=True),
    Stage(
        "relearn",
        measures.relearn,
        lambda s: s.relearn if relearned(s) else None,
        wanted=lambda s: bool(relearned(s)),
    ),
    Stage("export_base", stages.export_base, _other_formats, wanted=lambda s: bool(_other_formats(s)), shared=True, aside=True),
    Stage("export", stages.export, lambda s: s.export),
    Stage("report", stages.report, folder="result"),
)


def run(
    spec: CompressionSpec,
    folder: Path,
    sink: Sink,
    stop: threading.Event | None = None,
    shared: Path | None = None,
    mesh: DeviceMesh | None = None,
) -> Path:
    """Runs what is not done yet and returns the folder of the results. `shared` is where runs leave each other their first
    stages, and the other processes of `mesh` are in `follow`.

    Raises NarrowError for what the user can mend, Cancelled once `stop` is set.
    """
    context = Run(spec, folder, sink, stop or threading.Event(), mesh=mesh)
    (folder / "stages").mkdir(parents=True, exist_ok=True)
    line = _with_keys(spec)
    done = list(takewhile(lambda step: _reuse(context, *step), line))
    if len(done) < len(line) and (folder / "result").exists():
        sink(
            "notice",
            "",
            "The results in this folder came of another spec or other data: they are replaced.",
            {"code": "replaced"},
        )
    for stage in LINE:
        if stage not in [step[0] for step in done]:
            # What other inputs made is no result of this run.
            _forget(context, stage)
    if any(stage.name == "load" for stage, _ in done) and any(stage.name == "recover" for stage, _ in line[len(done) :]):
        stages.settle_memory(context)
    for stage, key in line[len(done) :]:
        context.check()
        if shared and stage.shared:
            _share(context, stage, key, shelf.place(shared, stage.name, key))
        else:
            _run_stage(context, stage, key)
        if stage.name in ("load", "allocate"):
            # Other runs may have read the text, and what is kept may have been chosen.
            stages.settle_memory(context)
    if mesh is not None:
        shard.tell("")
    return folder / "result"


def follow(spec: CompressionSpec, folder: Path, stop: threading.Event, mesh: DeviceMesh) -> None:
    """What the other processes of a run do: each stage that the first one names, until there is none. They say nothing, and
    what they make is thrown away: the first makes the same.
    """
    named = {stage.name: stage for stage in LINE}
    while name := shard.told():
        with tempfile.TemporaryDirectory() as scratch:
            named[name].run(Run(spec, folder, lambda *_: None, stop, mesh=mesh), Path(scratch))


def _share(context: Run, stage: Stage, key: str, place: Path) -> None:
    """Takes a stage from another run, waiting for one that is at it, or runs it and leaves it there."""
    told = False

    def wait() -> None:
        nonlocal told
        context.check()
        if not told:
            context.sink("progress", stage.name, "another run is at it", {"done": 0, "total": 1})
            told = True

    with shelf.turn(place, wait):
        if not _take(context, stage, key, place):
            _run_stage(context, stage, key)
            shelf.put(place, _folder(context, stage), context.record(stage.name))


def _with_keys(spec: CompressionSpec) -> list[tuple[Stage, str]]:
    """The stages that the spec wants, each with the hash of all that its output depends on."""
    key = _inputs(spec)
    found: list[tuple[Stage, str]] = []
    for stage in LINE:
        options = json.dumps(stage.options(spec), default=lambda m: m.model_dump(mode="json"), sort_keys=True)
        before = found[0][1] if stage.aside else key
        own = hashlib.sha256(f"{before} {stage.name} {options}".encode()).hexdigest()
        if not stage.aside:
            key = own
        if stage.wanted(spec):
            found.append((stage, own))
    return found


def _reuse(context: Run, stage: Stage, key: str) -> bool:
    """Whether a stage is done already, with the same inputs; its notices count for this run too."""
    record = context.record(stage.name)
    if not (record.exists() and _folder(context, stage).exists()):
        return False
    known = json.loads(record.read_text())
    if known["key"] != key:
        return False
    context.notices += [Notice.model_validate(notice) for notice in known["notices"]]
    context.sink("finished", stage.name, "already done", {"seconds": known["seconds"], "reused": True})
    return True


def _take(context: Run, stage: Stage, key: str, place: Path) -> bool:
    """Whether another run has done a stage with the same inputs; what it did, and told, is then this run's too."""
    record = shelf.take(place, _folder(context, stage))
    if record is None:
        return False
    write_json(context.record(stage.name), {**record, "key": key})
    for notice in record["notices"]:
        context.emit("notice", notice["phase"], notice["message"], {"code": notice["code"]})
    context.sink("finished", stage.name, "done by another run", {"seconds": record["seconds"], "reused": True})
    return True


def _forget(context: Run, stage: Stage) -> None:
    context.record(stage.name).unlink(missing_ok=True)
    out = _folder(context, stage)
    for path in (out, out.with_name(out.name + ".tmp")):
        shutil.rmtree(path, ignore_errors=True)


def _folder(context: Run, stage: Stage) -> Path:
    return context.folder / (stage.folder or stage.name)


def _run_stage(context: Run, stage: Stage, key: str) -> None:
    out = _folder(context, stage)
    temporary = out.with_name(out.name + ".tmp")
    temporary.mkdir(parents=True)
    stamp = context.work(stage.name) / "key"
    if not stamp.exists() or stamp.read_text() != key:
        # A checkpoint of other inputs is not a checkpoint of this run.
        shutil.rmtree(stamp.parent)
        context.work(stage.name)
        stamp.write_text(key)

    context.sink("started", stage.name, "", {})
    first, started, highest = len(context.notices), time.monotonic(), memory.begin(device())
    if context.mesh is not None and stage.together:
        shard.tell(stage.name)
    stage.run(context, temporary)
    seconds, taken = round(time.monotonic() - started, 3), memory.peak(device(), highest)
    _sync(temporary)
    temporary.rename(out)
    notices = [notice.model_dump() for notice in context.notices[first:]]
    write_json(context.record(stage.name), {"key": key, "seconds": seconds, "memory": taken, "notices": notices})
    shutil.rmtree(context.folder / "work" / stage.name)
    context.sink("finished", stage.name, "", {"seconds": seconds, "reused": False})


def _inputs(spec: CompressionSpec) -> str:
    """Digest of everything outside the spec that a run depends on: the model's files and the datasets'."""
    parts = [inspect_model(model.path).sha256 for model in (spec.base, spec.teacher) if model]
    for data in spec.data:
        parts += [data.path.name, earlier.dataset_sha256(data.path), data.column]
        parts += [data.answer.model_dump_json()] if data.answer else []
        parts += [data.bad_rows] if data.bad_rows != "stop" else []
    parts += [f"{skill.name} {skill.role}" for skill in spec.skills]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
