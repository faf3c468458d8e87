"""The result as a stock Hugging Face folder, and the gate it must pass: a fresh process loads it and gets the same logits.

"How do I load the pruned model?" is the first complaint about every pruning tool. So the check is made here, for every
result, by a new Python process that imports transformers and nothing of Narrow.
"""

import copy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from narrow_engine.errors import NarrowError
from narrow_engine.model_files import TOKENIZER_FILES
from narrow_engine.report.model import Parity

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
RELATIVE_BOUND = 1e-3
"""Both sides compute in float32 with the same rounded weights; only the order of summation may differ, about 1e-6. A wrong
tensor, a lost bias or a wrong config key shows at 1e-2 and more."""
CHECK_SECONDS = 1800
SHARD_BYTES = "5GB"
"""Larger models are saved in several files, which are downloaded and read in pieces."""

_CHECK = Path(__file__).with_name("reload.py")


@torch.no_grad()
def round_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Rounds a float32 model to what `dtype` can hold, in place: what is measured from here on is what will be saved.
    Raises NarrowError (dtype_too_small)."""
    for name, parameter in model.named_parameters():
        parameter.copy_(parameter.to(dtype))
        if not parameter.isfinite().all():
            detail = (
                f"{name} holds numbers too large for {str(dtype).removeprefix('torch.')}: choose bfloat16 or float32 as dtype."
            )
            raise NarrowError("dtype_too_small", detail)


def save_model(model: PreTrainedModel, source: Path, out: Path, dtype: torch.dtype) -> None:
    """Writes weights in `dtype`, config, generation config, and `source`'s tokenizer files unchanged."""
    rounded = _copy(model, dtype)
    rounded.config.use_cache = True
    rounded.save_pretrained(out, max_shard_size=SHARD_BYTES)
    for path in out.glob("*.safetensors"):
        # They are made for their owner alone; a service may well run as somebody else.
        path.chmod((out / "config.json").stat().st_mode)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def _copy(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy on the CPU, which takes no room where the model is: a GPU may have none left. What is there in this type already is
    shared."""
    weights = {id(p): torch.nn.Parameter(p.detach().to("cpu", dtype), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, weights).to("cpu", dtype)


def check_reload(folder: Path, model: PreTrainedModel, ids: Tensor) -> Parity:
    """Loads `folder` in a fresh process with stock transformers and compares logits on tokens [rows, length] with `model`.

    `model` computes in float32 with weights that the saved type can hold (`round_weights`), so the figure shows the reload
    alone; and both on the CPU, since between a GPU's sums and a CPU's a router picks other experts. The process also generates,
    saves the model again and compares the files.
    Raises NarrowError (reload_failed, reload_mismatch).
    """
    with tempfile.TemporaryDirectory() as scratch:
        tokens, logits = Path(scratch) / "tokens.safetensors", Path(scratch) / "logits.safetensors"
        save_file({"ids": ids.cpu().contiguous()}, tokens)
        command = [
            sys.executable,
            "-I",
            str(_CHECK),
            str(folder),
            str(tokens),
            str(logits),
            str(torch.get_num_threads()),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=CHECK_SECONDS, check=False)
        except subprocess.TimeoutExpired as late:
            raise NarrowError(
                "reload_failed", f"The saved model was not loaded by a fresh process within {CHECK_SECONDS} seconds."
            ) from late
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1]
            raise NarrowError("reload_failed", f"The saved model does not pass its check in a fresh process: {last[:300]}")
        found = load_file(logits)["logits"]
    with torch.no_grad():
        expected = _copy(model, torch.float32)(input_ids=ids.cpu(), use_cache=False).logits
    error = (found - expected).abs().max().item()
    parity = Parity(max_error=error, relative_error=error / max(expected.abs().max().item(), 1e-9))
    if not parity.relative_error <= RELATIVE_BOUND:
        raise NarrowError(
            "reload_mismatch",
            f"The saved model computes other logits than the one that was trained (relative error {parity.relative_error:.1e}).",
        )
    return parity
