"""Run as a script in a fresh, isolated process: loads a model as any user would and writes its logits.

usage: reload.py FOLDER TOKENS LOGITS THREADS. Imports nothing of Narrow, on purpose.
"""

import ctypes
import os
import sys
import tempfile
from pathlib import Path

# Linux: end with the process that started this one (PR_SET_PDEATHSIG, SIGKILL), however that ends.
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def main(folder: str, tokens: str, logits: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    ids = load_file(tokens)["ids"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        save_file({"logits": model(input_ids=ids).logits.contiguous()}, logits)
        model.generate(ids[:1, :4], attention_mask=torch.ones_like(ids[:1, :4]), max_new_tokens=4, do_sample=False)
    del model
    stock = AutoModelForCausalLM.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as again:
        stock.save_pretrained(again)
        del stock
        first, second = tensors(Path(folder)), tensors(Path(again))
        if first.keys() != second.keys():
            raise SystemExit(f"{min(first.keys() ^ second.keys())} appears or is lost when it is saved again")
        for name, path in first.items():
            if not torch.equal(read(path, name), read(second[name], name)):
                raise SystemExit(f"{name} is not the same once saved again")


def tensors(folder: Path) -> dict[str, Path]:
    """Tensor name → file that holds it, whatever the sharding."""
    found: dict[str, Path] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def read(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, "pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor


main(*sys.argv[1:])
