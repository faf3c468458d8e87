"""A parked model, whose layers' weights are brought in only while they run, does all that the whole one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import FAMILIES, tiny_model

from narrow_engine import footprint, importance, layerwise, memory, pipeline, skills
from narrow_engine.corpus import Blocks, Documents
from narrow_engine.errors import NarrowError
from narrow_engine.families import dimensions
from narrow_engine.models import config_dict, greedy, hidden_states, is_parked, layers, load_model, size_in_memory
from narrow_engine.plan import make_plan
from narrow_engine.reconstruct import refit
from narrow_engine.report.model import Report
from narrow_engine.slice import compare, slice_model, trim_vocabulary
from narrow_engine.spec import CompressionSpec
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
    return load_model(tmp_path), load_model(tmp_path, park=True)


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
def test_a_parked_model_takes_a_layer_and_its_file_where_that_counts(pair, monkeypatch):
    whole, parked = pair
    layer, inside = (sum(weight.numel() for weight in part.parameters()) for part in (layers(whole)[0], layers(whole)))
    outer = whole.num_parameters() - inside
    assert size_in_memory(parked) == 4 * (outer + layer)
    monkeypatch.setattr(memory, "counts_files", lambda: True)
    assert size_in_memory(parked) == 4 * (outer + layer) + 2 * inside
    assert size_in_memory(whole) == 4 * whole.num_parameters()


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


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2_moe"])
def test_scores_in_bfloat16_put_units_in_nearly_the_same_order(family, monkeypatch):
    """As on a GPU."""
    model = tiny_model(family, initializer_range=0.15)

    def scored():
        gradients = importance.collect(model, BLOCKS, 1024, True, quiet, False)
        moments = importance.collect(model, BLOCKS, 1024, False, quiet)
        return [
            *importance.CRITERIA["fisher"](model, gradients, 0).values(),
            *importance.CRITERIA["reconstruction"](model, moments, 0).values(),
            importance.residual.score(model, BLOCKS, 1024, "fisher", quiet),
            importance.residual.score(model, BLOCKS, 1024, "reconstruction", quiet),
        ]

    exact = scored()
    monkeypatch.setattr(layerwise, "precision", lambda _: torch.bfloat16)
    for one, other in zip(exact, scored(), strict=True):
        assert torch.isfinite(other).all()
        assert other.dtype == torch.float64
        if one.unique().numel() > 2:
            alike = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
            # A random router sends some tokens elsewhere.
            assert (0.9 if family == "qwen2_moe" else 0.98) < alike < 1
            assert not torch.equal(one, other)


def test_an_elimination_that_cannot_be_held_is_refused(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(memory, "limit", lambda _: 50_000)
    for act in (
        lambda: importance.CRITERIA["reconstruction"](model, iter([]), 0),
        lambda: importance.residual.score(model, BLOCKS, 64, "reconstruction", quiet),
    ):
        with pytest.raises(NarrowError, match=r"takes 0\.\d GB for this base") as raised:
            act()
        assert raised.value.code == "out_of_memory"


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


@pytest.mark.slow
def test_a_run_with_a_parked_base_comes_to_the_same(tmp_path, monkeypatch, tokenizer_file, python_file, german_file):
    """All stages that meet the base: trimmed, measured, scored, cut, refitted, taught by, asked."""
    tiny_model("qwen2", initializer_range=0.1).bfloat16().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    spec = CompressionSpec.model_validate(
        {
            "base": {"path": str(tmp_path / "base")},
            "target": {"path": str(python_file)},
            "target_name": "python",
            "skills": [{"name": "german", "path": str(german_file), "role": "watch"}],
            "budget": {"keep": {"neuron": 0.5, "token": 0.9, "layer": 0.67}},
            "method": {
                "units": ["neuron", "token", "layer"],
                "importance": "attribution",
                "calibration_tokens": 1024,
                "recover": {"tokens": 512, "batch_tokens": 256},
            },
            "controls": ["random"],
            "block_tokens": 64,
            "skill_tokens": 2048,
            "export": ["safetensors"],
        }
    )
    reports = []
    for name in ("whole", "parked"):
        monkeypatch.setattr(footprint, "parks", lambda job, name=name: name == "parked")
        monkeypatch.setattr(footprint, "together", lambda job, name=name: 1 if name == "parked" else 2)
        made = pipeline.run(spec, tmp_path / name, quiet)
        reports.append(Report.model_validate_json((made / "report.json").read_text()))
    whole, parked = reports
    assert parked.skills == whole.skills
    assert parked.locality == whole.locality
    assert parked.samples == whole.samples
    assert parked.parity["slice"].relative_error < 1e-5
    assert {n.code for n in parked.notices} - {n.code for n in whole.notices} == {"parked"}


def test_streams_that_are_large_are_held_in_a_file_and_in_groups(monkeypatch):
    in_memory = layerwise.room([torch.Size((2, 3, 4)), torch.Size((1, 3, 4))])
    monkeypatch.setattr(layerwise, "LARGE", 0)
    monkeypatch.setattr(layerwise, "KEPT", 0)  # and batches go back through the layers one by one
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


TAKEN = """
import json, sys, threading, torch
from pathlib import Path
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from narrow_engine import importance
from narrow_engine.corpus import Blocks
from narrow_engine.models import load_model

def own():
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1])

def peak(act):
    found, over = [own()], threading.Event()
    def watch():
        while not over.wait(0.002):
            found.append(own())
    thread = threading.Thread(target=watch)
    thread.start()
    made = act()
    over.set(), thread.join()
    return max(found) - found[0], made

torch.set_num_threads(1)
load_model(Path(sys.argv[2]))  # what is imported and set up on the way
loading, model = peak(lambda: load_model(Path(sys.argv[1]), park=sys.argv[3] == "parked"))
blocks = Blocks(np.random.default_rng(0).integers(0, 320, 4000).astype(np.uint32), 32, 0)
scoring, _ = peak(lambda: list(importance.collect(model, blocks, 512, True, lambda *_: None, False)))
print(json.dumps([sum(p.numel() for p in model.parameters()), loading, scoring]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is counted by Linux")
@pytest.mark.slow
def test_loading_and_scoring_take_the_weights_and_no_second_copy(tmp_path):
    shape = {"hidden_size": 512, "intermediate_size": 4096, "num_attention_heads": 8, "vocab_size": 2000}
    model = tiny_model("llama", num_hidden_layers=8, **shape).bfloat16()
    model.save_pretrained(tmp_path / "large", max_shard_size="40MB")
    tiny_model("llama").bfloat16().save_pretrained(tmp_path / "small")
    assert len(list((tmp_path / "large").glob("*.safetensors"))) > 2
    layer = sum(weight.numel() for weight in layers(model)[0].parameters())
    outer = sum(weight.numel() for weight in model.parameters()) - 8 * layer
    taken = {}
    for kind in ("whole", "parked"):
        command = [sys.executable, "-c", TAKEN, tmp_path / "large", tmp_path / "small", kind]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        taken[kind] = json.loads(done.stdout)
    count, loading, scoring = taken["whole"]
    largest = 4 * 4096 * 512
    assert 4 * count <= loading < 4 * count + largest + 8e6
    assert scoring < 70e6, "the activations of one layer; those of eight would be several times that"
    _, loading, scoring = taken["parked"]
    assert loading < 4 * (outer + layer) + largest + 8e6 < 4 * count / 2
    assert scoring < 4 * layer + 70e6
