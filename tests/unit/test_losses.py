"""Chunked losses are the plain ones: value, parts and gradients, with cap, temperature, share and every divergence."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from narrow_engine.footprint import CHUNK
from narrow_engine.losses import Head, likeliest, objective, statistics


def divergence(kind, p, q, mixture):
    """Mean over positions, from log-probabilities of the base and the student, as the papers write it."""

    def kl(a, b):
        return (a.exp() * (a - b)).sum(-1).mean()

    def mixed(share):
        return torch.logaddexp(p + math.log(share), q + math.log(1 - share))

    if kind == "js":
        beta = mixture or 0.5
        return beta * kl(p, mixed(beta)) + (1 - beta) * kl(q, mixed(beta))
    alpha = mixture or 0.1
    return {
        "kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "skew_kl": lambda: kl(p, mixed(alpha)),
        "skew_reverse_kl": lambda: kl(q, mixed(1 - alpha)),
    }[kind]()


def reference(hidden, weight, cap, targets, teacher, share, temperature, kind, mixture):
    """The objective written down with torch's own functions on whole logits, in float64, and its gradients."""
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))

    def logits(h, w):
        raw = h @ w.T
        return raw if cap is None else cap * torch.tanh(raw / cap)

    z = logits(hidden, weight)
    total = next_token = F.cross_entropy(z, targets)
    apart = torch.zeros(())
    if teacher is not None:
        base = logits(*(tensor.double() for tensor in teacher))
        apart = divergence(kind, F.log_softmax(base / temperature, -1), F.log_softmax(z / temperature, -1), mixture)
        total = (1 - share) * next_token + share * temperature**2 * apart
    return total, next_token, apart, torch.autograd.grad(total, (hidden, weight))


DIVERGENCES = [
    ("kl", None),
    ("reverse_kl", None),
    *itertools.product(("js", "skew_kl", "skew_reverse_kl"), (None, 0.7)),
]


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize(("share", "temperature"), [(0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (1.0, 2.5), (0.3, 0.7)])
@pytest.mark.parametrize(("kind", "mixture"), [(None, None), *DIVERGENCES])
def test_value_and_gradients(cap, share, temperature, kind, mixture):
    torch.manual_seed(0)
    count, hidden_size, vocab = 2 * CHUNK + 17, 16, 50
    hidden = torch.randn(count, hidden_size, requires_grad=True)
    weight = torch.randn(vocab, hidden_size, requires_grad=True)
    targets = torch.randint(0, vocab, (count,))
    teacher, share = ((torch.randn(count, 12), torch.randn(vocab, 12)), share) if kind else (None, 0.0)
    expected, next_token, apart, wanted = reference(hidden, weight, cap, targets, teacher, share, temperature, kind, mixture)
    found = objective(
        hidden,
        Head(weight, cap),
        targets,
        teacher and (teacher[0], Head(teacher[1], cap)),
        share,
        temperature,
        kind or "kl",
        mixture,
    )
    (found.total * 1.0).backward()
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    assert found.next_token == pytest.approx(next_token.item(), rel=1e-5)
    assert found.divergence == pytest.approx(apart.item(), rel=1e-4, abs=1e-6)
    for got, want in zip((hidden.grad, weight.grad), wanted, strict=True):
        assert torch.allclose(got.double(), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("share", "temperature"), [(1.0, 1.0), (0.4, 2.5)])
@pytest.mark.parametrize("count", [1, 7, 49])
@pytest.mark.parametrize(("kind", "mixture"), DIVERGENCES)
def test_of_the_likeliest_tokens_all_others_are_one(kind, mixture, count, share, temperature):
    torch.manual_seed(1)
    positions, vocab = CHUNK + 5, 50
    hidden, base = torch.randn(positions, 16, requires_grad=True), torch.randn(positions, vocab)
    weight, targets = torch.randn(vocab, 16, requires_grad=True), torch.randint(0, vocab, (positions,))
    told = likeliest(base, Head(torch.eye(vocab)), count, temperature)
    assert torch.equal(told.tokens, base.topk(count).indices)

    def binned(log_p):
        known = log_p.gather(1, told.tokens)
        rest = log_p.masked_fill(torch.zeros_like(log_p, dtype=torch.bool).scatter(1, told.tokens, True), -torch.inf)
        return torch.cat([known, rest.logsumexp(1, keepdim=True)], 1)

    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    logits = wide[0] @ wide[1].T
    p, q = (binned(F.log_softmax(z / temperature, -1)) for z in (base.double(), logits))
    apart = divergence(kind, p, q, mixture)
    expected = (1 - share) * F.cross_entropy(logits, targets) + share * temperature**2 * apart
    wanted = torch.autograd.grad(expected, wide)
    found = objective(hidden, Head(weight), targets, told, share, temperature, kind, mixture)
    found.total.backward()
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    assert found.divergence == pytest.approx(apart.item(), rel=1e-3, abs=1e-5)
    for got, want in zip((hidden.grad, weight.grad), wanted, strict=True):
        assert torch.allclose(got.double(), want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "mixture"),
    [*DIVERGENCES, *itertools.product(("js", "skew_kl", "skew_reverse_kl"), (1e-6, 1 - 1e-6))],
)
def test_divergences_hold_where_probabilities_underflow(kind, mixture):
    torch.manual_seed(2)
    count, vocab = 64, 12
    hidden, base = (1e4 * torch.randint(-1, 2, (count, vocab)).float() for _ in range(2))
    hidden.requires_grad_()
    weight = torch.eye(vocab, requires_grad=True)
    targets = torch.zeros(count, dtype=torch.long)
    expected, *_, (wanted, _) = reference(hidden, weight, None, targets, (base, torch.eye(vocab)), 1.0, 1.0, kind, mixture)
    found = objective(hidden, Head(weight), targets, (base, Head(torch.eye(vocab))), 1.0, 1.0, kind, mixture)
    found.total.backward()
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    assert torch.allclose(hidden.grad.double(), wanted, rtol=1e-4, atol=1e-6 * max(1, wanted.abs().max().item()))
    assert weight.grad.isfinite().all()


def test_statistics_are_those_of_whole_logits():
    torch.manual_seed(1)
    count, vocab = CHUNK + 9, 40
    sides = [(torch.randn(count, 8), Head(torch.randn(vocab, 8))) for _ in range(3)]
    targets = torch.randint(0, vocab, (count,))
    base, *others = [side[0] @ side[1].weight.T for side in sides]
    found = statistics(sides[0], sides[1:], targets)
    assert torch.allclose(found[0].loss, F.cross_entropy(base, targets, reduction="none"), atol=1e-4)
    assert found[0].agree.all()
    for other, got in zip(others, found[1:], strict=True):
        kl = F.kl_div(other.log_softmax(-1), base.log_softmax(-1), log_target=True, reduction="none").sum(-1)
        assert torch.allclose(got.kl, kl, atol=1e-4)
        assert torch.equal(got.agree, other.argmax(-1) == base.argmax(-1))
        assert torch.allclose(got.loss, F.cross_entropy(other, targets, reduction="none"), atol=1e-4)
