"""A model that does not fit: the weights of its layers stay where they are stored, and each layer's are brought to where it
computes for as long as it runs.

Stored they are in the mapped file, in the file's precision: memory that the system fills when it is read and takes back when
others need it. Only the embeddings, the last norm and the head are in memory for good. What reads a parked layer's parameters
outside its pass finds the stored ones, which is what slicing wants: it takes them tensor by tensor. The numbers are those of the
whole model, since no precision is lost on the way up.

A pass over the layers costs a reading of the file. So whatever can should take one layer after the other, each with all its
batches (`layerwise`), within `resident`. Where nothing is parked, bringing does nothing.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


def brought(stored: Tensor, like: Tensor) -> Tensor:
    """A tensor on the device and in the precision of another; itself if it is there."""
    # Changed to the wider type behind the bus, not before it.
    return stored.to(like.device).to(like.dtype)


def bring(parts: Iterable[nn.Module], like: Tensor) -> None:
    """Moves modules' own weights for good: one tensor at a time, so that there is never a second copy of more than that."""
    moved: dict[int, nn.Parameter] = {}
    for part in parts:
        for name, stored in part._parameters.items():
            if stored is not None:
                if id(stored) not in moved:  # what is tied stays tied
                    moved[id(stored)] = nn.Parameter(brought(stored.detach(), like), stored.requires_grad)
                part._parameters[name] = moved[id(stored)]
        for name, value in part._buffers.items():
            # Of the precision that the model needs it in.
            part._buffers[name] = value if value is None else value.to(like.device)


@contextmanager
def resident(layer: nn.Module, like: Tensor) -> Iterator[None]:
    """Has a layer's weights where another tensor is, in its precision, and lets go of them afterwards."""
    stored = [
        (part, name, value)
        for part in layer.modules()
        for name, value in part._parameters.items()
        if value is not None and (value.device != like.device or value.dtype != like.dtype)
    ]
    try:
        for part, name, value in stored:
            # A parameter of its own: what autograd kept of the pass is right whatever comes after.
            part._parameters[name] = nn.Parameter(brought(value.detach(), like), value.requires_grad)
        yield
    finally:
        for part, name, value in stored:
            part._parameters[name] = value


def park(layers: nn.ModuleList, like: Tensor) -> None:
    """Has each layer run where another tensor is, whenever it is called."""
    running: dict[int, ExitStack] = {}

    def begin(layer: nn.Module, _: Any) -> None:
        running[id(layer)] = ExitStack()
        running[id(layer)].enter_context(resident(layer, like))

    def end(layer: nn.Module, *_: Any) -> None:
        running.pop(id(layer)).close()

    for layer in layers:
        layer.register_forward_pre_hook(begin)
        layer.register_forward_hook(end, always_call=True)


def is_parked(layers: nn.ModuleList) -> bool:
    """By the hooks: the weights may be stored as they compute."""
    return any(hook.__qualname__.startswith(park.__qualname__) for hook in layers[0]._forward_pre_hooks.values())
