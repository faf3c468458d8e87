"""Least-squares refit: what reads the cut units is solved anew, so that the cut model follows the base's residual stream.

Layer by layer, from the first to the last, both models run on the calibration tokens. The cut layer's MLP output
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

No training comes near this per token: at three quarters of the neurons cut it closes most of the gap (bench/quality.py).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from narrow_engine.corpus import Blocks
from narrow_engine.families import Dimensions, Family, dimensions
from narrow_engine.models import config_dict, family, hidden_states, layers, output_weight, routed
from narrow_engine.plan import Plan
from narrow_engine.slice import slice_tensor

RIDGE = 1e-3
"""ρ, relative to the mean diagonal of Σ h hᵀ."""


@torch.no_grad()
def refit(
    base: PreTrainedModel,
    cut: PreTrainedModel,
    plan: Plan,
    blocks: Blocks,
    tokens: int,
    progress: Callable[[int, int], None],
) -> None:
    """Refits `cut` in place on about `tokens` calibration tokens. `progress` is called with (done, total) layers."""
    table = family(base)
    rows = max(1, min(8, 4096 // blocks.length))
    count = max(1, tokens // blocks.length // rows)
    ids = [blocks.batch(first * rows, rows)[:, :-1].to(base.device) for first in range(count)]
    base_calls, cut_calls = _calls(base, ids[0]), _calls(cut, ids[0])
    targets = [_first_stream(base, batch) for batch in ids]
    dims = dimensions(config_dict(base))
    residual_cut = len(plan.residual) < dims.hidden
    attention_cut = residual_cut or len(plan.heads[0]) < dims.heads
    streams = [stream[..., plan.residual] for stream in targets]
    scale = getattr(base.config, table.write_scale_key) if table.write_scale_key else 1.0
    for layer in range(plan.layers[0]):
        # Layers dropped in front count towards the first kept one, as those behind a kept one do.
        targets = [base_calls[layer](stream) for stream in targets]
    following = [*plan.layers[1:], len(base_calls)]
    for position, (first, last) in enumerate(zip(plan.layers, following, strict=True)):
        progress(position, len(plan.layers))
        kept, dropped = base_calls[first], base_calls[first + 1 : last]
        spans = [_span(kept, dropped, stream, table, residual_cut) for stream in targets]
        call = cut_calls[position]
        if residual_cut:
            _refit_readers(kept, call, table, table.readers[0], plan, dims, position, [s.attention_in for s in spans], streams)
        if attention_cut:
            _solve(
                call.layer.get_submodule(table.attention_out),
                output_weight(call.layer, table, table.attention_out),
                (
                    (tapped.inputs, wanted if table.writes_normed else wanted + (span.start[..., plan.residual] - stream) / scale)
                    for span, stream in zip(spans, streams, strict=True)
                    for _, tapped in [call.tap(stream, table.attention_out)]
                    for wanted in [span.attention[..., plan.residual]]
                ),
            )
        if residual_cut:
            _refit_readers(kept, call, table, table.readers[1], plan, dims, position, [s.mlp_in for s in spans], streams)
        module = call.layer.get_submodule(table.mlp_out)
        passes = ((span, *call.tap(stream, table.mlp_out)) for span, stream in zip(spans, streams, strict=True))
        if table.router:
            _solve_experts(module, [(tapped, (span.end[..., plan.residual] - end) / scale) for span, end, tapped in passes])
        else:
            _solve(
                module,
                output_weight(call.layer, table, table.mlp_out),
                (
                    (
                        tapped.inputs,
                        span.mlp[..., plan.residual]
                        if table.writes_normed
                        else (span.end[..., plan.residual] - end) / scale + tapped.outputs,
                    )
                    for span, end, tapped in passes
                ),
            )
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
    ridge = RIDGE * gram.diagonal().mean().clamp(min=1e-12)
    system = gram + ridge * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    solved: Tensor = torch.linalg.solve(system, (cross + ridge * start).T)
    return solved.T.float()


def _solve(module: nn.Module, weight: Tensor, pairs: Any) -> None:
    """Solves a linear module's `weight` [outputs, inputs] from (inputs h, wanted outputs Y) batches; its bias stays."""
    bias = module.bias if module.bias is not None else torch.zeros((), device=weight.device)
    gram = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)
    cross = torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
    for inputs, wanted in pairs:
        h, y = inputs.flatten(0, 1), (wanted - bias).flatten(0, 1)
        gram += (h.T @ h).double()
        cross += (y.T @ h).double()
    weight.copy_(_ridge_solution(gram, cross, weight))


def _solve_experts(experts: nn.Module, batches: list[tuple[Any, Tensor]]) -> None:
    """Solves the experts' projections from (what the experts are called with, what the stream lacks [rows, length, hidden])."""
    tokens = torch.cat([tapped.inputs for tapped, _ in batches])
    chosen, gates = (torch.cat([tapped.routing[i] for tapped, _ in batches]) for i in range(2))
    lacking = torch.cat([lack.flatten(0, 1) for _, lack in batches])
    for expert, rows, h in routed(experts, tokens, chosen, gates):
        weight = experts.get_parameter("down_proj")[expert]
        wanted = lacking[rows] + h @ weight.T
        weight.copy_(_ridge_solution((h.T @ h).double(), (wanted.T @ h).double(), weight))
        lacking[rows] = wanted - h @ weight.T


def _ridge_solution(gram: Tensor, cross: Tensor, weight: Tensor) -> Tensor:
    """The weight nearest to Y hᵀ = W h hᵀ, from Σ h hᵀ and Σ Y hᵀ, that stays near `weight`."""
    ridge = RIDGE * gram.diagonal().mean().clamp(min=1e-12)
    system = gram + ridge * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    solved: Tensor = torch.linalg.solve(system, (cross + ridge * weight.double()).T).T
    return solved


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
