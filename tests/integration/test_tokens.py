"""`narrow run` with the vocabulary trimmed: what comes out loads as any model does, and every skill is measured in one unit."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from test_engine import finish, spec, start, wait_for  # noqa: F401
from tiny import documents, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from narrow_engine.plan import Plan
from narrow_engine.report.model import Report

METHOD = {"calibration_tokens": 1024, "recover": {"tokens": 2560, "batch_tokens": 256}}


@pytest.fixture
def base(tmp_path) -> Path:
    """A tiny Llama whose vocabulary is half Python and half German."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents(count=10) + documents("german", 10), trainer)
    folder = tmp_path / "llama"
    tiny_model("llama", vocab_size=600, initializer_range=0.1).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def make(spec, base):  # noqa: F811
    return lambda **changes: spec(base={"path": str(base)}, **changes)


def report(out):
    return Report.model_validate_json((out / "result" / "report.json").read_text())


def test_neurons_and_tokens_end_to_end(make, tmp_path, base):
    method = {**METHOD, "units": ["neuron", "token"]}
    out = tmp_path / "run"
    code, told = finish(start(make(method=method, budget={"parameters": 0.8}, export=["safetensors", "onnx"]), out))
    assert code == 0, told
    found, result = report(out), out / "result"
    plan = Plan.read(result / "plan.json")
    assert found.after.vocabulary == len(plan.tokens) < found.before.vocabulary == 600
    assert found.after.parameters <= 0.8 * found.before.parameters
    _, tokens = found.cuts
    assert (tokens.unit, tokens.kept, tokens.of, tokens.per_layer) == ("token", len(plan.tokens), 600, [])
    assert found.parity["vocabulary"].relative_error < 1e-5
    assert found.parity["slice"].relative_error < 1e-5
    assert found.parity["onnx"].greedy_equal == found.parity["onnx"].greedy_tokens

    # The target's text is cut as before: no notice, and its loss of the base is that of the base alone.
    assert not [n for n in found.notices if n.code == "segmentation_changed"]
    assert found.skills["python"].note.find("times as many") < 0
    python = found.skills["python"]
    assert python.cut.loss < python.base.loss + 1.0
    # German loses tokens; it is still counted in the base's, and says so.
    assert "times as many" in found.skills["german"].note

    whole, small = Tokenizer.from_file(str(base / "tokenizer.json")), AutoTokenizer.from_pretrained(result / "model")
    model = AutoModelForCausalLM.from_pretrained(result / "model")
    assert model.config.vocab_size == len(small) == len(plan.tokens)
    for text in documents(count=20):
        assert [plan.tokens[number] for number in small.encode(text)] == whole.encode(text).ids
    for text in ("Grüße, 世界 🦙\n\t\0", *documents("german", 5)):
        assert small.decode(small.encode(text)) == text
    end = small.convert_tokens_to_ids("<|endoftext|>")
    assert end == model.config.eos_token_id == model.generation_config.eos_token_id == plan.tokens.index(0)
    made = model.generate(torch.tensor([small.encode("def ")]), max_new_tokens=5, do_sample=False)
    assert small.decode(made[0]).startswith("def ")
    assert (result / "onnx" / "tokenizer.json").read_bytes() == (result / "model" / "tokenizer.json").read_bytes()


def test_tokens_alone_are_exact_on_text_that_needs_no_other(make, tmp_path):
    """Nothing is trained and no neuron cut: the loss is the base's, but for what the lost tokens' probability was."""
    out = tmp_path / "run"
    method = {**METHOD, "units": ["neuron", "token"], "refit": False, "recover": {"tokens": 0}}
    assert finish(start(make(method=method, budget={"parameters": 1.0}), out))[0] == 0
    python = report(out).skills["python"]
    assert report(out).after.width == report(out).before.width
    assert python.base.loss - 0.5 < python.recovered.loss < python.base.loss, "renormalised, each token is a little likelier"
    assert python.agreement.value == 1
    assert python.kl.value < 1e-5


def test_a_vocabulary_may_be_too_small_for_the_text_and_is_measured_so(make, tmp_path):
    out = tmp_path / "run"
    method = {**METHOD, "units": ["token"], "recover": {"tokens": 0}}
    code, told = finish(start(make(method=method, budget={"keep": {"token": 0.5}}), out))
    assert code == 0, told
    found = report(out)
    assert found.after.vocabulary == 300
    assert [n for n in found.notices if n.code == "segmentation_changed"]
    for skill in found.skills.values():
        assert "times as many" in skill.note
        # Without the longer tokens a text is worse predicted, and all of it is counted: a loss by the new tokens would be lower.
        assert skill.cut.loss > 1.05 * skill.base.loss
    assert found.skills["python"].retention.value < 0.9
    assert "score" not in found.provenance.seconds


def test_a_budget_below_what_must_stay_says_the_smallest(make, tmp_path):
    """The dry run takes it; the text needs more."""
    code, told = finish(start(make(method={**METHOD, "units": ["token"]}, budget={"parameters": 0.6}), tmp_path / "run"))
    assert (code, "Cutting tokens can bring this model from" in told) == (1, True), told
    assert json.loads((tmp_path / "run" / "failure.json").read_text())["code"] == "budget_too_small"


@pytest.mark.slow
def test_killed_with_a_trimmed_vocabulary_it_goes_on(make, tmp_path):
    """Each stage can be the first of a process: what it needs of the whole base it loads."""
    method = {**METHOD, "units": ["neuron", "token"], "regularizer": {"tokens": 2560}}
    path, out = make(method=method, budget={"parameters": 0.8}), tmp_path / "run"
    for stage in ("score", "slice", "measure", "export"):
        process = start(path, out)
        wait_for(out, lambda e, stage=stage: e.phase == stage and e.kind == "started", process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    code, told = finish(start(path, out))
    assert code == 0, told
    assert report(out).after.vocabulary < 600


def test_a_tokenizer_that_cannot_be_trimmed_is_told(make, tmp_path, base):
    vocabulary = {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1}, "unk_token": "[UNK]"}
    raw = {"version": "1.0", "added_tokens": [], "model": vocabulary}
    (base / "tokenizer.json").write_text(json.dumps(raw))
    method = {**METHOD, "units": ["token"]}
    code, told = finish(start(make(method=method, budget={"keep": {"token": 0.5}}), tmp_path / "run"))
    assert (code, "WordLevel cannot be trimmed" in told, "Traceback" in told) == (1, True, False), told
