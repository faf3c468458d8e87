"""Networks of the experiments: many at once are each what it would be alone, and cuts are exact."""

import pytest
import torch
from torch import Tensor

from experiments import networks
from experiments.networks import Elimination, Networks, ablation, attribution, cross_entropy, cut, divergence, join, one, train
from experiments.parity import Parity

WIDTHS = (6, 12, 10, 4)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    return torch.randn(1, 50, 6, generator=draw), torch.randint(0, 4, (1, 50), generator=draw)


def test_a_network_among_others_trains_as_it_would_alone(batch):
    together = Networks(3, WIDTHS, 0)
    alone = one(together, 1)
    for model in (together, alone):
        train(model, 1e-2, 20, lambda _, m=model: cross_entropy(m(batch[0]), batch[1]), clip=0.05)
    assert torch.allclose(together(batch[0])[1], alone(batch[0])[0], atol=1e-5)
    assert not torch.allclose(together(batch[0])[0], together(batch[0])[1], atol=0.1)


def test_joined_networks_are_what_they_were(batch):
    parts = [Networks(1, WIDTHS, seed) for seed in (1, 2)]
    assert torch.allclose(join(parts)(batch[0]), torch.cat([part(batch[0]) for part in parts]))


def test_cut_is_the_same_network_with_the_others_masked(batch):
    network = Networks(1, WIDTHS, 0)
    kept = [torch.tensor([0, 3, 7]), torch.tensor([1, 2, 9])]
    masks = [torch.zeros(1, n).index_fill_(1, rows, 1.0) for n, rows in zip(WIDTHS[1:3], kept, strict=True)]
    small = cut(network, kept)
    assert small.widths == (6, 3, 3, 4)
    assert torch.allclose(small(batch[0]), network(batch[0], masks), atol=1e-6)
    assert not torch.allclose(small(batch[0]), network(batch[0]), atol=0.01)


def test_ablation_is_what_a_mask_costs(batch):
    network = Networks(2, WIDTHS, 0)
    found = ablation(network, *batch)
    start = cross_entropy(network(batch[0]), batch[1])
    for layer, neuron in ((0, 4), (1, 7)):
        masks = [torch.ones(2, n) for n in WIDTHS[1:3]]
        masks[layer][:, neuron] = 0
        rise = cross_entropy(network(batch[0], masks), batch[1]) - start
        assert torch.allclose(found[layer][:, neuron], rise, atol=1e-6)


def test_attribution_is_nothing_for_what_never_speaks_and_is_each_networks_own(batch):
    networks_ = Networks(2, WIDTHS, 0)
    with torch.no_grad():
        networks_.weights[0][:, 3] = 0
        networks_.biases[0][:, 3] = -1
    scores = attribution(networks_, *batch)
    assert (scores[0][:, 3] == 0).all()
    assert (scores[0][:, 4] > 0).all()
    assert torch.allclose(scores[1][1:], attribution(one(networks_, 1), *batch)[1], atol=1e-6)


def test_elimination_spares_one_of_two_copies_and_the_refit_makes_up_for_the_other(batch):
    """A network whose second half repeats the first loses nothing with it."""
    network = Networks(1, WIDTHS, 0)
    with torch.no_grad():
        for layer, half in ((0, 6), (1, 5)):
            network.weights[layer][:, half:] = network.weights[layer][:, :half]
            network.biases[layer][:, half:] = network.biases[layer][:, :half]
    found = Elimination(network, batch[0][0])
    kept = [*found.kept(6)[:1], found.kept(5)[1]]
    assert sorted(neuron % 6 for neuron in kept[0].tolist()) == list(range(6))
    wanted = network(batch[0])
    assert torch.allclose(found.refitted(kept)(batch[0]), wanted, atol=0.05)
    assert not torch.allclose(cut(network, kept)(batch[0]), wanted, atol=0.2)


def test_divergence_is_nothing_from_oneself_and_as_hintons_from_others(batch):
    logits, other = torch.randn(1, 50, 4), torch.randn(1, 50, 4)
    assert divergence(logits, logits, 3.0).abs() < 1e-6
    by_hand = torch.nn.functional.kl_div((logits[0] / 3).log_softmax(1), (other[0] / 3).softmax(1), reduction="batchmean")
    assert torch.allclose(divergence(logits, other, 3.0)[0], 9 * by_hand, atol=1e-5)


def test_parity_answers_are_the_parity_of_the_bits_that_are_asked_for():
    task = Parity(bits=9, subtasks=3, each=3)
    codes = [(1,), (0, 2)]
    inputs, answers = task.batch(codes, 40, 2, torch.Generator().manual_seed(0))
    assert inputs.shape == (2, 80, 12)
    for code, rows in ((codes[0], slice(0, 40)), (codes[1], slice(40, 80))):
        asked = [3 + subtask * 3 + bit for subtask in code for bit in range(3)]
        assert torch.equal(answers[:, rows], inputs[:, rows][:, :, asked].sum(2).long() % 2)
        control = torch.zeros(3).index_fill_(0, torch.tensor(code), 1.0)
        assert (inputs[:, rows, :3] == control).all()


def test_training_stops_when_it_is_told_to(batch):
    model = Networks(1, WIDTHS, 0)
    asked = []

    def stop(step: int) -> bool:
        asked.append(step)
        return step == 3

    assert train(model, 1e-3, 10, lambda _: cross_entropy(model(batch[0]), batch[1]), stop=stop) == 3
    assert asked == [0, 1, 2, 3]
    assert networks.accuracy(model(batch[0]), model(batch[0]).argmax(-1)).item() == 1
