"""A saved model in another format: one function for all, so that base and result are written alike."""

import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from narrow_engine.errors import NarrowError
from narrow_engine.export import gguf, onnx, quantize
from narrow_engine.export.parity import compare
from narrow_engine.export.runtimes import Onnx, have_llama, open_runtime
from narrow_engine.report.model import Parity
from narrow_engine.spec import Format

BOUNDS: dict[Format, float] = {"gguf-f16": 5e-3, "gguf-q8_0": 5e-2}
BOUND = 1e-3
"""Relative error of logits that a format may have: in ONNX Runtime, with the same weights in float32, right exports measured 1e-6
in every family. llama.cpp is compared with the weights before they are rounded, and rounds activations too: 4e-4 and 1.5e-2."""
GGUF: dict[Format, gguf.Kind] = {"gguf-f16": "f16", "gguf-q8_0": "q8_0"}


class Written(NamedTuple):
    model: PreTrainedModel
    """In torch, in float32, with the weights that are in the files."""
    notes: list[str]
    """What is other than in the model, as sentences."""


def write(form: Format, folder: Path, out: Path, plain: Path) -> Written:
    """Writes the saved model in `folder` to the folder `out`. `plain` is where its ONNX in float32 is, or is put, of which those
    with rounded weights are made. Raises NarrowError (gguf_unsupported, gguf_overflow)."""
    with onnx.quiet():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if form in GGUF:
        made = gguf.export_gguf(folder, out, GGUF[form])
        gguf.round_model(model, GGUF[form])
        return Written(model, made.notes)
    if not (plain / "model.onnx").exists():
        onnx.export_onnx(folder, plain)
    if form != "onnx":
        out.mkdir(parents=True)
        rounded = quantize.round_model(model, int(form.removeprefix("onnx-int")))
        quantize.quantize_onnx(plain / "model.onnx", out / "model.onnx", rounded)
        onnx.copy_beside(folder, out)
    return Written(model, [])


class Checked(NamedTuple):
    exact: Parity
    """What shows whether the files are right: of ONNX, computed in float32."""
    told: Parity
    """What their users get."""


def check(form: Format, model: PreTrainedModel, folder: Path, out: Path, ids: torch.Tensor) -> Checked | None:
    """Compares files in `out`, of the saved model in `folder`, with the `model` that is meant, on tokens [rows, length].
    None where what runs them is not installed."""
    if form in GGUF:
        if not have_llama():
            return None
        found = gguf.check_gguf(folder, next(out.glob("*.gguf")), ids).parity
        return Checked(found, found)
    threads = torch.get_num_threads()
    found = compare(model, open_runtime(form, out, threads), ids)
    if form == "onnx":
        return Checked(found, found)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        path = Path(scratch) / "model.onnx"
        quantize.set_compute(out / "model.onnx", path, quantize.IN_FLOAT)
        return Checked(compare(model, Onnx(path, threads), ids), found)


def mismatch(form: Format, parity: Parity) -> NarrowError:
    return NarrowError(
        "export_mismatch",
        f"The export to {form} computes other logits than the model (relative error {parity.relative_error:.1e}): leave it out "
        "of export, and please report it with the model's config.json.",
    )
