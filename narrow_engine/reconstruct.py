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
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from narrow_engine.corpus import Blocks
from narrow_engine.families import Dimensions, Family, dimensions
from narrow_engine.models import config_dict, family, hidden_states, layers, output_weight, routed
from narrow_engine.muon import Muon, training_dtype
from narrow_engine.plan import Plan
from narrow_engine.sizing import REFIT_PASSES
from narrow_engine.slice import slice_tensor

RIDGE = 1e-3
"""ρ, relative to the mean diagonal of Σ h hᵀ."""

BATCH, BATCHES = 4096, 8
"""Tokens of a batch at most, and batches at least."""

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
    table = family(base)
    rows = max(1, min(BATCH, tokens // BATCHES) // blocks.length)
    count = max(1, tokens // blocks.length // rows)
    ids = [blocks.batch(first * rows, rows)[:, :-1].to(base.device) for first in range(count)]
    base_calls, cut_calls = _calls(base, ids[0]), _calls(cut, ids[0])
    targets = [_first_stream(base, batch) for batch in ids]
    dims = dimensions(config_dict(base))
    residual_cut = len(plan.residual) < dims.hidden
    streams = [stream[..., plan.residual] for stream in targets]
    scale = getattr(base.config, table.write_scale_key) if table.write_scale_key else 1.0
    for layer in range(plan.layers[0]):
        # Layers dropped in front count towards the first kept one, as those behind a kept one do.
        targets = [base_calls[layer](stream) for stream in targets]
    following = [*plan.layers[1:], len(base_calls)]
    for position, (first, last) in enumerate(zip(plan.layers, following, strict=True)):
        tell = partial(progress, position, len(plan.layers))
        tell()
        kept, dropped, call = base_calls[first], base_calls[first + 1 : last], cut_calls[position]
        spans = [_span(kept, dropped, stream, table, residual_cut) for stream in targets]
        wanted = [_Wanted(*(end[..., plan.residual] for end in (s.start, s.attention, s.mlp, s.end))) for s in spans]
        if residual_cut:
            _refit_readers(kept, call, table, table.readers[0], plan, dims, position, [s.attention_in for s in spans], streams)
        if residual_cut or len(plan.heads[0]) < dims.heads:
            _solve_attention(call, table, scale, wanted, streams)
        if residual_cut:
            _refit_readers(kept, call, table, table.readers[1], plan, dims, position, [s.mlp_in for s in spans], streams)
        _solve_mlp(call, table, scale, wanted, streams)
        if passes and len(ids) > 1:
            better = _follow(call, streams, [w.end for w in wanted], passes, rate, tell)
            if better and not table.writes_normed:
                _solve_mlp(call, table, scale, wanted, streams)
        targets = [span.end for span in spans]
        streams = [call(stream) for stream in streams]
    if residual_cut and not dims.tied:
        norm = next(t for t in table.outer_tensors if t.is_norm)
        inputs = [base.get_submodule(norm.module)(stream) for stream in targets]
        predictor = _predictor(inputs, [cut.get_submodule(norm.module)(stream) for stream in streams], plan.residual)
        cut.get_output_embeddings().weight.copy_(base.get_output_embeddings().weight @ predictor)
    progress(len(plan.layers), len(plan.layers))


def _refit_readers(
    base: "_Call",
    cut: "_Call",
    table: Family,
    names: tuple[str, ...],
    plan: Plan,
    dims: Dimensions,
    position: int,
    wanted: list[Tensor],
    streams: list[Tensor],
) -> None:
    """Solves anew the modules of a layer that read the stream together, given what they read in the base."""
    predictor = _predictor(wanted, (cut.tap(stream, names[0])[1].inputs for stream in streams), plan.residual)
    for tensor in table.layer_tensors:
        if tensor.module in names and tensor.reads:
            weight = base.layer.get_parameter(tensor.name).detach()
            predicted = torch.zeros_like(weight)
            predicted[..., plan.residual] = weight @ predictor
            cut.layer.get_parameter(tensor.name).copy_(slice_tensor(predicted, tensor, table, plan, dims, position))


def _predictor(wanted: Iterable[Tensor], given: Iterable[Tensor], kept: list[int]) -> Tensor:
    """T, [hidden, kept]: the least-squares map from what the cut model's stream holds to what the base's does."""
    gram = cross = torch.zeros(())
    for y, x in zip((t.flatten(0, -2) for t in wanted), (t.flatten(0, -2) for t in given), strict=True):
        gram = gram + (x.T @ x).double()
        cross = cross + (y.T @ x).double()
    start = torch.zeros_like(cross)
    start[kept, range(len(kept))] = 1.0
    return ridge_solution(gram, cross, start).float()


class _Wanted(NamedTuple):
    """The dimensions that are kept of the base's streams and of what its projections wrote."""

    start: Tensor
    attention: Tensor
    mlp: Tensor
    end: Tensor


def _solve_attention(call: "_Call", table: Family, scale: float, wanted: list[_Wanted], streams: list[Tensor]) -> None:
    """Solves the attention's output projection for what it wrote in the base, and for what the stream lacks by then."""
    _solve(
        call.layer.get_submodule(table.attention_out),
        output_weight(call.layer, table, table.attention_out),
        (
            (tapped.inputs, base.attention if table.writes_normed else base.attention + (base.start - stream) / scale)
            for base, stream in zip(wanted, streams, strict=True)
            for _, tapped in [call.tap(stream, table.attention_out)]
        ),
    )


def _solve_mlp(call: "_Call", table: Family, scale: float, wanted: list[_Wanted], streams: list[Tensor]) -> None:
    """Solves the MLP's output projection, or those of the experts, for what the stream after the layer lacks without it."""
    module = call.layer.get_submodule(table.mlp_out)
    ends = ((base, *call.tap(stream, table.mlp_out)) for base, stream in zip(wanted, streams, strict=True))
    if table.router:
        _solve_experts(module, [(tapped, (base.end - end) / scale) for base, end, tapped in ends])
        return
    _solve(
        module,
        output_weight(call.layer, table, table.mlp_out),
        (
            (tapped.inputs, base.mlp if table.writes_normed else (base.end - end) / scale + tapped.outputs)
            for base, end, tapped in ends
        ),
    )


def _solve(module: nn.Module, weight: Tensor, pairs: Any) -> None:
    """Solves a linear module's `weight` [outputs, inputs] from (inputs h, wanted outputs Y) batches; its bias stays."""
    bias = module.bias if module.bias is not None else torch.zeros((), device=weight.device)
    gram = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)
    cross = torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
    for inputs, wanted in pairs:
        h, y = inputs.flatten(0, 1), (wanted - bias).flatten(0, 1)
        gram += (h.T @ h).double()
        cross += (y.T @ h).double()
    weight.copy_(ridge_solution(gram, cross, weight))


def _solve_experts(experts: nn.Module, batches: list[tuple[Any, Tensor]]) -> None:
    """Solves the experts' projections from (what the experts are called with, what the stream lacks [rows, length, hidden])."""
    tokens = torch.cat([tapped.inputs for tapped, _ in batches])
    chosen, gates = (torch.cat([tapped.routing[i] for tapped, _ in batches]) for i in range(2))
    lacking = torch.cat([lack.flatten(0, 1) for _, lack in batches])
    for expert, rows, h in routed(experts, tokens, chosen, gates):
        weight = experts.get_parameter("down_proj")[expert]
        wanted = lacking[rows] + h @ weight.T
        weight.copy_(ridge_solution((h.T @ h).double(), (wanted.T @ h).double(), weight))
        lacking[rows] = wanted - h @ weight.T


def ridge_solution(gram: Tensor, cross: Tensor, weight: Tensor) -> Tensor:
    """The weight nearest to Y hᵀ = W h hᵀ, from Σ h hᵀ and Σ Y hᵀ, that stays near `weight`."""
    ridge = RIDGE * gram.diagonal().mean().clamp(min=1e-12)
    system = gram + ridge * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    solved: Tensor = torch.linalg.solve(system, (cross + ridge * weight.double()).T).T
    return solved


def _follow(call: "_Call", streams: list[Tensor], ends: list[Tensor], passes: int, rate: float, tell: Callable[[], None]) -> bool:
    """Trains all of a layer to make `ends` of `streams`. Returns whether that is kept: the last batch judges and is not
    trained on, and a layer that gets worse on it is put back."""
    layer, low = call.layer, training_dtype(streams[0].device)
    before = {name: parameter.clone() for name, parameter in layer.named_parameters()}
    error = _error(call, streams[-1], ends[-1])
    if error <= EXACT * ends[-1].square().mean():
        return False
    optimizers = _optimizers(layer, rate)
    steps = passes * (len(streams) - 1)
    schedules = [LambdaLR(optimizer, lambda step: 1 - step / steps) for optimizer in optimizers]
    for step in range(steps):
        tell()
        stream, end = streams[step % (len(streams) - 1)], ends[step % (len(streams) - 1)]
        with torch.enable_grad(), torch.autocast(stream.device.type, low, enabled=low != torch.float32):
            _error(call, stream, end).backward()  # type: ignore[no-untyped-call]
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
    better = bool(_error(call, streams[-1], ends[-1]) < error)
    if not better:
        for name, parameter in layer.named_parameters():
            parameter.copy_(before[name])
    return better


def _error(call: "_Call", stream: Tensor, end: Tensor) -> Tensor:
    return (call(stream).float() - end).square().mean()


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


class _Tapped(NamedTuple):
    """Input and output of a projection, or of the experts."""

    inputs: Tensor
    outputs: Tensor
    routing: tuple[Tensor, ...]
    """What experts are called with as well: the numbers and the gates of each token's experts."""


@dataclass
class _Call:
    """A layer with the arguments that its model calls it with (masks and position embeddings of one batch shape)."""

    layer: nn.Module
    positional: tuple[Any, ...]
    arguments: dict[str, Any]

    def __call__(self, stream: Tensor) -> Tensor:
        out = self.layer(stream, *self.positional, **self.arguments)
        return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]

    def tap(self, stream: Tensor, *names: str) -> tuple[Any, ...]:
        """One pass: the layer's output stream, and then a `_Tapped` for each named projection."""
        kept: dict[str, _Tapped] = {}

        def keep(name: str) -> Callable[..., None]:
            return lambda _, args, out: kept.__setitem__(name, _Tapped(args[0], out, args[1:]))

        hooks = [self.layer.get_submodule(name).register_forward_hook(keep(name)) for name in names]
        try:
            end = self(stream)
        finally:
            for hook in hooks:
                hook.remove()
        return (end, *(kept[name] for name in names))


class _Span(NamedTuple):
    """The base from one kept layer up to the next: streams before and after, and what the kept layer reads and writes."""

    start: Tensor
    attention_in: Tensor
    attention: Tensor
    mlp_in: Tensor
    mlp: Tensor
    end: Tensor


def _span(kept: _Call, dropped: list[_Call], start: Tensor, table: Family, readers: bool) -> _Span:
    """What is read is kept only where it is asked for, and else empty."""
    names = [names[0] for names in table.readers] if readers else []
    end, attention, mlp, *read = kept.tap(start, table.attention_out, table.mlp_out, *names)
    for call in dropped:
        end = call(end)
    attention_in, mlp_in = (tapped.inputs for tapped in read) if read else (start[:0], start[:0])
    return _Span(start, attention_in, attention.outputs, mlp_in, mlp.outputs, end)


def _calls(model: PreTrainedModel, ids: Tensor) -> list[_Call]:
    """Each layer with the arguments of a real forward pass on tokens of this shape."""
    found: list[_Call] = []

    def keep(layer: nn.Module, args: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        found.append(_Call(layer, args[1:], arguments))

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers(model)]
    try:
        hidden_states(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    return found


class _Reached(Exception):
    """Ends a forward pass at the first layer."""


def _first_stream(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """What the first layer receives: embeddings with all that the family does to them."""
    kept: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Tensor]) -> None:
        kept.append(args[0])
        raise _Reached

    hook = layers(model)[0].register_forward_pre_hook(stop)
    try:
        hidden_states(model, ids)
    except _Reached:
        pass
    finally:
        hook.remove()
    return kept[0]
