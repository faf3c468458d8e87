"""Which units skills share, and what each loses as the target's go."""

import numpy as np
import pytest
import torch
from tiny import tiny_model

from narrow_engine import corpus, locality, skills
from narrow_engine.families import dimensions
from narrow_engine.importance import random
from narrow_engine.models import config_dict
from narrow_engine.plan import make_plan
from narrow_engine.report.model import Cut, Locality, LocalityCurve, Overlap
from narrow_engine.slice import slice_model


def nothing(*_):
    pass


def ranked(*orders):
    """Scores of 40 neurons in two layers, the given ones on top."""
    scores = torch.rand(2, 40, generator=torch.Generator().manual_seed(len(orders[0])))
    for layer, best in enumerate(orders):
        scores[layer, list(best)] += 10
    return {"neuron": scores, "head": torch.rand(2, 4), "layer": torch.rand(2)}


def test_overlap_counts_the_top_units_that_two_skills_have_in_common():
    one = ranked(range(10), range(10)), ranked(range(10), range(10))
    half = ranked(range(5, 15), range(10)), ranked(range(5, 15), range(10))
    apart = ranked(range(20, 30), range(30, 40)), ranked(range(20, 30), range(20, 30))
    (found,) = locality.overlaps([one, half, apart])
    assert (found.unit, found.top, found.of) == ("neuron", 10, 40), "of four heads or two layers there is no list"
    assert np.allclose(found.shared, [[1, 0.75, 0], [0.75, 1, 0], [0, 0, 0.5]])


def test_scores_drawn_at_random_share_what_chance_would():
    dims = dimensions(config_dict(tiny_model("llama", intermediate_size=400)))
    found = locality.overlaps([(random.draw(dims, 2 * skill), random.draw(dims, 2 * skill + 1)) for skill in range(6)])
    neurons = next(row for row in found if row.unit == "neuron")
    assert neurons.top / neurons.of == 0.25
    assert np.mean(neurons.shared) == pytest.approx(0.25, abs=0.02)


def text(seed, low, high, documents=40, length=80):
    tokens = np.random.default_rng(seed).integers(low, high, documents * length).astype(np.uint32)
    return corpus.Documents(tokens, np.arange(0, documents * length + 1, length), np.arange(documents, dtype=np.uint64))


def test_texts_of_other_tokens_use_other_neurons():
    """Two texts of the same tokens share more neurons than two of different tokens do."""
    torch.manual_seed(0)
    model = tiny_model("llama", intermediate_size=160)
    texts = [text(0, 0, 40), text(1, 0, 40), text(2, 200, 240)]
    halves = [locality.halves(found, 32, 0) for found in texts]
    found = [tuple(locality.scores(model, side, False, nothing) for side in sides) for sides in halves]
    (neurons,) = [row for row in locality.overlaps(found) if row.unit == "neuron"]
    shared = np.array(neurons.shared)
    assert np.allclose(shared, shared.T)
    assert shared[0, 1] > shared[0, 2] + 0.1
    assert abs(shared[0, 1] - shared[0, 0]) < 0.1, "two samples of one text are as one skill"


def test_short_texts_are_not_halved():
    assert locality.halves(text(0, 0, 40, documents=2), 64, 0) is None
    assert locality.halves(text(0, 0, 40, documents=8), 64, 0) is not None


@pytest.mark.parametrize(
    ("family", "unit"), [("llama", "neuron"), ("llama", "kv_group"), ("qwen3_moe", "expert"), ("gpt2", "neuron")]
)
def test_curves_are_the_losses_of_slices(family, unit):
    model = tiny_model(family)
    config = config_dict(model)
    order = random.draw(dimensions(config), 0)
    texts = {"a": (text(0, 0, 40), 1.0), "b": (text(1, 200, 240), 0.5)}
    found = locality.curve(model, unit, order, texts, 32, nothing)
    assert found.cut == sorted(set(found.cut))
    assert 0 < found.cut[0] <= found.cut[-1] < 1
    whole = {"neuron": 48, "kv_group": dimensions(config).kv_heads, "expert": 6}[unit]
    keep = round(whole * (1 - found.cut[-1]))
    small = slice_model(model, make_plan(config, order, {unit: keep}))
    for name, (documents, per_base_token) in texts.items():
        lost = skills.loss_of(small, documents, 32) - skills.loss_of(model, documents, 32)
        assert found.loss[name][-1] == pytest.approx(per_base_token * lost, abs=1e-5)


def test_the_summary_is_read_off_the_figures():
    curve = LocalityCurve(unit="neuron", cut=[0.25, 0.5], loss={"python": [-0.001, 0.2], "c": [0.3, 1.5], "german": [0.4, 2.0]})
    overlap = Overlap(unit="neuron", top=16, of=64, shared=[[0.8, 0.5, 0.3], [0.5, 0.9, 0.3], [0.3, 0.3, 0.9]])
    found = Locality(skills=["python", "c", "german"], overlaps=[overlap], curves=[curve])
    cuts = {share: [Cut(unit="neuron", kept=int(64 * (1 - share)), of=64, per_layer=[])] for share in (0.25, 0.5)}
    assert locality.summary(found, "python", cuts[0.5]).split(". ") == [
        "Cutting the 50% of neurons that python needs least costs python 0.20 nats before any refit, "
        "and also costs german 2.00 nats and c 1.50 nats",
        "Of the neurons that matter most to python, 50% matter most to c as well, and 30% to german; "
        "chance would make it 25%, and two samples of python share 80%",
        "Skills share structure: what is cut for one is missed by others.",
    ]
    assert "costs python nothing before any refit, and also costs german 0.40 nats" in locality.summary(
        found, "python", cuts[0.25]
    )
    alone = Locality(skills=["python"], overlaps=[], curves=[curve.model_copy(update={"loss": {"python": [0, 0]}})])
    assert locality.summary(alone, "python", cuts[0.5]) == ""
