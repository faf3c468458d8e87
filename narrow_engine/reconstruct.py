"""Refit: layer by layer, the cut model learns to follow the base's residual stream. No labels, no backward pass through more
than one layer.

From the first layer to the last, both models run on the calibration tokens. First the cut layer's MLP output
projection W becomes the minimiser of Σ ‖Y − W h‖² + ρ ‖W − W₀‖², where h are the kept neurons' activations *in the cut
model* and Y is what the stream lacks: the base's stream after the layer, less the cut model's stream without the MLP. So
each layer also makes up for what the layers before it, and whole layers that were dropped after it, got wrong. Ridge
pulls towards the kept weights W₀: plain least squares overfits small calibration sets (arXiv 2510.07782).

Experts share the work: what they write adds up. They are solved one after the other, each on the tokens that the cut model
routes to it, for what is lacking with all the others as they are by then. One that no token reaches stays as it is.

Where heads were cut, the attention's output projection is solved first, in the same way. Where hidden dimensions were cut,
so are the projections that read the stream: what they read of it is predicted from the dimensions that are left, x ≈ T x',
and W T takes the place of W; the head too, unless it is the embedding as well. Families that normalise what a
layer writes (Gemma 2) cannot be followed in the stream by a linear solve; there Y is the base's projection output.

Then all weights of the layer are trained a few passes on ‖stream after the base's layer − stream after the cut one‖², from
the cut model's stream, and W is solved once more. Before any recovery that about halves what is lost; what it costs and saves
after one is in docs/explanation/recovery.md.

Of all tokens, three residual streams are held, on the host: the base's before a layer and after it, and the cut model's. What a
layer reads and writes inside is there for a batch at a time, and computed again for each solve.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from narrow_engine.corpus import Blocks
from narrow_engine.families import Dimensions, Family, dimensions
from narrow_engine.footprint import refit_batch
from narrow_engine.layerwise import Call, begin, enter, room
from narrow_engine.models import config_dict, family, output_weight, routed
from narrow_engine.muon import Muon, training_dtype
from narrow_engine.parked import resident
from narrow_engine.plan import Plan
from narrow_engine.sizing import REFIT_PASSES
from narrow_engine.slice import slice_tensor

RIDGE = 1e-3
"""ρ, relative to the mean diagonal of Σ h hᵀ."""

RATE = 0.025
"""The change of a step at the start of a layer's training, relative to the weights: what is right for one model's
weights would wreck another's, which may be ten times smaller."""

EXACT = 1e-9
"""Relative squared error of a layer that has nothing to learn, since nothing in it or before it was cut."""


@torch.no_grad()
def refit(
    base: PreTrainedModel,
    cut: PreTrainedModel,
    plan: Plan,
    blocks: Blocks,
    tokens: int,
    progress: Callable[[int, int], None],
    passes: int = REFIT_PASSES,
    rate: float = RATE,
) -> None:
    """Refits `cut` in place on about `tokens` calibration tokens. `progress` is called with (done, total) layers, before every
    step of training too, and may raise to stop. `passes` is how often training goes through the tokens; 0 is none."""
    table, dims, like = family(base), dimensions(config_dict(base)), base.get_input_embeddings().weight
    rows = max(1, refit_batch(tokens) // blocks.length)
    count = max(1, tokens // blocks.length // rows)
    ids = [blocks.batch(first * rows, rows)[:, :-1] for first in range(count)]
    targets, calls = begin(base, ids)
    base_calls, (_, cut_calls) = calls[0], enter(cut, ids[0].to(cut.device))
    residual_cut = len(plan.residual) < dims.hidden
    streams = room([torch.Size((*batch.shape, len(plan.residual))) for batch in ids])
    for stream, target in zip(streams, targets, strict=True):
        stream.copy_(target[..., plan.residual])
    ends = room([target.shape for target in targets])
    scale = getattr(base.config, table.write_scale_key) if table.write_scale_key else 1.0
    # Layers dropped in front count towards the first kept one, as those behind a kept one do.
    _go(base_calls[: plan.layers[0]], targets, targets, like)
    following = [*plan.layers[1:], len(base_calls)]
    for position, (first, last) in enumerate(zip(plan.layers, following, strict=True)):
        tell = partial(progress, position, len(plan.layers))
        tell()
        _go(base_calls[first:last], targets, ends, like)
        pair = _Pair(base_calls[first], cut_calls[position], table, scale, plan.residual, targets, ends, streams, base.device)
        with resident(pair.base.layer, like):
            if residual_cut:
                _refit_readers(pair, table.readers[0], plan, dims, position)
            if residual_cut or len(plan.heads[0]) < dims.heads:
                _solve_attention(pair)
            if residual_cut:
                _refit_readers(pair, table.readers[1], plan, dims, position)
            _solve_mlp(pair)
            if passes and len(ids) > 1:
                better = _follow(pair, passes, rate, tell)
                if better and not table.writes_normed:
                    _solve_mlp(pair)
        targets, ends = ends, targets
        _go([pair.cut], streams, streams, like)
    if residual_cut and not dims.tied:
        norm = next(t for t in table.outer_tensors if t.is_norm)
        norms = [model.get_submodule(norm.module) for model in (base, cut)]
        sides = (
            tuple(module(side.to(base.device)) for module, side in zip(norms, both, strict=True))
            for both in zip(targets, streams, strict=True)
        )
        cut.get_output_embeddings().weight.copy_(base.get_output_embeddings().weight @ _predictor(sides, plan.residual))
    progress(len(plan.layers), len(plan.layers))


def _go(calls: list[Call], streams: list[Tensor], ends: list[Tensor], like: Tensor) -> None:
    """Takes the streams through layers, one layer after the other, to `ends`."""
    for call in calls:
        with resident(call.layer, like):
            for stream, end in zip(streams, ends, strict=True):
                end.copy_(call(stream.to(like.device)))
        streams = ends


class _Batch(NamedTuple):
    """A batch where it is computed with: the base's stream before the layer, and what is kept of it there and after the layer
    (and those that are dropped behind it); and the cut model's stream before the layer."""

    target: Tensor
    start: Tensor
    end: Tensor
    stream: Tensor


@dataclass
class _Pair:
    """A layer of the base and what is left of it, with the streams of all batches, which are on the host."""

    base: Call
    cut: Call
    table: Family
    scale: float
    residual: list[int]
    targets: list[Tensor]
    ends: list[Tensor]
    streams: list[Tensor]
    device: torch.device

    def batch(self, number: int) -> _Batch:
        target, end, stream = (side[number].to(self.device) for side in (self.targets, self.ends, self.streams))
        return _Batch(target, self.kept(target), self.kept(end), stream)

    def batches(self) -> Iterator[_Batch]:
        return map(self.batch, range(len(self.streams)))

    def kept(self, stream: Tensor) -> Tensor:
        return stream if len(self.residual) == stream.shape[-1] else stream[..., self.residual]


def _refit_readers(pair: _Pair, names: tuple[str, ...], plan: Plan, dims: Dimensions, position: int) -> None:
    """Solves anew the modules of a layer that read the stream together, given what they read in the base."""
    read = ((pair.base.tap(b.target, names[0])[1].inputs, pair.cut.tap(b.stream, names[0])[1].inputs) for b in pair.batches())
    predictor = _predictor(read, plan.residual)
    for tensor in pair.table.layer_tensors:
        if tensor.module in names and tensor.reads:
            weight = pair.base.layer.get_parameter(tensor.name).detach()
            predicted = torch.zeros_like(weight)
            predicted[..., plan.residual] = weight @ predictor
            pair.cut.layer.get_parameter(tensor.name).copy_(slice_tensor(predicted, tensor, pair.table, plan, dims, position))


def _predictor(sides: Iterable[tuple[Tensor, ...]], kept: list[int]) -> Tensor:
    """T, [hidden, kept]: the least-squares map from what the cut model's stream holds to what the base's does, from batches of
    what the base has and what the cut model has."""
    gram = cross = torch.zeros(())
    for wanted, given in sides:
        y, x = wanted.flatten(0, -2), given.flatten(0, -2)
        gram = gram + (x.T @ x).double()
        cross = cross + (y.T @ x).double()
    start = torch.zeros_like(cross)
    start[kept, range(len(kept))] = 1.0
    return ridge_solution(gram, cross, start).float()


def _solve_attention(pair: _Pair) -> None:
    """Solves the attention's output projection for what it wrote in the base, and for what the stream lacks by then."""
    name = pair.table.attention_out

    def wanted(batch: _Batch) -> Tensor:
        written = pair.kept(pair.base.tap(batch.target, name)[1].outputs)
        return written if pair.table.writes_normed else written + (batch.start - batch.stream) / pair.scale

    _solve(pair, name, ((pair.cut.tap(batch.stream, name)[1].inputs, wanted(batch)) for batch in pair.batches()))


def _solve_mlp(pair: _Pair) -> None:
    """Solves the MLP's output projection, or those of the experts, for what the stream after the layer lacks without it."""
    name = pair.table.mlp_out
    if pair.table.router:
        _solve_experts(pair)
        return

    def sides(batch: _Batch) -> tuple[Tensor, Tensor]:
        end, tapped = pair.cut.tap(batch.stream, name)
        if pair.table.writes_normed:
            return tapped.inputs, pair.kept(pair.base.tap(batch.target, name)[1].outputs)
        return tapped.inputs, (batch.end - end) / pair.scale + tapped.outputs

    _solve(pair, name, map(sides, pair.batches()))


def _solve(pair: _Pair, name: str, sides: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Solves a linear module of the cut layer from batches of its inputs h and of wanted outputs Y; its bias stays."""
    module, weight = pair.cut.layer.get_submodule(name), output_weight(pair.cut.layer, pair.table, name)
    bias = module.bias if isinstance(module.bias, Tensor) else torch.zeros((), device=weight.device)
    gram = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)
    cross = torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
    for inputs, wanted in sides:
        h, y = inputs.flatten(0, 1), (wanted - bias).flatten(0, 1)
        gram += (h.T @ h).double()
        cross += (y.T @ h).double()
    weight.copy_(ridge_solution(gram, cross, weight))


def _solve_experts(pair: _Pair) -> None:
    """Solves the experts' projections, one after the other, each on all the tokens that are routed to it. What the experts are
    called with, and what the stream lacks, is on the host."""
    experts = pair.cut.layer.get_submodule(pair.table.mlp_out)
    counts = [stream[..., 0].numel() for stream in pair.streams]
    inputs, lacking = room([torch.Size((sum(counts), pair.streams[0].shape[-1]))] * 2)
    routing = []
    for batch, called, lacks in zip(pair.batches(), torch.split(inputs, counts), torch.split(lacking, counts), strict=True):
        end, tapped = pair.cut.tap(batch.stream, pair.table.mlp_out)
        called.copy_(tapped.inputs)
        lacks.copy_(((batch.end - end) / pair.scale).flatten(0, 1))
        routing.append([part.cpu() for part in tapped.routing])
    chosen, gates = (torch.cat([parts[i] for parts in routing]) for i in range(2))
    for expert, rows, h in routed(experts, inputs, chosen, gates):
        weight = experts.get_parameter("down_proj")[expert]
        wanted = lacking[rows].to(h.device) + h @ weight.T
        weight.copy_(ridge_solution((h.T @ h).double(), (wanted.T @ h).double(), weight))
        lacking[rows] = (wanted - h @ weight.T).to(lacking.device)


def ridge_solution(gram: Tensor, cross: Tensor, weight: Tensor) -> Tensor:
    """The weight nearest to Y hᵀ = W h hᵀ, from Σ h hᵀ and Σ Y hᵀ, that stays near `weight`."""
    ridge = RIDGE * gram.diagonal().mean().clamp(min=1e-12)
    system = gram + ridge * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    solved: Tensor = torch.linalg.solve(system, (cross + ridge * weight.double()).T).T
    return solved


def _follow(pair: _Pair, passes: int, rate: float, tell: Callable[[], None]) -> bool:
    """Trains all of a layer to make the base's streams after it. Returns whether that is kept: the last batch judges and is not
    trained on, and a layer that gets worse on it is put back."""
    call, low = pair.cut, training_dtype(pair.device)
    layer, judge, trained_on = call.layer, pair.batch(-1), len(pair.streams) - 1
    before = {name: parameter.clone() for name, parameter in layer.named_parameters()}
    error = _error(call, judge)
    if error <= EXACT * judge.end.square().mean():
        return False
    optimizers = _optimizers(layer, rate)
    steps = passes * trained_on
    schedules = [LambdaLR(optimizer, lambda step: 1 - step / steps) for optimizer in optimizers]
    for step in range(steps):
        tell()
        batch = pair.batch(step % trained_on)
        with torch.enable_grad(), torch.autocast(pair.device.type, low, enabled=low != torch.float32):
            _error(call, batch).backward()  # type: ignore[no-untyped-call]
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
    better = bool(_error(call, judge) < error)
    if not better:
        for name, parameter in layer.named_parameters():
            parameter.copy_(before[name])
    return better


def _error(call: Call, batch: _Batch) -> Tensor:
    return (call(batch.stream).float() - batch.end).square().mean()


def _optimizers(layer: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices and AdamW for the rest, so that the first steps change a weight by `rate` of its kind's RMS."""
    found: list[torch.optim.Optimizer] = []
    for kind in (True, False):
        parameters = [p for p in layer.parameters() if (p.ndim >= 2) == kind]
        if parameters:
            size = torch.cat([p.detach().flatten() for p in parameters]).square().mean().sqrt().item()
            # A step of Muon has an RMS of 0.2 · its rate, one of AdamW about its rate.
            found.append(
                Muon(parameters, rate * size / 0.2)
                if kind
                else torch.optim.AdamW(parameters, rate * size, (0.9, 0.95), weight_decay=0.0)
            )
    return found
