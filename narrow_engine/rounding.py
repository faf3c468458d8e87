"""Training whose weights, gradients and optimizer states are bfloat16, with no float32 copies: six to eight bytes a parameter
instead of twelve to sixteen.

A bfloat16 has eight significant bits, and a step of training changes a weight by less than the last of them. To the nearest
number, it would be lost every time. Rounded up or down by chance, as far as it is on the way (stochastic rounding; Gupta et al.,
arXiv 1502.02551; Zamirai et al., 2010.06192), it is there on average. So what a step computes, it computes in float32, for a
piece of a tensor at a time, and writes down so: weights, and the moments, which change by a twentieth a step.

Chance is torch's generator, which the training loop seeds by the step: a run that was stopped goes on to the same bits.
Vectors (norms, biases) are few, and stay in float32. What all that costs in loss: docs/explanation/memory.md.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from narrow_engine.footprint import PIECE


def stochastically(value: Tensor) -> Tensor:
    """float32 → bfloat16: each number becomes one of its two neighbours, with the nearer one likelier, and itself on average."""
    # A bfloat16 is the upper half of a float32. What is added to the lower half carries into the upper as often as that is large.
    chance = torch.randint(2**16, value.shape, dtype=torch.int32, device=value.device)
    return chance.add_(value.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32).bfloat16()


def write(target: Tensor, compute: Callable[..., Tensor], *others: Tensor) -> None:
    """`target` becomes what `compute` makes, in float32, of it and of others of its shape, piece by piece."""
    parts = [_own(tensor) for tensor in (target, *others)]
    # Pieces are views along the first dimension: what is turned or cut out of another is not contiguous.
    rows = max(1, PIECE // max(1, parts[0][:1].numel()))
    for pieces in zip(*(torch.split(part, rows) for part in parts), strict=True):
        made = compute(*(piece.to(torch.float32, copy=True) for piece in pieces))
        pieces[0].copy_(stochastically(made.contiguous()) if target.dtype == torch.bfloat16 else made)


def lerp_(target: Tensor, other: Tensor, share: float) -> None:
    """target + share · (other − target), in place."""
    if target.dtype == torch.float32:
        target.lerp_(other, share)
    else:
        write(target, lambda own, towards: own.lerp_(towards, share), other)


def add_(target: Tensor, change: Tensor, alpha: float) -> None:
    """target + alpha · change, in place."""
    if target.dtype == torch.float32:
        target.add_(change, alpha=alpha)
    else:
        write(target, lambda own, by: own.add_(by, alpha=alpha), change)


def _own(tensor: Tensor) -> Tensor:
    """What this process has of a tensor (`shard`)."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) without weight decay, whose weights and moments are rounded by chance."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, betas: tuple[float, float], eps: float = 1e-8) -> None:
        super().__init__(list(parameters), {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            (fast, slow), rate, least = group["betas"], group["lr"], group["eps"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state |= {"step": torch.zeros(()), "mean": torch.zeros_like(parameter), "square": torch.zeros_like(parameter)}
                state["step"] += 1
                taken = int(state["step"])
                size, floor = rate / (1 - fast**taken), (1 - slow**taken) ** 0.5
                write(state["mean"], lambda mean, grad: mean.lerp_(grad, 1 - fast), parameter.grad)  # noqa: B023
                write(state["square"], lambda square, grad: square.lerp_(grad.square_(), 1 - slow), parameter.grad)  # noqa: B023
                write(
                    parameter,
                    lambda weight, mean, square: weight.addcdiv_(mean, square.sqrt_().div_(floor).add_(least), value=-size),  # noqa: B023
                    state["mean"],
                    state["square"],
                )


def narrow_(model: nn.Module) -> None:
    """Makes a model's matrices bfloat16, in place."""
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data = parameter.data.bfloat16()


def widen_(model: nn.Module) -> None:
    """Makes them float32 again, to the same values."""
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
        parameter.grad = None


@contextmanager
def computed_in_float32(model: nn.Module) -> Iterator[None]:
    """Within, a model with bfloat16 weights computes in float32 outside of autocast: a module has copies of its own for a pass.
    Where activations are computed again, no more than one layer's copies exist."""
    handles: list[Any] = []
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            handles.append(module.register_forward_hook(lambda _, __, out: out.float()))
        elif any(parameter.dtype == torch.bfloat16 for parameter in module.parameters(recurse=False)):
            held: dict[str, nn.Parameter] = {}
            handles.append(module.register_forward_pre_hook(partial(_widen_for_a_pass, held)))
            handles.append(module.register_forward_hook(partial(_put_back, held), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _widen_for_a_pass(held: dict[str, nn.Parameter], module: nn.Module, _: Any) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.dtype == torch.bfloat16 and not torch.is_autocast_enabled(parameter.device.type):
            held[name] = parameter
            module._parameters[name] = parameter.float()  # type: ignore[assignment]


def _put_back(held: dict[str, nn.Parameter], module: nn.Module, *_: Any) -> None:
    module._parameters.update(held)
    held.clear()
