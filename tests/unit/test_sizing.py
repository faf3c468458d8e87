"""A budget is met exactly as promised, and sizes are those of the real models."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, tiny_config, tiny_model

from narrow_engine.errors import NarrowError
from narrow_engine.families import FAMILIES as TABLE
from narrow_engine.families import dimensions, tensor_shapes
from narrow_engine.sizing import parameters, plan_sizes, shrink, size_of, solve
from narrow_engine.spec import QUANTITIES, Options


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_counted_as_torch_counts_them(family, tied):
    model = tiny_model(family, tie_word_embeddings=tied)
    config = model.config.to_dict()
    assert parameters(config, dimensions(config)) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_is_what_transformers_takes(family):
    """A config.json with the lengths that nobody can guess, and nothing else."""
    from transformers import AutoConfig

    table = TABLE[family]
    given = {"vocab_size": 320, table.hidden_key: 384, table.layers_key: 2, table.heads_key: 32}
    if family != "gpt2":  # whose width is four times its hidden size by default
        given[table.width_key] = 40
    bare = {"model_type": family, **given}
    whole = AutoConfig.for_model(family, **given).to_dict()
    assert replace(dimensions(bare), context=0) == replace(dimensions(whole), context=0)
    assert tensor_shapes(bare, dimensions(bare)) == tensor_shapes(whole, dimensions(whole)) | (
        {"transformer.wpe.weight": (dimensions(bare).context, 384)} if family == "gpt2" else {}
    )


@settings(max_examples=100, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    quantity=st.sampled_from(QUANTITIES),
    share=st.floats(0.2, 1.0),
    width=st.integers(4, 300),
    data=st.data(),
)
def test_a_budget_is_never_exceeded_and_hardly_wasted(family, quantity, share, width, data):
    units = data.draw(st.lists(st.sampled_from(TABLE[family].units), min_size=1, unique=True))
    config = tiny_config(family, intermediate_size=width, num_hidden_layers=4).to_dict()
    dims = dimensions(config)

    def cost(keep):
        size = size_of(config, shrink(dims, keep), 2)
        return {"parameters": size.parameters, "bytes": size.bytes, "flops": size.flops_per_token}[quantity]

    asked = int(share * cost({})) if data.draw(st.booleans()) else share
    multiple = data.draw(st.sampled_from([None, 1, 16]))
    options = Options.model_validate({"budget": {quantity: asked}, "method": {"units": units, "multiple": multiple}})
    try:
        keep, _ = solve(config, options, 2)
    except NarrowError:
        return  # test_what_cannot_be_met_is_said is about these
    assert set(keep) == set(units)
    assert cost(keep) <= share * cost({})
    if units == ["neuron"] and keep["neuron"] < width:
        step = math.lcm(multiple or 8, TABLE[family].multiple)
        assert keep["neuron"] % step == 0
        more = {"neuron": keep["neuron"] + step}
        assert cost(more) > int(share * cost({})) or more["neuron"] > width


@pytest.mark.parametrize("family", [name for name in FAMILIES if {"head", "residual"} & set(TABLE[name].units)])
def test_the_table_says_where_transformers_wants_heads_to_divide_the_hidden_size(family):
    try:
        tiny_config(family, hidden_size=40, num_attention_heads=6, num_key_value_heads=2)
        refused = False
    except Exception as error:  # huggingface_hub has a class of its own
        refused = "not a multiple of the number of attention heads" in str(error)
    assert TABLE[family].heads_divide_hidden == refused


def test_wide_models_keep_neurons_in_whole_tiles():
    config = tiny_config("llama", intermediate_size=11_008, hidden_size=64).to_dict()
    options = Options.model_validate({"budget": {"parameters": 0.5}})
    assert solve(config, options, 2)[0]["neuron"] % 64 == 0


def test_the_dry_run_says_what_the_cut_makes():
    config = tiny_config("llama").to_dict()
    sizes = plan_sizes(config, Options.model_validate({"budget": {"keep": {"neuron": 0.5}}}))
    assert sizes.keep == {"neuron": 24, "token": 320}
    assert (sizes.before.width, sizes.after.width) == (48, 24)
    assert sizes.after.parameters == parameters(config, shrink(dimensions(config), {"neuron": 24}))
    assert sizes.memory_bytes > sizes.before.bytes
    assert sizes.seconds > 0


def test_the_dry_run_counts_the_probes():
    config = tiny_config("llama").to_dict()

    def flops(roles, **options):
        return plan_sizes(config, Options.model_validate({"budget": {"keep": {"neuron": 0.5}}, **options}), roles=roles).flops

    watched, forgotten = flops(["watch"]), flops(["forget"])
    assert flops([]) < flops(["watch"], locality=False) < watched < forgotten
    assert flops(["forget"], relearn=None) == watched
    assert forgotten - watched == pytest.approx((flops(["forget"], relearn={"tokens": 65536}) - watched) * 2)


def test_the_dry_run_counts_who_teaches():
    config, larger = (tiny_config("llama", hidden_size=size).to_dict() for size in (32, 128))

    def sizes(recover, teacher=None):
        options = {"budget": {"keep": {"neuron": 0.5}}, "method": {"units": ["neuron"], "recover": {"tokens": 10**6, **recover}}}
        return plan_sizes(config, Options.model_validate(options), teacher=teacher and (teacher, "F32"))

    base, alone = sizes({}), sizes({"objective": "next_token"})
    assert alone.flops < base.flops < sizes({}, larger).flops
    taught = [sizes(recover, larger).memory["recover"] for recover in ({}, {"cache": "hidden"})]
    assert base.memory["recover"] < taught[0] > taught[1]
    assert sizes({"correction": {"tokens": 10**6}}).flops > base.flops
    assert sizes({"cache": "hidden"}).notices == ["The cache of what the teacher says takes up to 0.1 GB of disk."]
    assert "0.3 GB" in sizes({"cache": "hidden"}, larger).notices[0]
    assert "0.4 GB" in sizes({"cache": "top"}).notices[0]


def test_the_dry_run_counts_what_trying_shapes_takes():
    config = tiny_config("llama").to_dict()
    one, several, search = (
        plan_sizes(config, Options.model_validate({"budget": budget, "method": {"units": units}}))
        for budget, units in (
            ({"parameters": 0.8}, ["neuron"]),
            ({"parameters": 0.8}, ["neuron", "head"]),
            ({"retention": 0.9}, ["neuron"]),
        )
    )
    assert one.seconds < several.seconds < search.seconds
    assert "measured by the job" in several.notices[-1]
    assert "the most it can be" in search.notices[-1]
    assert search.after == search.before


def trimming(budget, units=("neuron", "token")):
    return Options.model_validate({"budget": budget, "method": {"units": list(units)}})


def test_a_smaller_vocabulary_leaves_more_neurons():
    config = tiny_config("llama", vocab_size=2000, intermediate_size=400).to_dict()
    options = trimming({"parameters": 0.6})
    whole, small = solve(config, options, 2)[0], solve(config, options, 2, 700)[0]
    assert (whole["token"], small["token"]) == (2000, 700)
    assert small["neuron"] > whole["neuron"]
    total = parameters(config, dimensions(config))
    assert 0.55 * total < parameters(config, shrink(dimensions(config), small)) <= 0.6 * total
    assert solve(config, trimming({"parameters": 1.0}), 2, 700)[1] == [
        f"{total:,} parameters were asked for; whole units make it "
        f"{parameters(config, shrink(dimensions(config), {'token': 700})):,}."
    ]


def test_the_dry_run_does_not_know_the_text_and_says_so():
    config = tiny_config("llama", vocab_size=2000, intermediate_size=400).to_dict()
    sizes = plan_sizes(config, trimming({"parameters": 0.6}))
    assert sizes.keep["token"] == 2000
    assert "counts whole here" in sizes.notices[-1]
    tight = plan_sizes(config, trimming({"parameters": 0.3}))
    assert tight.keep["token"] < 2000
    assert f"no more than {tight.keep['token']:,} of the 2,000 tokens" in tight.notices[-1]
    with pytest.raises(NarrowError, match="raise the budget"):
        solve(config, trimming({"parameters": 0.3}), 2, tight.keep["token"] + 1)
    assert solve(config, trimming({"parameters": 0.3}), 2, tight.keep["token"])[0] == tight.keep
    assert len(plan_sizes(config, trimming({"keep": {"neuron": 0.5, "token": 0.5}})).notices) == 0


def test_tokens_alone_fill_the_budget():
    config = tiny_config("llama", vocab_size=2000).to_dict()
    total = parameters(config, dimensions(config))
    keep = solve(config, trimming({"parameters": 0.5}, ["token"]), 2)[0]
    assert set(keep) == {"token"}
    assert 0 <= int(0.5 * total) - parameters(config, shrink(dimensions(config), keep)) < 64
    assert solve(config, trimming({"keep": {"token": 0.3}}, ["token"]), 2)[0] == {"token": 600}
    assert solve(config, trimming({"keep": {"token": 0.3}}, ["token"]), 2, 640)[0] == {"token": 640}


@pytest.mark.parametrize(
    ("family", "options", "code", "words"),
    [
        ("llama", {"budget": {"parameters": 0.05}}, "budget_too_small", "add head, kv_group, layer"),
        ("llama", {"budget": {"parameters": 2}}, "budget_too_small", "raise the budget"),
        ("llama", {"budget": {"bytes": 2}}, "budget_too_small", "bytes, not to 2"),
        ("llama", {"budget": {"flops": 0.01}}, "budget_too_small", "FLOPs a token"),
        ("gpt_neox", {"budget": {"parameters": 0.5}, "method": {"units": ["head"]}}, "unit_not_supported", "'head'"),
    ],
)
def test_what_cannot_be_met_is_said(family, options, code, words):
    with pytest.raises(NarrowError, match=words) as raised:
        solve(tiny_config(family).to_dict(), Options.model_validate(options), 2)
    assert raised.value.code == code


@pytest.mark.parametrize(
    "change",
    [{"hidden_size": 2**40}, {"hidden_size": -1}, {"vocab_size": "many"}, {"num_attention_heads": 0}, {"num_key_value_heads": 3}],
)
def test_absurd_configs_are_refused_before_anything_is_made(change):
    with pytest.raises(NarrowError) as raised:
        dimensions({**tiny_config("llama").to_dict(), **change})
    assert raised.value.code == "bad_config"


def test_an_unknown_architecture_is_named():
    with pytest.raises(NarrowError, match="'mamba'") as raised:
        dimensions({"model_type": "mamba"})
    assert raised.value.code == "unsupported_architecture"


@pytest.mark.parametrize(
    "budget",
    [
        {},
        {"parameters": 0.5, "keep": {"neuron": 0.5}},
        {"bytes": 1e6, "flops": 0.5},
        {"bytes": 1.5},
        {"parameters": 0},
        {"parameters": -1},
        {"parameters": 1.5},
        {"keep": {"neuron": 2}},
        {"retention": 1.1},
        {"latency": 0},
        {"latency": 0.5, "retention": 0.9},
    ],
)
def test_budgets_that_mean_nothing_are_refused(budget):
    with pytest.raises(ValueError, match="budget"):
        Options.model_validate({"budget": budget})
