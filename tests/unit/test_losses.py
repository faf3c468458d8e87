"""Chunked losses are the plain ones: value, parts and gradients, with cap, temperature and mixture."""

import pytest
import torch
import torch.nn.functional as F

from narrow_engine.losses import CHUNK, Head, objective, statistics


def reference(hidden, weight, cap, targets, teacher, share, temperature):
    """The objective written down with torch's own functions on whole logits."""

    def logits(h, w):
        raw = h @ w.T
        return raw if cap is None else cap * torch.tanh(raw / cap)

    z = logits(hidden, weight)
    next_token = F.cross_entropy(z, targets)
    if teacher is None:
        return next_token, next_token, torch.zeros(())
    t = logits(*teacher)
    kl = F.kl_div(F.log_softmax(z / temperature, -1), F.log_softmax(t / temperature, -1), log_target=True, reduction="batchmean")
    return (1 - share) * next_token + share * temperature**2 * kl, next_token, kl


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize(("share", "temperature"), [(0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (1.0, 2.5), (0.3, 0.7)])
@pytest.mark.parametrize("distil", [False, True])
def test_value_and_gradients(cap, share, temperature, distil):
    torch.manual_seed(0)
    count, hidden_size, vocab = 2 * CHUNK + 17, 16, 50
    hidden = torch.randn(count, hidden_size, requires_grad=True)
    weight = torch.randn(vocab, hidden_size, requires_grad=True)
    targets = torch.randint(0, vocab, (count,))
    teacher = (torch.randn(count, 12), torch.randn(vocab, 12)) if distil else None
    share = share if distil else 0.0
    expected, next_token, kl = reference(hidden, weight, cap, targets, teacher, share, temperature)
    wanted = torch.autograd.grad(expected, (hidden, weight))
    found = objective(hidden, Head(weight, cap), targets, teacher and (teacher[0], Head(teacher[1], cap)), share, temperature)
    (found.total * 1.0).backward()
    assert torch.allclose(found.total, expected, rtol=1e-5, atol=1e-6)
    assert found.next_token == pytest.approx(next_token.item(), rel=1e-5)
    assert found.kl == pytest.approx(kl.item(), rel=1e-4, abs=1e-6)
    for got, want in zip((hidden.grad, weight.grad), wanted, strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-6)


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
