"""llm-compressor's part of bench/peers.py, in the venv that its pins on transformers ask for.

    python bench/peers_masks.py wanda|sparsegpt BASE TOKENS.npy OUT

Sets three quarters of each MLP matrix to zero, the weights one by one, on 128 sequences of 512 tokens, and saves the model.
Prints the processor seconds, the share of zeros and the size of the weights' file as JSON.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

LENGTH, SEQUENCES = 512, 128

method, base, tokens, out = sys.argv[1:]
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
stream = np.load(tokens, mmap_mode="r")
order = np.random.default_rng(0).permutation(len(stream) // LENGTH)[:SEQUENCES]
rows = [stream[at * LENGTH : (at + 1) * LENGTH].tolist() for at in order]
kind = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[method]
wall, started = time.monotonic(), time.process_time()
oneshot(
    model=model,
    dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * LENGTH] * len(rows)}),
    tokenizer=AutoTokenizer.from_pretrained(base),
    recipe=kind(sparsity=0.75, mask_structure="0:0", targets=[r"re:.*mlp\..*_proj$"]),
    max_seq_length=LENGTH,
    num_calibration_samples=SEQUENCES,
)
seconds = [round(time.monotonic() - wall, 1), round(time.process_time() - started, 1)]
model.save_pretrained(out)
weights = [p for name, p in model.named_parameters() if ".mlp." in name]
zeros = sum(int((p == 0).sum()) for p in weights) / sum(p.numel() for p in weights)
print(json.dumps({"seconds": seconds, "zeros": round(zeros, 4), "bytes": Path(out, "model.safetensors").stat().st_size}))
