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
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def main(folder: str, tokens: str, logits: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    ids = load_file(tokens)["ids"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        save_file({"logits": model(input_ids=ids).logits.contiguous()}, logits)
        model.generate(ids[:1, :4], attention_mask=torch.ones_like(ids[:1, :4]), max_new_tokens=4, do_sample=False)
    stock = AutoModelForCausalLM.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as again:
        stock.save_pretrained(again)
        for path in Path(folder).glob("*.safetensors"):
            first, second = load_file(path), load_file(Path(again) / path.name)
            if first.keys() != second.keys() or not all(torch.equal(first[name], second[name]) for name in first):
                raise SystemExit(f"{path.name} is not the same once saved again")


main(*sys.argv[1:])
