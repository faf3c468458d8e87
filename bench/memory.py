"""How much memory stages take at their peak, predicted and measured.

    python bench/memory.py [--only TEXT]
    python bench/memory.py --table     # memory and time that are predicted for models of 1B, 8B and 70B; nothing is run

Trainings of random models in processes of their own, two steps each, and the stages of whole runs. Predicted is what the dry run
and the planner say (`narrow_engine/footprint.py`); measured is VmHWM of /proc/self/status, reset before a training or stage by
writing 5 to /proc/self/clear_refs. glibc keeps freed memory for later, the more the longer a process runs, and that is no need of
the work: MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ are fixed at 64 KiB, so that it gives back at once.
Writes bench/results/memory.json, where rows of machines that train in float32 and in bfloat16 stand side by side.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from bisect import bisect_left
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

from narrow_engine import footprint

HERE = Path(__file__).resolve().parent
BASE, DATA = HERE.parent / "demo" / "base", HERE.parent / "demo" / "data"
STEADY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_WAIT_POLICY": "passive"}

# Millions of parameters in the name, about. `head` is the size of a head.
SHAPES = {
    "llama 8M": {"family": "llama", "hidden": 256, "width": 1024, "layers": 6, "heads": 8, "kv": 4, "vocab": 8192},
    "llama 46M, vocabulary of 128k": {
        "family": "llama", "hidden": 256, "width": 1024, "layers": 12, "heads": 8, "kv": 4, "vocab": 131_072,
    },
    "qwen3 110M": {"family": "qwen3", "hidden": 768, "width": 2304, "layers": 10, "heads": 12, "kv": 4, "vocab": 32_768},
    "mixtral 120M": {"family": "mixtral", "hidden": 512, "width": 1024, "layers": 8, "heads": 8, "kv": 4, "vocab": 16_384},
    "llama 300M": {"family": "llama", "hidden": 1024, "width": 3584, "layers": 18, "heads": 16, "kv": 8, "vocab": 32_768},
}  # fmt: skip
CASES = [
    ("llama 8M", {"tokens": 2048}),
    ("llama 8M", {"tokens": 2048, "pieces": 4, "recompute": True}),
    ("llama 8M", {"tokens": 2048, "pieces": 4, "recompute": True, "bfloat16": True}),
    ("llama 46M, vocabulary of 128k", {"tokens": 512}),
    ("llama 46M, vocabulary of 128k", {"tokens": 512, "objective": "next_token", "optimizer": "adamw"}),
    ("llama 46M, vocabulary of 128k", {"tokens": 1024, "pieces": 2, "recompute": True, "bfloat16": True}),
    ("qwen3 110M", {"tokens": 1024, "objective": "next_token", "optimizer": "adamw"}),
    ("mixtral 120M", {"tokens": 512, "objective": "next_token"}),
    ("llama 300M", {"tokens": 512, "objective": "next_token", "optimizer": "adamw"}),
    ("qwen3 110M", {"tokens": 1024}),
    ("llama 300M", {"tokens": 512, "optimizer": "adamw", "recompute": True, "bfloat16": True}),
    ("llama 8M", {"tokens": 16_384}),
    ("llama 8M", {"tokens": 16_384, "recompute": True}),
    ("llama 8M", {"tokens": 2048, "match": {"hidden": 1.0, "attention": 1.0}}),
]
LENGTH = 512
RUNS = {"llama 8M": 16_384, "qwen3 110M": 8192}
"""Shapes of bases that go through a whole run, and tokens of its calibration and of its recovery."""

KNOWN = {
    "1B (Llama 3.2)": {"hidden": 2048, "width": 8192, "layers": 16, "heads": 32, "kv": 8, "vocab": 128_256, "tied": True},
    "8B (Llama 3.1)": {"hidden": 4096, "width": 14_336, "layers": 32, "heads": 32, "kv": 8, "vocab": 128_256, "tied": False},
    "70B (Llama 3.1)": {"hidden": 8192, "width": 28_672, "layers": 80, "heads": 64, "kv": 8, "vocab": 128_256, "tied": False},
}
"""Shapes that are predicted alone."""
RECOVERIES = ((10**6, 2048), (10**8, 2**14), (10**9, 2**17))
"""Tokens, and tokens of a batch."""
H100 = 0.4 * 989e12
"""FLOPs a second: an assumed share of what the data sheet has for bfloat16."""


def table() -> None:
    """Prints what is predicted for KNOWN, half of whose parameters are kept: GB by stage and way of training, FLOPs, hours."""
    from narrow_engine.families import dimensions
    from narrow_engine.sizing import plan_sizes, shrink, solve
    from narrow_engine.spec import Options

    ways = {
        "plain": footprint.Way(),
        "recomputed": footprint.Way(recompute=True),
        "and in bfloat16": footprint.Way(recompute=True, bfloat16=True),
    }
    stages = ("load", "measure_base", "score", "reconstruct", "measure", "export")
    print(
        "| base | device | "
        + " | ".join(stages)
        + " | "
        + " | ".join(f"recover, {way}" for way in ways)
        + " | and the base parked | machine, at least | machine, base whole |"
    )
    print("|---" * (5 + len(stages) + len(ways)) + "|")
    for name, shape in KNOWN.items():
        config = known_config(shape)
        options = Options.model_validate({"budget": {"parameters": 0.5}, "method": {"units": ["neuron"]}})
        dims = dimensions(config)
        for device, low in (("CPU", False), ("GPU", True)):
            small = shrink(dims, solve(config, options, 2)[0])
            job = footprint.Job(config, options, dims, dims, small, machine=footprint.Machine(gpu=low, low=low))
            task, memory = footprint.trainings(job)["recover"], footprint.stages(job)
            found = [memory[stage] for stage in stages] + [footprint.training(task, way) for way in ways.values()]
            parked = footprint.trainings(replace(job, parked=True))["recover"]
            found.append(footprint.training(parked, footprint.Way(recompute=True, bfloat16=True)))
            found.append(footprint.least(job) / footprint.ROOM)
            # The least whole gigabyte; it goes up but once.
            enough = range(1, 10_000)
            found.append(1e9 * enough[bisect_left(enough, True, key=lambda n: not footprint.parks(with_memory(job, n * 10**9)))])
            print(f"| {name} | {device} | " + " | ".join(f"{value / 1e9:,.0f}" for value in found) + " |")
    print("\n| base | tokens of recovery | of a batch | FLOPs | hours of an H100 at 40 % |\n|---|---|---|---|---|")
    for name, shape in KNOWN.items():
        for tokens, batch in RECOVERIES:
            method = {"units": ["neuron"], "recover": {"tokens": tokens, "batch_tokens": batch}}
            options = Options.model_validate({"budget": {"parameters": 0.5}, "method": method})
            flops = plan_sizes(known_config(shape), options, 2).flops
            print(f"| {name} | {tokens:,} | {batch:,} | {flops:.1e} | {flops / H100 / 3600:.2g} |")


def with_memory(job: footprint.Job, size: int) -> footprint.Job:
    return replace(job, machine=replace(job.machine, memory=size, host=size))


def known_config(shape: dict) -> dict:
    return {"model_type": "llama", **config_of(shape), "tie_word_embeddings": shape["tied"]}


def config_of(shape: dict) -> dict:
    return {
        "vocab_size": shape["vocab"],
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["width"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv"],
        "head_dim": shape["hidden"] // shape["heads"],
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "use_cache": False,
        "pad_token_id": 0,
    }


def one(name: str, options: dict) -> None:
    """Trains two steps and prints predicted and measured bytes."""
    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from narrow_engine import matching, memory, pipeline, train
    from narrow_engine.corpus import Blocks
    from narrow_engine.families import dimensions
    from narrow_engine.models import config_dict
    from narrow_engine.plan import whole_plan
    from narrow_engine.spec import Match
    from narrow_engine.teacher import Live

    assert pipeline  # what a job's process has of libraries
    torch.set_num_threads(1)
    cpu, shape = torch.device("cpu"), SHAPES[name]
    way = footprint.Way(options.get("pieces", 1), options.get("recompute", False), options.get("bfloat16", False))
    rows, objective, optimizer = options["tokens"] // LENGTH, options.get("objective", "mixed"), options.get("optimizer", "muon")

    def model() -> object:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(shape["family"], **config_of(shape))).float()

    student, teacher = model(), Live(model()) if objective == "mixed" else None
    low = train.training_dtype(cpu) != torch.float32
    config, beside = config_dict(student), footprint.FIXED + (teacher.bytes if teacher else 0)
    dims, weights = dimensions(config), Match(**options["match"]) if "match" in options else None
    match = (weights, dims) if weights else None
    task = footprint.Task(config, dims, rows, LENGTH, optimizer, low, beside, taught=teacher is not None, match=match)
    tokens = np.random.default_rng(0).integers(0, shape["vocab"], 40_000).astype(np.uint32)
    before = memory.begin(cpu)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(mock.patch.object(footprint, "choose", return_value=way))
        drawn = matching.beside(teacher.model, student, whole_plan(config), weights) if weights else nullcontext()
        train.train(
            student,
            Blocks(tokens, LENGTH, 0),
            train.Settings(2 * rows * LENGTH, rows * LENGTH, objective, 2.0, optimizer),
            phase="bench",
            folder=Path(folder),
            emit=lambda *_: None,
            check=lambda: None,
            validate=lambda model: 0.0,
            teacher=teacher,
            beside=stack.enter_context(drawn),
        )
    print(json.dumps({"predicted": footprint.training(task, way), "measured": memory.peak(cpu, before)}))


def run(name: str) -> list[dict]:
    """Predicted and measured bytes of each stage of a run that keeps half of the parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from narrow_engine import train
    from narrow_engine.sizing import plan_sizes
    from narrow_engine.spec import Options

    shape, tokens = SHAPES[name], RUNS[name]
    method = {"units": ["neuron"], "calibration_tokens": tokens, "recover": {"tokens": tokens}}
    options = {"budget": {"parameters": 0.5}, "skill_tokens": 8192, "method": method, "export": ["safetensors"]}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config = AutoConfig.for_model(shape["family"], **config_of(shape))
        AutoModelForCausalLM.from_config(config).float().save_pretrained(folder / "base")
        for path in BASE.glob("tokenizer*"):
            (folder / "base" / path.name).write_bytes(path.read_bytes())
        inputs = {"base": {"path": str(folder / "base")}, "target": {"path": str(DATA / "python.jsonl.gz")}}
        (folder / "spec.json").write_text(json.dumps({**inputs, **options}))
        command = [sys.executable, "-m", "narrow_engine", str(folder / "spec.json"), "--out", str(folder / "run"), "--quiet"]
        subprocess.run(command, check=True, cwd=HERE.parent, env={**os.environ, **STEADY})
        measured = json.loads((folder / "run" / "result" / "report.json").read_text())["provenance"]["memory"]
        predicted = plan_sizes(
            json.loads((folder / "base" / "config.json").read_text()),
            Options.model_validate(options),
            4,
            machine=train.machine(torch.device("cpu")),
        ).memory
    return [
        {"case": f"a run of {name}: {stage}", "predicted": predicted[stage], "measured": measured[stage]}
        for stage in predicted
        if stage in measured
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--table", action="store_true", help="predictions for known shapes")
    options = parser.parse_args()
    if options.table:
        table()
        return
    if options.one:
        one(options.one[0], json.loads(options.one[1]))
        return
    import torch

    from narrow_engine.muon import training_dtype

    rows, dtype = [], str(training_dtype(torch.device("cpu"))).removeprefix("torch.")
    print(f"Products in {dtype}.\n\n| training | predicted, MB | measured, MB | ratio |\n|---|---|---|---|")
    for name, asked in CASES:
        said = f"{name}: " + ", ".join(f"{key} {value}" for key, value in asked.items())
        if options.only in said:
            command = [sys.executable, __file__, "--one", name, json.dumps(asked)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **STEADY})
            show(rows, [{"case": said, **json.loads(done.stdout.splitlines()[-1])}], "" if options.only else dtype)
    for name in RUNS:
        if options.only in f"a run of {name}":
            show(rows, run(name), "" if options.only else dtype)


def show(rows: list[dict], more: list[dict], dtype: str) -> None:
    """Prints rows, and writes them down with those before as those of a type, if one is named."""
    rows += more
    for row in more:
        predicted, measured = row["predicted"], row["measured"]
        print(f"| {row['case']} | {predicted / 1e6:,.0f} | {measured / 1e6:,.0f} | {predicted / measured:.2f} |", flush=True)
    if dtype:
        path = HERE / "results" / "memory.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), dtype: rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
