"""The decoder as ONNX: with KV cache, any batch, any length, any past, checked against torch token by token.

Inputs input_ids, attention_mask, position_ids and past_key_values.{i}.key/value; outputs logits and
present.{i}.key/value: the names that Optimum, transformers.js and ONNX Runtime's examples use. Weights are float32.

Experts become a part of the graph each, which runs on the tokens that are routed to it. Of what transformers has, two ways
cannot be exported and the third copies an expert's weights for every token: a prefill of 256 tokens through two layers of 32
experts took 0.52 s and 0.7 GB more that way, 0.07 s with all experts on all tokens (but decoding five times as long), and
takes 0.02 s so.

Attention is written for the graph as well: what transformers has repeats keys and values for all heads that share them, and looks
for rows without any. Of the demo's base a token took 2.4 ms so and 3.1 ms otherwise, behind 1,000 others 2.8 and 5.1.
"""

import contextlib
import io
import json
import logging
import shutil
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from narrow_engine.families import dimensions
from narrow_engine.model_files import TOKENIZER_FILES
from narrow_engine.models import config_dict, family

OPSET = 18
EXTERNAL_BYTES = 2**31 - 2**20
"""A protobuf file cannot be larger than 2 GiB; beyond, the weights go into model.onnx.data."""


def export_onnx(folder: Path, out: Path) -> None:
    """Exports the saved model in `folder` to `out`/model.onnx. The tokenizer and the config go along, and what ONNX Runtime GenAI
    wants to know, so that the folder can be used on its own."""
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    out.mkdir(parents=True)
    program = _trace(model)
    proto = program.model_proto
    proto.producer_name, proto.producer_version = "narrow", version("narrow")
    for key, value in {"opset": str(OPSET), "family": model.config.model_type, "torch": torch.__version__}.items():
        proto.metadata_props.add(key=key, value=value)
    _name_dimensions(proto)
    path = out / "model.onnx"
    large = sum(p.numel() * 4 for p in model.parameters()) > EXTERNAL_BYTES
    onnx.save(proto, path, save_as_external_data=large, location="model.onnx.data" if large else None)
    onnx.checker.check_model(str(path))
    copy_beside(folder, out)


def copy_beside(folder: Path, out: Path) -> None:
    """What goes with a model.onnx in `out` of the saved model in `folder`."""
    for name in (*TOKENIZER_FILES, "config.json", "generation_config.json"):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    config = json.loads((folder / "config.json").read_text())
    (out / "genai_config.json").write_text(json.dumps(_genai(config), indent=1))


def _genai(config: dict[str, Any]) -> dict[str, Any]:
    """What ONNX Runtime GenAI reads (https://onnxruntime.ai/docs/genai/reference/config.html)."""
    dims = dimensions(config)
    ends = config.get("eos_token_id")
    end = ends if isinstance(ends, list) else [ends] if ends is not None else [0]
    start = config.get("bos_token_id")
    pad = config.get("pad_token_id")
    return {
        "model": {
            "type": "decoder",  # of any family: those that it knows by name have inputs of their own
            "bos_token_id": end[0] if start is None else start,
            "eos_token_id": end,
            "pad_token_id": end[0] if pad is None else pad,
            "vocab_size": dims.vocab,
            "context_length": dims.context,
            "decoder": {
                "filename": "model.onnx",
                "head_size": dims.head_dim,
                "hidden_size": dims.hidden,
                "num_attention_heads": dims.heads,
                "num_key_value_heads": dims.kv_heads,
                "num_hidden_layers": dims.layers,
                "session_options": {"log_id": "narrow", "provider_options": []},
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": dims.context,
            "min_length": 0,
            "num_beams": 1,
            "past_present_share_buffer": False,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }


class _Flat(nn.Module):
    """The model with flat tensors in and out."""

    def __init__(self, model: PreTrainedModel, layers: int) -> None:
        super().__init__()
        self.model, self.layers = model, layers

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        # Without a config every layer keeps its whole past: a sliding window is applied by the mask alone.
        cache = DynamicCache()
        for layer in range(self.layers):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        present = [tensor for layer in out.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return (out.logits, *present)


def _each_expert(self: Any, hidden: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
    """What a module of experts returns, written so that it can be traced: hidden [n, hidden], chosen and gates [n, k]."""
    written = torch.zeros_like(hidden)
    gate_of = hidden.new_zeros(hidden.shape[0], self.num_experts).scatter(1, chosen, gates)
    for expert in range(self.num_experts):
        tokens = (chosen == expert).any(1).nonzero()[:, 0]
        gate, up = functional.linear(hidden[tokens], self.gate_up_proj[expert]).chunk(2, -1)
        out = functional.linear(self.act_fn(gate) * up, self.down_proj[expert])
        written = written.index_add(0, tokens, out * gate_of[tokens, expert, None])
    return written


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention [batch, length, heads, size] of query [batch, heads, length, size] to key and value [batch, KV heads, all, size];
    the mask [batch, 1, length, all] is added to its scores."""
    kv_heads, scale = key.shape[1], query.shape[-1] ** -0.5 if scaling is None else scaling
    grouped = scale * query.reshape(query.shape[0], kv_heads, -1, *query.shape[2:])
    scores = torch.matmul(grouped, key[:, :, None].transpose(-1, -2))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    made = torch.matmul((scores + mask[:, :, None]).softmax(-1), value[:, :, None])
    return made.permute(0, 3, 1, 2, 4).flatten(2, 3), None


ALL_EXPERTS_FUNCTIONS.register("narrow_onnx", _each_expert)
ALL_ATTENTION_FUNCTIONS.register("narrow_onnx", _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register("narrow_onnx", ALL_MASK_ATTENTION_FUNCTIONS["eager"])


def _trace(model: PreTrainedModel) -> Any:
    dims = dimensions(config_dict(model))
    batch, length, before = 2, 3, 5
    past = [torch.zeros(batch, dims.kv_heads, before, dims.head_dim) for _ in range(2 * dims.layers)]
    example = (
        torch.zeros(batch, length, dtype=torch.long),
        torch.ones(batch, before + length, dtype=torch.long),
        torch.arange(before, before + length)[None].expand(batch, length).contiguous(),
        *past,
    )
    auto = torch.export.Dim.AUTO
    shapes = ({0: auto, 1: auto}, {0: auto, 1: auto}, {0: auto, 1: auto}, tuple({0: auto, 2: auto} for _ in past))
    caches = [f"{layer}.{kind}" for layer in range(dims.layers) for kind in ("key", "value")]
    with quiet(), torch.no_grad(), _for_the_graph(model):
        return torch.onnx.export(
            _Flat(model, dims.layers),
            example,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{c}" for c in caches)],
            output_names=["logits", *(f"present.{c}" for c in caches)],
            opset_version=OPSET,
            verbose=False,
        )


def _name_dimensions(proto: onnx.ModelProto) -> None:
    """Names for people instead of s56 and s70; they are labels and bind nothing."""
    named: dict[str, list[str | None]] = {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        "logits": ["batch_size", "sequence_length", None],
        "past_key_values": ["batch_size", None, "past_sequence_length", None],
        "present": ["batch_size", None, "total_sequence_length", None],
    }
    for value in (*proto.graph.input, *proto.graph.output):
        for dim, name in zip(value.type.tensor_type.shape.dim, named[value.name.split(".")[0]], strict=True):
            if name:
                dim.dim_param = name
    # Inside the graph the old names would now be free symbols that contradict the new ones.
    del proto.graph.value_info[:]


@contextlib.contextmanager
def _for_the_graph(model: PreTrainedModel) -> Any:
    """Has attention and experts, if there are any, computed as they are written here."""
    attention, experts = model.config._attn_implementation, model.config._experts_implementation
    model.set_attn_implementation("narrow_onnx")
    if family(model).router:
        model.set_experts_implementation("narrow_onnx")
    try:
        yield
    finally:
        model.set_attn_implementation(attention)
        if family(model).router:
            model.set_experts_implementation(experts)


@contextlib.contextmanager
def quiet() -> Any:
    """For what libraries say: the exporter prints, warns and logs; none of it is for the user."""
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
