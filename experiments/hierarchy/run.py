"""A skill made of others is learned far sooner beside them: arXiv 2505.15811, section 3, on compositional sparse parity.

    python -m experiments.hierarchy.run            about an hour on one core; finished points are not run again
    python -m experiments.hierarchy.run --draw     the figure and the table, from result.json

Inputs have 64 task bits. Networks learn a composite of two, three or four atomic subtasks of three bits each, either beside
those subtasks (broad) or alone (narrow). Counted: samples, of all tasks together, until the loss on the composite is under 0.1
nats; ten networks from ten seeds, which read the same samples.

The paper has subtasks of four bits, 2,000 samples of each task a step, and up to 200,000 steps: 2 billion samples. A parity of
k of 64 bits takes in the order of 64^(k-1) samples, so with three bits and 200 samples all of it is about a hundredth.
"""

import math
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments import results
from experiments.networks import Networks, cross_entropy, train
from experiments.parity import Code, Parity

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "result.json"
SAMPLES, SEEDS = 200, 10
RATE, EPSILON = 1e-3, 1e-5
LEARNED = 0.1
CHECK = 100
"""Steps between two looks at the loss."""


class Setting(NamedTuple):
    subtasks: int
    width: int
    depth: int
    """Linear layers, one more than hidden ones, as the paper counts them."""
    most: int
    """Samples after which those that learn broadly are given up."""
    bits: int = 64
    each: int = 3
    """Task bits, and those of an atomic subtask."""


SETTINGS = (
    Setting(2, 128, 3, 6_000_000),
    Setting(3, 128, 3, 6_000_000),
    Setting(4, 128, 3, 12_000_000),
    Setting(3, 32, 3, 6_000_000),
    Setting(3, 64, 3, 6_000_000),
    Setting(3, 128, 2, 6_000_000),
    Setting(3, 128, 4, 6_000_000),
    Setting(3, 64, 3, 3_000_000, bits=12, each=2),
)
ALONE = 3_000_000
"""Samples after which those that learn the composite alone are given up: all of these are of the composite."""


def learn(setting: Setting, broad: bool, most: int, seeds: int, samples: int = SAMPLES) -> dict[str, Any]:
    """Samples until each network has learned the composite, None if not after `most`; and the median loss on the way."""
    task = Parity(setting.bits, setting.subtasks, setting.each)
    whole: Code = tuple(range(setting.subtasks))
    codes: list[Code] = [*((n,) for n in whole), whole] if broad else [whole]
    # As many samples a step either way.
    rows = samples if broad else samples * (setting.subtasks + 1)
    networks = Networks(seeds, (task.inputs, *[setting.width] * (setting.depth - 1), 2), 0)
    draw = torch.Generator().manual_seed(1)
    judged = task.batch([whole], 2000, 1, torch.Generator().manual_seed(2))
    step_samples = rows * len(codes)
    reached, curve = torch.full((seeds,), math.inf), []

    def stop(step: int) -> bool:
        if step % CHECK == 0:
            with torch.no_grad():
                losses = cross_entropy(networks(judged[0]), judged[1])
            reached[(losses < LEARNED) & reached.isinf()] = step * step_samples
            curve.append([step * step_samples, round(float(losses.median()), 4)])
        return not bool(reached.isinf().any())

    def loss(step: int) -> Tensor:
        inputs, answers = task.batch(codes, rows, 1, draw)
        return cross_entropy(networks(inputs), answers)

    train(networks, RATE, most // step_samples, loss, stop=stop, epsilon=EPSILON)
    return {
        **setting._asdict(),
        "broad": broad,
        "most": most,
        "samples": [None if math.isinf(count) else int(count) for count in reached.tolist()],
        "curve": curve,
    }


def summary(row: dict[str, Any]) -> str:
    """How many learned it, and the median of their samples; where half did not, that it is more than they had."""
    counts = [math.inf if count is None else count for count in row["samples"]]
    learned = sum(count < math.inf for count in counts)
    middle = median(counts)
    after = f"{middle / 1e6:.1f} M" if middle < math.inf else f"> {row['most'] / 1e6:.0f} M"
    return f"{learned} of {len(counts)}, {after}"


def same(row: dict[str, Any], setting: Setting) -> bool:
    return all(row[name] == value for name, value in setting._asdict().items() if name != "most")


def pairs(rows: list[dict[str, Any]]) -> list[tuple[Setting, dict[str, Any], dict[str, Any]]]:
    """The settings that are done, with what was learned broadly and alone."""
    found = []
    for setting in SETTINGS:
        mine = [row for row in rows if same(row, setting)]
        if len(mine) == 2:
            found.append((setting, next(r for r in mine if r["broad"]), next(r for r in mine if not r["broad"])))
    return found


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| composite of | width | layers | beside its subtasks | alone |",
        "|---|---|---|---|---|",
    ]
    for setting, broad, alone in pairs(rows):
        bits = f"{setting.subtasks * setting.each} of {setting.bits} bits"
        cells = (f"{setting.subtasks} ({bits})", str(setting.width), str(setting.depth), summary(broad), summary(alone))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    plt = results.pyplot()
    shown = [pair for pair in pairs(rows) if (pair[0].width, pair[0].depth) == (128, 3)]
    figure, grid = plt.subplots(1, len(shown), figsize=(10, 3), layout="constrained", sharey=True, squeeze=False)
    for axes, (setting, broad, alone) in zip(grid[0], shown, strict=True):
        for row, label in ((broad, "beside its subtasks"), (alone, "alone")):
            samples, losses = zip(*row["curve"], strict=True)
            axes.plot([count / 1e6 for count in samples], losses, label=label)
        axes.set_title(f"{setting.subtasks} subtasks of {setting.each} bits", loc="left", fontsize=10)
        axes.set_xlabel("million samples")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].set_ylabel("median loss on the composite, nats")
    grid[0][0].legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    only_draw = results.begin(__doc__)
    rows = results.read(RESULTS)
    for setting in () if only_draw else SETTINGS:
        for broad in (True, False):
            if not any(same(row, setting) and row["broad"] == broad for row in rows):
                rows.append(learn(setting, broad, setting.most if broad else ALONE, SEEDS))
                results.write(RESULTS, rows)
                print(setting, "beside its subtasks:" if broad else "alone:", summary(rows[-1]), flush=True)
    draw(rows, HERE / "figure.svg")
    print(table(rows))


if __name__ == "__main__":
    main()
