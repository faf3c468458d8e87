"""Multilayer perceptrons, many at a time, and what the engine does to them.

A network is Linear, ReLU, …, Linear. Networks of one shape live in one module whose products run over all of them, so ten
seeds of a small network cost little more than one. The units that can be cut are the hidden neurons; a neuron's group is its
row of weights, its bias and its column in the next layer. Elimination, ridge and group lasso are the engine's own: this file
is what `families`, `slice`, `reconstruct` and `train` are for language models.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from narrow_engine.importance.reconstruction import eliminate
from narrow_engine.reconstruct import ridge_solution

Kept = list[Tensor]
"""Numbers of the neurons that stay, ascending, for each hidden layer."""


class Networks(nn.Module):
    """`count` networks with layers of `widths`: the inputs, each hidden layer, the outputs. Weights are [count, out, in]."""

    def __init__(self, count: int, widths: tuple[int, ...], seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for into, out in pairwise(widths):
            # What nn.Linear starts from.
            bound = into**-0.5
            self.weights.append((torch.rand(count, out, into, generator=draw) * 2 - 1) * bound)
            self.biases.append((torch.rand(count, out, generator=draw) * 2 - 1) * bound)

    @property
    def count(self) -> int:
        return len(self.biases[0])

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.weights[0].shape[2], *(bias.shape[1] for bias in self.biases))

    def forward(self, inputs: Tensor, masks: list[Tensor] | None = None) -> Tensor:
        """Logits [count, batch, outputs] of inputs [count or 1, batch, in]; `masks` [count, n] of each hidden layer's neurons."""
        return self.layer(len(self.weights) - 1, self.hidden(inputs, masks)[-1])

    def hidden(self, inputs: Tensor, masks: list[Tensor] | None = None) -> list[Tensor]:
        """What each hidden layer gives, [count, batch, n] each."""
        found = [inputs]
        for number in range(len(self.weights) - 1):
            out = self.layer(number, found[-1]).relu()
            found.append(out if masks is None else out * masks[number][:, None])
        return found[1:]

    def layer(self, number: int, inputs: Tensor) -> Tensor:
        """What a layer computes before its ReLU, [count, batch, out]."""
        return torch.baddbmm(self.biases[number][:, None], inputs.expand(self.count, -1, -1), self.weights[number].mT)

    def groups(self) -> list[list[Tensor]]:
        """For each network, and in it each hidden layer, all that belongs to a neuron, neurons first: what `GroupLasso` takes."""
        w, b = [p.detach() for p in self.weights], [p.detach() for p in self.biases]
        return [[w[layer][n], b[layer][n], w[layer + 1][n].mT] for n in range(self.count) for layer in range(len(w) - 1)]


def join(networks: list[Networks]) -> Networks:
    """Networks of one shape as one module."""
    made = Networks(sum(part.count for part in networks), networks[0].widths, 0)
    with torch.no_grad():
        for mine, theirs in zip(made.parameters(), zip(*(part.parameters() for part in networks), strict=True), strict=True):
            mine.copy_(torch.cat(list(theirs)))
    return made


def one(networks: Networks, number: int) -> Networks:
    made = Networks(1, networks.widths, 0)
    with torch.no_grad():
        for mine, theirs in zip(made.parameters(), networks.parameters(), strict=True):
            mine.copy_(theirs[number : number + 1])
    return made


# Losses and what is measured: [count], from logits [count, batch, classes] and targets [count or 1, batch]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    count, batch, _ = logits.shape
    wanted = targets.expand(count, -1)
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view(count, batch).mean(1)


def divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² KL(teacher ‖ network) (Hinton et al., arXiv 1503.02531), the teacher's logits of the same shape."""
    given, made = (teacher / temperature).log_softmax(-1), (logits / temperature).log_softmax(-1)
    return temperature**2 * (given.exp() * (given - made)).sum(-1).mean(1)


def accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits.argmax(-1) == targets).double().mean(1)


# Training


def train(
    networks: Networks,
    rate: float,
    steps: int,
    loss: Callable[[int], Tensor],
    *,
    stop: Callable[[int], bool] = lambda step: False,
    after_step: Callable[[float], None] | None = None,
    epsilon: float = 1e-8,
    clip: float | None = None,
) -> int:
    """Adam at a constant rate on `loss(step)`, the loss of each network [count]; returns the number of steps taken.

    Networks do not see each other: the gradient of the sum is each one's own, and Adam works by element. `stop` is asked before
    each step. `clip` bounds the norm of a single network's gradient.
    """
    optimizer = torch.optim.Adam(networks.parameters(), lr=rate, eps=epsilon)
    for step in range(steps):
        if stop(step):
            return step
        optimizer.zero_grad()
        loss(step).sum().backward()  # type: ignore[no-untyped-call]
        if clip is not None:
            _clip(networks, clip)
        optimizer.step()
        if after_step is not None:
            after_step(rate)
    stop(steps)
    return steps


@torch.no_grad()
def _clip(networks: Networks, most: float) -> None:
    gradients = [p.grad for p in networks.parameters() if p.grad is not None]
    norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
    factor = (most / (norms + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor.view(-1, *[1] * (gradient.ndim - 1)))


# Scores: of each hidden layer's neurons, [count, n]


def attribution(networks: Networks, inputs: Tensor, targets: Tensor) -> list[Tensor]:
    """Mean |h · ∂loss/∂h| over the inputs, as in the paper's code for MNIST."""
    hidden = networks.hidden(inputs)
    losses = cross_entropy(networks.layer(len(hidden), hidden[-1]), targets) * inputs.shape[1]
    slopes = torch.autograd.grad(losses.sum(), hidden)
    return [(h * slope).detach().abs().mean(1) for h, slope in zip(hidden, slopes, strict=True)]


@torch.no_grad()
def ablation(networks: Networks, inputs: Tensor, targets: Tensor) -> list[Tensor]:
    """What the loss rises by, nats, when one neuron alone gives nothing: exact, a forward pass for each neuron."""
    hidden = networks.hidden(inputs)
    start = cross_entropy(networks.layer(len(hidden), hidden[-1]), targets)
    found = []
    for number, h in enumerate(hidden):
        rises = torch.zeros(h.shape[0], h.shape[2])
        for neuron in range(h.shape[2]):
            changed = h.clone()
            changed[:, :, neuron] = 0
            for following in range(number + 1, len(hidden)):
                changed = networks.layer(following, changed).relu()
            rises[:, neuron] = cross_entropy(networks.layer(len(hidden), changed), targets) - start
        found.append(rises)
    return found


def best(scores: Tensor, count: int) -> Tensor:
    """Numbers of the `count` largest, ascending."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


# Cutting


def cut(network: Networks, kept: Kept) -> Networks:
    """A smaller network of the kept neurons of a single one, their weights as they are."""
    everything = [torch.arange(n) for n in network.widths]
    sides = [everything[0], *kept, everything[-1]]
    made = Networks(1, tuple(len(side) for side in sides), 0)
    with torch.no_grad():
        for number, (into, out) in enumerate(pairwise(sides)):
            made.weights[number].copy_(network.weights[number][:, out][:, :, into])
            made.biases[number].copy_(network.biases[number][:, out])
    return made


class Elimination:
    """The order in which neurons of a single network go, and the refit, from one pass over inputs [batch, in] without labels.

    From the last hidden layer to the first: those stay whose activations the layer behind, cut already, can be refitted to
    best (`importance.reconstruction`). In a transformer every layer writes to one stream, so there the order of layers is free.
    """

    def __init__(self, network: Networks, inputs: Tensor) -> None:
        self.network, self.inputs = network, inputs
        with torch.no_grad():
            self.hidden = [h[0] for h in network.hidden(inputs[None])]
        self.grams = [(h.T @ h).double() for h in self.hidden]
        self.last = eliminate([network.weights[-1][0]], [self.grams[-1]], 1)

    def kept(self, size: int) -> Kept:
        """`size` neurons of each hidden layer."""
        found = [best(self.last, size)]
        for number in range(len(self.hidden) - 2, -1, -1):
            scores = eliminate([self.network.weights[number + 1][0][found[0]]], [self.grams[number]], 1)
            found.insert(0, best(scores, size))
        return found

    @torch.no_grad()
    def refitted(self, kept: Kept) -> Networks:
        """The cut network, in which each layer that reads cut neurons computes what it did before as nearly as it can, from what
        the cut network gives it (`reconstruct`)."""
        made = cut(self.network, kept)
        given = self.inputs
        for number in range(len(made.weights)):
            if number:
                inputs = torch.cat([given, torch.ones(len(given), 1)], 1)
                before = self.network.layer(number, self.hidden[number - 1][None])[0]
                outputs = before if number == len(kept) else before[:, kept[number]]
                start = torch.cat([made.weights[number][0], made.biases[number][0][:, None]], 1)
                solved = ridge_solution((inputs.T @ inputs).double(), (outputs.T @ inputs).double(), start).float()
                made.weights[number][0], made.biases[number][0] = solved[:, :-1], solved[:, -1]
            given = made.layer(number, given[None])[0].relu()
        return made
