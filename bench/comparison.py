"""Is pruning really better? The paper's central comparison (arXiv 2505.15811, sections 4 and 5), redone: every way to a small
model, at the same shapes, on the same tokens, each with its own best learning rate.

    python bench/comparison.py [--domains python medical math] [--seeds 0 1 2] [--keep 0.75 ...] [--methods ...]
    python bench/comparison.py --long [--domains python]     how many tokens the others need to come to where pruning is
    python bench/comparison.py --tune                        the learning rates: Python, a quarter of the neurons, seed 0
    python bench/comparison.py --draw                        the figure and the tables, from what is in the results

Cuts the MLP neurons of base-s to a share of 1,024, or trains a student of that shape. Losses are nats a token on the target's
held-out text, minus the base's. One thread. Each finished point is kept in bench/results/comparison.json and not run again:
all of them take a core about eight hours, so they were run over some days.
"""

import argparse
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from narrow_engine import pipeline
from narrow_engine.report.frontier import outcome
from narrow_engine.report.model import Report
from narrow_engine.spec import CompressionSpec

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent / "demo"
TEXT = {
    "python": DEMO / "data" / "python.jsonl.gz",
    "medical": HERE / "data" / "medical.train.jsonl.gz",
    "math": HERE / "data" / "math.train.jsonl.gz",
}
BROAD = HERE / "data" / "broad.train.jsonl.gz"
RESULTS, OUT = HERE / "results" / "comparison.json", HERE / "out" / "comparison"
KEEP = (0.75, 0.5, 0.25, 0.125, 0.0625)
TOKENS, LONG = 163_840, 4_096_000
MEASURED = 32_768

ADAMW = {"objective": "next_token", "optimizer": "adamw", "batch_tokens": 4096}
METHODS: dict[str, dict[str, Any]] = {
    # Slicing computes what the paper's masks compute, in less time.
    "paper": {"importance": "attribution", "refit": False, "recover": ADAMW},
    "prune": {},
    "lasso": {"regularizer": {"kind": "group_lasso", "tokens": TOKENS // 4}, "recover": {"tokens": TOKENS - TOKENS // 4}},
    "distill": {"kind": "distill"},
    "distill from a cut": {"kind": "distill", "init": "cut"},
    "scratch": {"kind": "scratch"},
    "scratch with curriculum": {"kind": "scratch", "recover": {"curriculum": {}}},
}
RATES = {
    "paper": (1e-3, 3e-3),
    "distill": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
    "scratch": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
}
"""What was tried. The others train the base's own weights, for which Narrow's defaults were tuned."""
TUNED = {name: name for name in RATES} | {"scratch with curriculum": "scratch"}
"""Whose rate a method takes."""


def spec(domain: str, method: str, keep: float, seed: int, tokens: int, rate: float | None) -> CompressionSpec:
    """Of one point."""
    given = METHODS[method]
    options = {"tokens": tokens, "learning_rate": rate, **given.get("recover", {})}
    broad = {"broad": {"path": BROAD}} if "curriculum" in options else {}
    return CompressionSpec.model_validate(
        {
            "base": {"path": DEMO / "base"},
            "target": {"path": TEXT[domain]},
            "target_name": domain,
            "method": {**given, "units": ["neuron"], "recover": options},
            "budget": {"keep": {"neuron": keep}},
            "export": ["safetensors"],
            "skill_tokens": MEASURED,
            "seed": seed,
            **broad,
        }
    )


def run(rows: list[dict[str, Any]], key: dict[str, Any]) -> None:
    """Runs a point that is not in the results yet, and writes it there."""
    if any(all(row.get(name) == value for name, value in key.items()) for row in rows):
        return
    folder = OUT / "-".join(str(value) for value in key.values()).replace(" ", "_")
    pipeline.run(spec(**key), folder, lambda *_: None, shared=OUT / "stages")
    found = outcome(Report.model_validate_json((folder / "result" / "report.json").read_bytes()))
    curve = [[p.phase, p.tokens, round(p.validation, 4)] for p in found.curve if p.validation is not None]
    rows.append({**key, **found.model_dump(exclude={"curve", "target"}), "curve": curve})
    RESULTS.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    shutil.rmtree(folder)
    print(key, f"{found.loss - found.base_loss:+.3f} in {found.seconds:.0f} s", flush=True)


def best_rate(rows: list[dict[str, Any]], method: str) -> float | None:
    """Of those that were tried; None is the default."""
    middle = {"domain": "python", "method": TUNED.get(method), "keep": 0.25, "seed": 0, "tokens": TOKENS}
    tried = [row for row in rows if row["rate"] and all(row[name] == value for name, value in middle.items())]
    return min(tried, key=lambda row: row["loss"])["rate"] if tried else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--domains", nargs="+", default=list(TEXT), choices=TEXT)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--keep", nargs="+", type=float, default=KEEP)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--long", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    if options.tune:
        for method, rates in RATES.items():
            for rate in rates:
                run(rows, {"domain": "python", "method": method, "keep": 0.25, "seed": 0, "tokens": TOKENS, "rate": rate})
        return
    for seed, domain, keep, method in itertools.product(options.seeds, options.domains, options.keep, options.methods):
        tokens = LONG if options.long else TOKENS
        run(
            rows,
            {"domain": domain, "method": method, "keep": keep, "seed": seed, "tokens": tokens, "rate": best_rate(rows, method)},
        )


if __name__ == "__main__":
    main()
