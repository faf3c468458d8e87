"""The one training loop. Recovery and group lasso are its callers; what differs between them is in the arguments.

A run that was killed resumes to the same weights: the order of the blocks depends on seed and step alone, and a
checkpoint holds everything else (weights, optimizer state, the state of what runs after each step, the curve so far).
Checkpoints are safetensors, written under a temporary name and renamed.

On several processes (`shard`) each has a part of every batch, and the loop is the same for all of them. What does not fit into
memory is done in another way, which is chosen before training begins (`footprint.choose`): a batch in pieces whose gradients are
added up, activations computed again, weights in bfloat16.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from narrow_engine import footprint, memory, rounding, shard
from narrow_engine.corpus import Blocks, Mixture
from narrow_engine.errors import Cancelled
from narrow_engine.events import Sink
from narrow_engine.families import Dimensions, dimensions
from narrow_engine.losses import objective
from narrow_engine.models import config_dict, family, head, hidden_states, sampled
from narrow_engine.muon import Muon, training_dtype
from narrow_engine.report.model import CurvePoint
from narrow_engine.spec import Divergence, Match, Method, Objective
from narrow_engine.teacher import Live, Teacher

SHARE: dict[Objective, float] = {"next_token": 0.0, "mixed": 0.5, "distill": 1.0}
"""Weight of the divergence from the base in the loss."""

LEARNING_RATE = {"muon": 2e-3, "adamw": 1e-3}
FRESH_RATE = {"muon": 1.6e-2, "adamw": 1e-3}
"""Of weights that have learned nothing yet. Muon's was the best of six, to distill or not: experiments/frontier/run.py --tune."""
WARM_UP = 0.02
CHECKPOINT_SECONDS, CHECKPOINT_TIMES = 30.0, 20.0
"""Between two checkpoints, and how many times as long as the last one took: that of a large model takes a minute, and training on
a GPU would do little else."""
POINTS = 40
"""Points on the curve, at most; at the first two, where it falls fastest, and at every fourth the held-out loss is measured."""


@dataclass(frozen=True)
class Settings:
    """What one training run does. Rates are peaks; `tokens` is rounded down to whole batches, but to one at least."""

    tokens: int
    batch_tokens: int
    objective: Objective = "next_token"
    temperature: float = 1.0
    optimizer: str = "adamw"
    learning_rate: float | None = None
    schedule: str = "linear"
    divergence: Divergence = "kl"
    mixture: float | None = None
    on_policy: float = 0.0


def settings_of(method: Method) -> Settings:
    """Of a method's recovery. What it reads is in the blocks, and who teaches what in the teacher and beside it."""
    options = method.recover.model_dump(include={field.name for field in fields(Settings)})
    rate = peak_rate(method.recover.optimizer, method.init == "fresh")
    return Settings(**{**options, "learning_rate": method.recover.learning_rate or rate})


def peak_rate(optimizer: str, fresh: bool) -> float:
    """The measured best of an optimizer, of weights that are fresh or not."""
    return (FRESH_RATE if fresh else LEARNING_RATE)[optimizer]


class Beside(Protocol):
    """A term that is added to the loss: `begin` before a step's forward pass, `loss` after it, with the gradient."""

    match: tuple[Match, Dimensions] | None
    """What is drawn to the teacher's, and the teacher's lengths, by which what it takes of memory is known."""

    def begin(self) -> None: ...

    def loss(self) -> Tensor: ...


class AfterStep(Protocol):
    """Runs after every optimizer step, with the learning rate that it used; its state is part of checkpoints."""

    def __call__(self, learning_rate: float) -> None: ...

    def state(self) -> dict[str, Tensor]: ...

    def restore(self, state: dict[str, Tensor]) -> None: ...

    @property
    def sparsity(self) -> float: ...


def train(
    model: PreTrainedModel,
    blocks: Blocks | Mixture,
    settings: Settings,
    *,
    phase: str,
    folder: Path,
    emit: Sink,
    check: Callable[[], None],
    validate: Callable[[PreTrainedModel], float],
    teacher: Teacher | None = None,
    beside: Beside | None = None,
    after_step: AfterStep | None = None,
    enough: float = -math.inf,
    mesh: DeviceMesh | None = None,
) -> list[CurvePoint]:
    """Trains `model` in place and returns the curve; its first point is the model as it came, at 0 tokens.

    `folder` holds the checkpoint, and a later call with the same arguments goes on from it. `check` raises Cancelled to
    stop: a checkpoint is written first. `validate` gives the held-out loss; at one of `enough` training ends. `beside` adds
    a term to the loss. The processes of a `mesh` must all call it with the same; a checkpoint of theirs is as one alone would
    write it. No other model should be in memory but the teacher's. Raises NarrowError (too_little_memory).
    """
    rows, steps = shape(settings, blocks)
    checkpoint = folder / "checkpoint.safetensors"
    rounded = _is_rounded(checkpoint)
    way = _way(model, teacher, beside, settings, rows, blocks.length, mesh, after_step is not None, rounded, phase, emit)
    parts = shard.parts(mesh, rows, way.pieces)
    place = model.device
    if way.bfloat16:
        rounding.narrow_(model)
    if mesh is not None and after_step is None:
        model.cpu()  # until the end: `after_step` has views of its weights
    whole = shard.spread(model, mesh)
    trained = whole.model
    if way.recompute:
        trained.activation_checkpointing_enable({"use_reentrant": False})
    in_float32 = ExitStack()
    if way.bfloat16:
        in_float32.enter_context(rounding.computed_in_float32(trained))
    optimizers = _optimizers(trained, settings, way.bfloat16)
    parameters = dict(trained.named_parameters())
    done, curve = _restore(checkpoint, parameters, optimizers, after_step)
    if not curve:
        curve = [CurvePoint(phase=phase, tokens=0, validation=whole(validate), seconds=0.0)]
        emit("progress", phase, "", {"done": 0, "total": steps, **curve[0].model_dump(exclude={"phase"}, exclude_none=True)})
    started = time.monotonic() - curve[-1].seconds
    saved, pause = time.monotonic(), CHECKPOINT_SECONDS
    interval = max(1, steps // POINTS)
    losses: list[float] = []
    if (curve[-1].validation or math.inf) <= enough:
        steps = done
    for step in range(done, steps):
        if shard.any_of(mesh, _cancelled(check)):
            _save(checkpoint, step, parameters, optimizers, after_step, curve)
            raise Cancelled
        # Seeded by the step, dropout is the same after a resume. `validate` leaves the model in eval mode.
        torch.manual_seed(step)
        trained.train()
        rate = _rate(step, steps, settings.schedule)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
        first = step * rows
        own = bool(settings.on_policy and float(torch.rand(())) < settings.on_policy)
        if mesh is not None:
            torch.manual_seed(step * mesh.size() + mesh.get_local_rank())  # what is drawn for other rows is other
        batches = [blocks.batch(first + part.first, part.rows).to(trained.device) for part in parts]
        if own:
            batches = whole(partial(_sampled, batches=batches))
        total = 0.0
        for part, batch in zip(parts, batches, strict=True):
            if own:
                assert isinstance(teacher, Live)
                loss = whole(partial(_own_loss, made=batch, settings=settings, teacher=teacher))
            else:
                at = first + part.first
                loss = whole(partial(_loss, first=at, batch=batch, settings=settings, teacher=teacher, beside=beside))
            loss = loss * part.weight
            loss.backward()
            total += loss.item()
        losses.append(total)
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if after_step is not None:
            if mesh is not None:
                shard.pull(whole, model)
            after_step(optimizers[0].param_groups[0]["lr"])
            if mesh is not None:
                shard.push(model, whole)

        if (step + 1) % interval == 0 or step + 1 == steps:
            number = len(curve)
            measured = whole(validate) if number % 4 == 0 or number <= 2 or step + 1 == steps else None
            point = CurvePoint(
                phase=phase,
                tokens=(step + 1) * rows * blocks.length,
                loss=shard.mean(mesh, sum(losses) / len(losses)),
                validation=measured,
                sparsity=after_step.sparsity if after_step is not None else None,
                seconds=time.monotonic() - started,
            )
            curve.append(point)
            losses = []
            emit(
                "progress",
                phase,
                "",
                {"done": step + 1, "total": steps, **point.model_dump(exclude={"phase"}, exclude_none=True)},
            )
            if measured is not None and measured <= enough:
                break
        if shard.any_of(mesh, shard.is_first() and time.monotonic() - saved > pause):  # who writes it knows how long it takes
            began = time.monotonic()
            _save(checkpoint, step + 1, parameters, optimizers, after_step, curve)
            saved = time.monotonic()
            pause = max(CHECKPOINT_SECONDS, CHECKPOINT_TIMES * (saved - began))
    if way.recompute:
        trained.activation_checkpointing_disable()
        trained.disable_input_require_grads()
    in_float32.close()
    del optimizers
    if way.bfloat16:
        rounding.widen_(model)
    if mesh is not None:
        shard.pull(whole, model)
        model.to(place)
    model.eval()
    return curve


def _cancelled(check: Callable[[], None]) -> bool:
    try:
        check()
    except Cancelled:
        return True
    return False


def shape(settings: Settings, blocks: Blocks | Mixture) -> tuple[int, int]:
    """Blocks in a batch, and steps."""
    rows = footprint.batch_rows(settings.batch_tokens, settings.tokens, blocks.length)
    return rows, max(1, settings.tokens // (rows * blocks.length))


def machine(where: torch.device, mesh: DeviceMesh | None = None) -> footprint.Machine:
    """What there is to train on."""
    return footprint.Machine(
        memory.limit(where),
        memory.limit(torch.device("cpu")),
        gpu=where.type == "cuda",
        low=training_dtype(where) != torch.float32,
        processes=mesh.size() if mesh is not None else 1,
        mapped=where.type == "cpu" and memory.counts_files(),
    )


def _way(
    model: PreTrainedModel,
    teacher: Teacher | None,
    beside: Beside | None,
    settings: Settings,
    rows: int,
    length: int,
    mesh: DeviceMesh | None,
    in_float32: bool,
    rounded: bool | None,
    phase: str,
    emit: Sink,
) -> footprint.Way:
    """How a step is done on this machine, and a notice of whatever is not the plain way. What was begun with weights in one type
    (`rounded`) goes on so, whatever memory there is by now."""
    there, config = machine(model.device, mesh), config_dict(model)
    task = footprint.Task(
        config,
        dimensions(config),
        rows,
        length,
        settings.optimizer,
        there.low,
        there.fixed + (teacher.bytes if teacher is not None else 0),
        there.processes,
        there.gpu,
        teacher is not None,
        beside.match if beside else None,
        in_float32,
    )
    way = footprint.choose(task, there.each(there.processes), phase, rounded)
    memory.keep_within(footprint.training(task, way), model.device)
    for code, sentence in footprint.told(task, way, there.each(there.processes)):
        emit("notice", phase, sentence, {"code": code})
    return way


def _loss(
    model: PreTrainedModel,
    first: int,
    batch: Tensor,
    settings: Settings,
    teacher: Teacher | None = None,
    beside: Beside | None = None,
) -> Tensor:
    """Of one batch [rows, length + 1], the blocks from number `first` on."""
    share = SHARE[settings.objective]
    ids, targets = batch[:, :-1], batch[:, 1:].flatten()
    if beside:
        beside.begin()
    told = teacher(first, ids) if teacher and share else None
    states = _hidden(model, ids)
    # What was heard of both models goes before there are logits.
    drawn = beside.loss() if beside else None
    loss = objective(
        states.flatten(0, 1),
        head(model),
        targets,
        told,
        share if told else 0.0,
        settings.temperature,
        settings.divergence,
        settings.mixture,
    ).total
    return loss if drawn is None else loss + drawn


def _sampled(model: PreTrainedModel, batches: list[Tensor]) -> list[Tensor]:
    """What the model itself makes of the first half of each block, for all pieces of a batch together."""
    given = batches[0].shape[1] // 2
    low = training_dtype(model.device)
    with torch.autocast(model.device.type, low, enabled=low != torch.float32):
        made = sampled(model.eval(), torch.cat(batches)[:, :given], batches[0].shape[1] - given)
    model.train()
    return list(torch.split(made, [len(batch) for batch in batches]))


def _own_loss(model: PreTrainedModel, made: Tensor, settings: Settings, teacher: Live) -> Tensor:
    """The same on what was sampled: it learns what the teacher says to that (GKD, arXiv 2306.13649, algorithm 1)."""
    given = made.shape[1] // 2
    ids, targets = made[:, :-1], made[:, given:].flatten()
    states, of_teacher = teacher(0, ids)
    told = states.view(*ids.shape, -1)[:, given - 1 :].flatten(0, 1), of_teacher
    hidden = _hidden(model, ids)[:, given - 1 :].flatten(0, 1)
    return objective(hidden, head(model), targets, told, 1.0, settings.temperature, settings.divergence, settings.mixture).total


def _hidden(model: PreTrainedModel, ids: Tensor) -> Tensor:
    low = training_dtype(model.device)
    with torch.autocast(model.device.type, low, enabled=low != torch.float32):
        return hidden_states(model, ids).to(low)


def _rate(step: int, steps: int, schedule: str) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then constant or linear to zero."""
    warm = max(1, round(WARM_UP * steps))
    return min(1.0, (step + 1) / warm) * (1.0 if schedule == "constant" else 1 - step / steps)


def _optimizers(model: PreTrainedModel, settings: Settings, rounded: bool = False) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers and AdamW for the rest, or AdamW for all.

    Experts' matrices and routers are matrices like others: a mixture of 16 experts cut to 8 ended within 0.003 nats of this
    with AdamW for the experts or for the routers (one run each of 60 steps), so nothing is gained by an exception. The loss
    has no term for the routers' balance: that is there to keep experts alive through a training from scratch, and would pull
    the routing of a trained model away from what the data ask.
    """
    peak = settings.learning_rate or LEARNING_RATE[settings.optimizer]
    prefix = family(model).layers + "."
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for name, parameter in model.named_parameters():
        chosen = settings.optimizer == "muon" and name.startswith(prefix) and parameter.ndim >= 2
        (matrices if chosen else rest).append(parameter)
    betas = (0.9, 0.95)
    found: list[torch.optim.Optimizer] = (
        [rounding.AdamW(rest, peak, betas)]
        if rounded
        else [torch.optim.AdamW(rest, lr=peak, betas=betas, weight_decay=0.0, fused=True)]  # the one without copies of all states
    )
    if matrices:
        found.insert(0, Muon(matrices, lr=peak))
    for optimizer in found:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return found


def _states(parameters: dict[str, Tensor], optimizers: list[torch.optim.Optimizer]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    names = {parameter: name for name, parameter in parameters.items()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield names[parameter], optimizer.state[parameter]


def _save(
    path: Path,
    step: int,
    parameters: dict[str, Tensor],
    optimizers: list[torch.optim.Optimizer],
    after_step: AfterStep | None,
    curve: list[CurvePoint],
) -> None:
    found = {f"weight/{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, state in _states(parameters, optimizers):
        found |= {f"state/{name}/{key}": value for key, value in state.items()}
    if after_step is not None:
        found |= {f"after/{key}": value for key, value in after_step.state().items()}
    tensors: dict[str, Tensor] = {}
    for name, value in found.items():
        gathered = shard.full(value)
        if shard.is_first():
            tensors[name] = gathered.cpu().contiguous()
    if not shard.is_first():
        return
    temporary = path.with_suffix(".tmp")
    points = json.dumps([point.model_dump() for point in curve])
    save_file(tensors, temporary, {"step": str(step), "curve": points})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _is_rounded(path: Path) -> bool | None:
    """Whether what a checkpoint holds is in bfloat16; None if there is no checkpoint."""
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        return any(file.get_slice(name).get_dtype() == "BF16" for name in file.keys() if name.startswith("weight/"))  # noqa: SIM118


def _restore(
    path: Path, parameters: dict[str, Tensor], optimizers: list[torch.optim.Optimizer], after_step: AfterStep | None
) -> tuple[int, list[CurvePoint]]:
    if not path.exists():
        return 0, []
    with safe_open(path, "pt") as file, torch.no_grad():
        names = list(file.keys())
        for name, parameter in parameters.items():
            parameter.copy_(shard.like(file.get_tensor(f"weight/{name}"), parameter))
        for name, state in _states(parameters, optimizers):
            prefix = f"state/{name}/"
            for key in names:
                if key.startswith(prefix):
                    value = file.get_tensor(key)
                    own = parameters[name]
                    state[key.removeprefix(prefix)] = (
                        value.to(own.device) if value.ndim == 0 else shard.like(value.to(own.device), own)
                    )
        if after_step is not None:
            after_step.restore({k.removeprefix("after/"): file.get_tensor(k) for k in names if k.startswith("after/")})
        metadata = file.metadata()
    return int(metadata["step"]), [CurvePoint.model_validate(point) for point in json.loads(metadata["curve"])]
