"""What a base of random weights takes, whole in memory and parked: peak memory and seconds of each step.

    python bench/streaming.py [--layers 12] [--hidden 2048] [--width 5632] [--tokens 512]

A Llama in bfloat16 and in shards is made in a temporary folder; each way runs in a process of its own. Memory is the process's
own (RssAnon, looked at every 2 ms), over what it had before the step: a mapped file's pages are the system's, which takes them
back when it needs them. Both ways compute in float32. The refit is least squares alone, without the training of layers. Large
blocks are given back to the system when they are freed (MALLOC_MMAP_THRESHOLD_), so that peaks are what is in use.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the engine sets it

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from narrow_engine import importance, skills
from narrow_engine.corpus import Blocks, Documents
from narrow_engine.families import dimensions
from narrow_engine.models import config_dict, layers, load_model
from narrow_engine.plan import make_plan
from narrow_engine.reconstruct import refit
from narrow_engine.slice import compare, slice_model

RESULTS = Path(__file__).resolve().parent / "results" / "streaming.json"
VOCABULARY, LENGTH = 8192, 128
WAYS = ("whole", "parked")


def make(folder: Path, options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCABULARY,
        hidden_size=options.hidden,
        intermediate_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 128,
        num_key_value_heads=max(1, options.hidden // 512),
        tie_word_embeddings=False,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="250MB")


def own() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def one_way(way: str, folder: Path, tokens: int) -> None:
    """Prints what each step took."""
    taken = {}

    def step(name, act):
        found, over = [own()], threading.Event()

        def watch() -> None:
            while not over.wait(0.002):
                found.append(own())

        watcher, began = threading.Thread(target=watch), time.perf_counter()
        watcher.start()
        made = act()
        seconds = time.perf_counter() - began
        over.set()
        watcher.join()
        taken[name] = {"seconds": round(seconds, 2), "peak_bytes": max(found) - found[0]}
        return made

    def quiet(*_) -> None:
        pass

    def score(criterion):
        gradients, grams = criterion in importance.NEEDS_GRADIENTS, criterion in importance.NEEDS_GRAMS
        return importance.CRITERIA[criterion](model, importance.collect(model, blocks, tokens, gradients, quiet, grams), 0)

    model = step("load", lambda: load_model(folder, park=way == "parked"))
    numbers = np.random.default_rng(0).integers(0, VOCABULARY, 4 * tokens + 1).astype(np.uint32)
    blocks, text = Blocks(numbers, LENGTH, 0), Documents(numbers[:tokens], np.array([0, tokens]), np.zeros(1, np.uint64))
    config = config_dict(model)
    step("measure", lambda: skills.loss_of(model, text, LENGTH))
    step("score by activation", lambda: score("activation"))
    scores = step("score by attribution", lambda: score("attribution"))
    keep = {"neuron": dimensions(config).width // 4, "layer": dimensions(config).layers // 2}
    plan = make_plan(config, scores, keep)
    small = step("slice", lambda: slice_model(model, plan))
    step("prove", lambda: compare(model, small, torch.from_numpy(numbers[:64].astype(np.int64))[None], plan=plan))
    step("refit", lambda: refit(model, small, plan, blocks, tokens, quiet, passes=0))
    parameters = sum(weight.numel() for weight in model.parameters())
    layer = sum(weight.numel() for weight in layers(model)[0].parameters())
    cut = sum(weight.numel() for weight in small.parameters())
    print(json.dumps({"parameters": parameters, "layer": layer, "cut": cut, "steps": taken}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("layers", 12), ("hidden", 2048), ("width", 5632), ("tokens", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--way", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        one_way(options.way[0], Path(options.way[1]), options.tokens)
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), options)
        for way in WAYS:
            command = [sys.executable, __file__, "--way", way, folder, "--tokens", str(options.tokens)]
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
            found[way] = json.loads(done.stdout.splitlines()[-1])
    size = 4 * found["whole"]["parameters"]
    rows = []
    print(f"{size / 1e9:.2f} GB in float32\n{'step':24}{'peak, of that':>24}{'parked / whole':>18}")
    for name, whole in found["whole"]["steps"].items():
        parked = found["parked"]["steps"][name]
        row = {
            "step": name,
            "whole": whole["peak_bytes"] / size,
            "parked": parked["peak_bytes"] / size,
            "seconds": whole["seconds"],
            "parked_seconds_ratio": parked["seconds"] / whole["seconds"],
        }
        rows.append(row)
        print(f"{name:24}{row['whole']:12.3f}{row['parked']:12.3f}{row['parked_seconds_ratio']:18.2f}")
    about = {"parameters": size // 4, "layer": found["whole"]["layer"], "cut": found["whole"]["cut"], "tokens": options.tokens}
    RESULTS.write_text(
        json.dumps({**about, "threads": torch.get_num_threads(), "torch": torch.__version__, "steps": rows}, indent=1)
    )


if __name__ == "__main__":
    main()
