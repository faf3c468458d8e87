"""The shape under a budget: what costs nothing goes first, what was asked for is kept, and machines are asked."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_config, tiny_model

from narrow_engine import importance, speed
from narrow_engine.allocate import allocate, interpolate, open_workshop
from narrow_engine.corpus import Blocks, Documents
from narrow_engine.errors import NarrowError
from narrow_engine.families import dimensions
from narrow_engine.models import config_dict, layers
from narrow_engine.report.model import Trial
from narrow_engine.sizing import parameters, shrink
from narrow_engine.spec import CompressionSpec


@pytest.fixture(scope="module")
def redundant():
    """A model of whose neurons two thirds are copies, and text of its own making, which only it predicts best."""
    model = tiny_model("llama", initializer_range=0.3, vocab_size=320, hidden_size=32)
    with torch.no_grad():
        for layer in layers(model):
            for part in (layer.mlp.gate_proj, layer.mlp.up_proj):
                part.weight[16:32], part.weight[32:] = part.weight[:16], part.weight[:16]
                part.bias[16:32], part.bias[32:] = part.bias[:16], part.bias[:16]
            layer.mlp.down_proj.weight *= 3
        model.model.norm.weight *= 4
        ids = torch.randint(0, 320, (200, 1), generator=torch.Generator().manual_seed(0))
        for _ in range(64):
            chances = model(ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=torch.Generator().manual_seed(ids.shape[1]))], 1)
    tokens = ids.numpy().astype(np.uint32)
    text = Documents(tokens.flatten(), np.arange(0, tokens.size + 1, 65), np.arange(200, dtype=np.uint64))
    return model, text


def shop(redundant, tmp_path, budget, units=("neuron", "head", "layer"), recover=0):
    model, text = redundant
    spec = CompressionSpec.model_validate(
        {
            "base": {"path": "base"},
            "target": {"path": "target"},
            "budget": budget,
            "block_tokens": 32,
            "method": {
                "units": list(units),
                "multiple": 4,
                "calibration_tokens": 4096,
                "recover": {"tokens": recover, "batch_tokens": 256},
            },
        }
    )
    found = importance.collect(model, Blocks(text.tokens, 32, 0), 2048, False, lambda *_: None)
    scores = importance.CRITERIA["reconstruction"](model, found, 0)
    return open_workshop(spec, config_dict(model), 4, None, model, scores, text, tmp_path / "trials.json", lambda *_: None)


def share(model, keep):
    config = config_dict(model)
    return parameters(config, shrink(dimensions(config), keep)) / parameters(config, dimensions(config))


def test_what_costs_nothing_is_cut_first(redundant, tmp_path):
    made, told = allocate(shop(redundant, tmp_path, {"parameters": 0.75}, units=["neuron", "head"]))
    assert made.keep["head"] == 4
    assert made.keep["neuron"] < 32
    assert share(redundant[0], made.keep) <= 0.75
    assert made.sensitivity["neuron"][1].refitted < 0.1 * made.sensitivity["head"][0].refitted
    assert len(made.trials) > 1
    assert min(t.refitted for t in made.trials) == next(t.refitted for t in made.trials if t.keep == made.keep)
    assert "the best is taken" in told[-1]


def test_what_was_tried_is_not_tried_again(redundant, tmp_path, monkeypatch):
    first, _ = allocate(shop(redundant, tmp_path, {"parameters": 0.75}, recover=4096))
    assert first.recovery_tokens == sum(256 for _ in first.trials)
    monkeypatch.setattr("narrow_engine.allocate.refit", lambda *_: pytest.fail("a refit"))
    assert allocate(shop(redundant, tmp_path, {"parameters": 0.75}, recover=4096))[0] == first


def test_retention_finds_the_copies_and_little_more(redundant, tmp_path):
    made, told = allocate(shop(redundant, tmp_path, {"retention": 0.97}, units=["neuron"]))
    assert 12 <= made.keep["neuron"] <= 20, "16 are needed, and the rest are their copies"
    chosen = next(t for t in made.trials if t.keep == made.keep)
    assert math.exp(-chosen.refitted) >= 0.97
    assert all(math.exp(-t.refitted) < 0.97 for t in made.trials if t.parameters < chosen.parameters)
    assert f"{chosen.parameters:,} of" in told[0]


def test_what_cannot_be_kept_is_left_whole(redundant, tmp_path):
    made, told = allocate(shop(redundant, tmp_path, {"retention": 1.0}, units=["head"]))
    assert made.keep == {"head": 4}
    assert "all 4 query heads stay" in told[0]


@pytest.mark.parametrize("asked", [0.6, 6.0])
def test_latency_is_measured_and_met(redundant, tmp_path, monkeypatch, asked):
    """A machine of known speed: 1 ms and 2 ms a layer and 30 ns a parameter; a line through a few shapes knows it all."""

    def seconds(models, check):
        return [1e-3 + 2e-3 * len(layers(m)) + 30e-9 * sum(p.numel() for p in layers(m).parameters()) for m in models]

    monkeypatch.setattr(speed, "token_seconds", seconds)
    whole = seconds([redundant[0]], None)[0]
    made, _ = allocate(shop(redundant, tmp_path, {"latency": asked}))
    chosen = next(t for t in made.trials if t.keep == made.keep)
    limit = 1000 * whole * asked if asked < 1 else asked
    assert 0.5 * limit < chosen.latency <= limit
    with pytest.raises(NarrowError, match=r"No model that this machine runs in .* raise the budget or add kinds"):
        allocate(shop(redundant, tmp_path, {"latency": 0.5}, units=["neuron"]))


def test_a_real_machine_runs_less_in_less_time():
    """What the search stands on: a model with an eighth of the layers takes less time a token."""
    models = [tiny_model("llama", num_hidden_layers=count, hidden_size=64) for count in (16, 2)]
    slow, fast = speed.token_seconds(models, lambda: None)
    assert 0 < fast < slow


@given(st.lists(st.floats(-0.1, 5), min_size=1, max_size=4), st.integers(1, 48), st.integers(1, 48))
def test_fewer_units_never_cost_less(losses, one, other):
    dims = dimensions(tiny_config("llama").to_dict())
    curve = [
        Trial(keep={"neuron": kept}, parameters=1, refitted=loss) for kept, loss in zip([36, 24, 12, 6], losses, strict=False)
    ]
    few, many = sorted((one, other))
    cost = {kept: interpolate(curve, "neuron", dims, {"neuron": kept}) for kept in (few, many)}
    assert cost[few] >= cost[many] >= 0
    assert interpolate(curve, "neuron", dims, {"neuron": 48}) == 0
    assert interpolate([], "neuron", dims, {"neuron": 1}) == 0


def test_heads_that_go_with_their_group_are_not_counted_twice():
    dims = dimensions(tiny_config("llama").to_dict())
    curve = [Trial(keep={"head": 2}, parameters=1, refitted=1.0)]
    assert interpolate(curve, "head", dims, {"kv_group": 1, "head": 2}) == 0
    assert interpolate(curve, "head", dims, {"kv_group": 2, "head": 2}) == 1
