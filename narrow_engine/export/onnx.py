"""The decoder as ONNX: with KV cache, any batch, any length, any past, checked against torch token by token.

Inputs input_ids, attention_mask, position_ids and past_key_values.{i}.key/value; outputs logits and
present.{i}.key/value: the names that Optimum, transformers.js and ONNX Runtime's examples use. Weights are float32.

Experts become a part of the graph each, which runs on the tokens that are routed to it. Of what transformers has, two ways
cannot be exported and the third copies an expert's weights for every token: a prefill of 256 tokens through two layers of 32
experts took 0.52 s and 0.7 GB more that way, 0.07 s with all experts on all tokens (but decoding five times as long), and
takes 0.02 s so.
"""

import contextlib
import io
import logging
import shutil
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from narrow_engine.families import dimensions
from narrow_engine.model_files import TOKENIZER_FILES
from narrow_engine.models import config_dict, family, greedy
from narrow_engine.report.model import Parity

OPSET = 18
GREEDY_TOKENS = 64
PROMPT_TOKENS = 16
EXTERNAL_BYTES = 2**31 - 2**20
"""A protobuf file cannot be larger than 2 GiB; beyond, the weights go into model.onnx.data."""


def export_onnx(folder: Path, out: Path, ids: Tensor) -> Parity:
    """Exports the saved model in `folder` to `out`/model.onnx and compares it with torch on tokens [rows, length].

    Logits are compared on a prefill of all rows and on a continuation from a past; greedy decoding of GREEDY_TOKENS by
    ONNX Runtime with that of torch. The tokenizer and the config go along, so that the folder can be used on its own.
    """
    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = ids.cpu()
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
    for name in (*TOKENIZER_FILES, "config.json", "generation_config.json"):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    return _parity(model, open_session(path), ids)


def check_onnx(folder: Path, out: Path, ids: Tensor) -> Parity:
    """Compares an export in `out` of the saved model in `folder` again, on other tokens."""
    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return _parity(model, open_session(out / "model.onnx"), ids.cpu())


def open_session(path: Path, threads: int | None = None) -> ort.InferenceSession:
    """An ONNX Runtime session on the CPU, with as many threads as torch has."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class Decoder:
    """Greedy decoding with a session of an exported model: keeps the past between calls."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self.session = session
        self.past_names = [i.name for i in session.get_inputs() if i.name.startswith("past_key_values.")]
        self.shapes = {i.name: i.shape for i in session.get_inputs()}
        self.past: list[NDArray[np.float32]] = []

    def step(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Feeds tokens [batch, length] after what was fed before; returns logits [batch, length, vocab]."""
        batch, length = ids.shape
        if not self.past:
            self.past = [np.zeros((batch, self.shapes[n][1], 0, self.shapes[n][3]), np.float32) for n in self.past_names]
        before = self.past[0].shape[2]
        feed = {
            "input_ids": ids,
            "attention_mask": np.ones((batch, before + length), np.int64),
            "position_ids": np.tile(np.arange(before, before + length), (batch, 1)),
            **dict(zip(self.past_names, self.past, strict=True)),
        }
        logits, *self.past = self.session.run(None, feed)
        return logits  # type: ignore[no-any-return]

    def greedy(self, ids: NDArray[np.int64], count: int) -> list[int]:
        """Continues the tokens [1, length] by the `count` most likely next ones."""
        made: list[int] = []
        while len(made) < count:
            made.append(int(self.step(ids)[0, -1].argmax()))
            ids = np.array([[made[-1]]])
        return made


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


ALL_EXPERTS_FUNCTIONS.register("narrow_onnx", _each_expert)


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
    with _quiet(), torch.no_grad(), _experts(model, "narrow_onnx"):
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


@torch.no_grad()
def _parity(model: PreTrainedModel, session: ort.InferenceSession, ids: Tensor) -> Parity:
    expected = model(input_ids=ids, use_cache=False).logits
    decoder, half = Decoder(session), ids.shape[1] // 2
    found = np.concatenate([decoder.step(ids[:, :half].numpy()), decoder.step(ids[:, half:].numpy())], axis=1)
    error = float(np.abs(found - expected.numpy()).max())
    prompt = ids[:1, :PROMPT_TOKENS]
    made = greedy(model, prompt, GREEDY_TOKENS)
    by_onnx = Decoder(session).greedy(prompt.numpy(), GREEDY_TOKENS)
    equal = next((i for i, (a, b) in enumerate(zip(made, by_onnx, strict=True)) if a != b), GREEDY_TOKENS)
    return Parity(
        max_error=error,
        relative_error=error / max(float(expected.abs().max()), 1e-9),
        greedy_tokens=GREEDY_TOKENS,
        greedy_equal=equal,
    )


@contextlib.contextmanager
def _experts(model: PreTrainedModel, implementation: str) -> Any:
    """Has the experts, if there are any, computed in another way."""
    if not family(model).router:
        yield
        return
    own = model.config._experts_implementation
    model.set_experts_implementation(implementation)
    try:
        yield
    finally:
        model.set_experts_implementation(own)


@contextlib.contextmanager
def _quiet() -> Any:
    """The exporter prints, warns and logs; none of it is for the user."""
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
