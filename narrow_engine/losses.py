"""Losses on hidden states that never hold all the logits, and the statistics that measuring needs.

At a vocabulary of 150,000 the logits of one batch take gigabytes, several times over. Here they exist for a chunk of
positions at a time. The gradient is computed in the same pass, chunk by chunk: softmax − target is known as soon as the
logits are, so nothing of the vocabulary's size is kept for the backward pass.

One function covers the three objectives: (1 − share) · cross-entropy + share · T² · a divergence of base and student at
temperature T (Hinton et al., arXiv 1503.02531, section 2). A model that caps its logits (Gemma 2) trains on the capped ones.

Where of the base only its likeliest tokens and the mass of all others are known (`Top`), the divergence is that of the two
distributions in which the others are one token. That is also the divergence from the base which spreads this mass as the
student spreads its own, and so is its gradient, since no divergence sees more than ratios: nothing else has to change.

With p the base's probabilities, q the student's and g = ∂L/∂q, the gradient of any divergence L in the student's logits is
q ⊙ (g − Σ q g); of KL(p ‖ q) that is q − p.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from narrow_engine.spec import MIXTURE, Divergence

LEAST = 1e-30
"""Mass that is taken for granted where rounding leaves none, so that its logarithm stays finite."""
CHUNK = 256
"""Positions whose logits exist at once; 128 to 256 measured fastest on CPU at a vocabulary of 8,192."""


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits: weight [vocab, hidden], and the cap c of c · tanh(z / c) if there is one."""

    weight: Tensor
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """[positions, hidden] → float32 [positions, vocab]."""
        raw = (hidden @ self.weight.to(hidden.dtype).T).float()
        return raw if self.softcap is None else raw.div_(self.softcap).tanh_().mul_(self.softcap)


@dataclass(frozen=True)
class Top:
    """The teacher's likeliest tokens at each position: their numbers, [positions, k], and log-probabilities, [positions, k + 1],
    of which the last is that of all others together."""

    tokens: Tensor
    log_probability: Tensor


Told = tuple[Tensor, Head] | Top
"""What a teacher says at each position: its hidden states [positions, hidden] and its head, or its likeliest tokens."""


@dataclass(frozen=True)
class Losses:
    """Means over positions, in nats. `total` carries the gradient."""

    total: Tensor
    next_token: float
    divergence: float


def objective(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    teacher: Told | None = None,
    share: float = 0.0,
    temperature: float = 1.0,
    divergence: Divergence = "kl",
    mixture: float | None = None,
) -> Losses:
    """The training loss of hidden states [positions, hidden] against targets [positions].

    `teacher` is what was told at the same positions, a `Top` at this temperature; `share` is the weight of the divergence from
    it, and `mixture` the β or α that the divergence has.
    """
    if mixture is None:
        mixture = MIXTURE.get(divergence, 0.0)
    total, parts = _Objective.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.softcap, targets, teacher, share, temperature, divergence, mixture
    )
    return Losses(total, *parts.tolist())


class _Objective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        softcap: float | None,
        targets: Tensor,
        teacher: Told | None,
        share: float,
        temperature: float,
        divergence: Divergence,
        mixture: float,
    ) -> tuple[Tensor, Tensor]:
        # One cast of the weights, not one a chunk.
        head, count = Head(weight.detach().to(hidden.dtype), softcap), hidden.shape[0]
        if isinstance(teacher, tuple):
            states, given = teacher
            teacher = states, Head(given.weight.detach().to(states.dtype), given.softcap)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        sums = torch.zeros(2, dtype=torch.float64, device=hidden.device)
        for at in range(0, count, CHUNK):
            rows = hidden[at : at + CHUNK]
            logits = head.logits(rows)
            slope = None if softcap is None else 1 - (logits / softcap).square()
            grad, next_token, apart = _chunk(
                logits,
                targets[at : at + CHUNK],
                _part(teacher, at),
                share,
                temperature,
                divergence,
                mixture,
            )
            sums[0] += next_token
            sums[1] += apart
            if slope is not None:
                grad *= slope
            grad = grad.div_(count).to(rows.dtype)
            grad_hidden[at : at + CHUNK] = grad @ head.weight
            grad_weight += grad.T @ rows
        # Not as saved tensors: those are held until after the backward pass, and the weight's gradient would be copied.
        ctx.grads = grad_hidden, grad_weight.to(weight.dtype)
        parts = sums / count
        ctx.mark_non_differentiable(parts)
        return ((1 - share) * parts[0] + share * temperature**2 * parts[1]).to(torch.float32), parts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.grads
        del ctx.grads
        return grad_hidden.mul_(grads[0]), grad_weight.mul_(grads[0]), *[None] * 7


def _part(teacher: Told | None, at: int) -> Tensor | Top | None:
    """Of a chunk: the teacher's logits, or its likeliest tokens."""
    if isinstance(teacher, Top):
        return Top(teacher.tokens[at : at + CHUNK], teacher.log_probability[at : at + CHUNK])
    return teacher and teacher[1].logits(teacher[0][at : at + CHUNK])


def _chunk(
    logits: Tensor,
    targets: Tensor,
    base: Tensor | Top | None,
    share: float,
    temperature: float,
    divergence: Divergence,
    mixture: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient in the logits, sum of cross-entropies and sum of divergences of one chunk. Overwrites `logits` and `base`."""
    wanted = targets[:, None]
    probability, log_sum = _softmax(logits)
    next_token = (log_sum - logits.gather(1, wanted)).sum()
    minus_one = -torch.ones_like(log_sum)
    if base is None:
        return probability.scatter_add_(1, wanted, minus_one), next_token, next_token.new_zeros(())
    soft, soft_log_sum = probability, log_sum
    if temperature != 1:
        soft, soft_log_sum = _softmax(logits.div_(temperature))
    if isinstance(base, Top):
        target, ratio = _spread(base, soft, logits, soft_log_sum)
    else:
        target, base_log_sum = _softmax(base.div_(temperature) if temperature != 1 else base)
        ratio = base.sub_(logits).add_(soft_log_sum - base_log_sum)
    apart, grad = _DIVERGENCES[divergence](target, soft, ratio, mixture)
    grad.mul_(share * temperature)
    if share < 1:
        grad.add_(probability.scatter_add_(1, wanted, minus_one), alpha=1 - share)
    return grad, next_token, apart


def _spread(top: Top, q: Tensor, logits: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor]:
    """p and log(p ÷ q), [n, vocab] each, of a p that is `top` and shares what is left among all other tokens as q does."""
    log_p, log_rest = torch.split(top.log_probability.float(), [top.tokens.shape[1], 1], 1)
    own_rest = torch.scatter(q, 1, top.tokens, 0.0)
    rest = log_rest - own_rest.sum(1, keepdim=True).clamp_min(LEAST).log()
    p = own_rest.mul_(rest.exp()).scatter_(1, top.tokens, log_p.exp())
    return p, rest.expand_as(q).scatter(1, top.tokens, log_p - logits.gather(1, top.tokens) + log_sum)


def _kl(p: Tensor, q: Tensor, ratio: Tensor, _: float) -> tuple[Tensor, Tensor]:
    """KL(p ‖ q)."""
    return ratio.mul_(p).sum(), torch.sub(q, p, out=p)


def _reverse_kl(p: Tensor, q: Tensor, ratio: Tensor, _: float) -> tuple[Tensor, Tensor]:
    """KL(q ‖ p), of MiniLLM (arXiv 2306.08543). g = log(q ÷ p) + 1."""
    weighted = ratio.mul_(q).neg_()
    return weighted.sum(), _through_softmax(q, weighted)


def _js(p: Tensor, q: Tensor, ratio: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """β KL(p ‖ m) + (1 − β) KL(q ‖ m) with m = βp + (1 − β)q, of GKD (arXiv 2306.13649). g = (1 − β) log(q ÷ m)."""
    of_base = beta * _log_part(ratio, beta, 1 - beta).mul_(p).sum()
    weighted = _log_part(ratio.neg_(), 1 - beta, beta).mul_(q).mul_(1 - beta)
    return of_base + weighted.sum(), _through_softmax(q, weighted)


def _skew_kl(p: Tensor, q: Tensor, ratio: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """KL(p ‖ m) with m = αp + (1 − α)q, of DistiLLM (arXiv 2402.03898). g = −(1 − α) p ÷ m, and q ⊙ g = −(1 − α) p q ÷ m."""
    part = _log_part(ratio, alpha, 1 - alpha)
    student = torch.sub(part, ratio, out=ratio).exp_()
    return part.mul_(p).sum(), _through_softmax(q, student.mul_(p).mul_(alpha - 1))


def _skew_reverse_kl(p: Tensor, q: Tensor, ratio: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """KL(q ‖ m) with m = (1 − α)p + αq, of DistiLLM too. g = log(q ÷ m) + 1 − α q ÷ m."""
    part = _log_part(ratio.neg_(), alpha, 1 - alpha)
    share = torch.add(part, math.log(alpha), out=ratio).exp_()
    weighted = part.mul_(q)
    return weighted.sum(), _through_softmax(q, weighted.addcmul_(q, share, value=-1))


def _log_part(ratio: Tensor, own: float, other: float) -> Tensor:
    """log(x ÷ m) with m = own · x + other · y, from log(x ÷ y)."""
    return F.softplus(math.log(other) - math.log(own) - ratio).add_(math.log(own)).neg_()


def _through_softmax(q: Tensor, weighted: Tensor) -> Tensor:
    """q ⊙ (g − Σ q g) from q ⊙ g, in place. What is the same for all tokens in g makes no difference and can be left out."""
    return weighted.addcmul_(q, weighted.sum(1, keepdim=True), value=-1)


_DIVERGENCES: dict[Divergence, Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {
    "kl": _kl,
    "reverse_kl": _reverse_kl,
    "js": _js,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": _skew_reverse_kl,
}
"""Each takes p, q and log(p ÷ q), all [n, vocab], and its β or α. It gives the sum over positions and the gradient in the
student's logits, and may overwrite all but q. p ÷ q can be beyond any float; its logarithm is not, so mixtures start there."""


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax [n, vocab] and log-sum-exp [n, 1]. (torch.logsumexp is an order of magnitude slower on CPU.)"""
    top = logits.amax(1, keepdim=True)
    exponential = (logits - top).exp_()
    total = exponential.sum(1, keepdim=True)
    return exponential.div_(total), total.log_().add_(top)


@torch.no_grad()
def likeliest(hidden: Tensor, head: Head, count: int, temperature: float = 1.0) -> Top:
    """The `count` likeliest tokens of hidden states [positions, hidden], at a temperature."""
    head = Head(head.weight.to(hidden.dtype), head.softcap)
    found = []
    for rows in torch.split(hidden, CHUNK):
        logits = head.logits(rows).div_(temperature)
        highest = logits.topk(count, 1)
        log_sum = _softmax(logits)[1]
        rest = (logits - log_sum).exp_().scatter_(1, highest.indices, 0.0).sum(1, keepdim=True).clamp_min(LEAST).log()
        found.append((highest.indices, torch.cat([highest.values - log_sum, rest], 1)))
    return Top(*(torch.cat(parts) for parts in zip(*found, strict=True)))


@dataclass(frozen=True)
class Statistics:
    """Of each position: cross-entropy, KL from the base, and whether both predict the same token. [positions] each."""

    loss: Tensor
    kl: Tensor
    agree: Tensor


@torch.no_grad()
def statistics(base: tuple[Tensor, Head], others: list[tuple[Tensor, Head]], targets: Tensor) -> list[Statistics]:
    """Statistics of the base and then of each of `others`, all at the same positions."""
    chunks: list[list[Statistics]] = []
    for at in range(0, targets.shape[0], CHUNK):
        wanted = targets[at : at + CHUNK, None]
        base_logits = base[1].logits(base[0][at : at + CHUNK])
        base_probability, base_log_sum = _softmax(base_logits)
        base_top = base_logits.argmax(1)
        loss = (base_log_sum - base_logits.gather(1, wanted))[:, 0]
        row = [Statistics(loss, torch.zeros_like(loss), torch.ones_like(base_top, dtype=torch.bool))]
        for hidden, head in others:
            logits = head.logits(hidden[at : at + CHUNK])
            _, log_sum = _softmax(logits)
            kl = (base_probability * (base_logits - logits)).sum(1) + (log_sum - base_log_sum)[:, 0]
            row.append(Statistics((log_sum - logits.gather(1, wanted))[:, 0], kl, logits.argmax(1) == base_top))
        chunks.append(row)
    return [
        Statistics(*(torch.cat([getattr(row[i], field) for row in chunks]) for field in ("loss", "kl", "agree")))
        for i in range(1 + len(others))
    ]
