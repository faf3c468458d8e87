"""What a training step costs here, against the stock way and against the machine's limit.

    python bench/training.py [--threads 2] [--vocabularies 8192 131072]

Losses: forward and backward of one loss on 4,096 positions of hidden size 256, each in a process of its own, so that its peak
memory is its own. `stock` holds all the logits: transformers' ForCausalLMLoss, and torch's kl_div for distillation.
Steps: base-s whole, and with three quarters of its neurons cut, a batch of 4,096 tokens. `stock` is the paper's way: the base at
its full size with masked weights, transformers' loss, AdamW, in the same precision. All take turns, and the limit with them: a
square matrix product in the precision that training chose on this machine, whose speed drifts by a tenth. Medians.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the engine sets it

import torch
import torch.nn.functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from narrow_engine import corpus, footprint, models, muon, train
from narrow_engine.families import dimensions
from narrow_engine.losses import Head, objective
from narrow_engine.plan import make_plan, whole_plan
from narrow_engine.slice import mask_model, slice_model
from narrow_engine.teacher import Live

BASE = Path(__file__).resolve().parent.parent / "demo" / "base"
HIDDEN, POSITIONS, LENGTH, ROWS, ROUNDS, WARM = 256, 4096, 512, 8, 3, 1
SIDE, TURNS = 2048, 11
"""Of the matrices of the limit; and how often each step is timed."""


def median(run) -> float:
    """Seconds of a call, the median of some."""
    taken = []
    for _ in range(WARM + ROUNDS):
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    return sorted(taken[WARM:])[ROUNDS // 2]


def one_loss(kind: str, vocabulary: int) -> None:
    """Prints seconds and peak bytes of one loss, over those of a process that has its inputs and gradients."""
    torch.manual_seed(0)
    hidden = torch.randn(POSITIONS, HIDDEN, requires_grad=True)
    weight = (torch.randn(vocabulary, HIDDEN) * 0.05).requires_grad_(True)
    base_hidden, base_weight = torch.randn(POSITIONS, HIDDEN), torch.randn(vocabulary, HIDDEN) * 0.05
    targets = torch.randint(vocabulary, (POSITIONS,))
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)

    def compute() -> torch.Tensor:
        if kind == "narrow next_token":
            return objective(hidden, Head(weight), targets).total
        if kind == "narrow mixed":
            return objective(hidden, Head(weight), targets, (base_hidden, Head(base_weight)), 0.5).total
        logits = hidden @ weight.T
        loss = ForCausalLMLoss(logits, labels=None, shift_labels=targets, vocab_size=vocabulary)
        if kind == "stock mixed":
            with torch.no_grad():
                wanted = (base_hidden @ base_weight.T).log_softmax(-1)
            kl = F.kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="batchmean")
            loss = 0.5 * loss + 0.5 * kl
        return loss

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = median(lambda: compute().backward())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"loss": kind, "vocabulary": vocabulary, "seconds": seconds, "bytes": peak * 1024}))


def steps() -> tuple[float, list[dict]]:
    """The limit in FLOPs a second, and steps of recovery, ours and the paper's way, on the embedded model."""
    base = models.load_model(BASE)
    config = models.config_dict(base)
    plan = make_plan(config, {"neuron": torch.rand(6, 1024)}, {"neuron": 256})
    small, masked = slice_model(base, plan), mask_model(base, plan)
    tokens = torch.randint(8192, (20_000,)).numpy().astype("uint32")
    batch = corpus.Blocks(tokens, LENGTH, 0).batch(0, ROWS)
    low = muon.training_dtype(torch.device("cpu"))

    def ours(model, objective_name: str, optimizer: str):
        settings = train.Settings(1, ROWS * LENGTH, objective_name, 1.0, optimizer)
        optimizers = train._optimizers(model, settings)

        def step() -> None:
            train._loss(model, 0, batch, settings, base and Live(base)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for each in optimizers:
                each.step()
                each.zero_grad(set_to_none=True)

        return step

    stock_optimizer = torch.optim.AdamW(masked.parameters(), lr=5e-5)

    def stock() -> None:
        with torch.autocast("cpu", low, enabled=low != torch.float32):
            logits = masked(input_ids=batch[:, :-1]).logits
        ForCausalLMLoss(logits, labels=None, shift_labels=batch[:, 1:].contiguous(), vocab_size=8192).backward()
        torch.nn.utils.clip_grad_norm_(masked.parameters(), 1.0)
        stock_optimizer.step()
        stock_optimizer.zero_grad(set_to_none=True)

    lean, uncut = slice_model(base, plan), slice_model(base, whole_plan(config))
    lean.activation_checkpointing_enable({"use_reentrant": False})
    for model in (small, masked, lean, uncut):
        model.train()
    # A forward pass: two FLOPs a parameter and token, and attention over half of the block on average, by queries and for values.
    # A backward pass is twice that. What is computed again, and what the optimizer computes, does not count.
    dims = dimensions(config)
    attention = dims.layers * 2 * LENGTH * dims.axis("q")
    whole, cut = (2 * sum(p.numel() for p in m.parameters()) + attention for m in (base, small))
    arms = {
        "base-s, stock: masked, next token, AdamW": (masked, stock, 3 * whole),
        "base-s, narrow: next token, AdamW": (uncut, ours(uncut, "next_token", "adamw"), 3 * whole),
        "base-s, narrow: mixed, Muon": (uncut, ours(uncut, "mixed", "muon"), 4 * whole),
        "narrow: next token, AdamW": (small, ours(small, "next_token", "adamw"), 3 * cut),
        "narrow: next token, Muon": (small, ours(small, "next_token", "muon"), 3 * cut),
        "narrow: mixed, Muon (the default)": (small, ours(small, "mixed", "muon"), 3 * cut + whole),
        "the same, activations recomputed": (lean, ours(lean, "mixed", "muon"), 3 * cut + whole),
    }
    a = torch.randn(SIDE, SIDE).to(low)
    runs = [lambda: a @ a, *(run for _, run, _ in arms.values())]
    taken: list[list[float]] = [[] for _ in runs]
    for turn in range(WARM + TURNS):
        for run, found in zip(runs, taken, strict=True):
            started = time.perf_counter()
            run()
            if turn >= WARM:
                found.append(time.perf_counter() - started)
    product, *seconds = (sorted(found)[TURNS // 2] for found in taken)
    limit = 2 * SIDE**3 / product
    return limit, [
        {
            "step": name,
            "seconds": each,
            "of_limit": flops / each * ROWS * LENGTH / limit,
            "activations": activations(models.config_dict(model), model is lean),
        }
        for (name, (model, _, flops)), each in zip(arms.items(), seconds, strict=True)
    ]


def activations(config: dict, recomputed: bool) -> int:
    """Bytes that a step keeps for its backward pass, as the planner counts them."""
    dims, low = dimensions(config), muon.training_dtype(torch.device("cpu")) != torch.float32
    layer, outside = footprint.kept_per_token(config, dims, LENGTH, low)
    kept = dims.layers * 4 * dims.hidden + layer if recomputed else dims.layers * layer
    return ROWS * LENGTH * (kept + outside)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[8192, 131_072])
    parser.add_argument("--loss", nargs=2, metavar=("KIND", "VOCABULARY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.loss:
        one_loss(options.loss[0], int(options.loss[1]))
        return
    rows = []
    print("| loss, 4,096 positions | vocabulary | ms | memory above inputs, MiB |\n|---|---|---|---|")
    for vocabulary in options.vocabularies:
        for kind in ("stock next_token", "narrow next_token", "stock mixed", "narrow mixed"):
            command = [sys.executable, __file__, "--threads", str(options.threads), "--loss", kind, str(vocabulary)]
            row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            rows.append(row)
            print(f"| {kind} | {vocabulary:,} | {row['seconds'] * 1e3:.0f} | {row['bytes'] / 2**20:.0f} |", flush=True)
    dtype = muon.training_dtype(torch.device("cpu"))
    limit, stepped = steps()
    print(f"\n{options.threads} threads, {dtype}: {limit / 1e9:.0f} GFLOP/s\n")
    print("| step of 4,096 tokens | ms | of the limit | activations of the body, MiB |\n|---|---|---|---|")
    for row in stepped:
        rows.append(row)
        print(
            f"| {row['step']} | {row['seconds'] * 1e3:.0f} | {row['of_limit']:.0%} | {row['activations'] / 2**20:.0f} |",
            flush=True,
        )
    out = Path(__file__).resolve().parent / "out" / "training.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"threads": options.threads, "dtype": str(dtype), "limit": limit, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
