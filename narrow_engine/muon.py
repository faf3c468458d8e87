"""Muon: momentum whose update is orthogonalised, for the weight matrices of a network's layers.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), with Moonshot's scale
0.2 · √max(rows, columns) (arXiv 2502.16982, equation 4), so that learning rate and weight decay mean what they mean for
AdamW. `torch.optim.Muon` iterates in bfloat16, which is several times slower than float32 on a CPU without bfloat16
units; here the iteration runs in whatever is faster, batched over matrices of one shape.
"""

import time
from collections.abc import Iterable, Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from narrow_engine import rounding
from narrow_engine.footprint import BLOCK, NEWTON_STEPS, STACK
from narrow_engine.shard import full, like

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Quintic Newton–Schulz coefficients of the source: fast, to singular values between about 0.7 and 1.2."""


class Muon(torch.optim.Optimizer):
    """Takes matrices, and stacks of them [n, rows, columns] (experts). State: one momentum buffer a parameter. A step leaves the
    update in the gradient. Weights in bfloat16, and their momentum, are rounded by chance (`rounding`)."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(list(parameters), {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                buffer = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
                rounding.lerp_(buffer, parameter.grad, 1 - group["momentum"])
                parameter.grad.lerp_(buffer, group["momentum"])
                for weight, update in _pieces(parameter, parameter.grad):
                    by_shape.setdefault(tuple(sorted(update.shape[-2:])), []).append((weight, update))
            for (shortest, longest), members in by_shape.items():
                for some in _stacks(members):
                    # Of sharded ones (`shard`) each process orthogonalises the whole, and takes its shard of what comes out.
                    stacks = [_wide(full(update)).reshape(-1, shortest, longest) for _, update in some]
                    sizes, device = [len(stack) for stack in stacks], stacks[0].device
                    stacks = [torch.cat(stacks).to(training_dtype(device))]
                    made = orthogonalize(stacks.pop()).float()
                    for (weight, _), update in zip(some, torch.split(made, sizes), strict=True):
                        update = update if weight.shape[-2] <= weight.shape[-1] else update.mT
                        change = like(update.reshape(weight.shape), weight)
                        rounding.add_(weight, change, -group["lr"] * 0.2 * longest**0.5)


def _pieces(parameter: Tensor, update: Tensor) -> list[tuple[Tensor, Tensor]]:
    """A parameter's weights and their update; of a stack of experts, pieces that are not too large."""
    if parameter.ndim < 3 or isinstance(parameter, DTensor):
        return [(parameter, update)]
    count = max(1, STACK // parameter[0].numel())
    return list(zip(torch.split(parameter, count), torch.split(update, count), strict=True))


def _stacks(members: list[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Members in groups of STACK numbers, or one alone."""
    group: list[tuple[Tensor, Tensor]] = []
    for member in members:
        if group and sum(update.numel() for _, update in group) + member[1].numel() > STACK:
            yield group
            group = []
        group.append(member)
    yield group


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT


def orthogonalize(matrices: Tensor) -> Tensor:
    """[n, rows, columns] with rows ≤ columns → matrices with the same singular vectors and singular values near 1; of more than
    BLOCK rows, in equal blocks of rows, each by itself (arXiv 2510.16981, without its steps on whole matrices: what that costs is
    in docs/explanation/recovery.md)."""
    a, b, c = COEFFICIENTS
    stack, rows, columns = matrices.shape
    blocks = -(-rows // BLOCK)
    padding = -rows % blocks
    x = F.pad(matrices, (0, 0, 0, padding)).view(stack * blocks, -1, columns)
    del matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(NEWTON_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.view(stack, rows + padding, columns)[:, :rows]


@cache
def training_dtype(device: torch.device) -> torch.dtype:
    """What matrix products of a training step run in: bfloat16 where that is faster, which only a trial can tell.

    On CPUs with bfloat16 units it is two to five times faster than float32, on others as much slower. Weights,
    gradients' sums and optimizer states are float32 either way.
    """
    if device.type == "cuda":
        return torch.bfloat16
    times = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    # In turn, and the best of many: other work on the machine must not decide, or a run that goes on might go on otherwise.
    # Where bfloat16 is emulated it is many times slower, and a few rounds are enough.
    for done in range(24):
        if done >= 4 and times[torch.bfloat16] > 4 * times[torch.float32]:
            break
        for dtype in times:
            a, b = torch.ones(512, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
            started = time.perf_counter()
            a @ b
            times[dtype] = min(times[dtype], time.perf_counter() - started)
    return torch.bfloat16 if times[torch.bfloat16] * 1.5 < times[torch.float32] else torch.float32
