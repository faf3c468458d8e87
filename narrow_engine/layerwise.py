"""A model run layer by layer: all batches through one layer, then all of them through the next.

What is held at once is one layer's weights and activations, and the residual stream of all tokens, on the host: 4 bytes × tokens
× hidden. For gradients the streams before every layer are kept, and each layer runs a second time for its backward pass; tokens
are taken in as many groups as that needs. The gradients are exact: nothing but the stream joins layers.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from narrow_engine import memory
from narrow_engine.corpus import Blocks
from narrow_engine.footprint import KEPT, LARGE
from narrow_engine.losses import objective
from narrow_engine.models import head, hidden_states, layers
from narrow_engine.parked import resident

Progress = Callable[[int, int], None]


class Tapped(NamedTuple):
    """Input and output of a projection, or of the experts."""

    inputs: Tensor
    outputs: Tensor
    routing: tuple[Tensor, ...]
    """What experts are called with as well: the numbers and the gates of each token's experts."""


@dataclass
class Call:
    """A layer with the arguments that its model calls it with (masks and position embeddings of one batch shape)."""

    layer: nn.Module
    positional: tuple[Any, ...]
    arguments: dict[str, Any]
    low: torch.dtype = torch.float32
    """What its products are computed in; in float32, as whoever calls it has set."""

    def __call__(self, stream: Tensor) -> Tensor:
        lower = torch.autocast(stream.device.type, self.low) if self.low != torch.float32 else nullcontext()
        with lower:
            out = self.layer(stream, *self.positional, **self.arguments)
        return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]

    def tap(self, stream: Tensor, *names: str) -> tuple[Any, ...]:
        """One pass: the layer's output stream, and then a `Tapped` for each named projection."""
        kept: dict[str, Tapped] = {}

        def keep(name: str) -> Callable[..., None]:
            return lambda _, args, out: kept.__setitem__(name, Tapped(args[0], out, args[1:]))

        hooks = [self.layer.get_submodule(name).register_forward_hook(keep(name)) for name in names]
        try:
            end = self(stream)
        finally:
            for hook in hooks:
                hook.remove()
        return (end, *(kept[name] for name in names))


class _StandIn(nn.Module):
    """Takes a layer's place: keeps what it is called with, and runs nothing."""

    given: Tensor
    call: Call
    gives: Tensor | None = None
    """What it returns instead of what it is given."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = (layer,)  # not as a part of this module

    def __getattr__(self, name: str) -> Any:
        # Some models look at what kind of layer it is.
        return getattr(self.__dict__["layer"][0], name)

    def forward(self, stream: Tensor, *positional: Any, **arguments: Any) -> Tensor:
        self.given, self.call = stream, Call(self.layer[0], positional, arguments)
        return stream if self.gives is None else self.gives


@contextmanager
def _standing_in(model: PreTrainedModel) -> Iterator[list[_StandIn]]:
    whole = layers(model)
    stands, real = [_StandIn(layer) for layer in whole], list(whole)
    try:
        for number, stand in enumerate(stands):
            whole[number] = stand
        yield stands
    finally:
        for number, layer in enumerate(real):
            whole[number] = layer


@torch.no_grad()
def enter(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, list[Call]]:
    """What the first layer receives of tokens [rows, length], embeddings with all that the family does to them; and each layer
    with the arguments of a real pass on tokens of this shape."""
    with _standing_in(model) as stands:
        hidden_states(model, ids)
    return stands[0].given, [stand.call for stand in stands]


def leave(model: PreTrainedModel, ids: Tensor, stream: Tensor) -> Tensor:
    """What the head reads, from the stream after the last layer of tokens [rows, length]."""
    with _standing_in(model) as stands:
        stands[-1].gives = stream
        return hidden_states(model, ids)


def room(shapes: Sequence[torch.Size]) -> list[Tensor]:
    """For streams of these shapes, float32, on the host. If they are large, in a file without a name (in TMPDIR), mapped."""
    counts = [shape.numel() for shape in shapes]
    size = 4 * sum(counts)
    if size <= LARGE * memory.limit(torch.device("cpu")):
        whole = torch.empty(sum(counts))
    else:
        file = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as it is mapped
        # A mapped file has holes, and a disk that is full when one is filled kills the process: now it is only an error.
        os.posix_fallocate(file.fileno(), 0, size)
        whole = torch.from_numpy(np.memmap(file, np.float32, "r+"))
    return [part.view(shape) for part, shape in zip(torch.split(whole, counts), shapes, strict=True)]


def begin(
    model: PreTrainedModel, batches: Sequence[Tensor], low: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[list[Call]]]:
    """The streams of batches of tokens [rows, length] before the first layer, on the host, and each one's calls."""
    hidden = model.get_input_embeddings().weight.shape[1]
    streams = room([torch.Size((*ids.shape, hidden)) for ids in batches])
    calls: dict[torch.Size, list[Call]] = {}
    for ids, stream in zip(batches, streams, strict=True):
        first, found = enter(model, ids.to(model.device))
        stream.copy_(first)
        calls.setdefault(ids.shape, [replace(call, low=low) for call in found])
    return streams, [calls[ids.shape] for ids in batches]


def precision(device: torch.device) -> torch.dtype:
    """What products are computed in where units are scored: on a GPU in bfloat16, as in training, ten times as fast.

    Scores decide nothing but an order, and are sums over tens of thousands of tokens, added up in float64. What a report states
    is measured in float32, and so is the proof that a cut is exact: they run once, and small differences are what they are for.
    """
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@torch.no_grad()
def forwards(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    run: Callable[[Call, Tensor], Tensor],
    progress: Progress,
    at_head: Callable[[Tensor], None] | None = None,
) -> Iterator[int]:
    """Yields the number of each layer that all batches of tokens [rows, length] went through, while its weights are there.

    `run(call, stream)` takes a batch through a layer; in the end, `at_head(hidden)` sees what the head reads of each.
    `progress` is called with (done, total) passes and may raise to stop.
    """
    whole, low = layers(model), precision(model.device)
    streams, calls = begin(model, batches, low)
    total = len(whole) * len(batches)
    for number, layer in enumerate(whole):
        with resident(layer, model.get_input_embeddings().weight):
            for at, stream in enumerate(streams):
                progress(number * len(batches) + at, total)
                stream.copy_(run(calls[at][number], stream.to(model.device)))
            yield number
    for ids, stream in zip(batches, streams if at_head else (), strict=bool(at_head)):
        assert at_head
        at_head(leave(model, ids.to(model.device), stream.to(model.device)))
    progress(total, total)


def backwards(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    run: Callable[[int, int, Call, Tensor, Tensor], None],
    at_head: Callable[[int, Tensor], None],
    progress: Progress,
) -> None:
    """Takes the gradient of the summed next-token loss of batches [rows, length + 1] back through the layers, the last first.

    `run(layer, batch, call, stream, gradient)` takes a batch through a layer, forward from a `stream` that wants a gradient, and
    back from the `gradient` of what comes out. `at_head(batch, hidden)` sees what the head reads, with its gradient. The weights
    should be frozen. `progress` is called with (done, total) passes and may raise to stop.
    """
    whole, low, like = layers(model), precision(model.device), model.get_input_embeddings().weight
    each = max(4 * (len(whole) + 1) * batch[:, 1:].numel() * like.shape[1] for batch in batches)
    together = max(1, int(KEPT * memory.limit(torch.device("cpu"))) // each)
    total, done = 2 * len(whole) * len(batches), 0

    def passes(number: int, count: int) -> Iterator[int]:
        nonlocal done
        with resident(whole[number], like):
            for at in range(count):
                progress(done, total)
                yield at
                done += 1

    for first in range(0, len(batches), together):
        group = batches[first : first + together]
        streams, calls = begin(model, [batch[:, :-1] for batch in group], low)
        kept = [streams]
        for number in range(len(whole)):
            kept.append(room([stream.shape for stream in streams]))
            with torch.no_grad():
                for at in passes(number, len(group)):
                    kept[-1][at].copy_(calls[at][number](kept[-2][at].to(model.device)))
        # From here on it holds the gradients.
        gradients = kept.pop()
        for at, batch in enumerate(group):
            stream = gradients[at].to(model.device).detach().requires_grad_()
            with torch.enable_grad():
                hidden = leave(model, batch[:, :-1].to(model.device), stream)
                hidden.retain_grad()
                rows = hidden.flatten(0, -2)
                loss = objective(rows, head(model), batch[:, 1:].flatten().to(model.device)).total * len(rows)
            loss.backward()  # type: ignore[no-untyped-call]
            at_head(first + at, hidden)
            gradients[at].copy_(gradient_of(stream))
        for number in reversed(range(len(whole))):
            streams = kept.pop()
            for at in passes(number, len(group)):
                stream = streams[at].to(model.device).detach().requires_grad_()
                with torch.enable_grad():
                    run(number, first + at, calls[at][number], stream, gradients[at].to(model.device))
                gradients[at].copy_(gradient_of(stream))
    progress(total, total)


def gradient_of(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def cut_batches(blocks: Blocks, tokens: int, rows: int) -> list[Tensor]:
    """About `tokens` calibration tokens as batches of up to `rows` blocks, [rows, length + 1]."""
    total = max(1, tokens // blocks.length)
    return [blocks.batch(first, min(rows, total - first)) for first in range(0, total, rows)]
