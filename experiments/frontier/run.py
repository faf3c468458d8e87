"""Is pruning really better? The paper's central comparison (arXiv 2505.15811, sections 4 and 5), redone: every way to a small
model, at the same shapes, on the same tokens, each with its own best learning rate.

    python -m experiments.frontier.run [--domains python medical math] [--seeds 0 1 2] [--keep 0.75 ...] [--methods ...]
    python -m experiments.frontier.run --long [--domains python]    how many tokens the others need to come to where pruning is
    python -m experiments.frontier.run --tune                       the learning rates: Python, a quarter of the neurons, seed 0
    python -m experiments.frontier.run --draw                       the figure and the tables, from result.json

Cuts the MLP neurons of base-s to a share of 1,024, or trains a student of that shape. Losses are nats a token on the target's
held-out text, minus the base's. One thread. Each finished point is kept in result.json and not run again: all of
them would take a core about ten hours, and those that are there were run over some days.
"""

import argparse
import itertools
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from experiments import results
from narrow_engine import pipeline
from narrow_engine.report.frontier import outcome
from narrow_engine.report.model import Report
from narrow_engine.spec import CompressionSpec

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
DEMO, DATA = ROOT / "demo", ROOT / "bench" / "data"
TEXT = {
    "python": DEMO / "data" / "python.jsonl.gz",
    "medical": DATA / "medical.train.jsonl.gz",
    "math": DATA / "math.train.jsonl.gz",
}
BROAD = DATA / "broad.train.jsonl.gz"
RESULTS, OUT = HERE / "result.json", HERE.parent / "out" / "frontier"
KEEP = (0.75, 0.5, 0.25, 0.125, 0.0625)
MIDDLE = 0.25
"""Where rates were chosen and curves are drawn."""
TOKENS, LONG = 163_840, 4_096_000
TARGETS = (0.1, 0.3)
"""Nats above the base, for the tokens that it takes to come there."""
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
    # At the temperature that was the default when the first points were run.
    options = {"tokens": tokens, "learning_rate": rate, "temperature": 1.0, **given.get("recover", {})}
    broad = {"broad": {"path": BROAD}} if "curriculum" in options else {}
    return CompressionSpec.model_validate(
        {
            "base": {"path": DEMO / "base"},
            "target": {"path": TEXT[domain]},
            "target_name": domain,
            "method": {**given, "units": ["neuron"], "recover": options},
            "budget": {"keep": {"neuron": keep}},
            "export": ["safetensors"],
            "controls": [],
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
    results.write(RESULTS, rows)
    shutil.rmtree(folder)
    print(key, f"{found.loss - found.base_loss:+.3f} in {found.seconds:.0f} s", flush=True)


def best_rate(rows: list[dict[str, Any]], method: str) -> float | None:
    """Of those that were tried; None is the default."""
    middle = {"domain": "python", "method": TUNED.get(method), "keep": MIDDLE, "seed": 0, "tokens": TOKENS}
    tried = [row for row in rows if row["rate"] and all(row[name] == value for name, value in middle.items())]
    return min(tried, key=lambda row: row["loss"])["rate"] if tried else None


def finished(rows: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """The points of the comparison itself: each method at its own best rate, and no other that was tried."""
    mine = [row for row in rows if row["rate"] == best_rate(rows, row["method"])]
    return [row for row in mine if all(row[name] == value for name, value in wanted.items())]


def spread(values: list[float]) -> str:
    """Mean and, over several seeds, range."""
    return f"{fmean(values):+.3f}" + (f" ({min(values):+.3f} … {max(values):+.3f})" if len(values) > 1 else "")


def table(rows: list[dict[str, Any]], tokens: int) -> str:
    """Loss above the base's by domain, method and share of neurons, as Markdown."""
    lines = ["| domain | method | " + " | ".join(f"{keep:.4g}" for keep in KEEP) + " |", "|---" * (2 + len(KEEP)) + "|"]
    for domain, method in itertools.product(TEXT, METHODS):
        cells = []
        for keep in KEEP:
            found = finished(rows, domain=domain, method=method, keep=keep, tokens=tokens)
            cells.append(spread([row["loss"] - row["base_loss"] for row in found]) if found else "")
        if any(cells):
            lines.append(f"| {domain} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tokens_to(rows: list[dict[str, Any]], domain: str, keep: float, wanted: float) -> dict[str, float]:
    """Tokens after which each method's held-out loss on the curve is first at or under `wanted`; infinite where it never is."""
    reached = {}
    for method in METHODS:
        found = finished(rows, domain=domain, method=method, keep=keep, seed=0)
        curves = [[(tokens, loss) for phase, tokens, loss in row["curve"] if phase == "recover"] for row in found]
        first = [min((tokens for tokens, loss in curve if loss <= wanted), default=float("inf")) for curve in curves]
        if first:
            reached[method] = min(first)
    return reached


def frontier(rows: list[dict[str, Any]]) -> str:
    """Python, seed 0: tokens until a loss so far above the base's, by share of neurons.

    Curves are measured on a part of the held-out text, so each is moved to end where the whole text says that it ends.
    """
    lines = [
        "| nats above the base | method | " + " | ".join(f"{keep:.4g}" for keep in KEEP) + " |",
        "|---" * (2 + len(KEEP)) + "|",
    ]
    for above, method in itertools.product(TARGETS, METHODS):
        cells = []
        for keep in KEEP:
            found = finished(rows, domain="python", method=method, keep=keep, seed=0, tokens=TOKENS)
            cell = ""
            for row in found:
                moved = row["loss"] - row["curve"][-1][2]
                before = TOKENS - row["curve"][-1][1]
                trained = [(tokens, loss + moved) for phase, tokens, loss in row["curve"] if phase == "recover" and tokens]
                seen = [tokens for tokens, loss in [(0, row["cut_loss"]), *trained] if loss - row["base_loss"] <= above]
                cell = f"{before + min(seen):,}" if seen else f"> {TOKENS:,}"
            cells.append(cell)
        if any(cells):
            lines.append(f"| {above} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss against tokens at a quarter of the neurons, and below it against size, where a domain has enough sizes."""
    from matplotlib.ticker import NullLocator, ScalarFormatter

    plt = results.pyplot()
    domains = [domain for domain in TEXT if finished(rows, domain=domain, keep=MIDDLE, tokens=TOKENS)]
    sized = [len({row["keep"] for row in finished(rows, domain=domain, tokens=TOKENS)}) > 2 for domain in domains]
    lines = 2 if any(sized) else 1
    figure, grid = plt.subplots(lines, len(domains), figsize=(10, 3.4 * lines), layout="constrained", sharey=True, squeeze=False)
    for column, domain in enumerate(domains):
        for number, method in enumerate(METHODS):
            look = {"color": f"C{number}", "marker": "os^vDPX"[number], "markersize": 3.5, "label": method}
            points = finished(rows, domain=domain, method=method, tokens=TOKENS)
            middle = [row for row in points if row["keep"] == MIDDLE]
            curves = [[(t, loss - row["base_loss"]) for phase, t, loss in row["curve"] if phase == "recover"] for row in middle]
            for curve in curves[:1]:
                # Of the tokens, some were trained on before the cut.
                before = TOKENS - curve[-1][0]
                means = [fmean(found[at][1] for found in curves) for at in range(len(curve))]
                grid[0][column].plot([(t + before) / 1e3 for t, _ in curve], means, **look)
            if sized[column]:
                shapes = sorted({row["parameters"] for row in points})
                gaps = [[r["loss"] - r["base_loss"] for r in points if r["parameters"] == shape] for shape in shapes]
                grid[1][column].plot([shape / 1e6 for shape in shapes], list(map(fmean, gaps)), **look)
        grid[0][column].set_title(domain, loc="left", fontsize=10)
        grid[0][column].set_xlabel("thousand tokens trained on")
        if lines == 2:
            grid[1][column].set_xlabel(f"million parameters (the base: 7.8), {TOKENS // 1000} k tokens")
            grid[1][column].set_visible(sized[column])
    for axes in grid.flat:
        axes.set_yscale("symlog", linthresh=0.1)
        axes.set_yticks([-0.1, 0, 0.1, 0.3, 1, 3, 10])
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_locator(NullLocator())
        axes.axhline(0, color="black", linewidth=0.8, linestyle="--")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for line in grid:
        line[0].set_ylabel("nats a token above the base")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=7, frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--domains", nargs="+", default=list(TEXT), choices=TEXT)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--keep", nargs="+", type=float, default=KEEP)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--draw", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    rows = results.read(RESULTS)
    if options.draw:
        draw(rows, HERE / "figure.svg")
        print(table(rows, TOKENS), frontier(rows), sep="\n\n")
        for domain in TEXT:
            paper = finished(rows, domain=domain, method="paper", keep=MIDDLE, seed=0, tokens=TOKENS)
            if paper:
                wanted = paper[0]["curve"][-1][2]
                print(domain, f"to {wanted:.3f} nats:", tokens_to(rows, domain, MIDDLE, wanted))
        return
    if options.tune:
        for method, rates in RATES.items():
            for rate in rates:
                run(rows, {"domain": "python", "method": method, "keep": MIDDLE, "seed": 0, "tokens": TOKENS, "rate": rate})
        return
    for seed, domain, keep, method in itertools.product(options.seeds, options.domains, options.keep, options.methods):
        tokens = LONG if options.long else TOKENS
        run(
            rows,
            {"domain": domain, "method": method, "keep": keep, "seed": seed, "tokens": tokens, "rate": best_rate(rows, method)},
        )


if __name__ == "__main__":
    main()
