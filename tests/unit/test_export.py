"""What is saved loads anywhere and computes the same; what does not is caught."""

import shutil
import subprocess
import sys
import time

import numpy as np
import onnx
import psutil
import pytest
import torch
from misbehaving import run_cli
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, tiny_model

from narrow_engine.errors import NarrowError
from narrow_engine.export.onnx import export_onnx
from narrow_engine.export.parity import compare
from narrow_engine.export.runtimes import Onnx
from narrow_engine.export.safetensors import check_reload, round_weights, save_model
from narrow_engine.models import greedy

IDS = torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(0))


def saved(family, folder, tokenizer_file, dtype=torch.float32):
    source = folder / "source"
    source.mkdir(parents=True)
    shutil.copy(tokenizer_file, source / "tokenizer.json")
    model = tiny_model(family)
    round_weights(model, dtype)
    save_model(model, source, folder / "model", dtype)
    return model


def test_a_fresh_process_computes_the_same_and_a_changed_weight_is_caught(tmp_path, tokenizer_file):
    model = saved("gemma2", tmp_path, tokenizer_file, torch.bfloat16)
    folder = tmp_path / "model"
    assert check_reload(folder, model, IDS).relative_error < 1e-5
    assert (folder / "tokenizer.json").read_bytes() == tokenizer_file.read_bytes()
    weights = load_file(folder / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {(folder / "config.json").stat().st_mode & 0o777}
    weights["model.layers.1.self_attn.q_proj.bias"] += 0.5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NarrowError) as raised:
        check_reload(folder, model, IDS)
    assert raised.value.code == "reload_mismatch"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reloads(family, tmp_path, tokenizer_file):
    model = saved(family, tmp_path, tokenizer_file, torch.bfloat16)
    assert check_reload(tmp_path / "model", model, IDS).relative_error < 1e-5


@pytest.mark.slow
def test_a_model_in_shards_reloads_and_a_lost_shard_is_told(tmp_path):
    model = tiny_model("gpt_neox")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert check_reload(tmp_path, model, IDS).relative_error < 1e-5
    shards[0].unlink()
    with pytest.raises(NarrowError) as raised:
        check_reload(tmp_path, model, IDS)
    assert raised.value.code == "reload_failed"
    assert shards[0].name in str(raised.value)


@pytest.mark.slow
def test_the_fresh_process_ends_with_the_one_that_asked(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    code = (
        "import sys, torch, pathlib\n"
        "from transformers import AutoModelForCausalLM\n"
        "from narrow_engine.export.safetensors import check_reload\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "check_reload(folder, AutoModelForCausalLM.from_pretrained(folder), torch.ones(1, 8, dtype=torch.long))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.DEVNULL) as parent:
        children = until(lambda: psutil.Process(parent.pid).children(), 60)
        child = children[0]
        # It binds itself to its parent before it imports torch, and works on for seconds after.
        until(lambda: any("libtorch" in m.path for m in child.memory_maps()), 60)
        parent.kill()
        until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 1)


def until(found, seconds):
    """What `found` returns as soon as that is true; polls."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.02)
    raise AssertionError(f"did not happen within {seconds} s")


ONNX_FAMILIES = [f if f == "gemma2" else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]


@pytest.mark.parametrize("family", ONNX_FAMILIES)
def test_onnx_equals_torch(family, tmp_path, tokenizer_file):
    model = saved(family, tmp_path, tokenizer_file)
    export_onnx(tmp_path / "model", tmp_path / "onnx")
    runtime = Onnx(tmp_path / "onnx" / "model.onnx", threads=1)
    parity = compare(model, runtime, IDS)
    assert parity.relative_error < 1e-4
    assert 0 < parity.mean_error < parity.max_error
    assert parity.greedy_equal == parity.greedy_tokens >= 64
    proto = onnx.load(tmp_path / "onnx" / "model.onnx")
    names = [i.name for i in proto.graph.input]
    assert names[:4] == ["input_ids", "attention_mask", "position_ids", "past_key_values.0.key"]
    assert [o.name for o in proto.graph.output][:2] == ["logits", "present.0.key"]
    assert [d.dim_param for d in proto.graph.input[1].type.tensor_type.shape.dim] == ["batch_size", "total_sequence_length"]

    _any_batch_and_past(runtime, model)
    _left_padding(runtime.session, model)


def test_sampling_settings_do_not_count_and_large_weights_lie_beside(tmp_path, monkeypatch, capfd):
    """A base may ask `generate` to penalise repetition; greedy decoding is compared without. And a file holds 2 GiB."""
    model = tiny_model("llama", num_hidden_layers=1)
    model.generation_config.repetition_penalty = 1.5
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("narrow_engine.export.onnx.EXTERNAL_BYTES", 1000)
    capfd.readouterr()
    export_onnx(tmp_path / "model", tmp_path / "onnx")
    parity = compare(model.eval(), Onnx(tmp_path / "onnx" / "model.onnx", threads=1), IDS)
    assert parity.greedy_equal == parity.greedy_tokens >= 64
    assert capfd.readouterr() == ("", ""), "the exporter is talkative; none of it is for the user"
    assert (tmp_path / "onnx" / "model.onnx.data").stat().st_size > 40_000
    assert (tmp_path / "onnx" / "config.json").read_bytes() == (tmp_path / "model" / "config.json").read_bytes()
    proto = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False)
    assert {m.key: m.value for m in proto.metadata_props}["family"] == "llama"
    assert proto.producer_name == "narrow"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_a_sliding_window_is_in_the_mask(family, tmp_path):
    """The text is longer than the window, and only some layers of the Qwens have one."""
    layers = {} if family == "mistral" else {"use_sliding_window": True, "max_window_layers": 1}
    model = tiny_model(family, sliding_window=6, **layers)
    model.save_pretrained(tmp_path / "model")
    export_onnx(tmp_path / "model", tmp_path / "onnx")
    runtime = Onnx(tmp_path / "onnx" / "model.onnx", threads=1)
    parity = compare(model.eval(), runtime, IDS)
    assert parity.relative_error < 1e-4
    assert parity.greedy_equal == parity.greedy_tokens
    _any_batch_and_past(runtime, model)


@pytest.mark.parametrize("family", [f if f == "gpt_neox" else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_onnx_runtime_genai_runs_the_folder(family, tmp_path):
    genai = pytest.importorskip("onnxruntime_genai", reason="it is published for few machines")
    model = tiny_model(family).eval()
    model.save_pretrained(tmp_path / "model")
    export_onnx(tmp_path / "model", tmp_path / "onnx")
    opened = genai.Model(str(tmp_path / "onnx"))
    options = genai.GeneratorParams(opened)
    options.set_search_options(max_length=40)
    generator = genai.Generator(opened, options)
    generator.append_tokens(IDS[0, :8].tolist())
    while not generator.is_done():
        generator.generate_next_token()
    made = [int(token) for token in generator.get_sequence(0)][8:]
    assert made == greedy(model, IDS[:1, :8], len(made))
    assert made


def _any_batch_and_past(decoder, model):
    """Three rows, fed in pieces of uneven length, equal one pass of torch."""
    ids = torch.randint(3, 320, (3, 13), generator=torch.Generator().manual_seed(1))
    decoder.reset()
    found = np.concatenate([decoder.step(piece.numpy()) for piece in ids.split([1, 7, 5], dim=1)], axis=1)
    with torch.no_grad():
        assert np.abs(found - model(input_ids=ids).logits.numpy()).max() < 1e-3


def _left_padding(session, model):
    """A padded row computes what it computes alone."""
    ids = torch.randint(3, 320, (1, 6), generator=torch.Generator().manual_seed(2))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1).numpy()
    mask = np.array([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    feed = {"input_ids": padded, "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(1) - 1, 0)}
    for value in session.get_inputs()[3:]:
        feed[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    found = session.run(["logits"], feed)[0][:, 3:]
    with torch.no_grad():
        assert np.abs(found - model(input_ids=ids).logits.numpy()).max() < 1e-3


@pytest.mark.parametrize(
    ("name", "content"), [("model.safetensors", None), ("model.onnx", b"no protocol buffer"), ("config.json", b"{}")]
)
def test_a_file_of_a_result_that_is_broken_is_a_sentence(tiny_folder, tmp_path, name, content):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / name).write_bytes((folder / name).read_bytes()[:1000] if content is None else content)
    result = run_cli("run-model", str(folder), "def")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"narrow run-model: The model in {folder} cannot be read: ")
    assert run_cli("run-model", str(tiny_folder), "def", "--tokens", "2", "--threads", "1").exit_code == 0
