"""After a group lasso most neurons can go for nothing: arXiv 2505.15811, section 5, on the embedded language model.

    python -m experiments.lasso.run            about forty minutes on one core; finished arms are not run again
    python -m experiments.lasso.run --draw     the figure and the table, from result.json

The base is trained on Python, plainly, with the paper's penalty λ Σ ‖group‖ in the loss, for which an optimizer takes a
subgradient, or with the engine's proximal steps towards a share of zeros. Then neurons go, those with the smallest groups or
the least attribution first, and the loss on held-out Python is measured, with no refit and no training after the cut.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from experiments import language, results
from narrow_engine import corpus, models, train
from narrow_engine.families import dimensions
from narrow_engine.plan import Scores
from narrow_engine.regularize import GroupLasso, norms
from narrow_engine.slice import slice_model

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "result.json"
TOKENS, BATCH = 163_840, 1024
SCORED, MEASURED = 16_384, 8_192
CUTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
PENALTIES = (1e-4, 1e-3, 1e-2)
TARGETS = (0.5, 0.8)
ARMS: dict[str, float] = {
    "no penalty": 0.0,
    **{f"penalty, λ = {value:g}": value for value in PENALTIES},
    **{f"proximal, to {value:.0%}": value for value in TARGETS},
}
RATE = 1e-3
FLAT = 0.02
"""Nats that the loss may rise by on the flat part."""


class Penalty:
    """λ Σ ‖group‖ beside the loss, as in the paper: a neuron's group is its rows of gate and up and its column of down."""

    match = None

    def __init__(self, model: PreTrainedModel, strength: float) -> None:
        names = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
        self.parts = [[layer.get_parameter(name) for name in names] for layer in models.layers(model)]
        self.strength = strength

    def begin(self) -> None:
        """Nothing of a forward pass is needed."""

    def loss(self) -> Tensor:
        sizes = [(g.square().sum(1) + u.square().sum(1) + d.square().sum(0) + 1e-12).sqrt() for g, u, d in self.parts]
        return self.strength * torch.stack(sizes).sum()


def trained(arm: str, tokens: int, scored: int) -> tuple[PreTrainedModel, Tensor]:
    """The base after its training, and the norms of its neurons' groups, [layers, width]."""
    if arm.startswith("proximal"):
        return proximal(ARMS[arm], tokens, scored)
    model = language.copy(language.base())
    settings = train.Settings(tokens, BATCH, "next_token", learning_rate=RATE)
    language.learn(model, language.python(1), settings, beside=Penalty(model, ARMS[arm]) if ARMS[arm] else None)
    return model, norms(models.along(model, "width"))


def proximal(share: float, tokens: int, scored: int) -> tuple[PreTrainedModel, Tensor]:
    """The same by the engine's group lasso, until `share` of the neurons are zero."""
    model, blocks = language.copy(language.base()), language.python(1)
    settings = train.Settings(tokens, BATCH, "next_token", learning_rate=RATE)
    scores = language.scores(model, "fisher", scored, 0)["neuron"].sqrt()
    lasso = GroupLasso(models.along(model, "width"), scores, share, train.shape(settings, blocks)[1])
    language.learn(model, blocks, settings, after_step=lasso)
    return model, lasso.norms()


def measure(arm: str, tokens: int = TOKENS, scored: int = SCORED, measured: int = MEASURED) -> dict[str, Any]:
    """Losses by share of neurons cut, for either order."""
    text = corpus.sample(language.documents(language.HELD_OUT["python"]), measured, language.LENGTH, 0)
    model, sizes = trained(arm, tokens, scored)
    width = dimensions(models.config_dict(model)).width
    orders: dict[str, Scores] = {"size": {"neuron": sizes}, "attribution": language.scores(model, "attribution", scored, 0)}
    losses: dict[str, list[float]] = {name: [] for name in orders}
    for name, found in orders.items():
        for share in CUTS:
            small = slice_model(model, language.plan(model, found, round((1 - share) * width)))
            losses[name].append(round(language.loss(small, text), 4))
    return {
        "arm": arm,
        "tokens": tokens,
        "base": round(language.loss(language.base(), text), 4),
        "zero": float((sizes == 0).double().mean()),
        "loss": losses,
    }


def flat(row: dict[str, Any]) -> float:
    """The share of neurons that can go before the loss is FLAT above that of the same model with all, by the better order."""
    shares = []
    for losses in row["loss"].values():
        kept = [share for share, loss in zip(CUTS, losses, strict=True) if loss <= losses[0] + FLAT]
        shares.append(max(kept))
    return max(shares)


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| | whole | half cut | 80 % cut | exact zeros | flat to |", "|---|---|---|---|---|---|"]
    for row in rows:
        by_cut = [min(pair) - row["base"] for pair in zip(*row["loss"].values(), strict=True)]
        cells = [f"{by_cut[CUTS.index(share)]:+.3f}" for share in (0.0, 0.5, 0.8)]
        lines.append(f"| {row['arm']} | {' | '.join(cells)} | {row['zero']:.0%} | {flat(row):.0%} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.ticker import NullLocator

    plt = results.pyplot()
    figure, grid = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", sharey=True)
    for axes, order in zip(grid, ("attribution", "size"), strict=True):
        for number, row in enumerate(rows):
            axes.plot(CUTS, [loss - row["base"] for loss in row["loss"][order]], f"C{number}o-", markersize=3, label=row["arm"])
        axes.set_yscale("symlog", linthresh=0.1)
        axes.set_yticks([0, 0.1, 0.3, 1, 3], ["0", "0.1", "0.3", "1", "3"])
        axes.yaxis.set_minor_locator(NullLocator())
        axes.axhline(0, color="black", linewidth=0.8, linestyle="--")
        axes.set_title(
            {"attribution": "least attribution first", "size": "smallest groups first"}[order], loc="left", fontsize=10
        )
        axes.set_xlabel("share of neurons cut")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].set_ylabel("nats a token above the base")
    grid[0].legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    only_draw = results.begin(__doc__)
    rows = results.read(RESULTS)
    for arm in () if only_draw else ARMS:
        if arm not in [row["arm"] for row in rows]:
            rows.append(measure(arm))
            results.write(RESULTS, rows)
            print(table(rows[-1:]), flush=True)
    draw(rows, HERE / "figure.svg")
    print(table(rows))


if __name__ == "__main__":
    main()
