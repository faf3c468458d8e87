"""What the criteria measure: one pass over the calibration tokens that collects everything they are made of, layer by layer.

The units of a layer are read by two projections: neurons by the MLP's output projection, heads by the attention's. At
the input h of each (and with the gradient g of the summed loss with respect to h) a unit u has, at every token, the effect
e = Σ −h·g over its dimensions: the first-order change of the loss if it were set to zero. The criteria differ only in
how they add e, h or the weights up.

Where there are experts, each reads its neurons by a projection of its own, and h is what the tokens that are routed to it
have there, times the router's gate. An expert that no token is routed to has zeros everywhere.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from narrow_engine import layerwise
from narrow_engine.corpus import Blocks
from narrow_engine.families import Dimensions, Family, dimensions
from narrow_engine.layerwise import Call, gradient_of
from narrow_engine.models import config_dict, family, frozen, routed

ROWS, VALUES = 8, 2**26
"""Blocks of a batch, and numbers that its taps hold, at most: 256 MiB, and a few times that with what autograd keeps."""


@dataclass
class Reader:
    """Statistics at the input of one output projection. n: its inputs, u: units of its finest kind."""

    energy: Tensor
    """Σ h² over tokens, float64 [n]."""
    gram: Tensor
    """Σ h hᵀ over tokens, float64 [n, n]; empty where it was not asked for."""
    effect: Tensor
    """Σ e over tokens, [u]."""
    effect_squared: Tensor
    """Σ e² over tokens, [u]."""


@dataclass
class Experts:
    """Statistics of a layer's experts, [experts] each; zeros in dense models."""

    tokens: Tensor
    """How many are routed to an expert."""
    output: Tensor
    """Σ ‖what the expert writes‖, the gate included."""
    effect: Tensor
    effect_squared: Tensor

    @property
    def mean_output(self) -> Tensor:
        return self.output / self.tokens.clamp(min=1)


@dataclass
class LayerStatistics:
    mlp: list[Reader]
    """Of each expert: one in dense models."""
    experts: Experts
    attention: Reader
    group_effect: Tensor
    """Σ e of KV groups, [kv_heads]."""
    group_effect_squared: Tensor
    effect: Tensor
    """Σ e of the whole layer, what it writes to the stream set to zero. Scalar, and its square's sum."""
    effect_squared: Tensor
    written: Tensor
    """Σ ‖what the layer writes‖². Scalar."""
    stream: Tensor
    """Σ ‖the stream after it‖². Scalar."""

    @property
    def share(self) -> Tensor:
        return self.written / self.stream


def collect(
    model: PreTrainedModel,
    blocks: Blocks,
    tokens: int,
    gradients: bool,
    progress: Callable[[int, int], None],
    grams: bool = True,
) -> Iterator[LayerStatistics]:
    """Statistics of every layer, from the first to the last, over about `tokens` calibration tokens.

    Without `gradients` the pass is forward only and the effects stay zero; then a layer's statistics come as soon as they are
    known, and those of no other layer exist. With them all come at the end. Without `grams`, which take eight bytes times the
    square of the width, those stay empty. `progress` is called with (done, total) and may raise to stop.
    """
    table, dims = family(model), dimensions(config_dict(model))
    rows = max(1, min(ROWS, VALUES // ((dims.active * dims.width + dims.axis("q") + 2 * dims.hidden) * blocks.length)))
    batches = layerwise.cut_batches(blocks, tokens, rows)
    found = [_empty(dims, model.device, grams) for _ in range(dims.layers if gradients else 1)]

    def forward(call: Call, stream: Tensor) -> Tensor:
        with _taps(call.layer, table) as (attention, mlp):
            output = call(stream)
        _add(found[-1], attention, mlp, output, dims)
        return output

    def there_and_back(number: int, _: int, call: Call, stream: Tensor, gradient: Tensor) -> None:
        with _taps(call.layer, table) as (attention, mlp):
            output = call(stream)
        output.backward(gradient.to(output.dtype))  # type: ignore[no-untyped-call]
        with torch.no_grad():
            _add(found[number], attention, mlp, output, dims)

    with frozen(model):
        if gradients:
            layerwise.backwards(model, batches, there_and_back, lambda *_: None, progress)
            yield from found
            return
        for _ in layerwise.forwards(model, [batch[:, :-1] for batch in batches], forward, progress):
            yield found.pop()
            found.append(_empty(dims, model.device, grams))


def _empty(dims: Dimensions, device: torch.device, grams: bool) -> LayerStatistics:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=device)

    def reader(inputs: int, units: int) -> Reader:
        return Reader(zeros(inputs), zeros(inputs, inputs) if grams else zeros(0, 0), zeros(units), zeros(units))

    return LayerStatistics(
        mlp=[reader(dims.width, dims.width) for _ in range(dims.experts)],
        experts=Experts(*(zeros(dims.experts) for _ in range(4))),
        attention=reader(dims.axis("q"), dims.heads),
        group_effect=zeros(dims.kv_heads),
        group_effect_squared=zeros(dims.kv_heads),
        effect=zeros(),
        effect_squared=zeros(),
        written=zeros(),
        stream=zeros(),
    )


def _add(layer: LayerStatistics, attention: "_Tap", mlp: "_Tap", output: Tensor, dims: Dimensions) -> None:
    layer.written += attention.output.double().square().sum() + mlp.output.double().square().sum()
    layer.stream += output.double().square().sum()
    readers = [(layer.attention, attention)]
    if mlp.routing:
        _add_experts(layer, mlp)
    else:
        readers.insert(0, (layer.mlp[0], mlp))
    for reader, tap in readers:
        _add_moments(reader, tap.input.flatten(0, 1))
    if not attention.output.requires_grad:
        return
    for reader, tap in readers:
        units = reader.effect.shape[0]
        each = -(tap.input.float() * gradient_of(tap.input).float())
        effect = each.reshape(-1, units, tap.input.shape[-1] // units).sum(2).double()
        reader.effect += effect.sum(0)
        reader.effect_squared += effect.square().sum(0)
        if reader is layer.attention:
            groups = effect.reshape(-1, dims.kv_heads, dims.heads // dims.kv_heads).sum(2)
            layer.group_effect += groups.sum(0)
            layer.group_effect_squared += groups.square().sum(0)
    written = sum(tap.output.float() * gradient_of(tap.output).float() for tap in (attention, mlp))
    assert isinstance(written, Tensor)
    whole = -written.sum(2).double()
    layer.effect += whole.sum()
    layer.effect_squared += whole.square().sum()


def _add_moments(reader: Reader, rows: Tensor) -> None:
    rows = rows.float()
    reader.energy += rows.square().sum(0).double()
    if reader.gram.numel():
        reader.gram += (rows.T @ rows).double()


def _add_experts(layer: LayerStatistics, mlp: "_Tap") -> None:
    """What is at the input of an expert's projection follows from what the experts are called with, and the gradient there
    from the one at what they write."""
    slope = gradient_of(mlp.output).flatten(0, 1).float() if mlp.output.requires_grad else None
    for expert, tokens, inputs in routed(mlp.reader, mlp.input.float(), *mlp.routing):
        reader, whole = layer.mlp[expert], layer.experts
        weight = mlp.reader.get_parameter("down_proj")[expert]
        _add_moments(reader, inputs)
        whole.tokens[expert] += len(tokens)
        whole.output[expert] += (inputs @ weight.T).norm(dim=1).double().sum()
        if slope is not None:
            effect = -(inputs * (slope[tokens] @ weight)).double()
            reader.effect += effect.sum(0)
            reader.effect_squared += effect.square().sum(0)
            whole.effect[expert] += effect.sum()
            whole.effect_squared[expert] += effect.sum(1).square().sum()


class _Tap:
    """Keeps the input of a projection, or of the experts, and what is written, with their gradients where there are any."""

    input: Tensor
    routing: tuple[Tensor, ...]
    """What experts are called with as well: the numbers and the gates of each token's experts."""
    output: Tensor

    def __init__(self, reader: nn.Module, writer: nn.Module) -> None:
        self.reader = reader
        self.hooks = [reader.register_forward_pre_hook(self._before), writer.register_forward_hook(self._after)]

    def _before(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.input, self.routing = args[0], args[1:]
        if self.input.requires_grad:
            self.input.retain_grad()

    def _after(self, _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        self.output = output
        if output.requires_grad:
            output.retain_grad()


@contextmanager
def _taps(layer: nn.Module, table: Family) -> Iterator[tuple[_Tap, _Tap]]:
    """Of the attention and of the MLP, for as long as this lasts."""
    attention, mlp, experts = (layer.get_submodule(name) for name in (table.attention_out, table.mlp, table.mlp_out))
    taps = _Tap(attention, attention), _Tap(experts, mlp)
    try:
        yield taps
    finally:
        for tap in taps:
            for hook in tap.hooks:
                hook.remove()
