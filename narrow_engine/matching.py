"""Terms that draw the student's insides to the teacher's, layer by layer, in the units that were kept.

The student's layer i came of the teacher's layer `plan.layers[i]`, or, in a student of fresh weights, stands for it: so its
residual stream is compared with that one's, in the kept hidden dimensions, and its query heads with the kept ones.

Streams: the mean over layers and blocks of ‖student − teacher‖² ÷ ‖teacher‖². Attention: the mean over layers, heads and
positions of KL(teacher ‖ student) of where a query looks (MiniLM, arXiv 2002.10957, eq. 2, for every layer and not the last
alone). For the latter the maps must be there, so both models compute their attention unfused: slower, and with memory for each
pair of positions. Both are means over blocks, so that a batch can be taken in pieces.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from narrow_engine.families import Dimensions, dimensions
from narrow_engine.models import config_dict, family, layers
from narrow_engine.plan import Plan
from narrow_engine.spec import Match

SMALLEST = 1e-9
"""Added to probabilities before their logarithm: what is masked has none."""


class Matching:
    """Listens to a forward pass of each model, from `begin` to `loss`."""

    def __init__(self, teacher: PreTrainedModel, student: PreTrainedModel, plan: Plan, weights: Match) -> None:
        self.plan, self.weights, self.listening = plan, weights, False
        self.match: tuple[Match, Dimensions] | None = (weights, dimensions(config_dict(teacher)))
        self.heard: list[tuple[list[Tensor], list[Tensor]]] = []
        self.handles: list[Any] = []
        for model, numbers in ((teacher, plan.layers), (student, range(len(plan.layers)))):
            streams: list[Tensor] = []
            maps: list[Tensor] = []
            self.heard.append((streams, maps))
            for number in numbers:
                layer = layers(model)[number]
                if weights.hidden:
                    self._hook(layer, streams, 0)
                if weights.attention:
                    attention = layer.get_submodule(family(model).attention_out.rpartition(".")[0])
                    self._hook(attention, maps, 1)
                    self.handles.append(attention.register_forward_pre_hook(_without_dropout))

    def _hook(self, module: nn.Module, found: list[Tensor], part: int) -> None:
        """Keeps what a module returns, or a part of it."""

        def keep(_: nn.Module, __: Any, out: Any) -> None:
            if self.listening:
                found.append(out[part] if isinstance(out, tuple) else out)

        self.handles.append(module.register_forward_hook(keep))

    def begin(self) -> None:
        # What a backward pass computes again is not listened to.
        self.listening = True

    def loss(self) -> Tensor:
        """Of the passes since `begin`; it carries the student's gradient."""
        self.listening = False
        (streams, maps), (own_streams, own_maps) = self.heard
        total = torch.zeros((), device=(own_streams or own_maps)[0].device)
        for stream, own in zip(streams, own_streams, strict=True):
            wanted = stream[..., self.plan.residual].float()
            apart = (own.float() - wanted).square().mean((1, 2)) / wanted.square().mean((1, 2))
            total = total + self.weights.hidden / len(streams) * apart.mean()
        for heads, attended, own in zip(self.plan.heads, maps, own_maps, strict=bool(maps)):
            p = attended[:, heads].float()
            apart = (torch.xlogy(p, p) - p * (own.float() + SMALLEST).log()).sum(-1).mean()
            total = total + self.weights.attention / len(maps) * apart
        for found in self.heard:
            found[0].clear()
            found[1].clear()
        return total


def _without_dropout(attention: nn.Module, _: Any) -> None:
    """It would stand in the map."""
    attention.training = False


@contextmanager
def beside(teacher: PreTrainedModel, student: PreTrainedModel, plan: Plan, weights: Match) -> Iterator[Matching]:
    """What training adds to its loss. Both models are as they were once it is over."""
    before = [(model, model.config._attn_implementation) for model in (teacher, student)]
    found = Matching(teacher, student, plan, weights)
    try:
        for model, _ in before if weights.attention else ():
            model.set_attn_implementation("eager")
        yield found
    finally:
        for handle in found.handles:
            handle.remove()
        for model, implementation in before:
            model.set_attn_implementation(implementation)
