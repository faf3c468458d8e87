"""The result as GGUF, the one file that llama.cpp, Ollama and LM Studio run: weights, shape, tokenizer and chat template.

Made from the stock folder alone, tensor by tensor: of the weights no more than one tensor (of experts, one matrix of all the
experts of a layer) is in memory at a time. What llama.cpp can't compute as transformers does is refused, never approximated;
what is merely narrower in the file (a shorter context, a tensor that could not be quantized) comes back as a sentence.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; names of tensors and keys are the `gguf` package's.
"""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from narrow_engine import families
from narrow_engine.errors import NarrowError
from narrow_engine.export.gguf_arches import ARCHES, Arch
from narrow_engine.export.gguf_vocabulary import add_vocabulary
from narrow_engine.export.parity import GREEDY_TOKENS, PROMPT_TOKENS, parity
from narrow_engine.export.runtimes import have_llama
from narrow_engine.families import PARTS, Dimensions, Family, dimensions, family_of, present
from narrow_engine.model_files import weight_files
from narrow_engine.models import greedy, matrices
from narrow_engine.report.model import Parity

Kind = Literal["f32", "f16", "bf16", "q8_0"]
FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
Q8_BLOCK = 32
"""Numbers that share a scale in Q8_0; a row must hold whole blocks."""
EXACT = ("ffn_gate_inp", "ffn_gate_inp_shexp", "position_embd")
"""Matrices that llama.cpp wants in float32: routers, where a rounding picks another expert, and positions."""
CHUNK = 2**24
"""Numbers that are converted at a time."""
CHECK_SECONDS = 1800

_RUN = Path(__file__).with_name("run_llama.py")
_PART_NAMES = {"gate_up": ("ffn_gate", "ffn_up"), "q_k_v": ("attn_q", "attn_k", "attn_v")}
_YARN = {"beta_fast": 32, "beta_slow": 1}
"""Where YaRN's ramp begins and ends: llama.cpp reads other values for a few architectures only, of which none is here."""
_ROPE_KEYS = {
    *("rope_type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings", "attention_factor"),
    *(*_YARN, "low_freq_factor", "high_freq_factor", "long_factor", "short_factor"),
}

Read = Callable[[str], Tensor]


class Exported(NamedTuple):
    """A file that was written."""

    path: Path
    bytes: int
    notes: list[str]
    """A sentence for each thing that is other than in the model: for the report's notices."""


class Checked(NamedTuple):
    """A file that was run by llama.cpp, compared with torch in float32 on the same tokens."""

    parity: Parity
    """Of logits; `greedy_equal` counts from the first, so it ends at the first near tie."""
    agreement: float
    """Share of torch's greedy tokens that llama.cpp, given torch's tokens before each, finds the most likely too."""
    texts_equal: int
    """How many of the texts llama.cpp cuts into the same tokens as the tokenizer does."""


class _Piece(NamedTuple):
    """A tensor of the file."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[Read], Tensor]
    """Reads and reshapes it, from a function that reads a tensor of the folder by name."""


def export_gguf(folder: Path, out: Path, kind: Kind, name: str = "narrow") -> Exported:
    """Writes the saved model in `folder` as `out`/model-`kind`.gguf, which `name` is told to whoever opens it.

    Norms, biases, routers and positions stay float32. Raises NarrowError: gguf_unsupported where llama.cpp cannot compute
    this model or cut text as its tokenizer does, gguf_overflow where a weight is beyond what float16 holds.
    """
    out.mkdir(parents=True, exist_ok=True)
    path, unfinished = out / f"model-{kind}.gguf", out / f"model-{kind}.gguf.partial"
    writer, pieces, notes = _prepare(folder, unfinished)
    try:
        writer.add_name(name)
        writer.add_file_type(FILE_TYPES[kind])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        notes += _write(writer, folder, pieces, kind)
        writer.close()
        unfinished.replace(path)
    finally:
        writer.close()
        unfinished.unlink(missing_ok=True)
    return Exported(path, path.stat().st_size, notes)


def require_gguf(folder: Path) -> None:
    """Refuses a base of which no GGUF can be made, before any work. No weight is read.

    A cut can still bring a model out of what llama.cpp takes: heads or hidden dimensions where it wants them square, layers
    where it counts them. Raises NarrowError (gguf_unsupported).
    """
    _prepare(folder, None)


def _prepare(folder: Path, path: Path | None) -> tuple[gguf.GGUFWriter, list[_Piece], list[str]]:
    """A writer with all that is in the file but the tensors, these, and notes. Raises NarrowError (gguf_unsupported)."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    values = config.to_dict()
    family, dims = family_of(values), dimensions(values)
    arch = _arch(family, values, dims)
    writer = gguf.GGUFWriter(path, arch.name)
    notes = _add_shape(writer, arch, family, values, dims)
    extra = _add_rope(writer, arch, config, dims, notes)
    notes += add_vocabulary(writer, folder, dims.vocab)
    constants = [_Piece(name, tuple(tensor.shape), partial(_constant, tensor)) for name, tensor in extra.items()]
    return writer, constants + list(_pieces(arch, family, values, dims)), notes


def refuse(what: str) -> NarrowError:
    """Why there is no GGUF of this model, as a sentence."""
    return NarrowError("gguf_unsupported", f"{what}, so no GGUF can be made: leave 'gguf' out of export.")


def _arch(family: Family, config: dict[str, Any], dims: Dimensions) -> Arch:
    """The architecture to write the model as. Raises NarrowError (gguf_unsupported)."""
    if family.model_type not in ARCHES:
        raise refuse(f"llama.cpp has no {family.model_type} models")
    arch = ARCHES[family.model_type]
    if not arch.grouped and dims.kv_heads != dims.heads:
        raise refuse(f"llama.cpp takes {family.model_type} models only where every query head has its own key/value head")
    if arch.square and dims.heads * dims.head_dim != dims.hidden:
        if arch.otherwise is None:
            raise refuse(
                f"llama.cpp takes {family.model_type} models only where heads × head_dim is the hidden size, here "
                f"{dims.heads} × {dims.head_dim} is not {dims.hidden}"
            )
        arch = arch.otherwise
    act = next((config[key] for key in ("hidden_act", "hidden_activation", "activation_function") if config.get(key)), None)
    if act not in arch.act:
        raise refuse(f"llama.cpp computes {family.model_type} models with {arch.act[0]}, not {act}")
    for key, value in arch.only:
        if config.get(key, value) != value:
            raise refuse(f"llama.cpp computes {family.model_type} models as if {key!r} were {value}, not {config[key]}")
    if dims.layers == arch.layers_not or (arch.layers_below and dims.layers >= arch.layers_below):
        raise refuse(f"llama.cpp takes a {family.model_type} model of {dims.layers} layers for another one")
    if family.model_type == "smollm3" and config["no_rope_layers"] != [int((n + 1) % 4 != 0) for n in range(dims.layers)]:
        raise refuse("llama.cpp leaves the rotation out in every fourth layer of a smollm3 model, and here it is others")
    if arch.head == "none" and not dims.tied:
        raise refuse(f"llama.cpp takes {family.model_type} models only where the output matrix is the embedding")
    return arch


def _add_shape(writer: gguf.GGUFWriter, arch: Arch, family: Family, config: dict[str, Any], dims: Dimensions) -> list[str]:
    """Everything about the shape, but for rotary positions. Returns what is narrower than in the model."""
    notes: list[str] = []
    context, window = _context(arch, config, dims), _window(config)
    if window and arch.window_period:
        writer.add_sliding_window(window)
        pattern = [kind == "sliding_attention" for kind in config["layer_types"]]
        # Files of regular models carry no pattern, and older readers know no other.
        if pattern != [(n + 1) % arch.window_period != 0 for n in range(dims.layers)]:
            writer.add_sliding_window_pattern(pattern)
    elif arch.windowless == "refuse":
        raise refuse(f"llama.cpp takes {family.model_type} models only with a sliding window in some layer")
    elif arch.windowless == "context":
        writer.add_sliding_window(context)
    elif context < dims.context:
        notes.append(
            f"llama.cpp knows no sliding window in {family.model_type} models: the file's context is {context} tokens, the "
            "window's length, up to which both compute the same."
        )
    writer.add_context_length(context)
    writer.add_embedding_length(dims.hidden)
    writer.add_block_count(dims.layers)
    writer.add_head_count(dims.heads)
    writer.add_head_count_kv(dims.kv_heads)
    writer.add_key_length(dims.head_dim)
    writer.add_value_length(dims.head_dim)
    writer.add_vocab_size(dims.vocab)
    writer.add_feed_forward_length(dims.width)
    if family.experts_key:
        writer.add_expert_count(dims.experts)
        writer.add_expert_used_count(dims.active)
        writer.add_expert_feed_forward_length(dims.width)
    if dims.shared:
        writer.add_expert_shared_feed_forward_length(dims.shared)
    if arch.eps_key == "rms_norm_eps":
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    else:
        writer.add_layer_norm_eps(config[arch.eps_key] if arch.eps_key else 1e-5)
    for key, metadata in arch.numbers:
        if config.get(key) is not None:
            writer.add_float32(f"{arch.name}.{metadata}", float(config[key]))
        elif key == "attn_logit_softcapping":
            raise refuse("llama.cpp caps attention in gemma2 models, and this one doesn't")
    for key, metadata in arch.flags:
        writer.add_bool(f"{arch.name}.{metadata}", bool(config[key]))
    return notes


def _window(config: dict[str, Any]) -> int | None:
    """The sliding window, if a layer has one."""
    kinds = config.get("layer_types")
    return config.get("sliding_window") or None if kinds is None or "sliding_attention" in kinds else None


def _context(arch: Arch, config: dict[str, Any], dims: Dimensions) -> int:
    """How far the file goes: to the window's end where llama.cpp knows none."""
    return dims.context if arch.window_period else min(dims.context, _window(config) or dims.context)


def _add_rope(writer: gguf.GGUFWriter, arch: Arch, config: Any, dims: Dimensions, notes: list[str]) -> dict[str, Tensor]:
    """Rotary positions; returns the tensors of factors that they take. Raises NarrowError (gguf_unsupported)."""
    if arch.rotary == "none":
        return {}
    rope: dict[str, Any] = config.rope_parameters
    if "full_attention" in rope:
        rope, windowed = rope["full_attention"], rope["sliding_attention"]
        if windowed["rope_type"] != "default":
            raise refuse(f"llama.cpp does not scale positions in layers with a window ({windowed['rope_type']})")
        writer.add_rope_freq_base_swa(windowed["rope_theta"])
    rope = {key: value for key, value in rope.items() if value is not None}
    if config.model_type == "hunyuan_v1_dense" and rope["rope_type"] == "dynamic" and rope.get("alpha"):
        # HunYuan: a fixed stretch of the base and nothing dynamic (transformers, compute_ntk_alpha_rope_parameters).
        stretch = rope["alpha"] ** (dims.head_dim / (dims.head_dim - 2))
        rope = {"rope_type": "default", "rope_theta": rope["rope_theta"] * stretch}
    kind = rope["rope_type"]
    odd = rope.keys() - _ROPE_KEYS
    if kind == "yarn":
        odd |= {key for key, value in _YARN.items() if rope.get(key, value) != value}
    if kind not in arch.rope_types or odd:
        shown = ", ".join([kind, *sorted(odd)])
        raise refuse(f"llama.cpp does not compute such rotary positions in {arch.name} models ({shown})")
    turned = int(dims.head_dim * rope.get("partial_rotary_factor", 1.0))
    if turned != dims.head_dim and arch.rotary != "part":
        raise refuse(f"llama.cpp turns whole heads in {arch.name} models, here {turned} of {dims.head_dim} dimensions")
    writer.add_rope_dimension_count(turned)
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if kind == "yarn" and "attention_factor" in rope:
        # llama.cpp multiplies by YaRN's own factor as well.
        writer.add_rope_scaling_attn_factors(rope["attention_factor"] / (1 + 0.1 * math.log(rope["factor"])))
    if kind == "llama3":
        frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, turned, 2) / turned)
        return {"rope_freqs.weight": plain / frequencies}
    if kind == "longrope":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        _, attention = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
        writer.add_rope_scaling_attn_factors(attention)
        notes.append(
            "llama.cpp chooses between short and long rotary factors by the context that it is opened with, transformers by "
            f"the text: to compare them, open it with up to {rope['original_max_position_embeddings']} tokens."
        )
        return {f"rope_factors_{which}.weight": torch.tensor(rope[f"{which}_factor"]) for which in ("long", "short")}
    return {}


def _pieces(arch: Arch, family: Family, config: dict[str, Any], dims: Dimensions) -> Iterator[_Piece]:
    """The tensors of the file, in its order. Raises NarrowError (gguf_unsupported)."""
    names = gguf.get_tensor_name_map(_number(arch), dims.layers)
    for tensor in present(family.outer_tensors, family, config):
        head = tensor.name == f"{family.head}.weight"
        if head and dims.tied and arch.head != "required":
            continue
        # Where llama.cpp wants an output matrix, the embedding is written twice.
        source = family.outer_tensors[0] if head and dims.tied else tensor
        saved = families.saved_names(config, source.name)[0]
        yield _piece(arch, dims, config, tensor, _mapped(names, tensor.name, arch), [saved])
    for layer in range(dims.layers):
        for tensor in present(family.layer_tensors, family, config):
            yield from _layer_pieces(arch, family, dims, config, tensor, layer, names)


def _layer_pieces(
    arch: Arch,
    family: Family,
    dims: Dimensions,
    config: dict[str, Any],
    tensor: families.Tensor,
    layer: int,
    names: gguf.TensorNameMap,
) -> Iterator[_Piece]:
    """A tensor of a layer: as it is, or in its parts where llama.cpp has these apart."""
    prefix, suffix = f"{family.layers}.{layer}.", tensor.name.rpartition(".")[2]
    saved = [prefix + name for name in tensor.saved or (tensor.name,)]
    fused = next((axis for axis in tensor.axes if axis in PARTS), None)
    if tensor.routed:
        stems = [f"{stem}_exps.weight" for stem in (_PART_NAMES["gate_up"] if fused else ("ffn_down",))]
    elif fused and not arch.fused:
        stems = [f"{stem}.{suffix}" for stem in _PART_NAMES[fused]]
    else:
        yield _piece(arch, dims, config, tensor, _mapped(names, saved[0], arch), saved)
        return
    for part, stem in enumerate(stems):
        own = saved if len(saved) == 1 else [saved[part]]
        yield _piece(arch, dims, config, tensor, f"blk.{layer}.{stem}", own, part if fused else None)


def _piece(
    arch: Arch,
    dims: Dimensions,
    config: dict[str, Any],
    tensor: families.Tensor,
    name: str,
    saved: list[str],
    part: int | None = None,
) -> _Piece:
    """One tensor of the file, of a fused one just a part if that is given; `saved` has what it is called in the folder."""
    *_, stem, suffix = name.split(".")
    axes, steps = tensor.axes, list[Callable[[Tensor], Tensor]]()
    if part is not None:
        number = next(n for n, axis in enumerate(axes) if axis in PARTS)
        parts = PARTS[axes[number]]
        if len(tensor.saved) < 2:
            steps.append(partial(_cut, lengths=[dims.axis(axis) for axis in parts], part=part, axis=number))
        axes = (*axes[:number], parts[part], *axes[number + 1 :])
    if suffix == "bias" and stem not in ("attn_q", "attn_k", "attn_v", *arch.biases) and "norm" not in stem:
        raise refuse(f"llama.cpp has no bias at {stem!r} in {arch.name} models")
    shape = tuple(dims.axis(axis) for axis in axes)
    if arch.transposed and len(axes) == 2 and axes[0] not in ("vocab", "context"):
        steps.append(torch.t)
        shape = shape[::-1]
    if axes[0] == "one":
        steps.append(torch.flatten)
        shape = shape[1:]
    if arch.interleaved and stem in ("attn_q", "attn_k"):
        steps.append(partial(_interleave, heads=shape[0] // dims.head_dim))
    if axes[0] == "qkv":
        steps.append(partial(_sort_heads, heads=dims.heads))
    if tensor.is_norm and arch.norm_offset:
        steps.append(partial(_plus, number=arch.norm_offset))
    if stem == arch.query_scale:
        steps.append(partial(_times, number=_query_factor(arch, dims, config["query_pre_attn_scalar"])))
    if "*" in saved[0]:
        saved = [saved[0].replace("*", str(expert)) for expert in range(dims.experts)]
    return _Piece(name, shape, partial(_read, saved=saved, steps=steps))


def _query_factor(arch: Arch, dims: Dimensions, scalar: float) -> float:
    """What queries are multiplied by, so that llama.cpp's own scale comes to 1/√scalar."""
    own = dims.hidden // dims.heads if dims.layers == arch.large_layers else dims.head_dim
    return math.sqrt(own / scalar)


def _mapped(names: gguf.TensorNameMap, name: str, arch: Arch) -> str:
    found: str | None = names.get_name(name, (".weight", ".bias"))
    if found is None:
        raise refuse(f"llama.cpp has no place for {name!r} in {arch.name} models")
    return found


def _number(arch: Arch) -> gguf.MODEL_ARCH:
    return next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch.name)


def _read(read: Read, saved: Sequence[str], steps: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    """A tensor, or the experts' own on top of each other, after the steps; as saved, if none of them computes."""
    tensor = read(saved[0]) if len(saved) == 1 else torch.stack([read(name) for name in saved])
    for step in steps:
        tensor = step(tensor)
    return tensor


def _constant(tensor: Tensor, read: Read) -> Tensor:
    return tensor


def _plus(tensor: Tensor, number: float) -> Tensor:
    return tensor.float() + number


def _times(tensor: Tensor, number: float) -> Tensor:
    return tensor.float() * number


def _cut(tensor: Tensor, lengths: list[int], part: int, axis: int) -> Tensor:
    return torch.split(tensor, lengths, dim=axis)[part]


def _interleave(tensor: Tensor, heads: int) -> Tensor:
    """Rows [heads × head_dim, ...] with the two halves of each head, which are turned together, row by row."""
    return tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _sort_heads(tensor: Tensor, heads: int) -> Tensor:
    """Query, key and value of each head side by side, as all queries, all keys, all values."""
    return tensor.view(heads, 3, -1, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)


def _write(writer: gguf.GGUFWriter, folder: Path, pieces: list[_Piece], kind: Kind) -> list[str]:
    """Writes header and tensors, one after the other. Returns what could not be of the kind asked for."""
    unquantized: list[str] = []
    types: list[gguf.GGMLQuantizationType] = []
    for piece in pieces:
        qtype = gguf.GGMLQuantizationType[kind.upper()]
        if len(piece.shape) == 1 or any(f"{name}.weight" in piece.name for name in EXACT):
            qtype = gguf.GGMLQuantizationType.F32
        elif kind == "q8_0" and piece.shape[-1] % Q8_BLOCK:
            qtype = gguf.GGMLQuantizationType.F16
            unquantized.append(piece.name)
        types.append(qtype)
        size, length = gguf.GGML_QUANT_SIZES[qtype]
        # With a raw type, the shape is in numbers and the type of the array unread, unless that says bytes.
        writer.add_tensor_info(piece.name, piece.shape, np.dtype(np.float32), math.prod(piece.shape) // size * length, qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, "pt")) for path in weight_files(folder)]
        where = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        for piece, qtype in zip(pieces, types, strict=True):
            tensor = piece.make(lambda name: where[name].get_tensor(name))
            assert tuple(tensor.shape) == piece.shape, (piece.name, tensor.shape)
            writer.write_tensor_data(_quantized(tensor, qtype, piece.name))
    if not unquantized:
        return []
    return [
        f"{len(unquantized)} of {len(pieces)} tensors are in F16 and not Q8_0, since their rows are no multiple of {Q8_BLOCK}: "
        f"{', '.join(unquantized[:4])}{', ...' if len(unquantized) > 4 else ''}."
    ]


def _quantized(tensor: Tensor, qtype: gguf.GGMLQuantizationType, name: str) -> NDArray[Any]:
    """A tensor [..., n] as numbers or blocks of the type, [rows, n or bytes]. Raises NarrowError (gguf_overflow).

    Some rows at a time: an embedding in float32 would be several times the model file's largest tensor.
    """
    rows = tensor.reshape(-1, tensor.shape[-1])
    found: NDArray[Any] | None = None
    for at in range(0, len(rows), step := max(1, CHUNK // rows.shape[1])):
        numbers = rows[at : at + step].float()
        if qtype == gguf.GGMLQuantizationType.F16 and float(numbers.abs().max()) > torch.finfo(torch.float16).max:
            raise NarrowError(
                "gguf_overflow",
                f"A weight of {name!r} is larger than float16 holds (65,504): ask for GGUF in bf16 or f32 instead.",
            )
        done = gguf.quants.quantize(numbers.numpy(), qtype)
        if found is None:
            found = np.empty((len(rows), done.shape[1]), done.dtype)
        found[at : at + step] = done
    assert found is not None
    return found


@torch.no_grad()
def round_model(model: PreTrainedModel, kind: Kind) -> None:
    """Rounds the matrices of a model in place as a file of this kind has them."""
    for name, matrix, _ in matrices(model):
        whole = kind != "q8_0" or matrix.shape[-1] % Q8_BLOCK == 0
        qtype = gguf.GGMLQuantizationType[kind.upper()] if whole else gguf.GGMLQuantizationType.F16
        blocks = gguf.quants.dequantize(_quantized(matrix, qtype, name), qtype)
        matrix.copy_(torch.from_numpy(blocks).view(matrix.shape))


def check_gguf(folder: Path, path: Path, ids: Tensor, texts: Sequence[str] = ()) -> Checked:
    """Runs a file by llama.cpp and compares it with the saved model in `folder`, which torch computes in float32.

    Logits on tokens [rows, length]; greedy decoding from the first row's beginning; the tokens of `texts`. All of it as far
    as the file's context goes. llama.cpp ends the process where an assertion fails, so it runs in one of its own, with a
    float32 KV cache: in float16, its default, the cache would be most of the error of a float32 file.
    Raises NarrowError (missing_extra, gguf_failed).
    """
    if not have_llama():
        raise NarrowError("missing_extra", "A GGUF file takes llama-cpp-python to run: pip install 'narrow[llama]'.")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    ids = ids.cpu()
    config = model.config.to_dict()
    family, dims = family_of(config), dimensions(config)
    context = _context(_arch(family, config, dims), config, dims)
    if (rope := config.get("rope_parameters") or {}).get("rope_type") == "longrope":
        # Opened with more tokens, llama.cpp takes the long factors from the first one on.
        context = min(context, rope["original_max_position_embeddings"])
    ids = ids[:, :context]
    prompt = ids[:1, :PROMPT_TOKENS]
    made = greedy(model, prompt, min(GREEDY_TOKENS, context - prompt.shape[1]))
    with tempfile.TemporaryDirectory() as scratch:
        request, answer = Path(scratch) / "request.npz", Path(scratch) / "answer.npz"
        np.savez(request, ids=ids.numpy(), prompt=prompt[0].numpy(), made=np.array(made), texts=np.array(json.dumps(list(texts))))
        command = [sys.executable, "-I", str(_RUN), str(path), str(request), str(answer), str(torch.get_num_threads())]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=CHECK_SECONDS, check=False)
        except subprocess.TimeoutExpired as late:
            raise NarrowError("gguf_failed", f"llama.cpp did not run the file within {CHECK_SECONDS} seconds.") from late
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1]
            raise NarrowError("gguf_failed", f"llama.cpp does not run the file: {last[:300]}")
        with np.load(answer) as found:
            logits, by_llama, follow = found["logits"], found["made"].tolist(), found["follow"].tolist()
            cut = json.loads(str(found["texts"]))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits.float().numpy()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return Checked(
        parity=parity(expected, logits, made, by_llama),
        agreement=float(np.mean(np.equal(follow, made))),
        texts_equal=sum(tokens == tokenizer.encode(text).ids for tokens, text in zip(cut, texts, strict=True)),
    )
