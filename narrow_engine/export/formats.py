"""A saved model in another format: one function for all, so that base and result are written alike."""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from narrow_engine.errors import NarrowError
from narrow_engine.export import onnx, quantize
from narrow_engine.export.parity import compare
from narrow_engine.export.runtimes import Onnx, open_runtime
from narrow_engine.report.model import Parity
from narrow_engine.spec import Format

BOUND = 1e-3
"""Relative error that another runtime may have in float32; right exports measured 1e-6 in every family."""


def load(folder: Path) -> PreTrainedModel:
    """The saved model in float32, on the CPU."""
    with onnx.quiet():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def write(form: Format, folder: Path, out: Path, plain: Path) -> PreTrainedModel:
    """Writes the saved model in `folder` to the folder `out`. `plain` is where its ONNX in float32 is, or is put, of which the
    others are made. Returns the model in torch with the weights that are then in the files."""
    model = load(folder)
    if not (plain / "model.onnx").exists():
        onnx.export_onnx(folder, plain)
    if form == "onnx":
        return model
    out.mkdir(parents=True)
    rounded = quantize.round_model(model, _bits(form))
    quantize.quantize_onnx(plain / "model.onnx", out / "model.onnx", rounded)
    onnx.copy_beside(folder, out)
    return model


def check(form: Format, model: PreTrainedModel, out: Path, plain: Path, ids: torch.Tensor) -> tuple[Parity, Parity]:
    """Of files in `out` and the model that is meant, on tokens [rows, length]: what shows whether they are right, which are
    the same weights where computed in float32, and what their users get."""
    threads = torch.get_num_threads()
    found = compare(model, open_runtime(form, out, threads), ids)
    if form == "onnx":
        return found, found
    with tempfile.TemporaryDirectory(dir=plain) as scratch:
        path = Path(scratch) / "model.onnx"
        quantize.set_compute(out / "model.onnx", path, quantize.IN_FLOAT)
        return compare(model, Onnx(path, threads), ids), found


def mismatch(form: Format, parity: Parity) -> NarrowError:
    return NarrowError(
        "onnx_mismatch",
        f"The export to {form} computes other logits than the model (relative error {parity.relative_error:.1e}): leave it out "
        "of export, and please report it with the model's config.json.",
    )


def _bits(form: Format) -> int:
    return int(form.removeprefix("onnx-int"))
