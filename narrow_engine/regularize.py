"""Group lasso by proximal steps: training that drives whole neurons to exactly zero.

A neuron's group is all that belongs to it: its gate and up rows (with their biases) and its down column. After each
optimizer step every group is shrunk towards zero by block soft-thresholding, the proximal operator of λ_g ‖group‖
(Yuan & Lin 2006; the penalty of arXiv 2505.15811, section 5). The penalty is adaptive (Zou 2006): λ_g falls with the
group's size z = score · norm ÷ norm at the start, so that the scores of the base say where the pressure begins, what is
small goes, and what is large is left almost unbiased.

With a fixed λ the groups die in a cliff, hundreds within a few steps, and where they stop is luck. So the strength
follows the target: with τ the size of the group that is last to go in its layer, λ makes a group of that size decay by
e^−DECAY over the schedule unless the loss holds it up, and at each step exactly as many of the smallest as the schedule
wants by now are set to zero. A dead group is projected back ever after, since an adaptive optimizer's momentum would
move it. Each layer, and each expert of it, has the same target: stock models have one width.
"""

import torch
from torch import Tensor

WARM, REACHED = 0.1, 0.8
"""Groups die between these shares of the steps; before, the optimizer settles, and after, what is left heals."""
DECAY = 3.0


class GroupLasso:
    """An `AfterStep` for `train`: call it after each optimizer step.

    `scores` is [layers × experts, width], larger for neurons that the penalty should spare; `target` is the share of neurons
    that must be exactly zero in every layer, and every expert of it, once REACHED of `steps` are done. `groups` has for each row
    of the scores views of the weights that belong to its neurons, neurons first (`models.along`).
    """

    def __init__(self, groups: list[list[Tensor]], scores: Tensor, target: float, steps: int) -> None:
        self.groups = groups
        self.steps, self.taken = steps, 0
        self.final = round(target * scores.shape[1])
        self.weight = (scores / self.norms().clamp(min=1e-12)).to(torch.float64)
        self.dead = torch.zeros(scores.shape, dtype=torch.bool, device=groups[0][0].device)

    @property
    def sparsity(self) -> float:
        return self.dead.double().mean().item()

    def norms(self) -> Tensor:
        """Of each group: zero for the dead, so that a plan made from it keeps the living."""
        return norms(self.groups)

    @torch.no_grad()
    def __call__(self, learning_rate: float) -> None:
        self.taken += 1
        share = (self.taken / self.steps - WARM) / (REACHED - WARM)
        factor = torch.ones_like(self.weight)
        if share > 0:
            size = self.weight * self.norms()
            if share < 1:
                boundary = size.kthvalue(min(self.final + 1, size.shape[1]), dim=1, keepdim=True).values
                pull = DECAY / (self.steps * (REACHED - WARM)) * (boundary / size.clamp(min=1e-300)).square()
                factor = (1 - pull).clamp(min=0.0)
            wanted = round(self.final * min(1.0, share))
            order = (size * factor).masked_fill(self.dead, -1.0).argsort(dim=1, stable=True)
            self.dead.scatter_(1, order[:, :wanted], True)
        factor[self.dead] = 0.0
        for parts, row in zip(self.groups, factor, strict=True):
            for part in parts:
                part.mul_(row.to(part.dtype).view(-1, *[1] * (part.ndim - 1)))

    def state(self) -> dict[str, Tensor]:
        return {"dead": self.dead.to(torch.uint8), "weight": self.weight, "taken": torch.tensor(self.taken)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.dead.copy_(state["dead"].bool())
        self.weight.copy_(state["weight"])
        self.taken = int(state["taken"])


def norms(groups: list[list[Tensor]]) -> Tensor:
    """Norm of each group, [layers × experts, width]."""
    rows = [torch.stack([_squares(part) for part in parts]).sum(0).sqrt() for parts in groups]
    return torch.stack(rows).detach().double()


def _squares(part: Tensor) -> Tensor:
    return part.reshape(part.shape[0], -1).square().sum(1)
