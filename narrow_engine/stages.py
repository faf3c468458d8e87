"""The stages of the line, in order. Each is a function of the run and of the folder that it must fill."""

import hashlib
import json
import platform
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from narrow_engine import corpus, importance, skills, speed, train
from narrow_engine import reconstruct as least_squares
from narrow_engine.errors import NarrowError
from narrow_engine.export import onnx as onnx_export
from narrow_engine.export import safetensors as safetensors_export
from narrow_engine.families import dimensions
from narrow_engine.model_files import DTYPES, ModelInfo, inspect_model
from narrow_engine.models import config_dict, device, greedy, load_model
from narrow_engine.plan import Plan, cuts, make_plan
from narrow_engine.regularize import GroupLasso
from narrow_engine.report.card import render_card
from narrow_engine.report.model import CurvePoint, File, Parity, Provenance, Report, Sample, Skill, Speed
from narrow_engine.report.page import render_page
from narrow_engine.run import Run, write_json
from narrow_engine.sizing import size_of, solve
from narrow_engine.slice import compare, mask_model, slice_model
from narrow_engine.spec import DatasetPath, Role

VALIDATION_TOKENS = 8192
"""Held-out tokens that the curve is drawn from; the table of skills uses all of them."""
HELD_OUT_FACTOR = 16
"""Held-out tokens for each that is measured: stretches of many documents instead of a few whole ones."""
PARITY_BOUND = 1e-4
"""Relative error that slicing may have in float32. Other orders of summation stay well under it."""
ONNX_BOUND = 1e-3
"""Relative error that ONNX Runtime may have in float32; right exports measured 1e-6 in every family."""
PROMPT_TOKENS, SAMPLE_TOKENS, SAMPLES = 32, 48, 3


def load(run: Run, out: Path) -> None:
    """Checks the base and the budget, and turns every dataset into tokens."""
    spec = run.spec
    info = inspect_model(spec.base.path)
    keep, rounded = solve(info.config, spec, DTYPES[info.dtype])
    for sentence in rounded:
        run.emit("notice", "load", sentence, {"code": "rounded"})
    run.models["base"] = load_model(spec.base.path)
    tokenizer, start = _tokenizer(spec.base.path, info)

    def tokenize(data: DatasetPath) -> corpus.Documents:
        found = corpus.tokenize(data.path, data.column, tokenizer, start, run.check, run.emit)
        if int(found.tokens.max()) >= info.config["vocab_size"]:
            raise NarrowError("bad_tokenizer", f"The tokenizer makes token {found.tokens.max()}, which the model does not have.")
        return found

    training, held_out = corpus.hold_out(tokenize(spec.target), HELD_OUT_FACTOR * spec.skill_tokens, run.emit)
    corpus.Blocks(training.tokens, spec.block_tokens, spec.seed)
    corpus.save(training, out, "training")
    for name, skill in _skills(run).items():
        documents = held_out if name == spec.target_name else tokenize(skill.data)
        corpus.save(corpus.sample(documents, spec.skill_tokens, spec.block_tokens, spec.seed), out, skill.file)
    data = {d.path.name: dataset_sha256(d.path) for d in (spec.target, *spec.skills)}
    write_json(out / "info.json", {"model": info.model_dump(), "keep": keep, "data": data})


def measure_base(run: Run, out: Path) -> None:
    """The base's loss on every skill: what the rest is measured against, and an early end for data that hold nothing."""
    losses = {}
    for name, skill in _skills(run).items():
        documents = corpus.load(run.out("load"), skill.file)
        if not (documents.lengths > 1).any():
            raise NarrowError("text_too_short", f"The documents of {name!r} are all shorter than two tokens.")
        measured = skills.measure(base(run), [], documents, run.spec.block_tokens, run.progress("measure_base"))[0]
        losses[name] = measured.mean_loss()
        run.emit(
            "progress",
            "measure_base",
            f"{name}: {losses[name]:.3f} nats",
            {"done": len(losses), "total": len(_skills(run))},
        )
    write_json(out / "skills.json", losses)


def score(run: Run, out: Path) -> None:
    """Importance of every unit for the target, by the spec's criterion."""
    method = run.spec.method
    model = base(run)
    found = importance.collect(
        model,
        _calibration(run),
        method.calibration_tokens,
        method.importance in importance.NEEDS_GRADIENTS,
        run.progress("score"),
    )
    scores = importance.CRITERIA[method.importance](model, found, run.spec.seed)
    save_file({unit: value.double().cpu().contiguous() for unit, value in scores.items()}, out / "scores.safetensors")


def sparsify(run: Run, out: Path) -> None:
    """Group lasso: the base trained until the neurons to cut are exactly zero."""
    lasso = run.spec.method.regularizer
    assert lasso is not None
    keep = _info(run)["keep"]
    model = slice_model(base(run), _whole(run))
    settings = train.Settings(lasso.tokens, run.spec.method.recover.batch_tokens, "next_token", learning_rate=lasso.learning_rate)
    blocks = _training_blocks(run, 1)
    scores = load_file(run.out("score") / "scores.safetensors")["neuron"].sqrt().to(model.device)
    groups = GroupLasso(model, scores, 1 - keep["neuron"] / scores.shape[1], train.shape(settings, blocks)[1])
    curve = train.train(
        model,
        blocks,
        settings,
        phase="sparsify",
        folder=run.work("sparsify"),
        emit=run.emit,
        check=run.check,
        validate=_validator(run),
        after_step=groups,
    )
    run.models["sparsify"] = model
    _save_weights(model, out)
    save_file({"neuron": groups.norms().cpu()}, out / "norms.safetensors")
    write_json(out / "curve.json", [point.model_dump() for point in curve])


def plan(run: Run, out: Path) -> None:
    """Which units stay. After group lasso, the living neurons do."""
    scores = load_file(run.out("score") / "scores.safetensors")
    norms = run.out("sparsify") / "norms.safetensors"
    if norms.exists():
        scores |= load_file(norms)
    made = make_plan(_info(run)["model"]["config"], scores, _info(run)["keep"])  # type: ignore[arg-type]
    (out / "plan.json").write_text(made.model_dump_json())


def cut(run: Run, out: Path) -> None:
    """Slices, and proves it: the sliced model against the base with the same units masked, on real text."""
    whole, chosen = _source(run), _plan(run)
    small = slice_model(whole, chosen)
    parity = compare(mask_model(whole, chosen), small, _probe(run))
    if parity.relative_error > PARITY_BOUND:
        raise NarrowError(
            "slicing_not_exact",
            f"The sliced model's logits differ from the masked base's by {parity.relative_error:.1e} (relative), which must not "
            "happen: please report it with the model's config.json.",
        )
    run.models["slice"] = small
    _save_weights(small, out)
    write_json(out / "parity.json", parity.model_dump())


def reconstruct(run: Run, out: Path) -> None:
    """Refits the cut model layer by layer, towards the base's residual stream."""
    small = _model(run, "slice")
    if run.spec.method.refit:
        least_squares.refit(
            _source(run),
            small,
            _plan(run),
            _calibration(run),
            run.spec.method.calibration_tokens,
            run.progress("reconstruct"),
        )
    run.models["reconstruct"] = small
    del run.models["slice"]
    _save_weights(small, out)


def recover(run: Run, out: Path) -> None:
    """Trains the cut model on the target. A recovery that made it worse on held-out text is not kept.

    The result is rounded to the base's type here, so that every figure is of the model that is delivered.
    """
    options = run.spec.method.recover
    small = _copy(run, "reconstruct")
    curve: list[CurvePoint] = []
    if options.tokens:
        blocks, settings = _training_blocks(run, 2), train.Settings(**options.model_dump())
        rows, steps = train.shape(settings, blocks)
        if rows * steps * blocks.length != options.tokens:
            run.emit(
                "notice",
                "recover",
                f"{options.tokens:,} tokens of recovery were asked for; whole batches of {rows * blocks.length:,} make it "
                f"{rows * steps * blocks.length:,}.",
                {"code": "rounded"},
            )
        curve = train.train(
            small,
            blocks,
            settings,
            phase="recover",
            folder=run.work("recover"),
            emit=run.emit,
            check=run.check,
            validate=_validator(run),
            teacher=base(run),
        )
        first, last = curve[0].validation, curve[-1].validation
        if first is not None and last is not None and not last <= first:
            run.emit(
                "notice",
                "recover",
                f"Training made the model worse on held-out text ({first:.3f} to {last:.3f} nats): the untrained cut is kept. "
                "Lower the learning rate or bring more text.",
                {"code": "recovery_harmed"},
            )
            small = _copy(run, "reconstruct")
    safetensors_export.round_weights(small, _dtype(run))
    run.models["recover"] = small
    _save_weights(small, out)
    write_json(out / "curve.json", [point.model_dump() for point in curve])


def measure(run: Run, out: Path) -> None:
    """Base, cut and recovered model on every skill, side by side on the same tokens, and a sample of what they write."""
    variants = [_model(run, "reconstruct"), _model(run, "recover")]
    rows = {}
    for name, skill in _skills(run).items():
        documents = corpus.load(run.out("load"), skill.file)
        first, before, after = skills.measure(base(run), variants, documents, run.spec.block_tokens, run.progress("measure"))
        kept = skills.retention(first, after, run.spec.seed)
        count = int((first.tokens > 0).sum())
        rows[name] = Skill(
            role=skill.role,
            documents=count,
            tokens=int(first.tokens.sum()),
            base=skills.fit(first),
            cut=skills.fit(before),
            recovered=skills.fit(after),
            retention=kept,
            agreement=float(after.agree.sum() / after.tokens.sum()),
            kl=float(after.kl.sum() / after.tokens.sum()),
            note=skills.note(skill.role, kept, count),
        ).model_dump()
    write_json(out / "skills.json", rows)
    write_json(out / "samples.json", [sample.model_dump() for sample in _samples(run)])


def export(run: Run, out: Path) -> None:
    """The model as files: stock safetensors, reloaded by a fresh process, and ONNX; each checked against the original."""
    model, probe = _model(run, "recover"), _probe(run)
    parity: dict[str, Parity] = {}
    run.progress("export")(0, 3)
    safetensors_export.save_model(model, run.spec.base.path, out / "model", _dtype(run))
    parity["reload"] = safetensors_export.check_reload(out / "model", model, probe)
    run.progress("export")(1, 3)
    if "onnx" in run.spec.export:
        found = parity["onnx"] = onnx_export.export_onnx(out / "model", out / "onnx", probe)
        if found.relative_error > ONNX_BOUND:
            raise NarrowError(
                "onnx_mismatch",
                f"The ONNX export computes other logits than the model (relative error {found.relative_error:.1e}): leave 'onnx' "
                "out of export, and please report it with the model's config.json.",
            )
        if found.greedy_equal != found.greedy_tokens:
            run.emit(
                "notice",
                "export",
                f"ONNX Runtime's greedy text leaves torch's after {found.greedy_equal} of {found.greedy_tokens} tokens "
                f"(largest difference of logits {found.max_error:.1e}): a near tie fell the other way.",
                {"code": "onnx_greedy_differs"},
            )
    run.progress("export")(2, 3)
    speeds = speed.measure_speed(base(run), model)
    write_json(out / "parity.json", {name: value.model_dump() for name, value in parity.items()})
    write_json(out / "speed.json", [value.model_dump() for value in speeds])


def report(run: Run, out: Path) -> None:
    """Gathers the results: the exported files, the plan, and the report as JSON, page and model card."""
    spec, info = run.spec, ModelInfo.model_validate(_info(run)["model"])
    for name in ("model", "onnx"):
        if (run.out("export") / name).exists():
            shutil.copytree(run.out("export") / name, out / name)
    shutil.copy(run.out("plan") / "plan.json", out / "plan.json")
    small = config_dict(_model(run, "recover"))
    parity = {"slice": json.loads((run.out("slice") / "parity.json").read_text())}
    parity |= json.loads((run.out("export") / "parity.json").read_text())
    options = spec.method
    made = Report(
        target=spec.target_name,
        family=info.family,
        spec=spec.model_dump(mode="json", exclude={"base", "target", "skills"}),
        before=size_of(info.config, dimensions(info.config), DTYPES[info.dtype]),
        after=size_of(small, dimensions(small), DTYPES[info.dtype]),
        speed=[Speed.model_validate(s) for s in json.loads((run.out("export") / "speed.json").read_text())],
        skills=json.loads((run.out("measure") / "skills.json").read_text()),
        cuts=cuts(info.config, _plan(run), options.units),
        parity=parity,
        curve=[point for stage in ("sparsify", "recover") for point in _curve(run, stage)],
        samples=[Sample.model_validate(s) for s in json.loads((run.out("measure") / "samples.json").read_text())],
        notices=run.notices,
        files=[],
        provenance=Provenance(
            base_sha256=info.sha256,
            data_sha256=_info(run)["data"],
            spec_sha256=hashlib.sha256(spec.model_dump_json(exclude={"base", "target", "skills"}).encode()).hexdigest(),
            seed=spec.seed,
            versions={name: version(name) for name in ("narrow", "torch", "transformers", "tokenizers", "onnx", "onnxruntime")},
            machine=_machine(),
            seconds={
                path.stem: json.loads(path.read_text())["seconds"] for path in sorted((run.folder / "stages").glob("*.json"))
            },
            recovery_tokens=next((p.tokens for p in reversed(_curve(run, "recover"))), 0),
            regularizer_tokens=next((p.tokens for p in reversed(_curve(run, "sparsify"))), 0),
        ),
    )
    (out / "model" / "README.md").write_text(render_card(made), encoding="utf-8")
    made.files = [_file(path, out) for path in sorted(out.rglob("*")) if path.is_file()]
    (out / "report.json").write_text(made.model_dump_json(indent=1), encoding="utf-8")
    (out / "report.html").write_text(render_page(made), encoding="utf-8")


# What the stages share: reading what earlier ones wrote, from memory where this process made it.


def base(run: Run) -> PreTrainedModel:
    if "base" not in run.models:
        run.models["base"] = load_model(run.spec.base.path)
    return run.models["base"]


def dataset_sha256(path: Path) -> str:
    if not path.is_file():
        raise NarrowError("missing_file", f"There is no dataset at {path}.")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tokenizer(folder: Path, info: ModelInfo) -> tuple[Tokenizer, int | None]:
    """The tokenizer, and the token that opens a document: BOS, else EOS, else none."""
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises bare Exception
        raise NarrowError("bad_tokenizer", f"tokenizer.json cannot be read: {str(error)[:200]}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= info.config["vocab_size"]:
        raise NarrowError(
            "bad_tokenizer", f"The tokenizer knows token {highest}, but the model has only {info.config['vocab_size']}."
        )
    for key in ("bos_token_id", "eos_token_id"):
        value = info.config.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int) and 0 <= value < info.config["vocab_size"]:
            return tokenizer, value
    return tokenizer, None


def _info(run: Run) -> dict[str, Any]:
    return json.loads((run.out("load") / "info.json").read_text())  # type: ignore[no-any-return]


def _dtype(run: Run) -> torch.dtype:
    return safetensors_export.DTYPES[_info(run)["model"]["dtype"]]


class _Skill(NamedTuple):
    data: DatasetPath
    role: Role
    file: str
    """Of its tokens in the folder of `load`. Names are the user's and may be anything: files are numbered."""


def _skills(run: Run) -> dict[str, _Skill]:
    """All that is measured, by name, the target first."""
    found = {run.spec.target_name: _Skill(run.spec.target, "keep", "skill-0")}
    for number, skill in enumerate(run.spec.skills, 1):
        found[skill.name] = _Skill(skill, skill.role, f"skill-{number}")
    return found


def _training(run: Run) -> corpus.Documents:
    return corpus.load(run.out("load"), "training")


def _held_out(run: Run) -> corpus.Documents:
    """What the target is measured on."""
    return corpus.load(run.out("load"), _skills(run)[run.spec.target_name].file)


def _training_blocks(run: Run, order: int) -> corpus.Blocks:
    """The target's training text; each user of it goes through it in an order of its own."""
    return corpus.Blocks(_training(run).tokens, run.spec.block_tokens, run.spec.seed + order)


def _calibration(run: Run) -> corpus.Blocks:
    return _training_blocks(run, 0)


def _probe(run: Run) -> torch.Tensor:
    """Tokens that two forms of a model are compared on, [2, up to 64]."""
    blocks = _calibration(run)
    return blocks.batch(0, 2)[:, : min(64, blocks.length)].to(device())


def _validator(run: Run) -> Callable[[PreTrainedModel], float]:
    length = run.spec.block_tokens
    documents = corpus.sample(_held_out(run), VALIDATION_TOKENS, length, run.spec.seed)
    return lambda model: skills.loss_of(model.eval(), documents, length)


def _plan(run: Run) -> Plan:
    return Plan.read(run.out("plan") / "plan.json")


def _whole(run: Run) -> Plan:
    """The plan that cuts nothing: slicing by it copies the base."""
    dims = dimensions(config_dict(base(run)))
    layers = range(dims.layers)
    return Plan(
        layers=list(layers),
        neurons=[list(range(dims.width)) for _ in layers],
        heads=[list(range(dims.heads)) for _ in layers],
        kv_groups=[list(range(dims.kv_heads)) for _ in layers],
    )


def _source(run: Run) -> PreTrainedModel:
    """What is sliced: the base, or what group lasso made of it."""
    return base(run) if run.spec.method.regularizer is None else _model(run, "sparsify")


def _model(run: Run, stage: str) -> PreTrainedModel:
    """The model that a stage made; a model's shape is the base's up to `plan` and the plan's from then on."""
    if stage not in run.models:
        run.models[stage] = _copy(run, stage)
    return run.models[stage]


def _copy(run: Run, stage: str) -> PreTrainedModel:
    model = slice_model(base(run), _whole(run) if stage == "sparsify" else _plan(run))
    model.load_state_dict(load_file(run.out(stage) / "weights.safetensors"), strict=False)
    model.tie_weights()
    return model


def _save_weights(model: PreTrainedModel, out: Path) -> None:
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in model.named_parameters()},
        out / "weights.safetensors",
    )


def _curve(run: Run, stage: str) -> list[CurvePoint]:
    path = run.out(stage) / "curve.json"
    return [CurvePoint.model_validate(point) for point in json.loads(path.read_text())] if path.exists() else []


def _samples(run: Run) -> list[Sample]:
    """The beginning of held-out text, continued greedily by both models."""
    tokenizer, start = _tokenizer(run.spec.base.path, ModelInfo.model_validate(_info(run)["model"]))
    documents = _held_out(run)
    found = []
    # What was measured are stretches; those that begin where their document does read best.
    for index in sorted(range(len(documents)), key=lambda i: documents[i][0] != start)[:SAMPLES]:
        prompt = documents[index][:PROMPT_TOKENS].astype("int64")
        texts = []
        for model in (base(run), _model(run, "recover")):
            run.check()
            ids = torch.from_numpy(prompt)[None].to(model.device)
            texts.append(tokenizer.decode(greedy(model, ids, SAMPLE_TOKENS)))
        found.append(Sample(prompt=tokenizer.decode(prompt.tolist()), base=texts[0], narrow=texts[1]))
    return found


def _file(path: Path, root: Path) -> File:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return File(path=path.relative_to(root).as_posix(), bytes=path.stat().st_size, sha256=digest)


def _machine() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "system": platform.platform(),
        "python": sys.version.split()[0],
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "transformers": transformers.__version__,
    }
