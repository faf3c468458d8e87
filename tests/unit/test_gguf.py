"""A GGUF file holds the model and its tokenizer, llama.cpp computes with it what torch does, and what it cannot is refused."""

import copy
import json
import math
import re
import shutil

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, ROOT, documents, tiny_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from narrow_engine.errors import NarrowError
from narrow_engine.export.gguf import check_gguf, export_gguf, have_llama, require_gguf, round_model
from narrow_engine.export.gguf_arches import ARCHES
from narrow_engine.vocabulary import choose, write_files

needs_llama = pytest.mark.skipif(not have_llama(), reason="llama-cpp-python is not installed (extra 'llama')")
IDS = torch.randint(3, 320, (2, 60), generator=torch.Generator().manual_seed(0))
PLAIN = {"attention_bias": False, "mlp_bias": False}
CHANGES = {
    **dict.fromkeys(["qwen3", "qwen3_moe", "hunyuan_v1_dense", "arcee", "olmo", "olmo2", "cohere", "cohere2"], PLAIN),
    **dict.fromkeys(["glm", "glm4", "gemma", "gemma2", "gemma3_text"], PLAIN),
    "smollm3": {**PLAIN, "no_rope_layers": [1, 1, 1]},
    "seed_oss": {"attention_out_bias": False, "mlp_bias": False},
    "ernie4_5": {"use_bias": False},
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 3},
    "olmoe": {**PLAIN, "num_key_value_heads": 4},
}
"""What llama.cpp has no place for, turned off."""
GELU = ("starcoder2", "gemma", "gemma2", "gemma3_text", "gpt_neox", "gpt2")
"""Families whose activation ggml takes from a table in float16."""
LAYERS = {"s": "sliding_attention", "f": "full_attention"}


def layer_types(kinds):
    return {"num_hidden_layers": len(kinds), "layer_types": [LAYERS[kind] for kind in kinds]}


def saved(family, folder, tokenizer_file, **changes):
    model = tiny_model(family, **{**CHANGES.get(family, {}), **changes})
    model.save_pretrained(folder)
    shutil.copy(tokenizer_file, folder / "tokenizer.json")
    return folder


def read(path):
    """Metadata by key, and tensors by name as float32."""
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    return fields, {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}, reader


NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "block_sparse_moe.gate": "ffn_gate_inp",
}  # fmt: skip
GEMMA = {"post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
         "post_feedforward_layernorm": "post_ffw_norm"}  # fmt: skip
NEOX = {
    "gpt_neox.embed_in": "token_embd", "gpt_neox.final_layer_norm": "output_norm", "embed_out": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "attention.query_key_value": "attn_qkv",
    "attention.dense": "attn_output", "mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down",
}  # fmt: skip


def expected(family, folder):
    """Every tensor of the file, written down a second time: by name and, for what is changed, by index."""
    names = {**NAMES, **(GEMMA if family == "gemma2" else NEOX if family == "gpt_neox" else {})}
    found, experts = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        array = tensor.float().numpy()
        layer, inner, kind = re.fullmatch(r"(?:(?:model|gpt_neox)\.layers\.(\d+)\.)?(.+)\.(weight|bias)", name).groups()
        if expert := re.fullmatch(r"block_sparse_moe\.experts\.(\d)\.(w[123])", inner):
            stem = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}[expert[2]]
            experts.setdefault(f"blk.{layer}.{stem}.weight", {})[int(expert[1])] = array
            continue
        stem = names[inner]
        if stem in ("attn_q", "attn_k") and family in ("llama", "mixtral"):
            heads = len(array) // 8
            rows = [head * 8 + half * 4 + at for head in range(heads) for at in range(4) for half in (0, 1)]
            array = array[rows]
        if stem == "attn_qkv":
            rows = [head * 24 + which * 8 + at for which in range(3) for head in range(4) for at in range(8)]
            array = array[rows]
        if family == "gemma2":
            array = array + 1 if "norm" in stem else array * math.sqrt(8 / 256) if stem == "attn_q" else array
        found[f"blk.{layer}.{stem}.{kind}" if layer else f"{stem}.{kind}"] = array
    found |= {name: np.stack([by[n] for n in range(len(by))]) for name, by in experts.items()}
    return found


STEP = {"f32": 1e-7, "f16": 2**-11, "bf16": 2**-8}
"""Relative error of a number; of Q8_0 it is half a step of 127, of the largest in a block."""


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_every_tensor_is_in_the_file(family, kind, tmp_path, tokenizer_file):
    folder = saved(family, tmp_path, tokenizer_file)
    exported = export_gguf(folder, tmp_path / "out", kind, "a name")
    assert exported.path == tmp_path / "out" / f"model-{kind}.gguf"
    assert exported.bytes == exported.path.stat().st_size
    assert [path.name for path in (tmp_path / "out").iterdir()] == [exported.path.name]
    fields, tensors, reader = read(exported.path)
    wanted = expected(family, folder)
    assert tensors.keys() == wanted.keys()
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    for name, array in wanted.items():
        assert tensors[name].shape == array.shape, name
        exact = array.ndim == 1 or "ffn_gate_inp" in name
        assert types[name] == ("F32" if exact else "F16" if kind == "q8_0" and array.shape[-1] % 32 else kind.upper()), name
        if kind == "q8_0" and types[name] == "Q8_0":
            blocks = np.abs(array).reshape(*array.shape[:-1], -1, 32).max(-1, keepdims=True)
            error = np.abs(tensors[name] - array).reshape(*blocks.shape[:-1], 32) / np.maximum(blocks, 1e-9)
            assert error.max() < 0.5 / 127 * 1.1, name
        else:
            rounding = STEP["f32" if exact else "f16" if kind == "q8_0" else kind]
            np.testing.assert_allclose(tensors[name], array, rtol=rounding, atol=1e-7, err_msg=name)
    assert fields["general.name"] == "a name"
    assert fields["general.architecture"] == ARCHES[family].name
    fallen = [name for name, type in types.items() if kind == "q8_0" and type == "F16"]
    assert [note.split(":")[0] for note in exported.notes] == (
        [f"{len(fallen)} of {len(types)} tensors are in F16 and not Q8_0, since their rows are no multiple of 32"] * bool(fallen)
    )
    assert bool(fallen) == (kind == "q8_0"), "rows of 48 neurons are no whole blocks"


@pytest.mark.parametrize(("family", "down"), [("llama", "ffn_down"), ("gpt2", "ffn_down"), ("mixtral", "ffn_down_exps")])
def test_what_is_measured_has_the_weights_of_the_file(family, down, tmp_path, tokenizer_file):
    model = tiny_model(family, **CHANGES.get(family, {}), intermediate_size=64)
    model.save_pretrained(tmp_path)
    shutil.copy(tokenizer_file, tmp_path / "tokenizer.json")
    _, tensors, _ = read(export_gguf(tmp_path, tmp_path / "out", "q8_0").path)
    rounded = copy.deepcopy(model)
    round_model(rounded, "q8_0")
    layer = next(
        name for name, parameter in model.named_parameters() if ".1." in name and re.search(r"down_proj|mlp\.c_proj", name)
    )
    mine = dict(rounded.named_parameters())[layer].detach().numpy()
    stored = tensors[f"blk.1.{down}.weight"].reshape(mine.shape if family != "gpt2" else mine.T.shape)
    assert np.array_equal(stored if family != "gpt2" else stored.T, mine)
    assert not np.array_equal(mine, dict(model.named_parameters())[layer].detach().numpy())
    assert np.array_equal(tensors["token_embd.weight"], rounded.get_input_embeddings().weight.detach().numpy())


def test_shape_and_numbers_are_in_the_file(tmp_path, tokenizer_file):
    changes = {"num_experts_per_tok": 3, "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}}
    fields, _, _ = read(export_gguf(saved("granitemoe", tmp_path, tokenizer_file, **changes), tmp_path, "f32").path)
    numbers = {key: value for key, value in fields.items() if key.startswith("granitemoe.")}
    assert numbers == pytest.approx({
        "granitemoe.context_length": 1024, "granitemoe.embedding_length": 32, "granitemoe.block_count": 3,
        "granitemoe.feed_forward_length": 48, "granitemoe.expert_feed_forward_length": 48, "granitemoe.vocab_size": 320,
        "granitemoe.attention.head_count": 4, "granitemoe.attention.head_count_kv": 2, "granitemoe.attention.key_length": 8,
        "granitemoe.attention.value_length": 8, "granitemoe.attention.layer_norm_rms_epsilon": 0.01,
        "granitemoe.expert_count": 6, "granitemoe.expert_used_count": 3, "granitemoe.rope.dimension_count": 8,
        "granitemoe.rope.freq_base": 5000.0, "granitemoe.rope.scaling.type": "linear", "granitemoe.rope.scaling.factor": 4.0,
        "granitemoe.attention.scale": 0.3, "granitemoe.embedding_scale": 2.0, "granitemoe.residual_scale": 0.5,
        "granitemoe.logit_scale": 4.0,
    })  # fmt: skip


def test_a_base_that_llama_cpp_takes_is_not_refused(tmp_path, tokenizer_file):
    folder = saved("qwen2", tmp_path, tokenizer_file)
    (folder / "model.safetensors").unlink()
    require_gguf(folder)
    assert list(folder.glob("*gguf*")) == []


def test_a_tensor_is_converted_some_rows_at_a_time(tmp_path, tokenizer_file, monkeypatch):
    folder = saved("mixtral", tmp_path, tokenizer_file)
    whole = export_gguf(folder, tmp_path, "q8_0").path.read_bytes()
    monkeypatch.setattr("narrow_engine.export.gguf.CHUNK", 100)
    assert export_gguf(folder, tmp_path, "q8_0").path.read_bytes() == whole


def test_shards_are_read_and_a_large_weight_is_no_float16(tmp_path, tokenizer_file):
    whole = export_gguf(saved("llama", tmp_path / "whole", tokenizer_file), tmp_path / "whole", "bf16").path
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    shutil.copy(tokenizer_file, tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert export_gguf(tmp_path / "shards", tmp_path / "shards", "bf16").path.read_bytes() == whole.read_bytes()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = -7e4
    model.save_pretrained(tmp_path / "large")
    shutil.copy(tokenizer_file, tmp_path / "large")
    with pytest.raises(NarrowError, match=r"'blk\.1\.ffn_up\.weight'") as raised:
        export_gguf(tmp_path / "large", tmp_path / "out", "f16")
    assert raised.value.code == "gguf_overflow"
    assert list((tmp_path / "out").iterdir()) == []
    export_gguf(tmp_path / "large", tmp_path / "out", "bf16")


REFUSED = [
    ("gemma", {"tie_word_embeddings": False}, "output matrix is the embedding"),
    ("gemma2", {"attn_logit_softcapping": None}, "caps attention"),
    ("llama", {"hidden_act": "gelu"}, "with silu, not gelu"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, r"rotary positions .*dynamic"),
    ("qwen3", {"attention_bias": True}, "no bias at 'attn_output'"),
    ("qwen3_moe", {"norm_topk_prob": False}, "'norm_topk_prob' were True"),
    ("qwen2_moe", {"norm_topk_prob": True}, "'norm_topk_prob' were False"),
    ("olmoe", {"num_key_value_heads": 2}, "own key/value head"),
    ("olmo2", {"hidden_size": 24}, "4 × 8 is not 24"),
    ("cohere2", layer_types("ff"), "only with a sliding window"),
    ("cohere", {"num_hidden_layers": 64}, "64 layers for another one"),
    ("smollm3", {"no_rope_layers": [1, 0, 1]}, "every fourth layer"),
    ("exaone4", {"sliding_window": 8, "layer_types": ["sliding_attention"] * 3}, "'sliding_window' were None"),
    ("starcoder2", {"use_bias": False}, "'use_bias' were True"),
]


@pytest.mark.parametrize(("family", "changes", "why"), REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_refused(family, changes, why, tmp_path, tokenizer_file):
    folder = saved(family, tmp_path, tokenizer_file, **changes)
    with pytest.raises(NarrowError, match=why) as raised:
        export_gguf(folder, tmp_path / "out", "f32")
    assert raised.value.code == "gguf_unsupported"
    assert list((tmp_path / "out").glob("*")) == []
    (folder / "model.safetensors").unlink()
    with pytest.raises(NarrowError, match=why):
        require_gguf(folder)


def test_every_family_has_an_architecture_that_the_package_knows():
    assert set(ARCHES) == set(FAMILIES)
    assert {arch.name for arch in ARCHES.values()} <= set(gguf.MODEL_ARCH_NAMES.values())


def test_without_llama_cpp_the_check_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("narrow_engine.export.gguf.have_llama", lambda: False)
    with pytest.raises(NarrowError, match="pip install") as raised:
        check_gguf(tmp_path, tmp_path / "model-f16.gguf", IDS)
    assert raised.value.code == "missing_extra"


# Tokenizers


def framed(tokenizer, bos):
    number = tokenizer.token_to_id(bos)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, number)])
    return tokenizer


def byte_level(steps, specials=("<s>", "</s>"), **options):
    """Byte-level BPE behind other steps, which must end in ByteLevel."""
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(documents(count=40) + documents("german", 20), trainer)
    return framed(tokenizer, specials[0])


def sentencepiece_like(style="llama"):
    """A BPE as transformers makes it from SentencePiece's: every pair whose joint text is a piece is a merge."""
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.Metaspace()
    plain.train_from_iterator(documents(count=40), trainers.BpeTrainer(vocab_size=600, show_progress=False))
    learned = sorted(plain.get_vocab(), key=plain.get_vocab().get)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [
        (piece[:at], piece[at:])
        for piece in learned
        for at in range(1, len(piece))
        if piece[:at] in vocabulary and piece[at:] in vocabulary
    ]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if style == "llama":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif style == "gemma":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return framed(tokenizer, "<s>")


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=500, special_tokens=["<unk>", "<s>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(documents(count=40), trainer)
    return framed(tokenizer, "<s>")


CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = GPT4O.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace("{1,3}", "")
CJK = "[一-龥぀-ゟ゠-ヿ]+"
DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
# Its tokenizer.json has these two characters themselves.
DEEPSEEK = DEEPSEEK.replace(r"\r\n", "\r\n")


def split(*patterns):
    parts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return [*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


WHOLE_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
TOKENIZERS = {
    "gpt-2": lambda: byte_level([WHOLE_WORDS]),
    "smollm": lambda: byte_level([pre_tokenizers.Digits(individual_digits=True), WHOLE_WORDS]),
    "llama-bpe": lambda: byte_level(split(LLAMA3), ignore_merges=True),
    "dbrx": lambda: byte_level(split(LLAMA3)),
    "qwen2": lambda: byte_level(split(QWEN2)),
    "gpt-4o": lambda: byte_level(split(GPT4O)),
    "tekken": lambda: byte_level(split(TEKKEN), ignore_merges=True),
    "deepseek-v3": lambda: byte_level(split(r"\p{N}{1,3}", CJK, DEEPSEEK)),
    "llama": sentencepiece_like,
    "gemma": lambda: sentencepiece_like("gemma"),
    "metaspace": lambda: sentencepiece_like("metaspace"),
    "t5": unigram,
}
TEXTS = [
    *documents(count=12),
    *documents("german", 6),
    *documents("c", 6),
    *documents("medical", 4),
    "I'VE 12345 dogs, they're   3.14159!\n\n\n\tfoo_bar==baz; 🚀 naïve façade Größe 東京タワー Москва 'll we'LL",
    "a  b   c\r\n \n  x\t\ty",
    "one</s>two <s> three</s>",
]


def model_of(tokenizer, folder, **config):
    tiny_model("llama", num_hidden_layers=1, vocab_size=1000).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", **config}))
    return folder


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_is_in_the_file(name, tmp_path):
    tokenizer = TOKENIZERS[name]()
    folder = model_of(tokenizer, tmp_path, chat_template="{{ messages }}")
    fields, _, _ = read(export_gguf(folder, tmp_path, "f32").path)
    raw = json.loads(tokenizer.to_str())
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    size = tokenizer.get_vocab_size()
    assert [tokenizer.token_to_id(token) for token in tokens[:size]] == list(range(size))
    assert len(set(tokens)) == 1000
    assert set(kinds[size:]) == {gguf.TokenType.UNUSED}
    assert kinds[tokenizer.token_to_id("<s>")] == gguf.TokenType.CONTROL
    assert fields["tokenizer.ggml.bos_token_id"] == tokenizer.token_to_id("<s>")
    assert (fields["tokenizer.ggml.add_bos_token"], fields["tokenizer.ggml.add_eos_token"]) == (True, False)
    assert fields["tokenizer.chat_template"] == "{{ messages }}"
    if name in ("llama", "gemma", "metaspace"):
        assert fields["tokenizer.ggml.model"] == "llama"
        assert fields["tokenizer.ggml.add_space_prefix"] == (name != "gemma")
        scores = dict(zip(tokens, fields["tokenizer.ggml.scores"], strict=True))
        ranks = [scores[a + b] for a, b in raw["model"]["merges"]]
        assert ranks == sorted(ranks, reverse=True)
        assert kinds[tokenizer.token_to_id("<0x0A>")] == gguf.TokenType.BYTE
        assert kinds[0] == gguf.TokenType.UNKNOWN
    elif name == "t5":
        assert fields["tokenizer.ggml.model"] == "t5"
        assert fields["tokenizer.ggml.scores"][:size] == pytest.approx([score for _, score in raw["model"]["vocab"]])
    else:
        assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", name)
        assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in raw["model"]["merges"]]
        assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.token_to_id("</s>")


def test_a_chat_models_two_ends_are_both_told(tmp_path):
    """The end of a text and of a turn; a template of its own file goes before the config's."""
    folder = model_of(byte_level([WHOLE_WORDS], ("<s>", "</s>", "<|im_end|>")), tmp_path, chat_template="old")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "pad_token_id": 2}))
    (folder / "chat_template.jinja").write_text("new")
    fields, _, _ = read(export_gguf(folder, tmp_path, "f32").path)
    ends = [fields[f"tokenizer.ggml.{which}_token_id"] for which in ("eos", "eot", "padding")]
    assert ends == [1, 2, 2]
    assert fields["tokenizer.chat_template"] == "new"


def _uncased():
    tokenizer = TOKENIZERS["gpt-2"]()
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def _missing_merge():
    raw = json.loads(sentencepiece_like().to_str())
    raw["model"]["merges"] = raw["model"]["merges"][:-3]
    return Tokenizer.from_str(json.dumps(raw))


def _other_order():
    raw = json.loads(sentencepiece_like().to_str())
    merges = raw["model"]["merges"]
    several = next(n for n, (a, b) in enumerate(merges) if n and a + b == "".join(merges[n - 1]))
    merges.append(merges.pop(several))
    return Tokenizer.from_str(json.dumps(raw))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: byte_level(split(r"\w+|\W+")), "no name for how the tokenizer splits"),
        (lambda: byte_level([pre_tokenizers.ByteLevel(add_prefix_space=True)]), "no name for how the tokenizer splits"),
        (lambda: byte_level(split(QWEN2), ignore_merges=True), "no name for how the tokenizer splits"),
        (lambda: byte_level([pre_tokenizers.Whitespace(), WHOLE_WORDS]), "knows no pre-tokenizer Whitespace"),
        (_uncased, "no normalizer Lowercase"),
        (_missing_merge, "are not joined though"),
        (_other_order, "not in the order of their pieces"),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_not_is_refused(make, why, tmp_path):
    with pytest.raises(NarrowError, match=why) as raised:
        export_gguf(model_of(make(), tmp_path), tmp_path / "out", "f32")
    assert raised.value.code == "gguf_unsupported"


# With llama.cpp


@needs_llama
@pytest.mark.parametrize(
    "family", [f if f in ("llama", "gemma3_text") else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_llama_cpp_equals_torch(family, tmp_path, tokenizer_file):
    folder = saved(family, tmp_path, tokenizer_file)
    checked = check_gguf(folder, export_gguf(folder, tmp_path, "f32").path, IDS, TEXTS)
    assert checked.parity.relative_error < (5e-3 if family in GELU else 1e-5)
    assert checked.parity.mean_error < checked.parity.max_error / 3
    assert checked.parity.greedy_tokens == checked.parity.greedy_equal == 256
    assert checked.agreement == 1
    assert checked.texts_equal == len(TEXTS)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 256}
LONG |= {"short_factor": [1.0, 1.2, 1.4, 1.6], "long_factor": [1.0, 2.0, 3.0, 4.0]}
ALPHA = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0, "alpha": 1000.0}
VARIANTS = {
    "heads cut": ("qwen2", {"num_attention_heads": 6}, 256),
    "hidden cut": ("qwen2", {"hidden_size": 48}, 256),
    "fused, hidden cut": ("phi3", {"hidden_size": 48, "head_dim": 8}, 256),
    "three heads": ("qwen3", {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16}, 256),
    "tied where llama.cpp wants a head": ("olmo2", {"tie_word_embeddings": True}, 256),
    "tied": ("llama", {"tie_word_embeddings": True}, 256),
    "untied": ("gpt2", {"tie_word_embeddings": False}, 256),
    "untied gemma": ("gemma3_text", {"tie_word_embeddings": False}, 256),
    "layers cut, irregular windows": ("gemma2", layer_types("sfffs"), 256),
    "no window left": ("gemma2", layer_types("ff"), 256),
    "no window left, two bases": ("gemma3_text", layer_types("ff"), 256),
    "regular windows": ("gemma3_text", {"num_hidden_layers": 7, "rope_parameters": GEMMA3_ROPE}, 256),
    "rotation in windows only": ("cohere2", layer_types("sfsff"), 256),
    "clipped": ("olmo", {"clip_qkv": 0.5}, 256),
    "in a row": ("gpt_neox", {"use_parallel_residual": False}, 256),
    "llama 3": ("llama", {"rope_parameters": LLAMA3_ROPE}, 256),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, 256),
    "yarn": ("qwen2", {"rope_parameters": YARN}, 256),
    "yarn with a factor": ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.3}}, 256),
    "longrope": ("phi3", {"hidden_size": 32, "max_position_embeddings": 512, "original_max_position_embeddings": 256,
                          "rope_parameters": LONG}, 240),
    "a part of each head": ("phi3", {"hidden_size": 64, "head_dim": 16, "rope_parameters":
                                     {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}}, 256),
    "alpha": ("hunyuan_v1_dense", {"rope_parameters": ALPHA}, 256),
    "window": ("mistral", {"sliding_window": 40}, 24),
    "window in some layers": ("qwen2", {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1}, 24),
    "spare rows": ("llama", {"vocab_size": 400}, 256),
}  # fmt: skip


@needs_llama
@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_llama_cpp_equals_torch_in_other_shapes(name, tmp_path, tokenizer_file):
    family, changes, reach = VARIANTS[name]
    folder = saved(family, tmp_path, tokenizer_file, **changes)
    exported = export_gguf(folder, tmp_path, "f32")
    checked = check_gguf(folder, exported.path, IDS)
    assert checked.parity.relative_error < (5e-3 if family in GELU else 1e-5)
    assert (checked.parity.greedy_tokens, checked.parity.greedy_equal) == (reach, reach)
    assert bool(exported.notes) == name.startswith(("window", "longrope"))


@needs_llama
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_llama_cpp_writes_the_same_text_as_torch(kind, tmp_path):
    """With the demo's base, a trained model: 256 greedy tokens of each kind of file."""
    folder, tokenizer = ROOT / "demo" / "base", Tokenizer.from_file(str(ROOT / "demo" / "base" / "tokenizer.json"))
    rows = [tokens for text in documents(count=40) if len(tokens := tokenizer.encode(text).ids) >= 200]
    ids = torch.tensor([tokens[:200] for tokens in rows[:4]])
    checked = check_gguf(folder, export_gguf(folder, tmp_path, kind).path, ids, TEXTS)
    assert checked.parity.relative_error < {"f16": 2e-3, "bf16": 1e-2, "q8_0": 4e-2}[kind]
    assert (checked.parity.greedy_equal, checked.agreement) == (256, 1)
    assert checked.texts_equal == len(TEXTS)


def lines(name):
    """What is cut: of Unigram lines, since where two ways through a text are equally likely, each tokenizer takes its own, and
    in a long text there are some. Those behind Metaspace put a space neither before another one nor after a special token."""
    if name == "t5":
        return [line.strip() for text in TEXTS for line in text.splitlines() if line.strip()]
    return [text for text in TEXTS if name != "metaspace" or (text[0] != " " and "<s>" not in text)]


@needs_llama
@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_cuts_text_into_the_same_tokens(name, tmp_path):
    folder, texts = model_of(TOKENIZERS[name](), tmp_path), lines(name)
    equal = check_gguf(folder, export_gguf(folder, tmp_path, "f32").path, IDS, texts).texts_equal
    assert equal >= len(texts) * (0.98 if name == "t5" else 1)


@needs_llama
@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt-2", "qwen2", "llama", "gemma", "t5"])
def test_llama_cpp_cuts_text_by_a_trimmed_vocabulary_too(name, tmp_path):
    whole = model_of(TOKENIZERS[name](), tmp_path / "whole")
    tokenizer = Tokenizer.from_file(str(whole / "tokenizer.json"))
    counts = np.zeros(1000, np.int64)
    for text in documents(count=6):
        np.add.at(counts, tokenizer.encode(text).ids, 1)
    kept = choose(tokenizer, counts, set(), None)
    assert len(kept) < tokenizer.get_vocab_size()
    write_files(whole, tmp_path / "trimmed", kept)
    folder = tmp_path / "trimmed"
    tiny_model("llama", num_hidden_layers=1, vocab_size=len(kept)).save_pretrained(folder)
    texts = lines(name)
    equal = check_gguf(folder, export_gguf(folder, folder, "f32").path, IDS, texts).texts_equal
    assert equal >= len(texts) * (0.98 if name == "t5" else 1)


@needs_llama
def test_a_changed_weight_and_a_broken_file_are_seen(tmp_path, tokenizer_file):
    folder = saved("llama", tmp_path, tokenizer_file)
    path = export_gguf(folder, tmp_path, "f32").path
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.bias"] += 0.5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert check_gguf(folder, path, IDS).parity.relative_error > 1e-3
    path.write_bytes(path.read_bytes()[:-40_000])
    with pytest.raises(NarrowError, match="does not run the file") as raised:
        check_gguf(folder, path, IDS)
    assert raised.value.code == "gguf_failed"
