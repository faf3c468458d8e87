"""The stages of the line, in order. Each is a function of the run and of the folder that it must fill."""

import hashlib
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig, PreTrainedModel

from narrow_engine import corpus, earlier, footprint, importance, matching, memory, model_files, speed, teacher, train, vocabulary
from narrow_engine import locality as sharing
from narrow_engine import reconstruct as least_squares
from narrow_engine import skills as measuring
from narrow_engine.allocate import allocate as choose_shape
from narrow_engine.allocate import open_workshop
from narrow_engine.earlier import base
from narrow_engine.errors import NarrowError
from narrow_engine.export import formats, gguf, matrix, runtimes
from narrow_engine.export import safetensors as safetensors_export
from narrow_engine.families import dimensions, family_of
from narrow_engine.model_files import DTYPES, ModelInfo, check_teacher, inspect_model
from narrow_engine.models import along, config_dict, device, family, is_parked, layers, load_model, size_in_memory
from narrow_engine.plan import cuts, make_plan, unscored, whole_plan
from narrow_engine.regularize import GroupLasso
from narrow_engine.report.card import render_card
from narrow_engine.report.model import (
    Allocation,
    CurvePoint,
    File,
    Input,
    Interval,
    Locality,
    Parity,
    Provenance,
    Report,
    Sample,
    Speed,
)
from narrow_engine.report.page import render_page
from narrow_engine.run import Run, write_json
from narrow_engine.sizing import saved_bytes, size_of, solve, vocabulary_is_fixed
from narrow_engine.slice import compare, renew, slice_model
from narrow_engine.spec import INPUTS, ROUNDED, TOP, DatasetPath, Format, ModelPath, chooses, leaves_a_choice, relearned, taught

HELD_OUT_FACTOR = 16
"""Held-out tokens for each that is measured: stretches of many documents instead of a few whole ones."""
HELD_OUT, HELD_OUT_OF_FORGOTTEN = 0.1, 0.5
"""Share of the text that is held out, at most: of the target, and of a skill to forget, which is learned again from the rest."""
PARITY_BOUND = 1e-4
"""Relative error that slicing may have in float32. Other orders of summation stay well under it."""
SMALLEST_TIMED = 500_000
"""Parameters of a base below which nothing of a token's time is the weights'."""
BASE_EXPORT_BYTES = 8 * 2**30
"""Of a base in float32, that is written in other formats to be timed in them."""
DEVICES = Path("/dev")
TIES = 3
"""Further tokens to compare mixtures of experts on. Of 72 models with 24 layers of 64 experts, exactly sliced, one chose another
expert somewhere in 128 tokens, since two were tied to the last bits."""


def load(run: Run, out: Path) -> None:
    """Checks the base and the budget, and turns every dataset into tokens."""
    spec = run.spec
    info = inspect_model(spec.base.path)
    taught_by = inspect_model(spec.teacher.path) if spec.teacher else None
    if spec.teacher and taught_by:
        readings = model_files.reading(spec.base.path), model_files.reading(spec.teacher.path)
        check_teacher(info.config, taught_by.config, readings, "token" in spec.method.units, spec.block_tokens)
    room, _ = solve(info.config, spec, DTYPES[info.dtype])
    job = earlier.planned(run, info, taught_by)
    _require(job)
    _tell_unused_gpu(run)
    if any(form in formats.GGUF for form in spec.export):
        gguf.require_gguf(spec.base.path)
    model = load_model(spec.base.path, park=job.parked)
    reader = narrow = earlier.reader(spec.base.path, info.config)
    tell = run.progress("load", "bytes of text read")
    trimmed = "token" in spec.method.units
    read, total = 0, (1 + trimmed) * sum(data.path.stat().st_size for data in spec.data)

    def tokenized(data: DatasetPath, name: str, reads: earlier.Reader) -> corpus.Tokenized:
        nonlocal read
        before, side = read, "narrow" if reads is not reader else "base"
        read += data.path.stat().st_size
        return _tokenize(run, data, f"{name}.{side}", reads, lambda done, _: tell(before + done, total))

    # What must be kept decides about the vocabulary; the other skills are read one at a time, below.
    needed = {
        name: tokenized(skill.data, skill.file, reader) for name, skill in earlier.skills(run).items() if skill.role == "keep"
    }
    target, tokens = needed[spec.target_name].documents, None
    if trimmed:
        tokens = _trim(run, model, reader, [text.counts for text in needed.values()], room["token"])
        count = len(tokens) if tokens else reader.size
        _require(earlier.planned(run, info, taught_by, count))
        if taught_by and not tokens:
            # It could not be trimmed after all, and has all its rows.
            check_teacher(info.config, taught_by.config, readings, False, spec.block_tokens)
    if tokens:
        vocabulary.write_files(spec.base.path, out / "tokenizer", tokens)
        changes = {**vocabulary.renumber_config(info.config, tokens), "vocab_size": len(tokens)}
        narrow = earlier.reader(out / "tokenizer", {**info.config, **changes})

    widths = tuple(vocabulary.widths(r.tokenizer, r.size) for r in (reader, narrow)) if tokens else ()

    def reading(data: DatasetPath, name: str, found: corpus.Documents) -> corpus.Reading:
        """A dataset, `found` as the base reads it, also as the result will."""
        return corpus.Reading(found, tokenized(data, name, narrow).documents if tokens else found, widths)

    skills = earlier.skills(run)
    texts = reading(spec.target, skills[spec.target_name].file, target)
    _tell_difference(run, texts, tokens)
    room_to_measure = HELD_OUT_FACTOR * spec.skill_tokens
    training, held_out = corpus.hold_out(target, room_to_measure, HELD_OUT, "The target", run.emit)
    trained_on = texts.at(training, run.check)[1]
    corpus.Blocks(trained_on.tokens, spec.block_tokens, spec.seed)
    corpus.save(trained_on, out, "training", run.check)
    measured = []
    for name, skill in skills.items():
        of_target = name == spec.target_name
        if of_target:
            read_so, chosen = texts, held_out
        else:
            found = needed[name] if name in needed else tokenized(skill.data, skill.file, reader)
            read_so, chosen = reading(skill.data, skill.file, found.documents), found.documents
        if name in relearned(spec):
            rest, kept = corpus.hold_out(chosen, room_to_measure, HELD_OUT_OF_FORGOTTEN, name, run.emit)
            chosen = kept if _keep_to_relearn(run, read_so.at(rest, run.check)[1], name, skill.file, out) else chosen
        sides = read_so.at(corpus.sample(chosen, spec.skill_tokens, spec.block_tokens, spec.seed))
        measured.append(sides[0].hashes)
        for side, documents in zip(("base", "narrow"), sides, strict=True):
            corpus.save(documents, out, f"{skill.file}.{side}")
    if spec.broad:
        broad = reading(spec.broad, "broad", tokenized(spec.broad, "broad", reader).documents).narrow
        broad = _without(run, broad, np.concatenate(measured))
        try:
            corpus.Blocks(broad.tokens, spec.block_tokens, spec.seed)
        except NarrowError as error:
            raise NarrowError(error.code, f"The broad text is too short. {error}") from error
        corpus.save(broad, out, "broad", run.check)
    write_json(out / "info.json", {"model": info.model_dump(), "teacher": taught_by and taught_by.model_dump(), "tokens": tokens})
    run.models["untouched" if tokens else "base"] = model


def _tell_unused_gpu(run: Run) -> None:
    """Where a driver or its version is wrong, or torch was built without CUDA, torch says nothing and takes the CPU."""
    if device().type == "cpu" and next(DEVICES.glob("nvidia[0-9]*"), None) and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        run.emit(
            "notice",
            "load",
            f"There is a GPU in this machine, and torch {torch.__version__} does not find it: all is computed on the CPU, which "
            "takes many times as long. 'narrow doctor' tells what torch sees.",
            {"code": "gpu_not_used"},
        )


def _require(job: footprint.Job) -> None:
    """Refuses at the start what would run out of memory here after hours. Raises NarrowError (too_little_memory)."""
    footprint.check(job)
    memory.keep_within(max(footprint.stages(job).values()), device())


def settle_memory(run: Run) -> None:
    """Once it is known what there is to do: refuses what does not fit, and says if the base is parked for it. Raises NarrowError
    (too_little_memory)."""
    job, where = earlier.job(run), device()
    _require(job)
    kept = [run.models[name] for name in ("base", "untouched") if name in run.models]
    if any(is_parked(model) != job.parked for model in kept):
        run.models = {}
    if job.parked and not any(notice.code == "parked" for notice in run.notices):
        taken, there = 4e-9 * earlier.info(run)["model"]["parameters"], 1e-9 * memory.limit(where)
        run.emit(
            "notice",
            "load",
            f"The base takes {taken:,.1f} GB in float32, and with what the job needs beside it more than the {there:,.1f} GB of "
            "memory that there are: the weights of its layers stay in their file, and those of one layer at a time are brought "
            "in as it runs. No figure changes by that, but every pass over the base reads the file; text that it writes token "
            "by token (answers, samples) takes the longest.",
            {"code": "parked"},
        )


def _keep_to_relearn(run: Run, text: corpus.Documents, name: str, file: str, out: Path) -> bool:
    """Whether there is text enough to learn a skill from again."""
    try:
        corpus.Blocks(text.tokens, run.spec.block_tokens, run.spec.seed)
    except NarrowError:
        run.emit(
            "notice",
            "load",
            f"{name} has too little text to be learned again from a half of it: whether it is gone or hidden is not measured.",
            {"code": "not_relearned"},
        )
        return False
    corpus.save(text, out, f"{file}.relearn", run.check)
    return True


def _tokenize(
    run: Run, data: DatasetPath, name: str, reader: earlier.Reader, progress: Callable[[int, int], None]
) -> corpus.Tokenized:
    found = corpus.tokenize(
        data.path,
        data.column,
        reader.tokenizer,
        reader.start,
        answer=data.answer.column if data.answer else None,
        skip=data.bad_rows == "skip",
        folder=run.work("load") / name,
        progress=progress,
        # What is wrong with the text is told when the base reads it, and not again.
        emit=run.emit if name.endswith(".base") else lambda *_: None,
    )
    largest = len(found.counts) - 1
    if largest >= reader.size:
        raise NarrowError("bad_tokenizer", f"The tokenizer makes token {largest}, which the model does not have.")
    return found


def _trim(
    run: Run, model: PreTrainedModel, reader: earlier.Reader, counts: list[NDArray[np.int64]], room: int
) -> list[int] | None:
    """The tokens of the base to keep: all that the texts need, or as many as the budget says outright.

    None, with a notice, where the tokenizer is of a kind that cannot be trimmed and the budget does not insist.
    """
    fixed = vocabulary_is_fixed(run.spec)
    every = np.sum([np.pad(count, (0, reader.size - len(count))) for count in counts], 0)
    configs = [config_dict(model), model.generation_config.to_dict() if model.generation_config else {}]
    named = {number for number in vocabulary.named_ids(*configs) if 0 <= number < reader.size}
    try:
        tokens = vocabulary.choose(reader.tokenizer, every, named, room if fixed else None)
    except NarrowError as error:
        if fixed:
            raise
        run.emit("notice", "load", f"The vocabulary stays whole. {error}", {"code": error.code})
        return None
    if not fixed and reader.size >= vocabulary.LARGE:
        run.emit(
            "notice",
            "load",
            f"The vocabulary keeps {len(tokens):,} tokens: what the target's text needs, rounded up to a multiple of "
            f"{vocabulary.MULTIPLE}.",
            {"code": "rounded"},
        )
    return tokens


def _tell_difference(run: Run, texts: corpus.Reading, tokens: list[int] | None) -> None:
    """A notice where the kept tokens cut the target's text in another way than the base's. What is measured counts it in."""
    before, after, old = texts.base, texts.narrow, np.array(tokens)
    changed = 0
    for i in range(len(before)) if tokens else ():
        changed += not np.array_equal(before[i], old[after[i]])
        if i % 4096 == 0:
            run.check()
    if changed:
        run.emit(
            "notice",
            "load",
            f"The {len(old):,} tokens that are kept cut {changed:,} of the target's {len(before):,} documents in another way "
            f"than the base's: into {len(after.tokens) / len(before.tokens):.3f} times as many.",
            {"code": "segmentation_changed"},
        )


def _without(run: Run, documents: corpus.Documents, hashes: NDArray[np.uint64]) -> corpus.Documents:
    """The broad text without what is measured on, of which training must see nothing."""
    rest = np.flatnonzero(~corpus.among(documents.hashes, hashes))
    gone = len(documents) - len(rest)
    if gone:
        message = f"{gone:,} of the {len(documents):,} documents of the broad text are left out: skills are measured on them."
        run.emit("notice", "load", message, {"code": "measured_on"})
    return documents.take(rest)


def score(run: Run, out: Path) -> None:
    """Importance of every unit for the target, by the spec's criterion."""
    method = run.spec.method
    model = base(run)
    found = importance.collect(
        model,
        earlier.calibration(run),
        method.calibration_tokens,
        method.importance in importance.NEEDS_GRADIENTS,
        run.progress("score"),
        method.importance in importance.NEEDS_GRAMS,
    )
    scores = importance.CRITERIA[method.importance](model, found, run.spec.seed)
    if "residual" in method.units and "residual" not in scores:
        scores["residual"] = importance.residual.score(
            model, earlier.calibration(run), method.calibration_tokens, method.importance, run.progress("score")
        )
    save_file({unit: value.double().cpu().contiguous() for unit, value in scores.items()}, out / "scores.safetensors")


def allocate(run: Run, out: Path) -> None:
    """How many units of each kind stay: by arithmetic, or by trials where the budget leaves a choice."""
    info = earlier.info(run)
    config, size = info["model"]["config"], DTYPES[info["model"]["dtype"]]
    tokens = len(info["tokens"]) if info["tokens"] else config["vocab_size"]
    if leaves_a_choice(run.spec):
        results = run.work("allocate") / "trials.json"
        found, told = choose_shape(
            open_workshop(
                run.spec,
                config,
                size,
                tokens,
                base(run),
                earlier.scores(run),
                earlier.training(run),
                results,
                run.progress("allocate"),
            )
        )
    else:
        keep, told = solve(config, run.spec, size, tokens)
        found = Allocation(keep=keep)
    for sentence in told:
        run.emit("notice", "allocate", sentence, {"code": "rounded"})
    (out / "allocation.json").write_text(found.model_dump_json())


def sparsify(run: Run, out: Path) -> None:
    """Group lasso: the base trained until the neurons to cut are exactly zero."""
    lasso = run.spec.method.regularizer
    assert lasso is not None
    keep = earlier.allocation(run).keep
    model = earlier.alone(run, slice_model(base(run), whole_plan(config_dict(base(run)))))
    settings = train.Settings(lasso.tokens, run.spec.method.recover.batch_tokens, "next_token", learning_rate=lasso.learning_rate)
    blocks = earlier.training_blocks(run, 1)
    width = dimensions(config_dict(model)).width
    scores = earlier.scores(run)["neuron"].reshape(-1, width).sqrt().to(model.device)
    groups = GroupLasso(along(model, "width"), scores, 1 - keep["neuron"] / width, train.shape(settings, blocks)[1])
    curve = train.train(
        model,
        blocks,
        settings,
        phase="sparsify",
        folder=run.work("sparsify"),
        emit=run.emit,
        check=run.check,
        validate=earlier.validator(run, run.spec.target_name),
        after_step=groups,
        mesh=run.mesh,
    )
    run.models["sparsify"] = model
    earlier.save_weights(model, out)
    save_file({"neuron": groups.norms().reshape(len(layers(model)), -1).cpu()}, out / "norms.safetensors")
    write_json(out / "curve.json", [point.model_dump() for point in curve])


def plan(run: Run, out: Path) -> None:
    """Which units stay. After group lasso, the living neurons do. A student that takes no units has a shape all the same."""
    info, init, keep = earlier.info(run), run.spec.method.init, earlier.allocation(run).keep
    scores = earlier.scores(run) if chooses(run.spec.method) else unscored(info["model"]["config"])
    norms = run.out("sparsify") / "norms.safetensors"
    if norms.exists():
        scores["neuron"] = load_file(norms)["neuron"]
    if init == "layers":
        count = len(scores["layer"])
        scores["layer"][torch.linspace(0, count - 1, keep["layer"]).round().long()] = 1.0
    vocabulary_size = info["model"]["config"]["vocab_size"]
    kept_tokens = torch.tensor(info["tokens"] or range(vocabulary_size))
    scores["token"] = torch.zeros(vocabulary_size).index_fill_(0, kept_tokens, 1.0)
    made = make_plan(info["model"]["config"], scores, keep)
    (out / "plan.json").write_text(made.model_dump_json())


def cut(run: Run, out: Path) -> None:
    """Slices, and proves it: the sliced model against the base with the same units masked, on real text."""
    if run.spec.method.init == "fresh":
        run.models["slice"] = earlier.unfilled(run)
        renew(run.models["slice"], run.spec.seed)
        earlier.save_weights(run.models["slice"], out)
        return
    whole, chosen = earlier.source(run), earlier.plan(run)
    small = slice_model(whole, chosen)
    run.models["slice"] = small

    def compared(ids: torch.Tensor) -> Parity:
        return compare(whole, small, ids, plan=chosen)

    parity = _despite_ties(run, "slice", compared(earlier.probe(run)), PARITY_BOUND, compared)
    require_exact(parity, "slicing")
    run.models.pop("sparsify", None)  # as large as the base, and not asked again
    earlier.save_weights(small, out)
    write_json(out / "parity.json", parity.model_dump())


def require_exact(parity: Parity, what: str) -> None:
    if parity.relative_error > PARITY_BOUND:
        raise NarrowError(
            "slicing_not_exact",
            f"The logits after {what} differ from the masked base's by {parity.relative_error:.1e} (relative), which must not "
            "happen: please report it with the model's config.json.",
        )


def reconstruct(run: Run, out: Path) -> None:
    """Refits the cut model layer by layer, towards the base's residual stream; so too after group lasso, whose own stream is
    that of a model which lost its neurons in few steps."""
    refitted = run.spec.method.refit and run.spec.method.units != ["token"]
    whole = base(run) if refitted else None
    small = earlier.model(run, "slice")
    if whole is not None:
        least_squares.refit(
            whole,
            small,
            earlier.plan(run),
            earlier.calibration(run),
            run.spec.method.calibration_tokens,
            run.progress("reconstruct"),
        )
    run.models["reconstruct"] = small
    del run.models["slice"]
    earlier.save_weights(small, out)


def correct(run: Run, out: Path) -> None:
    """The base trained on the target, to teach."""
    options = run.spec.method.recover
    assert options.correction is not None
    model, curve = train_base(run, "correct", 3, options.correction.tokens, options.correction.learning_rate, run.mesh)
    harm = _harm(curve)
    if harm:
        run.emit(
            "notice",
            "correct",
            f"The base's training made it worse on held-out text ({harm}), and so it teaches: lower the learning rate, bring "
            "more text or leave the correction out.",
            {"code": "correction_harmed"},
        )
    run.models["correct"] = model
    earlier.save_weights(model, out)
    write_json(out / "curve.json", [point.model_dump() for point in curve])


def teach(run: Run, out: Path) -> None:
    """Writes down what the teacher says to all that recovery will read."""
    options = run.spec.method.recover
    blocks, count = earlier.recovery_blocks(run)
    top = None if options.cache == "hidden" else options.top or TOP
    size = teacher.write(out, run.work("teach"), _teacher(run), blocks, count, top, options.temperature, run.progress("teach"))
    run.emit("progress", "teach", f"{size / 1e6:,.1f} MB of what the teacher says", {"done": 1, "total": 1})
    run.models.pop("correct", None)


def recover(run: Run, out: Path) -> None:
    """Trains the cut model on the target. A recovery that made it worse on held-out text is not kept.

    The result is rounded to the base's type here, so that every figure is of the model that is delivered.
    """
    options = run.spec.method.recover
    curve: list[CurvePoint] = []
    told = None
    if options.tokens:
        # None but who teaches is in memory beside what is trained; the cut model is read again when it is measured.
        if taught(run.spec.method) and not options.cache:
            told = _teacher(run)
        else:
            run.models = {}
    small = earlier.copy(run, "reconstruct")
    if options.tokens:
        blocks, count = earlier.recovery_blocks(run)
        if count * blocks.length != options.tokens:
            run.emit(
                "notice",
                "recover",
                f"{options.tokens:,} tokens of recovery were asked for; whole batches make it {count * blocks.length:,}.",
                {"code": "rounded"},
            )
        with ExitStack() as stack:
            beside = None
            if options.match:
                assert told
                beside = stack.enter_context(matching.beside(told.model, small, earlier.plan(run), options.match))
            curve = train.train(
                small,
                blocks,
                train.settings_of(run.spec.method),
                phase="recover",
                folder=run.work("recover"),
                emit=run.emit,
                check=run.check,
                validate=earlier.validator(run, run.spec.target_name),
                teacher=teacher.Cached(run.out("teach"), blocks, device()) if options.cache else told,
                beside=beside,
                mesh=run.mesh,
            )
        del told, beside
        run.models.pop("correct", None)
        harm = _harm(curve)
        if harm:
            run.emit(
                "notice",
                "recover",
                f"Training made the model worse on held-out text ({harm}): the untrained cut is kept. Lower the learning rate or "
                "bring more text.",
                {"code": "recovery_harmed"},
            )
            del small
            small = earlier.copy(run, "reconstruct")
    safetensors_export.round_weights(small, earlier.dtype(run))
    run.models["recover"] = small
    earlier.save_weights(small, out)
    write_json(out / "curve.json", [point.model_dump() for point in curve])


def _harm(curve: list[CurvePoint]) -> str:
    """From what to what a training raised the loss on held-out text; empty if it did not."""
    first, last = curve[0].validation, curve[-1].validation
    return "" if first is None or last is None or last <= first else f"{first:.3f} to {last:.3f} nats"


def export(run: Run, out: Path) -> None:
    """The model as files: stock safetensors, reloaded by a fresh process, and ONNX; each checked against the original."""
    run.models = {}
    model, probe = earlier.model(run, "recover"), earlier.probe(run)
    size = size_in_memory(model)
    others: list[Format] = [form for form in run.spec.export if form != "safetensors"]
    parity: dict[str, Parity] = {}
    steps = 2 + 2 * len(others)
    run.progress("export")(0, steps)
    safetensors_export.save_model(model, earlier.tokenizer_folder(run), out / "model", earlier.dtype(run))
    parity["reload"] = safetensors_export.check_reload(out / "model", model, probe)
    del model, run.models["recover"]
    run.progress("export")(1, steps)
    rounded: dict[str, dict[str, Any]] = {}
    written = []
    for number, form in enumerate(others, 1):
        if not _room_for(run, form, size):
            continue
        try:
            made = formats.write(form, out / "model", out / form, out / "onnx")
        except NarrowError as error:
            # After hours of training the other formats are worth having.
            run.emit("notice", "export", str(error), {"code": error.code})
            shutil.rmtree(out / form, ignore_errors=True)
            continue
        written.append(form)
        for note in made.notes:
            run.emit("notice", "export", f"{form}: {note}", {"code": "export_narrower"})
        if found := _compared(run, form, made.model, out, probe):
            parity[form] = found
        for name, interval in _kept(run, made.model).items() if form in ROUNDED else ():
            rounded.setdefault(name, {})[form] = interval.model_dump()
        run.progress("export")(1 + number, steps)
    if "onnx" not in run.spec.export:
        shutil.rmtree(out / "onnx", ignore_errors=True)
    speeds = []
    # What is timed is in processes of its own, which need the memory: on a GPU it may be all of it that the models here take.
    run.models.clear()
    memory.give_back(device())
    for number, form in enumerate(_timed(run, written), 1):
        pace = _speed(run, form, out)
        speeds += [pace.model_dump()] if pace else []
        run.progress("export")(1 + len(others) + number, steps)
    write_json(out / "parity.json", {name: value.model_dump() for name, value in parity.items()})
    write_json(out / "rounded.json", rounded)
    write_json(out / "speed.json", speeds)


def _room_for(run: Run, form: Format, size: int) -> bool:
    """Whether a format can be made here of a model of so many bytes: being killed for it would cost the rest as well."""
    taken = footprint.exporting([form], footprint.of_base(earlier.job(run)) if form in ROUNDED else 0, size)
    there = memory.limit(torch.device("cpu"))
    if footprint.fits(taken, there):
        return True
    told = (
        f"{form} is left out: to make and check it takes {taken / 1e9:,.1f} GB of memory, and there are {there / 1e9:,.1f} GB. "
        "A job of the kind export makes it of this result where there is more."
    )
    run.emit("notice", "export", told, {"code": "export_too_large"})
    return False


def _timed(run: Run, written: list[Format]) -> list[Format]:
    """The formats whose speed is measured."""
    config = earlier.info(run)["model"]["config"]
    count = size_of(config, dimensions(config), 4).parameters
    if count < SMALLEST_TIMED:
        told = f"The base has {count:,} parameters: so small a model takes the time of the program around it, and is not timed."
        run.emit("notice", "export", told, {"code": "not_timed"})
        return []
    return ["safetensors", *written]


def _compared(run: Run, form: Format, made: PreTrainedModel, out: Path, probe: torch.Tensor) -> Parity | None:
    """How files of a format compare with the model. Raises NarrowError (export_mismatch)."""

    def again(ids: torch.Tensor) -> Parity:
        checked = formats.check(form, made, out / "model", out / form, ids.cpu())
        assert checked is not None
        return checked.exact

    checked = formats.check(form, made, out / "model", out / form, probe.cpu())
    if checked is None:
        return None
    bound = formats.BOUNDS.get(form, formats.BOUND)
    exact = _despite_ties(run, "export", checked.exact, bound, again)
    # Rounded weights send some tokens to other experts than the model's own.
    if exact.relative_error > bound and not (family(made).router and form == "gguf-q8_0"):
        raise formats.mismatch(form, exact)
    if form not in ROUNDED and exact.greedy_equal != exact.greedy_tokens:
        run.emit(
            "notice",
            "export",
            f"Greedy text of {form} leaves torch's after {exact.greedy_equal} of {exact.greedy_tokens} tokens (largest "
            f"difference of logits {exact.max_error:.1e}): a near tie fell the other way.",
            {"code": "greedy_differs"},
        )
    return checked.told if form in ROUNDED else exact


def _kept(run: Run, made: PreTrainedModel) -> dict[str, Interval]:
    """Retention of each skill by a model with rounded weights."""
    made.to(base(run).device)
    kept = {}
    for name, skill in earlier.skills(run).items():
        first = measuring.Measured.load(run.out("measure_base") / f"{skill.file}.npz")
        documents = earlier.documents(run, name)
        after = measuring.measure(base(run), [made], documents, run.spec.block_tokens, lambda *_: run.check())[1].per(first)
        kept[name] = measuring.retention(first, after, run.spec.seed)
    made.cpu()
    return kept


def _speed(run: Run, form: Format, out: Path) -> Speed | None:
    """Of a format, where what runs it is installed."""
    if not runtimes.is_there(form):
        run.emit("notice", "export", f"llama.cpp is not installed here: {form} was written and not run.", {"code": "not_run"})
        return None
    config, small = earlier.info(run)["model"]["config"], _config(out / "model")
    sizes = size_of(config, dimensions(config), 4), size_of(small, dimensions(small), 4)
    of_base = run.spec.base.path if form == "safetensors" else run.out("export_base") / form
    fits = footprint.fits(4 * sizes[0].parameters, memory.limit(device()))
    if form == "safetensors" and not fits:
        told = f"The base has {4 * sizes[0].parameters:,} bytes in float32, too many to be held whole: it is not timed."
        run.emit("notice", "export", told, {"code": "base_not_timed"})
    folders = of_base if of_base.exists() and fits else None, out / ("model" if form == "safetensors" else form)
    return speed.measure_speed(form, folders, sizes, dimensions(config).context, run.check)


def _config(folder: Path) -> dict[str, Any]:
    """Of a saved model, with what is left out of the file."""
    return dict(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).to_dict())


def export_base(run: Run, out: Path) -> None:
    """The base in the formats of the result, for nothing but to be timed beside it."""
    config = earlier.info(run)["model"]["config"]
    size = size_of(config, dimensions(config), 4).bytes
    if size < 4 * SMALLEST_TIMED:
        return
    run.models = {}
    room = memory.limit(torch.device("cpu"))
    if size > BASE_EXPORT_BYTES or not footprint.fits(footprint.exporting(["onnx"], 0, size), room):
        run.emit(
            "notice",
            "export_base",
            f"The base has {size:,} bytes in float32: too many to bring it into other formats here, to be timed in them.",
            {"code": "base_not_timed"},
        )
        return
    forms = [form for form in run.spec.export if form != "safetensors"]
    for number, form in enumerate(forms):
        run.progress("export_base")(number, len(forms))
        formats.write(form, run.spec.base.path, out / form, out / "onnx")


def report(run: Run, out: Path) -> None:
    """Gathers the results: the exported files, the plan, and the report as JSON, page and model card."""
    spec, info = run.spec, ModelInfo.model_validate(earlier.info(run)["model"])
    for name in ("model", *spec.export):
        if (run.out("export") / name).exists():
            shutil.copytree(run.out("export") / name, out / name)
    shutil.copy(run.out("plan") / "plan.json", out / "plan.json")
    small = _config(run.out("export") / "model")
    parity = {
        name: json.loads(path.read_text())
        for name, path in (
            ("vocabulary", run.out("measure_base") / "parity.json"),
            ("slice", run.out("slice") / "parity.json"),
        )
        if path.exists()
    }
    parity |= json.loads((run.out("export") / "parity.json").read_text())
    options = spec.method
    records = {path.stem: json.loads(path.read_text()) for path in sorted((run.folder / "stages").glob("*.json"))}
    speeds = [Speed.model_validate(s) for s in json.loads((run.out("export") / "speed.json").read_text())]
    made = Report(
        target=spec.target_name,
        family=info.family,
        spec=spec.model_dump(mode="json", exclude=INPUTS),
        before=size_of(info.config, dimensions(info.config), DTYPES[info.dtype]),
        after=size_of(small, dimensions(small), saved_bytes(spec, DTYPES[info.dtype])),
        speed=speeds,
        skills=_skills(run),
        allocation=earlier.allocation(run),
        cuts=cuts(info.config, earlier.plan(run), options.units),
        parity=parity,
        runtimes=matrix.runtimes(small, spec.export, [found.format for found in speeds]),
        curve=[point for stage in ("sparsify", "recover") for point in earlier.curve(run, stage)],
        locality=_locality(run),
        relearning=json.loads(found.read_text()) if (found := run.out("relearn") / "relearning.json").exists() else {},
        samples=[Sample.model_validate(s) for s in json.loads((run.out("measure") / "samples.json").read_text())],
        notices=run.notices,
        files=[],
        provenance=Provenance(
            inputs=_inputs(run),
            base_model=spec.base.hub or _hub_name(info.config),
            tokenizer_sha256=earlier.dataset_sha256(spec.base.path / "tokenizer.json"),
            spec_sha256=hashlib.sha256(spec.model_dump_json(exclude=INPUTS).encode()).hexdigest(),
            seed=spec.seed,
            versions={name: version(name) for name in ("narrow", "torch", "transformers", "tokenizers", "onnx", "onnxruntime")},
            machine=_machine(run.mesh),
            seconds={name: record["seconds"] for name, record in records.items()},
            memory={name: record["memory"] for name, record in records.items() if record.get("memory")},
            recovery_tokens=next((p.tokens for p in reversed(earlier.curve(run, "recover"))), 0),
            regularizer_tokens=next((p.tokens for p in reversed(earlier.curve(run, "sparsify"))), 0),
            correction_tokens=next((p.tokens for p in reversed(earlier.curve(run, "correct"))), 0),
        ),
    )
    (out / "model" / "README.md").write_text(render_card(made), encoding="utf-8")
    made.files = [_file(path, out) for path in sorted(out.rglob("*")) if path.is_file()]
    (out / "report.json").write_text(made.model_dump_json(indent=1), encoding="utf-8")
    (out / "report.html").write_text(render_page(made), encoding="utf-8")


def _teacher(run: Run) -> teacher.Live:
    """Who teaches in recovery: the base, also after its correction, or the model that was brought for it; alone in memory."""
    if run.spec.teacher is None:
        name = "base" if run.spec.method.recover.correction is None else "correct"
        run.models = {kept: model for kept, model in run.models.items() if kept == name}
        return teacher.Live(base(run) if name == "base" else earlier.model(run, name))
    info = earlier.info(run)
    dtype = torch.bfloat16 if info["teacher"]["dtype"] == "BF16" else torch.float32
    tokens = info["tokens"] or range(info["model"]["config"]["vocab_size"])
    run.models = {}
    return teacher.Live(load_model(run.spec.teacher.path, dtype, earlier.job(run).parked), torch.tensor(tokens))


def train_base(
    run: Run, phase: str, order: int, tokens: int, rate: float | None = None, mesh: DeviceMesh | None = None
) -> tuple[PreTrainedModel, list[CurvePoint]]:
    """A copy of the base, trained on the target's next tokens as recovery would train it; and its curve."""
    options = run.spec.method.recover
    model = earlier.alone(run, slice_model(base(run), whole_plan(config_dict(base(run)))))
    curve = train.train(
        model,
        earlier.training_blocks(run, order),
        train.Settings(tokens, options.batch_tokens, optimizer=options.optimizer, learning_rate=rate, schedule=options.schedule),
        phase=phase,
        folder=run.work(phase),
        emit=run.emit,
        check=run.check,
        validate=earlier.validator(run, run.spec.target_name),
        mesh=mesh,
    )
    return model, curve


def _despite_ties(run: Run, phase: str, parity: Parity, bound: float, again: Callable[[torch.Tensor], Parity]) -> Parity:
    """A comparison of two forms of a mixture of experts, made again on other tokens where it fails.

    When two experts of a token are nearly tied, rounding chooses, and all that follows differs. What is really wrong is so on
    any tokens.
    """
    for number in range(1, TIES + 1):
        if parity.relative_error <= bound or not family_of(earlier.info(run)["model"]["config"]).router:
            break
        run.emit(
            "notice",
            phase,
            f"The two forms of the model differ on some tokens (relative error {parity.relative_error:.1e}), as they do where "
            "two experts are nearly tied: they are compared on others.",
            {"code": "near_tie"},
        )
        parity = again(earlier.probe(run, number))
    return parity


def _file(path: Path, root: Path) -> File:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return File(path=path.relative_to(root).as_posix(), bytes=path.stat().st_size, sha256=digest)


def _locality(run: Run) -> Locality | None:
    """What was measured of it, told for the size that the result has."""
    path = run.out("locality") / "locality.json"
    if not path.exists():
        return None
    found = Locality.model_validate_json(path.read_bytes())
    told = sharing.summary(
        found, run.spec.target_name, cuts(earlier.info(run)["model"]["config"], earlier.plan(run), run.spec.method.units)
    )
    return found.model_copy(update={"summary": told})


def _skills(run: Run) -> dict[str, Any]:
    """The rows, with what models answered where they were asked, and what formats keep that round weights."""
    rows: dict[str, Any] = json.loads((run.out("measure") / "skills.json").read_text())
    asked = run.out("answer") / "answers.json"
    for name, answers in json.loads(asked.read_text()).items() if asked.exists() else ():
        rows[name]["answers"] = answers
    for name, kept in json.loads((run.out("export") / "rounded.json").read_text()).items():
        rows[name]["rounded"] = kept
    return rows


def _inputs(run: Run) -> list[Input]:
    """The base first; of files that a run reads, the bytes are those that its stages were keyed by."""
    spec = run.spec
    found = [_model_input("base", spec.base, earlier.info(run)["model"]["sha256"])]
    if spec.teacher:
        found.append(_model_input("teacher", spec.teacher, earlier.info(run)["teacher"]["sha256"]))
    data = [("target", None, spec.target), *(("skill", skill.name, skill) for skill in spec.skills)]
    data += [("broad", None, spec.broad)] if spec.broad else []
    return found + [
        Input(
            part=part,
            name=item.called or item.path.name,
            sha256=earlier.dataset_sha256(item.path),
            skill=skill,
            column=item.column,
            answer=item.answer,
            bad_rows=item.bad_rows,
        )
        for part, skill, item in data
    ]


def _model_input(part: Literal["base", "teacher"], model: ModelPath, sha256: str) -> Input:
    return Input(part=part, name=model.called or model.path.name, sha256=sha256, hub=model.hub, commit=model.commit)


def _hub_name(config: dict[str, Any]) -> str | None:
    """owner/name, as transformers keeps it in a config that came from a hub."""
    name = config.get("_name_or_path")
    return name if isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) else None


def _machine(mesh: DeviceMesh | None) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "system": platform.platform(),
        "python": sys.version.split()[0],
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "transformers": transformers.__version__,
        **({"processes": mesh.size()} if mesh is not None else {}),
    }
