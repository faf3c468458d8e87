"""Slicing is exact: for every family and unit, the sliced model equals the base with the cut units masked."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import DIVIDED, EXPERTS, FAMILIES, tiny_model
from transformers import AutoModelForCausalLM

from narrow_engine.families import FAMILIES as TABLE
from narrow_engine.families import dimensions
from narrow_engine.models import config_dict, load_model, outline, read_outline
from narrow_engine.plan import make_plan, whole_plan
from narrow_engine.sizing import parameters, solve, unit_counts
from narrow_engine.slice import compare, mask_model, renew, slice_model, trim_vocabulary, unfilled
from narrow_engine.spec import Options


def scores_for(dims, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "neuron": (dims.layers, dims.experts * dims.width),
        "expert": (dims.layers, dims.experts),
        "head": (dims.layers, dims.heads),
        "kv_group": (dims.layers, dims.kv_heads),
        "layer": (dims.layers,),
        "residual": (dims.hidden,),
        "token": (dims.vocab,),
    }
    return {unit: torch.rand(shape, generator=generator) for unit, shape in shapes.items()}


def check(model, keep, seed):
    config = config_dict(model)
    plan = make_plan(config, scores_for(dimensions(config), seed), keep)
    small = slice_model(model, plan)
    ids = torch.randint(0, len(plan.tokens), (2, 24), generator=torch.Generator().manual_seed(seed))
    assert compare(model, small, ids, plan.tokens, plan).relative_error < 1e-5
    made = dimensions(config_dict(small))
    counts = unit_counts(made)
    assert {unit: counts[unit] for unit in keep} == keep
    assert parameters(config_dict(small), made) == sum(p.numel() for p in small.parameters())
    return small, plan, ids


@pytest.mark.parametrize(("family", "unit"), [(family, unit) for family in FAMILIES for unit in TABLE[family].units])
def test_each_unit_of_each_family_is_sliced_exactly(family, unit):
    model = tiny_model(family)
    kept = {"neuron": 24 if family in EXPERTS else 21, "head": 2, "kv_group": 1, "layer": 2, "expert": 3}
    small, plan, ids = check(model, {unit: {**kept, "token": 200, "residual": 20}[unit]}, 1)
    if unit == "token":  # what is left of the vocabulary computes what it did; under other numbers it does not
        plan.tokens[:20] = range(20)
    assert compare(model, small, ids, plan.tokens).relative_error > 1e-2, "the cut must change something"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_mix_of_units_and_shapes_is_exact(data):
    family = data.draw(st.sampled_from(FAMILIES))
    kv_heads = data.draw(st.integers(1, 3))
    per_group = data.draw(st.integers(1, 3))
    # A quarter of StableLM's head turns, and what turns comes in pairs.
    head_dim = 8 if family == "stablelm" else data.draw(st.sampled_from([4, 8]))
    heads = kv_heads * per_group
    hidden = heads * (head_dim if family in DIVIDED else data.draw(st.integers(1, 3)) * 4)
    layers, width = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 24))
    if family in EXPERTS:
        width = 8 * (width // 8 + 1)
    shape = {"hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    shape |= {"num_key_value_heads": kv_heads, "head_dim": head_dim}
    if family in EXPERTS:
        experts = data.draw(st.integers(1, 6))
        shape |= {TABLE[family].experts_key: experts, "num_experts_per_tok": data.draw(st.integers(1, experts))}
        shape |= {"norm_topk_prob": data.draw(st.booleans())}
    tied = data.draw(st.booleans())
    model = tiny_model(family, seed=data.draw(st.integers(0, 99)), tie_word_embeddings=tied, **shape)
    units = data.draw(st.lists(st.sampled_from(TABLE[family].units), min_size=1, unique=True))
    fractions = {unit: data.draw(st.floats(0.05, 1.0)) for unit in units}
    options = Options.model_validate({"budget": {"keep": fractions}, "method": {"units": units}})
    keep, _ = solve(config_dict(model), options, 4)
    check(model, keep, data.draw(st.integers(0, 99)))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sliced_model_loads_in_stock_transformers_and_generates(family, tmp_path):
    keep = {"neuron": 16, "head": 2, "kv_group": 2, "layer": 2, "expert": 4, "residual": 24, "token": 250}
    small, _, ids = check(tiny_model(family), {u: n for u, n in keep.items() if u in TABLE[family].units}, 3)
    small.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert compare(small, loaded, ids).max_error == 0
    first = small.generate(ids[:1, :5], max_new_tokens=8, do_sample=False, use_cache=True, pad_token_id=0)
    assert torch.equal(first, loaded.generate(ids[:1, :5], max_new_tokens=8, do_sample=False, use_cache=True, pad_token_id=0))


def test_a_model_names_its_tokens_by_their_new_numbers():
    model = tiny_model("llama", eos_token_id=[7, 300], pad_token_id=300)
    model.generation_config.suppress_tokens = [3, 299]
    plan = whole_plan(config_dict(model), [0, 7, *range(200, 320)])
    small = slice_model(model, plan)
    for config in (small.config, small.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, [1, 102], 102)
    assert small.generation_config.suppress_tokens == [101]
    assert small.config.vocab_size == 122
    assert model.config.eos_token_id == [7, 300]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["new config", "says in config.json how to generate", "one that transformers cannot read"])
def test_what_a_plan_makes_is_known_without_the_weights(family, kind, tmp_path):
    """As from a model whose vocabulary was trimmed before."""
    tiny_model(family, pad_token_id=300, initializer_range=0.1).bfloat16().save_pretrained(tmp_path)
    if kind == "one that transformers cannot read":
        path = tmp_path / "generation_config.json"
        path.write_text(path.read_text(), encoding="utf-16")
    elif kind != "new config":
        (tmp_path / "generation_config.json").unlink()
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "suppress_tokens": [3, 299], "temperature": 0.5}))
    whole, tokens = load_model(tmp_path), [0, *range(100, 320)]
    keep = {"neuron": 16, "head": 2, "kv_group": 2, "layer": 2, "expert": 4, "residual": 24}
    keep = {unit: count for unit, count in keep.items() if unit in TABLE[family].units}
    plan = make_plan(config_dict(whole), scores_for(dimensions(config_dict(whole)), 3), keep)
    cut = slice_model(trim_vocabulary(whole, tokens), plan.model_copy(update={"tokens": list(range(len(tokens)))}))
    made = unfilled(read_outline(tmp_path), plan.model_copy(update={"tokens": tokens}), torch.empty(0))
    for one, other in zip(outline(made), outline(cut), strict=True):
        assert one.to_dict() == other.to_dict()
    assert [(name, value.shape) for name, value in made.named_parameters()] == [(n, v.shape) for n, v in cut.named_parameters()]
    with torch.no_grad():
        for value, found in zip(made.parameters(), cut.parameters(), strict=True):
            value.copy_(found)
    ids = torch.arange(40).view(2, 20)
    assert torch.equal(made(input_ids=ids).logits, cut(input_ids=ids).logits)


def test_a_plan_that_forgets_a_unit_is_noticed():
    """The comparison itself can fail: another plan's mask is not equal."""
    model = tiny_model("llama")
    config = config_dict(model)
    plans = [make_plan(config, scores_for(dimensions(config), seed), {"neuron": 20}) for seed in (1, 2)]
    ids = torch.randint(0, 320, (1, 16), generator=torch.Generator().manual_seed(0))
    assert compare(mask_model(model, plans[0]), slice_model(model, plans[1]), ids).relative_error > 1e-3


def test_heads_are_cut_evenly_over_groups_and_ties_are_stable():
    model = tiny_model("llama", hidden_size=24, num_attention_heads=6, num_key_value_heads=2)
    config = config_dict(model)
    dims = dimensions(config)
    scores = {unit: torch.ones_like(value) for unit, value in scores_for(dims, 0).items()}
    plan = make_plan(config, scores, {"head": 4, "neuron": 5})
    assert plan.heads == [[0, 1, 3, 4]] * 3
    assert plan.neurons == [[0, 1, 2, 3, 4]] * 3


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_weights_are_drawn_by_the_seed(family):
    model, drawn = tiny_model(family), []
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for seed in (1, 1, 2):
        renew(model, seed)
        drawn.append({name: p.detach().clone() for name, p in model.named_parameters()})
    for name, parameter in before.items():
        assert torch.equal(drawn[0][name], drawn[1][name])
        if parameter.ndim > 1:
            assert not torch.equal(drawn[0][name], parameter)
            assert not torch.equal(drawn[0][name], drawn[2][name])
    assert torch.isfinite(model(input_ids=torch.arange(12)[None]).logits).all()
