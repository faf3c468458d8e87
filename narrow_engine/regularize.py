"""Group lasso by proximal steps: training that drives whole neurons to exactly zero.

A neuron's group is all that belongs to it: its gate and up rows (with their biases) and its down column. After each
optimizer step every group is shrunk towards zero by block soft-thresholding, the proximal operator of λ‖group‖
(Yuan & Lin 2006; the penalty of arXiv 2505.15811, section 5), with λ weighted by 1 ÷ the group's norm relative to the
mean (the adaptive lasso, Zou 2006), so that what is small goes and what is large is left almost unbiased.

Two traps, both met in trials: with a fixed λ the groups die in a cliff, hundreds within a few steps, and the adaptive
optimizer's momentum moves dead groups off zero. So λ follows a schedule of the sparsity wanted by now, at each step no
more groups may die than the schedule allows, and a dead group is projected back to zero ever after. Each layer has the
same target, since stock models have one width.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from narrow_engine.families import present
from narrow_engine.models import config_dict, family, layers

WARM, REACHED = 0.1, 0.8
"""The schedule begins after this share of the steps and ends at that one; what is left heals."""
LEAST, MOST = 1e-4, 1e4
"""Bounds of the strength, relative to the learning rate."""


class GroupLasso:
    """An `AfterStep` for `train`: call it after each optimizer step.

    `target` is the share of neurons that must be exactly zero in every layer once REACHED of `steps` are done.
    """

    def __init__(self, model: PreTrainedModel, target: float, steps: int) -> None:
        self.groups = [_parts(model, layer) for layer in range(len(layers(model)))]
        self.target, self.steps, self.taken = target, steps, 0
        width = self.groups[0][0].shape[0]
        self.dead = torch.zeros(len(self.groups), width, dtype=torch.bool, device=model.device)
        self.strength = torch.ones(len(self.groups), device=model.device)

    @property
    def sparsity(self) -> float:
        return self.dead.float().mean().item()

    @torch.no_grad()
    def __call__(self, learning_rate: float) -> None:
        self.taken += 1
        share = (self.taken / self.steps - WARM) / (REACHED - WARM)
        wanted = round(self.target * min(1.0, max(0.0, share)) * self.dead.shape[1])
        final = round(self.target * self.dead.shape[1])
        for layer, parts in enumerate(self.groups):
            dead = self.dead[layer]
            norms = torch.stack([part.square().sum(tuple(range(1, part.ndim))) for part in parts]).sum(0).sqrt()
            shrink = torch.ones_like(norms)
            if share > 0 and int(dead.sum()) < final:
                relative = norms / norms[~dead].mean()
                pull = learning_rate * self.strength[layer] / relative.clamp(min=1e-6)
                shrink = (1 - pull / norms.clamp(min=1e-9)).clamp(min=0.0)
                candidates = ((shrink == 0) & ~dead).nonzero()[:, 0]
                allowed = max(0, wanted - int(dead.sum()))
                late = candidates[norms[candidates].argsort()][allowed:]
                shrink[late] = 0.1
                dead |= shrink == 0
                self._follow(layer, wanted - int(dead.sum()))
            shrink[dead] = 0.0
            for part in parts:
                part.mul_(shrink.view(-1, *[1] * (part.ndim - 1)))

    def _follow(self, layer: int, behind: int) -> None:
        """Strength up while fewer groups are dead than the schedule wants, down while more are about to die."""
        factor = 1.05 if behind > 0 else 0.97
        self.strength[layer] = (self.strength[layer] * factor).clamp(LEAST, MOST)

    def scores(self) -> Tensor:
        """Norms of the groups, [layers, width]: zero for the dead, so that a plan keeps the living."""
        rows = [torch.stack([p.square().sum(tuple(range(1, p.ndim))) for p in parts]).sum(0).sqrt() for parts in self.groups]
        return torch.stack(rows).detach().double()

    def state(self) -> dict[str, Tensor]:
        return {"dead": self.dead.to(torch.uint8), "strength": self.strength, "taken": torch.tensor(self.taken)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.dead.copy_(state["dead"].bool())
        self.strength.copy_(state["strength"])
        self.taken = int(state["taken"])


def _parts(model: PreTrainedModel, layer: int) -> list[Tensor]:
    """Views of the tensors along whose first axis the neurons of a layer lie."""
    table = family(model)
    module = layers(model)[layer]
    return [
        module.get_parameter(tensor.name).movedim(tensor.axes.index("width"), 0)
        for tensor in present(table.layer_tensors, table, config_dict(model))
        if "width" in tensor.axes
    ]
