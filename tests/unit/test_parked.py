"""A parked model, whose layers' weights are brought in only while they run, does all that the whole one does."""

import numpy as np
import pytest
import torch
from tiny import FAMILIES, tiny_model

from narrow_engine import importance, layerwise, skills
from narrow_engine.corpus import Blocks, Documents
from narrow_engine.families import dimensions
from narrow_engine.models import config_dict, greedy, hidden_states, is_parked, layers, load_model
from narrow_engine.plan import make_plan
from narrow_engine.reconstruct import refit
from narrow_engine.slice import compare, slice_model, trim_vocabulary
from narrow_engine.teacher import Live

TOKENS = np.random.default_rng(0).integers(0, 320, 3000).astype(np.uint32)
BLOCKS = Blocks(TOKENS, 32, 0)
IDS = torch.arange(40).view(2, 20)
SOME = ("llama", "gemma2", "gpt2", "phi3", "qwen2_moe")
"""With heads tied to the embedding, scaled embeddings, Conv1D, fused projections and experts among them."""


def quiet(*_):
    pass


@pytest.fixture
def pair(request, tmp_path):
    """The same file of bfloat16, loaded whole and parked."""
    model = tiny_model(request.param, tie_word_embeddings=request.param != "llama", initializer_range=0.15)
    model.bfloat16().save_pretrained(tmp_path, max_shard_size="50KB")
    return load_model(tmp_path), load_model(tmp_path, room=0)


def stored(model):
    """What layers hold between passes."""
    return {weight.dtype for weight in layers(model).parameters()}


@pytest.mark.parametrize("pair", FAMILIES, indirect=True)
def test_a_parked_model_computes_what_the_whole_one_does(pair):
    whole, parked = pair
    assert (is_parked(whole), is_parked(parked)) == (False, True)
    assert torch.equal(hidden_states(whole, IDS), hidden_states(parked, IDS))
    assert stored(parked) == {torch.bfloat16}, "and is parked again"
    for (name, one), (_, other) in zip(whole.named_buffers(), parked.named_buffers(), strict=True):
        assert torch.equal(one, other), name
    assert whole.get_output_embeddings().weight.dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_in_bfloat16_is_loaded_as_transformers_would_load_it(family, tmp_path):
    from transformers import AutoModelForCausalLM

    tiny_model(family).bfloat16().save_pretrained(tmp_path)
    wanted, found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), load_model(tmp_path)
    for kind in ("named_parameters", "named_buffers"):
        for (name, one), (_, other) in zip(getattr(wanted, kind)(), getattr(found, kind)(), strict=True):
            assert torch.equal(one, other), name
            assert one.dtype == other.dtype, name


@pytest.mark.parametrize("pair", SOME, indirect=True)
def test_scores_of_a_parked_model_are_those_of_the_whole_one(pair):
    for criterion in importance.CRITERIA:
        gradients, grams = criterion in importance.NEEDS_GRADIENTS, criterion in importance.NEEDS_GRAMS
        one, other = (
            importance.CRITERIA[criterion](m, importance.collect(m, BLOCKS, 512, gradients, quiet, grams), 0) for m in pair
        )
        for unit, scores in one.items():
            assert torch.equal(scores, other[unit]), (criterion, unit)
    assert stored(pair[1]) == {torch.bfloat16}


@pytest.mark.parametrize("pair", ["llama", "gemma2", "qwen2_moe"], indirect=True)
@pytest.mark.parametrize("criterion", [name for name in importance.CRITERIA if name != "random"])
def test_so_are_those_of_hidden_dimensions(pair, criterion):
    one, other = (importance.residual.score(model, BLOCKS, 512, criterion, quiet) for model in pair)
    assert torch.equal(one, other)


@pytest.mark.parametrize("pair", SOME, indirect=True)
def test_a_parked_model_is_cut_proved_and_refitted_as_the_whole_one(pair):
    config = config_dict(pair[0])
    keep = {"gpt2": {"neuron": 24}, "phi3": {"neuron": 24, "residual": 24}}.get(config["model_type"], {"neuron": 24, "head": 2})
    scores = importance.random.draw(dimensions(config), 0)
    plan, made = make_plan(config, scores, {**keep, "layer": 2}), []
    for model in pair:
        cut = slice_model(model, plan)
        assert compare(model, cut, IDS, plan=plan).relative_error < 1e-5
        refit(model, cut, plan, BLOCKS, 1024, quiet)
        made.append(cut)
    for (name, one), (_, other) in zip(*(model.named_parameters() for model in made), strict=True):
        assert torch.equal(one, other), name
        assert one.dtype == torch.float32


@pytest.mark.parametrize("pair", ["llama", "gemma2"], indirect=True)
def test_a_parked_model_is_measured_teaches_and_writes_as_the_whole_one(pair):
    documents = Documents(TOKENS, np.array([0, 1000, 2000, 3000]), np.zeros(3, np.uint64))
    measured = [skills.measure(model, [pair[0]], documents, 64, quiet) for model in pair]
    assert measured[0][0].loss.tolist() == measured[1][0].loss.tolist()
    assert measured[1][1].kl.tolist() == [0.0] * 3
    told = [Live(model)(0, IDS)[0] for model in pair]
    assert torch.equal(*told)
    assert greedy(pair[0], IDS[:1], 5) == greedy(pair[1], IDS[:1], 5)


@pytest.mark.parametrize("pair", ["llama", "gemma2", "gpt2", "qwen2_moe"], indirect=True)
def test_a_trimmed_vocabulary_leaves_the_layers_where_they_are(pair):
    tokens = [0, 7, *range(100, 300)]
    for model in pair:
        before = hidden_states(model, IDS)
        small = trim_vocabulary(model, tokens)
        assert compare(model, small, torch.arange(40).view(2, 20), tokens).relative_error < 1e-6
        assert small(input_ids=IDS).logits.shape[-1] == small.config.vocab_size == len(tokens)
        assert all(one is other for one, other in zip(layers(model).parameters(), layers(small).parameters(), strict=True))
        assert torch.equal(before, hidden_states(model, IDS)), "and the model as it is"
        assert model.config.vocab_size == 320


def test_streams_that_are_large_are_held_in_a_file(monkeypatch):
    in_memory = layerwise.room([torch.Size((2, 3, 4)), torch.Size((1, 3, 4))])
    monkeypatch.setattr(layerwise, "LARGE", 0)
    mapped = layerwise.room([torch.Size((2, 3, 4)), torch.Size((1, 3, 4))])
    assert [part.shape for part in mapped] == [part.shape for part in in_memory]
    assert all((part == 0).all() for part in mapped), "as a new file is"
    mapped[1].fill_(1.0)
    assert mapped[0].sum() == 0
    model = tiny_model("llama")
    scores = importance.CRITERIA["fisher"](model, importance.collect(model, BLOCKS, 512, True, quiet), 0)
    monkeypatch.undo()
    expected = importance.CRITERIA["fisher"](model, importance.collect(model, BLOCKS, 512, True, quiet), 0)
    assert torch.equal(scores["neuron"], expected["neuron"])
