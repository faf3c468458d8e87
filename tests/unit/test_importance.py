"""Each criterion is what its formula says, and elimination and refit find what can be made up for."""

import numpy as np
import pytest
import torch
from tiny import FAMILIES, tiny_model

from narrow_engine import importance
from narrow_engine.corpus import Blocks
from narrow_engine.families import FAMILIES as TABLE
from narrow_engine.families import dimensions
from narrow_engine.importance import reconstruction
from narrow_engine.importance.reconstruction import eliminate
from narrow_engine.losses import objective
from narrow_engine.models import config_dict, family, head, hidden_states, layers
from narrow_engine.plan import make_plan
from narrow_engine.reconstruct import refit
from narrow_engine.slice import slice_model

TOKENS = np.random.default_rng(0).integers(0, 320, 3000).astype(np.uint32)


def collected(model, tokens=256):
    return list(importance.collect(model, Blocks(TOKENS, 32, 0), tokens, True, lambda *_: None))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("criterion", sorted(importance.CRITERIA.keys() - importance.NEEDS_GRAMS))
def test_what_needs_no_grams_is_the_same_without(criterion, family):
    model = tiny_model(family)
    with_grams, without = (
        list(importance.collect(model, Blocks(TOKENS, 32, 0), 256, True, lambda *_: None, grams=grams)) for grams in (True, False)
    )
    assert all(not reader.gram.numel() for layer in without for reader in (*layer.mlp, layer.attention))
    expected = importance.CRITERIA[criterion](model, with_grams, 0)
    for unit, scores in importance.CRITERIA[criterion](model, without, 0).items():
        assert torch.equal(scores, expected[unit])


def gated_loss(model, batch):
    """Summed next-token loss as a function of a gate on every neuron and head: the gates' gradients define the scores."""
    table, dims = family(model), dimensions(config_dict(model))
    gates = {}
    hooks = []
    for number, layer in enumerate(layers(model)):
        for name, count in ((table.mlp_out, dims.width), (table.attention_out, dims.heads)):
            gate = torch.ones(*batch[:, :-1].shape, count, requires_grad=True)
            gates[number, name] = gate

            def scale(module, args, gate=gate, count=count):
                split = args[0].reshape(*args[0].shape[:2], count, -1)
                return ((split * gate[..., None]).reshape(args[0].shape),)

            hooks.append(layer.get_submodule(name).register_forward_pre_hook(scale))
    hidden = hidden_states(model, batch[:, :-1])
    weight = model.get_output_embeddings().weight
    cap = getattr(model.config, "final_logit_softcapping", None)
    logits = hidden @ weight.T
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
    grads = dict(zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True))
    for hook in hooks:
        hook.remove()
    return grads


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
def test_attribution_and_fisher_are_gradients_of_gates(name):
    model = tiny_model(name)
    table = family(model)
    batch = Blocks(TOKENS, 32, 0).batch(0, 8)
    grads = gated_loss(model, batch)
    found = collected(model, 256)
    attribution = importance.CRITERIA["attribution"](model, found, 0)
    fisher = importance.CRITERIA["fisher"](model, found, 0)
    for number in range(3):
        for unit, part in (("neuron", table.mlp_out), ("head", table.attention_out)):
            gate = grads[number, part].flatten(0, 1).double()
            assert torch.allclose(attribution[unit][number], gate.sum(0).abs(), rtol=1e-3, atol=1e-3)
            assert torch.allclose(fisher[unit][number], gate.square().sum(0), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("criterion", list(importance.CRITERIA))
@pytest.mark.parametrize("name", FAMILIES)
def test_every_criterion_scores_every_unit(name, criterion):
    model = tiny_model(name)
    dims = dimensions(config_dict(model))
    scores = importance.CRITERIA[criterion](model, collected(model), 0)
    shapes = {"neuron": (3, dims.experts * dims.width), "expert": (3, dims.experts), "layer": (3,)}
    shapes |= {"head": (3, dims.heads), "kv_group": (3, dims.kv_heads)}
    for unit, shape in shapes.items():
        assert scores[unit].shape == shape
        assert torch.isfinite(scores[unit]).all()
        assert (scores[unit] >= 0).all()
    assert scores["neuron"].unique().numel() > dims.width, "scores must tell units apart"


def test_a_forward_pass_is_enough_for_activations():
    model = tiny_model("llama")
    found = importance.collect(model, Blocks(TOKENS, 32, 0), 256, False, lambda *_: None)
    with_gradients = collected(model)
    for a, b in zip(found, with_gradients, strict=True):
        assert torch.allclose(a.mlp[0].gram, b.mlp[0].gram)
        assert a.mlp[0].effect.abs().sum() == 0
    assert all(p.requires_grad for p in model.parameters())


def test_elimination_drops_copies_first_and_loses_nothing_by_them():
    torch.manual_seed(0)
    inputs = torch.randn(500, 6, dtype=torch.float64)
    inputs = torch.cat([inputs, inputs[:, :3] * 2], 1)
    weight = torch.randn(4, 9)
    scores = eliminate([weight], [inputs.T @ inputs], 1)
    first = set(scores.argsort()[:3].tolist())
    assert len({index % 6 for index in first}) == 3
    assert first <= {0, 1, 2, 6, 7, 8}, "of each pair of copies one goes first"
    assert scores.sort().values[2] < 0.02 * scores.sort().values[3]


@pytest.mark.parametrize(("size", "steps"), [(1, 16), (1, 3), (2, 16), (2, 3)])
def test_a_score_is_the_error_of_the_best_refit_without_all_that_went_before(size, steps, monkeypatch):
    """Each block's score against least squares, computed the plain way, of leaving out it and all cheaper ones."""
    monkeypatch.setattr(reconstruction, "ROUND", steps)
    torch.manual_seed(1)
    inputs, weight = torch.randn(300, 8, dtype=torch.float64), torch.randn(5, 8)
    gram = inputs.T @ inputs
    scores = eliminate([weight[:2], weight[2:]], [gram, gram], size)
    wanted = inputs @ weight.double().T
    gone: list[int] = []
    for block in scores.argsort().tolist():
        gone.append(block)
        assert scores[block].item() == pytest.approx(without(inputs, wanted, gone, size), rel=0.03)
        others = [b for b in range(8 // size) if b not in gone[:-1]]
        assert block == min(others, key=lambda b: without(inputs, wanted, [*gone[:-1], b], size)), "the cheapest goes next"


def without(inputs, wanted, gone, size):
    rest = [i for i in range(8) if i // size not in gone]
    if not rest:
        return wanted.square().sum().item()
    return (inputs[:, rest] @ torch.linalg.lstsq(inputs[:, rest], wanted).solution - wanted).square().sum().item()


def error(base, cut):
    """Of the last hidden states; of the logits where the cut model has fewer hidden dimensions."""
    batch = Blocks(TOKENS, 32, 3).batch(0, 8)[:, :-1]
    with torch.no_grad():
        one, other = hidden_states(base, batch), hidden_states(cut, batch)
        if one.shape != other.shape:
            one, other = base(batch).logits, cut(batch).logits
        return (one - other).square().mean().item()


WITH_RESIDUAL = [name for name in FAMILIES if "residual" in TABLE[name].units]


def residual(model, criterion, tokens=256):
    return importance.residual.score(model, Blocks(TOKENS, 32, 0), tokens, criterion, lambda *_: None)


@pytest.mark.parametrize("criterion", [name for name in importance.CRITERIA if name != "random"])
@pytest.mark.parametrize("name", WITH_RESIDUAL)
def test_every_criterion_scores_hidden_dimensions(name, criterion):
    scores = residual(tiny_model(name), criterion)
    assert scores.shape == (32,)
    assert torch.isfinite(scores).all()
    assert (scores >= 0).all()
    assert scores.unique().numel() > 16, "scores must tell dimensions apart"


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2"])
def test_scores_of_hidden_dimensions_are_gradients_of_gates_on_what_is_read(name):
    model, batch = tiny_model(name), Blocks(TOKENS, 32, 0).batch(0, 8)
    gate = torch.ones(*batch[:, :-1].shape, 32, requires_grad=True)
    hooks = [
        layer.get_submodule(module).register_forward_pre_hook(lambda _, args: (args[0] * gate,))
        for layer in layers(model)
        for module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    ]
    stream = hidden_states(model, batch[:, :-1]) * gate
    loss = objective(stream.flatten(0, 1), head(model), batch[:, 1:].flatten()).total * batch[:, 1:].numel()
    (found,) = torch.autograd.grad(loss, gate)
    for hook in hooks:
        hook.remove()
    found = found.flatten(0, 1).double()
    assert torch.allclose(residual(model, "attribution"), found.sum(0).abs(), rtol=1e-3, atol=1e-3)
    assert torch.allclose(residual(model, "fisher"), found.square().sum(0), rtol=1e-3, atol=1e-5)


def test_hidden_dimensions_that_copy_others_go_first_and_are_made_up_for():
    model = tiny_model("llama", initializer_range=0.15, tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 28:] = model.model.embed_tokens.weight[:, :4]
        for layer in layers(model):
            for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
                part.weight[28:] = part.weight[:4]
                part.bias[28:] = part.bias[:4]
    scores = residual(model, "reconstruction", 2048)
    assert {index % 28 for index in scores.argsort()[:4].tolist()} == {0, 1, 2, 3}
    plan = make_plan(config_dict(model), {"residual": scores}, {"residual": 28})
    cut = slice_model(model, plan)
    before = error(model, cut)
    refit(model, cut, plan, Blocks(TOKENS, 32, 0), 2048, lambda *_: None)
    assert error(model, cut) < 1e-3 * before


KEEP = ({"neuron": 24}, {"head": 2}, {"neuron": 32, "head": 2, "layer": 2}, {"layer": 2}, {"expert": 3}, {"residual": 24})


@pytest.mark.parametrize(("name", "keep"), [(n, keep) for n in FAMILIES for keep in KEEP if keep.keys() <= set(TABLE[n].units)])
def test_refit_brings_the_cut_model_nearer_to_the_base(name, keep):
    model = tiny_model(name, initializer_range=0.15)
    scores = importance.CRITERIA["fisher"](model, collected(model), 0)
    if "residual" in keep:
        scores["residual"] = residual(model, "fisher")
    plan = make_plan(config_dict(model), scores, keep)
    cut = slice_model(model, plan)
    before = error(model, cut)
    refit(model, cut, plan, Blocks(TOKENS, 32, 0), 2048, lambda *_: None, passes=0)
    # A linear solve cannot reach past a norm: where layers alone are dropped from such families there is nothing to refit. Nor
    # does it see that a random router sends tokens elsewhere once the stream moves.
    alone = 1.05 if family(model).router else 1.0001 if family(model).writes_normed else 1.0
    bound = 0.95 if "layer" not in keep or len(keep) > 1 else alone
    assert error(model, cut) < bound * before


def test_training_the_layers_brings_more_than_least_squares_alone():
    model = tiny_model("llama", initializer_range=0.15)
    plan = make_plan(config_dict(model), importance.CRITERIA["fisher"](model, collected(model), 0), {"neuron": 12})
    errors = []
    for passes in (0, 4):
        cut = slice_model(model, plan)
        refit(model, cut, plan, Blocks(TOKENS, 32, 0), 8192, lambda *_: None, passes)
        errors.append(error(model, cut))
    assert errors[1] < 0.9 * errors[0]


def test_training_that_makes_a_layer_worse_is_undone():
    model = tiny_model("llama", initializer_range=0.15)
    plan = make_plan(config_dict(model), importance.CRITERIA["fisher"](model, collected(model), 0), {"neuron": 12})
    plain, wrecked = slice_model(model, plan), slice_model(model, plan)
    refit(model, plain, plan, Blocks(TOKENS, 32, 0), 2048, lambda *_: None, 0)
    refit(model, wrecked, plan, Blocks(TOKENS, 32, 0), 2048, lambda *_: None, 1, 100.0)
    for one, other in zip(plain.parameters(), wrecked.parameters(), strict=True):
        assert torch.equal(one, other)


def test_refit_restores_what_is_redundant():
    """Half of the neurons are copies: without them, least squares gives back the base's function."""
    model = tiny_model("llama", initializer_range=0.15)
    with torch.no_grad():
        for layer in layers(model):
            for part in (layer.mlp.gate_proj, layer.mlp.up_proj):
                part.weight[24:] = part.weight[:24]
                part.bias[24:] = part.bias[:24]
    scores = importance.CRITERIA["reconstruction"](model, collected(model, 2048), 0)
    plan = make_plan(config_dict(model), scores, {"neuron": 24})
    cut = slice_model(model, plan)
    before = error(model, cut)
    refit(model, cut, plan, Blocks(TOKENS, 32, 0), 2048, lambda *_: None)
    assert error(model, cut) < 1e-3 * before
