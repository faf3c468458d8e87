"""How fast formats are, what bounds them, and which programs take them."""

from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model

from narrow_engine import earlier, footprint, memory, speed, stages
from narrow_engine.errors import NarrowError
from narrow_engine.export import matrix
from narrow_engine.export.runtimes import form_of, open_runtime
from narrow_engine.families import dimensions
from narrow_engine.models import config_dict
from narrow_engine.report.model import Pace, Speed
from narrow_engine.sizing import size_of


def timed(base, narrow, predicted=2.0):
    return Speed(
        runtime="torch",
        base=Pace(prefill=base[0], decode=base[1]),
        narrow=Pace(prefill=narrow[0], decode=narrow[1]),
        predicted=predicted,
    )


def size(**changes):
    config = config_dict(tiny_model("llama", **changes))
    return size_of(config, dimensions(config), 4)


def test_what_bounds_a_result_is_what_does_not_shrink_with_it():
    """t = a + b · weights: 4 ms = a + b, 3 ms = a + b / 2, so a = 2 ms."""
    told = speed.bound(timed((1000, 250), (2000, 1000 / 3)), size())
    assert told.startswith("Writing is 1.33 times as fast where the weights say 2.00: of its 3 ms a token, 2 ms do not depend")
    assert "3 layers" in told
    assert "prompt" not in told
    assert speed.bound(timed((1000, 250), (1900, 460)), size()) == "", "0.9 of it is enough"
    assert speed.bound(timed((1000, 250), (1000, 250), predicted=1.0), size()) == "", "nothing was to be faster"


@pytest.mark.slow
def test_base_and_result_are_timed_in_processes_of_their_own(tmp_path):
    for name, width in (("base", 512), ("narrow", 32)):
        tiny_model("llama", intermediate_size=width, hidden_size=128, num_hidden_layers=6).save_pretrained(tmp_path / name)
    sizes = size(intermediate_size=512, hidden_size=128), size(intermediate_size=32, hidden_size=128)
    found = speed.measure_speed("safetensors", (tmp_path / "base", tmp_path / "narrow"), sizes, 256, lambda: None)
    assert found.predicted == sizes[0].flops_per_token / sizes[1].flops_per_token
    for pace in (found.base, found.narrow):
        assert min(pace.prefill, pace.decode, pace.load) > 0
        assert 50e6 < pace.memory < 2e9
    assert speed.measure_speed("safetensors", (None, tmp_path / "narrow"), sizes, 256, lambda: None).base is None


def test_a_runtime_that_ends_is_told(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(NarrowError, match="torch ended while it ran the model") as raised:
        speed.measure_speed("safetensors", (None, tmp_path), (size(), size()), 256, lambda: None)
    assert raised.value.code == "runtime_failed"


def test_rules_of_servers():
    config = config_dict(tiny_model("llama", num_attention_heads=4, num_key_value_heads=2, intermediate_size=64))
    assert matrix.gpus(config) == [1, 2, 4]
    assert matrix.gpus({**config, "num_attention_heads": 8, "num_key_value_heads": 2}) == [1, 2, 4, 8]
    assert matrix.gpus({**config, "num_attention_heads": 8, "num_key_value_heads": 2}, alike=False) == [1, 2]
    assert matrix.gpus({**config, "num_attention_heads": 8, "intermediate_size": 337}) == [1]
    rows = {(row.runtime, row.format): row for row in matrix.runtimes(config, ["onnx", "gguf-f16"], ["onnx"])}
    assert rows["transformers", "safetensors"].checked
    assert rows["ONNX Runtime", "onnx"].checked
    assert not rows["llama.cpp", "gguf-f16"].checked
    assert "On 1, 2 or 4 GPUs." in rows["vLLM", "safetensors"].note
    odd = matrix.runtimes({**config, "head_dim": 12}, [], [])
    assert "not in FlashAttention" in next(row.note for row in odd if row.runtime == "vLLM")
    other = matrix.runtimes(config_dict(tiny_model("ministral")), [], [])
    assert [row.loads for row in other if row.runtime == "vLLM"] == [False]


def test_a_folder_tells_its_format(tmp_path):
    with pytest.raises(NarrowError) as raised:
        form_of(tmp_path)
    assert raised.value.code == "no_model"
    tiny_model("llama").save_pretrained(tmp_path)
    assert form_of(tmp_path) == "safetensors"
    runtime = open_runtime("safetensors", tmp_path, torch.get_num_threads())
    assert runtime.step(torch.ones(2, 3, dtype=torch.long).numpy()).shape == (2, 3, runtime.vocabulary)


def test_a_format_that_does_not_fit_into_the_memory_is_left_out(monkeypatch):
    told = []
    run = SimpleNamespace(emit=lambda *event: told.append(event))
    monkeypatch.setattr(earlier, "job", lambda _: None)
    monkeypatch.setattr(footprint, "of_base", lambda _: 10**6)
    monkeypatch.setattr(memory, "limit", lambda _: round(4e9 / footprint.ROOM) + 1)
    assert stages._room_for(run, "onnx", 10**9)
    assert not told
    assert not stages._room_for(run, "onnx-int8", 10**9), "it is measured beside the base"
    monkeypatch.setattr(memory, "limit", lambda _: 4 * 10**9)
    assert not stages._room_for(run, "onnx", 10**9)
    assert [data["code"] for _, _, _, data in told] == ["export_too_large"] * 2
