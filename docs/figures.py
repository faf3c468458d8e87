"""Draws the figures of how-it-works.md into docs/images: `python docs/figures.py`. The same numbers make the same bytes."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "experiments" / "frontier" / "result.json"
TOKENS = 163_840
BLUE, PALE, GREY, INK = "#2563a8", "#dbe7f4", "#d0d0d0", "#222222"

pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "narrow", "font.size": 9, "text.color": INK})


def save(name: str, figure: Any) -> None:
    figure.savefig(HERE / "images" / name, bbox_inches="tight", facecolor="white", metadata={"Date": None})
    pyplot.close(figure)


def blank(width: float, height: float) -> tuple[Any, Axes]:
    figure, axes = pyplot.subplots(figsize=(width, height))
    axes.set_axis_off()
    return figure, axes


def stages() -> None:
    """The line: what every run does in the middle, what only some do above and below."""
    figure, axes = blank(9.5, 2.4)
    line = ["load", "measure_base", "score", "allocate", "plan", "slice", "reconstruct", "recover", "measure", "export", "report"]
    aside = [("sparsify", 3.5, 1), ("correct", 6, -1), ("teach", 7, -1), ("controls", 8, 1), ("answer", 9, 1)]
    aside += [("export_base", 8, -1), ("locality", 9, -1), ("relearn", 10, -1)]
    where = {name: (float(place), 0.0) for place, name in enumerate(line)} | {name: (x, float(y)) for name, x, y in aside}
    for name, (x, y) in where.items():
        needed = name in line
        look = {"facecolor": PALE if needed else "white", "edgecolor": BLUE, "linestyle": "-" if needed else "--"}
        axes.add_patch(FancyBboxPatch((x - 0.43, y - 0.2), 0.86, 0.4, boxstyle="round,pad=0.02", **look))
        axes.text(x, y, name.replace("_", "_\n"), ha="center", va="center", fontsize=7)
    arrows = list(pairwise(line))
    arrows += [("allocate", "sparsify"), ("sparsify", "plan"), ("correct", "teach"), ("teach", "recover")]
    arrows += [("reconstruct", "controls"), ("controls", "measure"), ("measure", "answer"), ("answer", "report")]
    arrows += [("locality", "relearn"), ("relearn", "report"), ("export_base", "export")]
    for start, end in arrows:
        (x0, y0), (x1, y1) = where[start], where[end]
        if y0 == y1:
            begin, finish = (x0 + 0.45, y0), (x1 - 0.45, y1)
        else:
            begin, finish = (x0, y0 + 0.22 * (1 if y1 > y0 else -1)), (x1, y1 - 0.22 * (1 if y1 > y0 else -1))
        axes.annotate("", finish, begin, arrowprops={"arrowstyle": "->", "color": BLUE, "lw": 0.8, "shrinkA": 0, "shrinkB": 0})
    axes.text(-0.43, -1.0, "solid: every run that prunes\ndashed: runs that ask for it", fontsize=8, va="center")
    axes.set_xlim(-0.5, 10.5)
    axes.set_ylim(-1.3, 1.3)
    save("stages.svg", figure)


def cut() -> None:
    """What of an MLP goes with a neuron, and what of embedding and head with a token."""
    figure, axes = blank(9, 2.6)
    hidden = 8
    neurons = [number in (0, 3, 6, 10) for number in range(16)]
    tokens = [number not in (2, 3, 6, 7, 10) for number in range(12)]

    def matrix(x: float, title: str, kept: list[bool], across: bool) -> None:
        """Rows, or across columns, of which some are kept."""
        for place, stays in enumerate(kept):
            look = {"facecolor": BLUE if stays else GREY, "edgecolor": "white", "lw": 0.8}
            corner, wide, high = ((x + place, -hidden), 1, hidden) if across else ((x, -place - 1), hidden, 1)
            axes.add_patch(Rectangle(corner, wide, high, **look))
        axes.text(x + (len(kept) if across else hidden) / 2, 0.6, title, ha="center", fontsize=8)

    matrix(0, "gate, up:\na row a neuron", neurons, across=False)
    matrix(11, "down:\na column a neuron", neurons, across=True)
    matrix(30, "embedding, head:\na row a token", tokens, across=False)
    axes.annotate("", (43.5, -4), (40, -4), arrowprops={"arrowstyle": "->", "color": INK})
    matrix(45.5, "gate, up", [stays for stays in neurons if stays], across=False)
    matrix(56, "down", [stays for stays in neurons if stays], across=True)
    matrix(63, "embedding, head", [stays for stays in tokens if stays], across=False)
    axes.text(0, -18, "grey goes; attention and norms stay whole", fontsize=8)
    axes.text(45.5, -12, "smaller matrices and no masks;\nthe refit solves “down” anew, for what went", fontsize=8, va="center")
    axes.set_xlim(-1, 73)
    axes.set_ylim(-18.5, 3.5)
    axes.set_aspect("equal")
    save("cut.svg", figure)


def measured() -> None:
    """What each step is worth, by the frontier's points at a quarter of the neurons, seed 0."""
    points = json.loads(RESULTS.read_text())
    steps = [
        ("fresh weights, distilled", "distill", "loss"),
        ("cut", "distill from a cut", "cut_loss"),
        ("cut, distilled", "distill from a cut", "loss"),
        ("cut, refit", "prune", "cut_loss"),
        ("cut, refit, recovery", "prune", "loss"),
    ]
    figure, axes = pyplot.subplots(figsize=(7.5, 2.6))
    for number, domain in enumerate(("python", "medical", "math")):
        here = [p for p in points if (p["domain"], p["keep"], p["seed"], p["tokens"]) == (domain, 0.25, 0, TOKENS)]
        # Of several learning rates the best, which comes last.
        mine = {p["method"]: p for p in sorted(here, key=lambda p: -p["loss"])}
        values = [mine[method][name] - mine[method]["base_loss"] for _, method, name in steps]
        bars = axes.barh([place + 0.27 * (number - 1) for place in range(len(steps))], values, 0.25, label=domain)
        axes.bar_label(bars, [f"{value:+.2f}" for value in values], padding=3, fontsize=7)
    axes.set_yticks(range(len(steps)), [name for name, *_ in steps])
    axes.invert_yaxis()
    axes.axvline(0, color=INK, lw=0.8)
    axes.set_xlabel("nats a token above the untouched base, on held-out text")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    axes.set_xlim(-0.2, 3.1)
    save("measured.svg", figure)


if __name__ == "__main__":
    stages()
    cut()
    measured()
