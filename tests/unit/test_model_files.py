"""A model folder is taken only if it is what it says, and nothing in it is ever run."""

import json
import pickle
import shutil
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, tiny_model

from narrow_engine.errors import NarrowError
from narrow_engine.model_files import accepted_name, inspect_model, read_header
from narrow_engine.models import hidden_states, load_model


@pytest.fixture
def folder(tmp_path, tiny_folder):
    return shutil.copytree(tiny_folder, tmp_path / "model")


def write_header(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def refused(folder, code, words="."):
    with pytest.raises(NarrowError, match=words) as raised:
        inspect_model(folder)
    assert raised.value.code == code


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_recognised_as_transformers_saves_it(family, tmp_path, tokenizer_file):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    shutil.copy(tokenizer_file, tmp_path / "tokenizer.json")
    info = inspect_model(tmp_path)
    assert info.family == family
    assert info.parameters == sum(p.numel() for p in model.parameters())
    assert info.dtype == "F32"


def test_a_sharded_model_is_taken_and_a_missing_shard_named(folder, tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50kB")
    shutil.copy(folder / "tokenizer.json", tmp_path / "sharded")
    assert inspect_model(tmp_path / "sharded").parameters == sum(p.numel() for p in model.parameters())
    shard = sorted((tmp_path / "sharded").glob("*.safetensors"))[1]
    shard.unlink()
    refused(tmp_path / "sharded", "missing_file", shard.name)


def test_pickles_are_refused_in_any_disguise(folder):
    payload = pickle.dumps({"weight": [1.0]})
    (folder / "model.safetensors").write_bytes(payload)
    refused(folder, "bad_safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(payload)
    refused(folder, "unsafe_weights", "pytorch_model.bin")


def test_code_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}}))
    refused(folder, "remote_code")


def test_a_truncated_file_is_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, "bad_safetensors", "cut short")


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"not json", b""),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"\0" * 4),
        ({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}, b"\0" * 8),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"\0" * 4),
        ({"a": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}, b"\0" * 8),
        ({"a": {"dtype": "F32", "shape": [1]}}, b"\0" * 4),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"\0" * 8),
        (
            {
                "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
            },
            b"\0" * 12,
        ),
        ({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
        ({"__metadata__": 7}, b""),
        (b'{"a": 1, "a": 2}', b""),
        (b"[" * 100_000, b""),
    ],
)
def test_lying_headers_are_refused(tmp_path, header, data):
    write_header(tmp_path / "x.safetensors", header, data)
    with pytest.raises(NarrowError) as raised:
        read_header(tmp_path / "x.safetensors")
    assert raised.value.code == "bad_safetensors"


@settings(max_examples=100, deadline=None)
@given(body=st.binary(max_size=200))
def test_any_bytes_give_a_sentence(tmp_path_factory, body):
    path = tmp_path_factory.mktemp("f") / "x.safetensors"
    path.write_bytes(body)
    try:
        found = read_header(path)
    except NarrowError:
        found = {}
    assert found == {}, "nothing this small can hold a tensor"


def test_a_header_length_of_terabytes_costs_nothing(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(NarrowError, match="does not fit"):
        read_header(tmp_path / "x.safetensors")


def test_tensors_that_do_not_match_the_config_are_named(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    refused(folder, "wrong_tensors", r"model\.norm\.weight")


def test_a_config_that_asks_for_terabytes_is_refused_by_the_headers(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 2**20, "num_hidden_layers": 2}))
    refused(folder, "wrong_tensors")


def test_a_config_that_asks_for_millions_of_layers_costs_nothing(folder):
    config = json.loads((folder / "config.json").read_text())
    for layers, code in ((10**7, "bad_config"), (4000, "wrong_tensors")):
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
        refused(folder, code)


@pytest.mark.parametrize("extra", ['"\\ud800"', "[" * 100 + "]" * 100, '{"a":' * 40 + "1" + "}" * 40])
def test_json_that_could_not_be_told_again_is_refused(folder, extra):
    config = (folder / "config.json").read_text().rstrip().removesuffix("}")
    (folder / "config.json").write_text(f'{config}, "x": {extra}}}')
    refused(folder, "bad_config")


@pytest.mark.parametrize(
    "index", [[], {"weight_map": {"a": ["x"]}}, {"weight_map": {"a": "../x.safetensors"}}, {"weight_map": {}}]
)
def test_an_index_that_maps_to_no_file_is_refused(folder, index):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "bad_safetensors")


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": 5},
        {"rope_parameters": [1]},
        {"rms_norm_eps": "x"},
        {"rms_norm_eps": -1e9},
        {"pad_token_id": 10**9},
        {"attention_dropout": 7},
        {"_attn_implementation": "flash_attention_2"},
        {"rope_parameters": {"rope_type": "linear", "factor": 0, "rope_theta": 10000.0}},
    ],
)
def test_a_config_that_transformers_cannot_run_is_a_bad_model(folder, change):
    """The headers agree with these: only loading shows it, and it must show there."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    inspect_model(folder)
    with pytest.raises(NarrowError) as raised:
        load_model(folder)
    assert raised.value.code == "bad_model"


def test_what_a_config_asks_to_be_returned_besides_does_not_matter(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "output_attentions": True, "return_dict": False, "use_cache": True})
    )
    assert hidden_states(load_model(folder), torch.arange(5)[None]).shape == (1, 5, 32)


@pytest.mark.parametrize(
    "name", ["../config.json", "a/config.json", ".config.json", "model.bin", "modeling.py", "x.safetensors", ""]
)
def test_only_known_names_are_accepted(name):
    assert not accepted_name(name)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "tokenizer.json"])
def test_known_names_are_accepted(name):
    assert accepted_name(name)


@pytest.mark.parametrize(
    ("name", "values"), [("config.json", 10_000), ("special_tokens_map.json", 100_000), ("tokenizer_config.json", 200_000)]
)
def test_values_are_counted_before_they_are_made(folder, name, values):
    content = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps({**content, "wide": (values // 2 - 500) * [[]]}))
    inspect_model(folder)
    (folder / name).write_text(json.dumps({**content, "wide": (values // 2) * [[]]}))
    refused(folder, "bad_config", f"more than {values:,} values")


def test_the_largest_vocabularies_are_within_the_limits(folder):
    """As many tokens and merges as Gemma 3 has, all of them longer than its are, in the form with more values."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {f"{number:016x}": number for number in range(262_144)}
    tokenizer["model"]["merges"] = [[f"{number:08x}", f"{number:08x}"] for number in range(514_906)]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, indent=1))
    settings = {number: {"content": f"<unused{number}>", "special": True, "lstrip": False} for number in range(6_400)}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": settings}, indent=2))
    inspect_model(folder)
