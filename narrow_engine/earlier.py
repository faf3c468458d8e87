"""What earlier stages of a run wrote, for those that come after: texts, numbers, plans and models.

Models are kept in memory where this process made them, and read from their stage's folder where another one did.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from narrow_engine import corpus, footprint, shard, train
from narrow_engine import skills as measuring
from narrow_engine import slice as slicing
from narrow_engine.errors import NarrowError
from narrow_engine.export import safetensors as safetensors_export
from narrow_engine.families import dimensions, opening
from narrow_engine.model_files import DTYPES, ModelInfo
from narrow_engine.models import device, load_model, read_outline
from narrow_engine.plan import Plan, Scores, whole_plan
from narrow_engine.report.model import Allocation, CurvePoint
from narrow_engine.run import Run
from narrow_engine.sizing import Keep, shrink, solve, vocabulary_is_fixed
from narrow_engine.spec import DatasetPath, Role
from narrow_engine.trial import read_tokenizer

VALIDATION_TOKENS = 8192
"""Held-out tokens that the curve is drawn from; the table of skills uses all of them."""


def dataset_sha256(path: Path) -> str:
    if not path.is_file():
        raise NarrowError("missing_file", f"There is no dataset at {path}.")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Reader(NamedTuple):
    """A tokenizer, the token that opens a document (BOS, else EOS, else none), and the size of the model's vocabulary."""

    tokenizer: Tokenizer
    start: int | None
    size: int


def reader(folder: Path, config: dict[str, Any]) -> Reader:
    return Reader(read_tokenizer(folder, config["vocab_size"]), opening(config), config["vocab_size"])


def info(run: Run) -> dict[str, Any]:
    return json.loads((run.out("load") / "info.json").read_text())  # type: ignore[no-any-return]


def tokenizer_folder(run: Run) -> Path:
    """Where the result's tokenizer is."""
    return run.out("load") / "tokenizer" if info(run)["tokens"] else run.spec.base.path


def dtype(run: Run) -> torch.dtype:
    """Of the result's weights as they are saved."""
    asked: torch.dtype | None = getattr(torch, run.spec.dtype) if run.spec.dtype else None
    return asked or safetensors_export.DTYPES[info(run)["model"]["dtype"]]


class Skill(NamedTuple):
    data: DatasetPath
    role: Role
    file: str
    """Of its tokens in the folder of `load`. Names are the user's and may be anything: files are numbered."""


def skills(run: Run) -> dict[str, Skill]:
    """All that is measured, by name, the target first."""
    found = {run.spec.target_name: Skill(run.spec.target, "keep", "skill-0")}
    for number, skill in enumerate(run.spec.skills, 1):
        found[skill.name] = Skill(skill, skill.role, f"skill-{number}")
    return found


def documents(run: Run, skill: str, side: Literal["base", "narrow"] = "narrow") -> corpus.Documents:
    """What a skill is measured on, in the tokens of the base or of what is made of it."""
    return corpus.load(run.out("load"), f"{skills(run)[skill].file}.{side}")


def training(run: Run) -> corpus.Documents:
    return corpus.load(run.out("load"), "training")


def training_blocks(run: Run, order: int) -> corpus.Blocks:
    """The target's training text; each user of it goes through it in an order of its own."""
    return corpus.Blocks(training(run).tokens, run.spec.block_tokens, run.spec.seed + order)


def recovery_blocks(run: Run) -> tuple[corpus.Blocks | corpus.Mixture, int]:
    """What recovery reads, mixed with broad text where a curriculum asks for it, and how many blocks of it.

    What a teacher said to a block can be read again if the block comes again.
    """
    spec, options = run.spec, run.spec.method.recover

    def blocks(documents: corpus.Documents) -> corpus.Blocks:
        return corpus.Blocks(documents.tokens, spec.block_tokens, spec.seed + 2, again=options.cache is not None)

    narrow = blocks(training(run))
    rows, steps = train.shape(train.settings_of(run.spec.method), narrow)
    asked = options.curriculum
    if asked is None:
        return narrow, rows * steps
    broad = blocks(corpus.load(run.out("load"), "broad"))
    return corpus.Mixture(narrow, broad, asked.start, asked.end, asked.until * rows * steps), rows * steps


def calibration(run: Run) -> corpus.Blocks:
    return training_blocks(run, 0)


def probe(run: Run, number: int = 0) -> torch.Tensor:
    """Tokens that two forms of a model are compared on, [2, up to 64]; each number has others."""
    blocks = calibration(run)
    return blocks.batch(2 * number, 2)[:, : min(footprint.PROBED // 2, blocks.length)].to(device())


class Judged(NamedTuple):
    """What a model is judged on while it trains: the first documents of a skill."""

    documents: corpus.Documents
    per_base_token: float
    """Predicted tokens for one of the base's."""
    base: float
    """The base's loss on the same text, as it was brought."""


def judged(run: Run, skill: str, tokens: int = VALIDATION_TOKENS) -> Judged:
    sides = [documents(run, skill, side) for side in ("narrow", "base")]
    # They are in a random order already, and the same ones on both sides.
    count = int(np.searchsorted(sides[0].offsets, min(tokens, sides[0].offsets[-1])))
    first, of_base = (side.take(np.arange(count)) for side in sides)
    measured = measuring.Measured.load(run.out("measure_base") / f"{skills(run)[skill].file}.npz")
    per_base_token = float((first.lengths - 1).sum() / (of_base.lengths - 1).sum())
    return Judged(first, per_base_token, float(measured.loss[:count].sum() / measured.tokens[:count].sum()))


def validator(run: Run, skill: str) -> Callable[[PreTrainedModel], float]:
    """A skill's loss per token of the base."""
    found = judged(run, skill)
    return lambda model: found.per_base_token * measuring.loss_of(model.eval(), found.documents, run.spec.block_tokens)


def relearning_blocks(run: Run, skill: str) -> corpus.Blocks | None:
    """The text that a skill to forget can be learned again from; none where that is too short."""
    name = f"{skills(run)[skill].file}.relearn"
    if not (run.out("load") / f"{name}.tokens.npy").exists():
        return None
    return corpus.Blocks(corpus.load(run.out("load"), name).tokens, run.spec.block_tokens, run.spec.seed + 4)


def scores(run: Run) -> Scores:
    path = run.out("score") / "scores.safetensors"
    return load_file(path) if path.exists() else {}  # type: ignore[return-value]


def allocation(run: Run) -> Allocation:
    return Allocation.model_validate_json((run.out("allocate") / "allocation.json").read_bytes())


def plan(run: Run) -> Plan:
    """The plan as it applies to `base`, whose vocabulary is trimmed already."""
    found = Plan.read(run.out("plan") / "plan.json")
    return found.model_copy(update={"tokens": list(range(len(found.tokens)))})


def base(run: Run) -> PreTrainedModel:
    """What is cut and taught by: the base, with its vocabulary trimmed where the spec says so."""
    if "base" not in run.models:
        whole, tokens = untouched(run), info(run)["tokens"]
        run.models["base"] = whole if tokens is None else slicing.trim_vocabulary(whole, tokens)
        run.models.pop("untouched", None)
    return run.models["base"]


def untouched(run: Run) -> PreTrainedModel:
    """The base as it was brought, which is read with no other model beside it: while it is, it takes more than afterwards."""
    if "base" in run.models and info(run)["tokens"] is None:
        return run.models["base"]
    if "untouched" not in run.models:
        run.models = {}
        run.models["untouched"] = load_base(run)
    return run.models["untouched"]


def load_base(run: Run) -> PreTrainedModel:
    return load_model(run.spec.base.path, park=job(run).parked)


def job(run: Run) -> footprint.Job:
    """What is left to do, once the text has been read."""
    found = info(run)
    base, teacher = (ModelInfo.model_validate(found[part]) if found[part] else None for part in ("model", "teacher"))
    assert base
    chosen = allocation(run).keep if (run.out("allocate") / "allocation.json").exists() else None
    return planned(run, base, teacher, len(found["tokens"] or range(base.config["vocab_size"])), chosen)


def planned(
    run: Run, base: ModelInfo, teacher: ModelInfo | None, tokens: int | None = None, keep: Keep | None = None
) -> footprint.Job:
    """What the stages have to do with on this machine, and whether the base is parked for it. Raises like `sizing.solve`.

    A vocabulary whose size the text decides is counted without its tokens until the text has been read, and there are `tokens`.
    What is kept is chosen in `allocate`, and until then what the budget says.
    """
    spec, dims = run.spec, dimensions(base.config)
    if keep is None:
        keep, _ = solve(base.config, spec, DTYPES[base.dtype], tokens)
    trimmed = dims
    if "token" in keep:
        count = tokens or (keep["token"] if vocabulary_is_fixed(spec) else 1)
        trimmed, keep = replace(dims, vocab=count), {**keep, "token": count}
    machine = train.machine(device(), run.mesh)
    made = footprint.Job(
        base.config,
        spec,
        dims,
        trimmed,
        shrink(dims, keep),
        DTYPES[base.dtype],
        [skill.role for skill in spec.skills],
        footprint.teaching(teacher.config, teacher.dtype, machine) if teacher else None,
        machine,
    )
    return replace(made, parked=footprint.parks(made))


def source(run: Run) -> PreTrainedModel:
    """What is sliced: the base, or what group lasso made of it."""
    return base(run) if run.spec.method.regularizer is None else model(run, "sparsify")


def model(run: Run, stage: str) -> PreTrainedModel:
    """The model that a stage made. Its shape is the plan's, but for what was made of the whole base."""
    if stage not in run.models:
        run.models[stage] = copy(run, stage)
    return run.models[stage]


def alone(run: Run, model: PreTrainedModel) -> PreTrainedModel:
    """A model that is to be trained, for which all others leave the memory. What is needed of them is read again."""
    run.models = {}
    return model


@torch.no_grad()
def copy(run: Run, stage: str) -> PreTrainedModel:
    """What a stage made, once more, for which no other model is read."""
    model = unfilled(run, whole=stage in ("sparsify", "correct"))
    weights = load_file(run.out(stage) / "weights.safetensors")
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])
    return model


def unfilled(run: Run, whole: bool = False) -> PreTrainedModel:
    """A model of the shape that was planned, or of the `whole` base with its vocabulary trimmed, with any weights."""
    outline = read_outline(run.spec.base.path)
    if whole:
        chosen = whole_plan(dict(outline.config.to_dict()), info(run)["tokens"])
    else:
        chosen = Plan.read(run.out("plan") / "plan.json")
    return slicing.unfilled(outline, chosen, torch.empty(0, device=device()))


def save_weights(model: PreTrainedModel, out: Path) -> None:
    if not shard.is_first():
        return  # what other processes fill is thrown away
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in model.named_parameters()},
        out / "weights.safetensors",
    )


def curve(run: Run, stage: str) -> list[CurvePoint]:
    path = run.out(stage) / "curve.json"
    return [CurvePoint.model_validate(point) for point in json.loads(path.read_text())] if path.exists() else []
