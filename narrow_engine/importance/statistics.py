"""What the criteria measure: one pass over the calibration tokens that collects everything they are made of.

The units of a layer are read by two projections: neurons by the MLP's output projection, heads by the attention's. At
the input h of each (and with the gradient g of the summed loss with respect to h) a unit u has, at every token, the effect
e = Σ −h·g over its dimensions: the first-order change of the loss if it were set to zero. The criteria differ only in
how they add e, h or the weights up.

Where there are experts, each reads its neurons by a projection of its own, and h is what the tokens that are routed to it
have there, times the router's gate. An expert that no token is routed to has zeros everywhere.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from narrow_engine.corpus import Blocks
from narrow_engine.families import Dimensions, dimensions
from narrow_engine.losses import objective
from narrow_engine.models import config_dict, family, frozen, head, hidden_states, layers, routed


@dataclass
class Reader:
    """Statistics at the input of one output projection. n: its inputs, u: units of its finest kind."""

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
    share: Tensor
    """Σ ‖what the layer writes‖² ÷ Σ ‖the stream after it‖². Scalar."""


def collect(
    model: PreTrainedModel,
    blocks: Blocks,
    tokens: int,
    gradients: bool,
    progress: Callable[[int, int], None],
    grams: bool = True,
) -> list[LayerStatistics]:
    """Statistics of every layer over about `tokens` calibration tokens.

    Without `gradients` the pass is forward only and the effects stay zero. Without `grams`, which take eight bytes times the
    square of the width in every layer, those stay empty. `progress` is called with (done, total) blocks and may raise to stop.
    """
    dims = dimensions(config_dict(model))
    table = family(model)
    found = [_empty(dims, model.device, grams) for _ in range(dims.layers)]
    stream_energy = torch.zeros(dims.layers, 2, dtype=torch.float64)
    taps = [
        (_Tap(layer, table.attention_out, table.attention_out), _Tap(layer, table.mlp_out, table.mlp), _Output(layer))
        for layer in layers(model)
    ]
    total = max(1, tokens // blocks.length)
    # The inputs and outputs of all the readers live at once: about 256 MiB of them.
    rows = max(1, min(8, 2**26 // (dims.layers * (dims.active * dims.width + dims.axis("q") + 2 * dims.hidden) * blocks.length)))
    try:
        with frozen(model):
            for first in range(0, total, rows):
                progress(first, total)
                batch = blocks.batch(first, min(rows, total - first)).to(model.device)
                with torch.set_grad_enabled(gradients):
                    hidden = hidden_states(model, batch[:, :-1]).flatten(0, 1)
                    if gradients:
                        (objective(hidden, head(model), batch[:, 1:].flatten()).total * hidden.shape[0]).backward()  # type: ignore[no-untyped-call]
                with torch.no_grad():
                    for number, ((attention, mlp, stream), layer) in enumerate(zip(taps, found, strict=True)):
                        _add(layer, attention, mlp, dims.heads, dims.kv_heads)
                        written = attention.output.double().square().sum() + mlp.output.double().square().sum()
                        stream_energy[number] += torch.stack([written, stream.output.double().square().sum()]).cpu()
                for row in taps:
                    for tap in row:
                        tap.clear()
            progress(total, total)
    finally:
        for row in taps:
            for tap in row:
                tap.remove()
    for layer, (written, stream_total) in zip(found, stream_energy, strict=True):
        layer.share = written / stream_total
    return found


def _empty(dims: Dimensions, device: torch.device, grams: bool) -> LayerStatistics:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=device)

    def reader(inputs: int, units: int) -> Reader:
        return Reader(zeros(inputs, inputs) if grams else zeros(0, 0), zeros(units), zeros(units))

    return LayerStatistics(
        mlp=[reader(dims.width, dims.width) for _ in range(dims.experts)],
        experts=Experts(*(zeros(dims.experts) for _ in range(4))),
        attention=reader(dims.axis("q"), dims.heads),
        group_effect=zeros(dims.kv_heads),
        group_effect_squared=zeros(dims.kv_heads),
        effect=zeros(),
        effect_squared=zeros(),
        share=zeros(),
    )


def _add(layer: LayerStatistics, attention: "_Tap", mlp: "_Tap", heads: int, kv_heads: int) -> None:
    readers = [(layer.attention, attention)]
    if mlp.routing:
        _add_experts(layer, mlp)
    else:
        readers.insert(0, (layer.mlp[0], mlp))
    for reader, tap in readers:
        _add_gram(reader, tap.input.flatten(0, 1))
    if not attention.output.requires_grad:
        return
    for reader, tap in readers:
        units = reader.effect.shape[0]
        effect = -(tap.input * tap.gradient("input")).reshape(-1, units, tap.input.shape[-1] // units).sum(2).double()
        reader.effect += effect.sum(0)
        reader.effect_squared += effect.square().sum(0)
        if reader is layer.attention:
            groups = effect.reshape(-1, kv_heads, heads // kv_heads).sum(2)
            layer.group_effect += groups.sum(0)
            layer.group_effect_squared += groups.square().sum(0)
    written = attention.output * attention.gradient("output") + mlp.output * mlp.gradient("output")
    whole = -written.sum(2).double()
    layer.effect += whole.sum()
    layer.effect_squared += whole.square().sum()


def _add_gram(reader: Reader, rows: Tensor) -> None:
    if reader.gram.numel():
        reader.gram += (rows.T @ rows).double()


def _add_experts(layer: LayerStatistics, mlp: "_Tap") -> None:
    """What is at the input of an expert's projection follows from what the experts are called with, and the gradient there
    from the one at what they write."""
    slope = mlp.gradient("output").flatten(0, 1) if mlp.output.requires_grad else None
    for expert, tokens, inputs in routed(mlp.reader, mlp.input, *mlp.routing):
        reader, whole = layer.mlp[expert], layer.experts
        weight = mlp.reader.get_parameter("down_proj")[expert]
        _add_gram(reader, inputs)
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

    def __init__(self, layer: nn.Module, reader: str, writer: str) -> None:
        self.reader = layer.get_submodule(reader)
        self.hooks = [
            self.reader.register_forward_pre_hook(self._before),
            layer.get_submodule(writer).register_forward_hook(self._forward),
        ]

    def _before(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # The weights need no gradient, so the first reader's input starts the graph; from there on it is carried along.
        hidden = args[0]
        if torch.is_grad_enabled():
            hidden = hidden if hidden.requires_grad else hidden.detach().requires_grad_(True)
            hidden.retain_grad()
        self.input, self.routing = hidden, args[1:]
        return (hidden, *self.routing)

    def _forward(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if torch.is_grad_enabled():
            output.retain_grad()
        self.output = output

    def gradient(self, side: str) -> Tensor:
        found = getattr(self, side).grad
        assert isinstance(found, Tensor)
        return found

    def clear(self) -> None:
        del self.input, self.routing, self.output

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


class _Output:
    """Keeps a layer's output, the residual stream."""

    output: Tensor

    def __init__(self, module: nn.Module) -> None:
        self.hook = module.register_forward_hook(self._forward)

    def _forward(self, module: nn.Module, args: tuple[Tensor], output: Tensor | tuple[Tensor, ...]) -> None:
        self.output = output[0] if isinstance(output, tuple) else output

    def clear(self) -> None:
        del self.output

    def remove(self) -> None:
        self.hook.remove()
