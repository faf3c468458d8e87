"""Skills share neurons, and a group lasso moves them apart: arXiv 2505.15811, section 4, on compositional sparse parity.

    python -m experiments.nonlocality.run            about half an hour on one core
    python -m experiments.nonlocality.run --draw     the figure and the table, from result.json

Ten networks 24–64–64–2 learn six atomic subtasks of three bits and two composites of three subtasks each. Then all but one
composite is unwanted: neurons are ranked by what the loss on the wanted one rises by without them, the least go, and both
composites are measured, at once and after 1,000 steps of training on each. The same after training on the wanted one alone
with the paper's penalty, λ Σ ‖group‖, and with the engine's group lasso.

The paper draws 2,000 samples a task and step; here 250, in as many steps.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments import results
from experiments.networks import Networks, ablation, accuracy, cross_entropy, train
from experiments.parity import Code, Parity
from narrow_engine import locality
from narrow_engine.regularize import GroupLasso

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "result.json"
TASK = Parity(bits=18, subtasks=6, each=3)
WANTED, OTHER = (0, 1, 2), (3, 4, 5)
CODES: list[Code] = [*((n,) for n in range(6)), WANTED, OTHER]
RATE, EPSILON = 1e-3, 1e-5
PENALTY, TARGET = 1e-3, 0.8
"""The paper's λ, and the share of neurons that the engine's group lasso takes out of each layer."""
CUTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
HOLDS = 0.975
"""Accuracy on the wanted composite that counts as kept."""


class Study:
    """Networks, and how much they are trained: the sizes that a test makes small."""

    def __init__(self, count: int, width: int, samples: int, steps: int, lasso_steps: int, recovery_steps: int) -> None:
        self.networks = Networks(count, (TASK.inputs, width, width, 2), 0)
        self.samples, self.steps, self.lasso_steps, self.recovery_steps = samples, steps, lasso_steps, recovery_steps
        self.draw = torch.Generator().manual_seed(1)

    def batch(self, codes: list[Code], each: int) -> tuple[Tensor, Tensor]:
        return TASK.batch(codes, each, self.networks.count, self.draw)

    def learn(self, networks: Networks, codes: list[Code], steps: int, **options: Any) -> None:
        """Trains on `codes`; `penalty`, a function of the networks, is added to the loss, and `masks` hold neurons at nothing."""
        penalty, masks = options.pop("penalty", None), options.pop("masks", None)

        def loss(step: int) -> Tensor:
            inputs, answers = self.batch(codes, self.samples)
            found = cross_entropy(networks(inputs, masks), answers)
            return found if penalty is None else found + penalty(networks)

        train(networks, RATE, steps, loss, epsilon=EPSILON, **options)

    @torch.no_grad()
    def right(self, networks: Networks, code: Code, masks: list[Tensor] | None = None) -> Tensor:
        """Accuracy on a task, [count]."""
        inputs, answers = self.batch([code], 4000)
        return accuracy(networks(inputs, masks), answers)

    def effects(self, networks: Networks) -> list[list[Tensor]]:
        """|Δ loss| of every neuron on every task: a list over tasks of [count, width] for each hidden layer."""
        return [[layer.abs() for layer in ablation(networks, *self.batch([code], 2000))] for code in CODES]


def penalty(networks: Networks) -> Tensor:
    """λ Σ ‖group‖ over the neurons of each network, [count] (the paper's equation for CMSP)."""
    w, b = list(networks.weights), list(networks.biases)
    sizes = [w[layer].square().sum(2) + b[layer].square() + w[layer + 1].square().sum(1) for layer in range(len(w) - 1)]
    return PENALTY * torch.stack([(size + 1e-12).sqrt().sum(1) for size in sizes]).sum(0)


def masks_of(scores: list[Tensor], share: float) -> list[Tensor]:
    """Ones for the neurons that stay when `share` of all of a network's go, those with the least scores first."""
    together = torch.cat(scores, 1)
    gone = together.argsort(dim=1, stable=True)[:, : int(share * together.shape[1])]
    masks = torch.ones_like(together).scatter(1, gone, 0.0)
    return list(torch.split(masks, [layer.shape[1] for layer in scores], dim=1))


def curves(study: Study, networks: Networks, scores: list[Tensor]) -> list[dict[str, Any]]:
    """What each cut leaves of both composites, by network: at once, and after training on each."""
    found = []
    for share in CUTS:
        masks = masks_of(scores, share)
        row: dict[str, Any] = {"cut": share}
        for name, code in (("wanted", WANTED), ("other", OTHER)):
            row[name] = rounded(study.right(networks, code, masks))
            trained = copy.deepcopy(networks)
            study.learn(trained, [code], study.recovery_steps, masks=masks)
            row[f"{name} trained"] = rounded(study.right(trained, code, masks))
        found.append(row)
    return found


def rounded(values: Tensor) -> list[float]:
    return [round(float(value), 4) for value in values]


def overlap(one: list[Tensor], other: list[Tensor]) -> Tensor:
    """Of the quarter of the neurons that matter most to one task, the share that is in the other's quarter too, [count]."""
    mine, others = (locality.top(torch.cat(scores, 1)) for scores in (one, other))
    return (mine & others).sum(1) / mine.sum(1)


def measure(study: Study, tell: Callable[..., None] = print) -> dict[str, Any]:
    study.learn(study.networks, CODES, study.steps)
    tell("trained:", {str(code): rounded(study.right(study.networks, code)) for code in CODES})
    wanted = CODES.index(WANTED)
    made = {"as trained": study.networks, "penalty": copy.deepcopy(study.networks), "group lasso": copy.deepcopy(study.networks)}
    start = study.effects(study.networks)
    study.learn(made["penalty"], [WANTED], study.lasso_steps, penalty=penalty)
    scores = torch.stack(start[wanted], 1).flatten(0, 1).double()
    groups = GroupLasso(made["group lasso"].groups(), scores, TARGET, study.lasso_steps)
    study.learn(made["group lasso"], [WANTED], study.lasso_steps, after_step=groups)
    result: dict[str, Any] = {}
    for name, networks in made.items():
        effects = study.effects(networks)
        result[name] = {
            "overlap": rounded(overlap(effects[wanted], effects[CODES.index(OTHER)])),
            "before cutting": {str(code): rounded(study.right(networks, code)) for code in CODES},
            "map": [[rounded(layer[0]) for layer in task] for task in effects],
            "curves": curves(study, networks, effects[wanted]),
        }
        tell(name, "done")
    return result


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def most(rows: list[dict[str, Any]], name: str) -> float:
    """The largest share of neurons that can go with the wanted composite kept, on average over the networks."""
    return max((row["cut"] for row in rows if mean(row[name]) >= HOLDS), default=0.0)


def table(result: dict[str, Any]) -> str:
    lines = [
        "| | neurons that can go | after 1,000 steps | the other composite then | the other, trained | overlap of the two |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in result.items():
        rows = found["curves"]
        at_once, trained = most(rows, "wanted"), most(rows, "wanted trained")
        there = next(row for row in rows if row["cut"] == trained)
        other, back = mean(there["other"]), mean(there["other trained"])
        lines.append(f"| {name} | {at_once:.0%} | {trained:.0%} | {other:.3f} | {back:.3f} | {mean(found['overlap']):.2f} |")
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    plt = results.pyplot()
    figure, grid = plt.subplots(2, len(result), figsize=(10, 5.6), layout="constrained", height_ratios=[1, 1.4])
    names = [*(str(n + 1) for n in range(6)), "1+2+3", "4+5+6"]
    for column, (name, found) in enumerate(result.items()):
        cells = torch.tensor([[value for layer in task for value in layer] for task in found["map"]])
        order = cells[CODES.index(WANTED)].argsort(descending=True)
        shades = cells[:, order].clamp(min=1e-4).log10().numpy()
        image = grid[0][column].imshow(shades, aspect="auto", vmin=-3, vmax=0.7, cmap="viridis", interpolation="nearest")
        grid[0][column].set_yticks(range(len(names)), names)
        grid[0][column].set_title(name, loc="left", fontsize=10)
        grid[0][column].set_xlabel("neuron, by its effect on 1+2+3")
        for key, label, look in (
            ("wanted", "1+2+3, for which neurons are cut", "C0--"),
            ("wanted trained", "1+2+3, trained 1,000 steps", "C0-"),
            ("other", "4+5+6", "C3--"),
            ("other trained", "4+5+6, trained 1,000 steps", "C3-"),
        ):
            points = [(row["cut"], mean(row[key])) for row in found["curves"]]
            grid[1][column].plot(*zip(*points, strict=True), look, marker="o", markersize=3, label=label)
        grid[1][column].set(ylim=(0.45, 1.02), xlabel="share of neurons cut")
        grid[1][column].grid(alpha=0.3)
        grid[1][column].spines[["top", "right"]].set_visible(False)
    grid[0][0].set_ylabel("task")
    grid[1][0].set_ylabel("accuracy")
    bar = figure.colorbar(image, ax=grid[0][-1], ticks=[-3, -2, -1, 0])
    bar.ax.set_yticklabels(["0.001", "0.01", "0.1", "1"])
    bar.set_label("nats without it")
    handles, labels = grid[1][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    if not results.begin(__doc__):
        result = measure(Study(10, 64, 250, 20_000, 10_000, 1000))
        RESULTS.write_text(json.dumps(result) + "\n")
    result = json.loads(RESULTS.read_text())
    draw(result, HERE / "figure.svg")
    print(table(result))


if __name__ == "__main__":
    main()
