"""What a narrow model forgets, and how soon it is back: arXiv 2505.15811, section 6, on the embedded language model.

    python -m experiments.unlearning.run            about an hour on one core; finished cuts are not run again
    python -m experiments.unlearning.run --draw     the figure and the table, from result.json

The base loses 30, 63 or 80 % of its neurons, those that matter least to Python: drawn at random, by the paper's attribution,
after a group lasso, or by this engine's elimination with its refit. Losses on Python and on four domains that nobody asked for,
after the cut, after recovery on Python, and after training on German, of which half of the documents are for that.
"""

from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from experiments import language, results
from experiments.lasso import run as lasso
from narrow_engine import corpus, models, reconstruct, relearning, train
from narrow_engine.families import dimensions
from narrow_engine.plan import unscored
from narrow_engine.slice import renew, slice_model
from narrow_engine.spec import Criterion, Method, Recover
from narrow_engine.teacher import Live

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "result.json"
CUTS = (0.3, 0.63, 0.8)
"""The paper's shares."""
METHODS = ("random", "attribution", "lasso", "narrow")
LASSO = 163_840
"""Tokens under the lasso, before those of the recovery that all have."""
COLORS = {"base": "black", "fresh": "C0", "random": "C7", "attribution": "C2", "lasso": "C3", "narrow": "C4"}
TOKENS, SCORED, MEASURED, RELEARNED = 49_152, 32_768, 8_192, 32_768


class Texts:
    """Held-out text of each domain, and the German that is trained on, of other documents."""

    def __init__(self, measured: int) -> None:
        every = {name: language.documents(path) for name, path in language.HELD_OUT.items()}
        german = every["german"]
        self.german = german.take(np.arange(1, len(german), 2))
        every["german"] = german.take(np.arange(0, len(german), 2))
        self.judged = {name: corpus.sample(text, measured, language.LENGTH, 0) for name, text in every.items()}

    def losses(self, model: PreTrainedModel) -> dict[str, float]:
        return {name: round(language.loss(model, text), 4) for name, text in self.judged.items()}


def smaller(method: str, share: float, scored: int) -> PreTrainedModel:
    """The cut model, before its recovery."""
    base = language.base()
    width = dimensions(models.config_dict(base)).width
    keep = round((1 - share) * width)
    if method == "lasso":
        model, norms = lasso.proximal(share, LASSO, scored)
        return slice_model(model, language.plan(model, {"neuron": norms}, keep))
    criteria: dict[str, Criterion] = {"narrow": "reconstruction", "random": "random", "attribution": "attribution"}
    found = language.plan(base, language.scores(base, criteria[method], scored, 0), keep)
    model = slice_model(base, found)
    if method == "narrow":
        reconstruct.refit(base, model, found, language.python(0), scored, lambda *_: None)
    return model


def measure(
    method: str, share: float, texts: Texts, tokens: int = TOKENS, scored: int = SCORED, relearned: int = RELEARNED
) -> dict[str, Any]:
    """Losses by domain at each stage, and German's on the way back. Recovery is the product's default, whatever the cut."""
    model = smaller(method, share, scored)
    stages = {"cut": texts.losses(model)}
    settings = train.settings_of(Method(recover=Recover(tokens=tokens)))
    language.learn(model, language.python(1), settings, teacher=Live(language.base()))
    stages["recovered"] = texts.losses(model)
    curve, stages["relearned"] = relearn(model, texts, relearned, False)
    return {"method": method, "cut": share, "stages": stages, "german": curve}


def relearn(model: PreTrainedModel, texts: Texts, tokens: int, fresh: bool = False) -> tuple[list[list[float]], dict[str, float]]:
    """German's held-out loss by tokens of training on it, at the probe's rate, and what all domains are at then."""
    rate = train.peak_rate("muon", fresh) * (1 if fresh else relearning.FASTER)
    settings = train.Settings(tokens, Recover().batch_tokens, optimizer="muon", learning_rate=rate, schedule="constant")
    curve = language.learn(
        model,
        corpus.Blocks(texts.german.tokens, language.LENGTH, 3),
        settings,
        validate=lambda m: language.loss(m, texts.judged["german"]),
    )
    return [[p.tokens, round(p.validation, 4)] for p in curve if p.validation is not None], texts.losses(model)


def control(share: float, texts: Texts, relearned: int = RELEARNED) -> dict[str, Any]:
    """Without a cut the base itself, with one fresh weights of the cut's shape: what training on German alone does."""
    base = language.base()
    config = models.config_dict(base)
    model = slice_model(base, language.plan(base, unscored(config), round((1 - share) * dimensions(config).width)))
    if share:
        renew(model, 4)
    stages = {"cut": texts.losses(model)}
    curve, stages["relearned"] = relearn(model, texts, relearned, bool(share))
    return {"method": "fresh" if share else "base", "cut": share, "stages": stages, "german": curve}


def table(rows: list[dict[str, Any]]) -> str:
    """Nats above the base."""
    base = rows[0]["stages"]["cut"]
    lines = [
        f"| cut | method | Python: cut, recovered | C | German | medical | mathematics | German, {RELEARNED:,} tokens later |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows[1:]:
        cells = [f"{row['cut']:.0%}", row["method"]]
        for name in base:
            there = [row["stages"][stage][name] - base[name] for stage in ("cut", "recovered") if stage in row["stages"]]
            cells.append(", ".join(f"{value:+.2f}" for value in there))
        cells.append(f"{row['stages']['relearned']['german'] - base['german']:+.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.ticker import NullLocator

    plt = results.pyplot()
    base = rows[0]["stages"]["cut"]
    figure, grid = plt.subplots(2, len(CUTS), figsize=(10, 6), layout="constrained", sharey="row")
    for column, share in enumerate(CUTS):
        above, below = grid[0][column], grid[1][column]
        for row in (row for row in rows if row["cut"] in (0.0, share)):
            name = row["method"]
            tokens, losses = zip(*row["german"], strict=True)
            gaps = [loss - base["german"] for loss in losses]
            below.plot([count / 1e3 for count in tokens], gaps, color=COLORS[name], marker="o", markersize=3, label=name)
            for stage, alpha in (("cut", 0.3), ("recovered", 1.0)) if name in METHODS else ():
                where = [at + (METHODS.index(name) - 1.5) * 0.2 for at in range(len(base))]
                heights = [row["stages"][stage][domain] - base[domain] for domain in base]
                above.bar(where, heights, width=0.18, color=COLORS[name], alpha=alpha)
        above.set_xticks(range(len(base)), base)
        above.set_title(f"{share:.0%} of the neurons cut", loc="left", fontsize=10)
        below.set_xlabel("thousand tokens of German")
        for axes in (above, below):
            axes.set_yscale("symlog", linthresh=0.3)
            axes.set_yticks([0, 0.1, 0.3, 1, 3], ["0", "0.1", "0.3", "1", "3"])
            axes.yaxis.set_minor_locator(NullLocator())
            axes.grid(alpha=0.3, axis="y")
            axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].set_ylabel("nats above the base:\npale after the cut, full after recovery")
    grid[1][0].set_ylabel("German, nats above the base")
    handles, labels = grid[1][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    only_draw = results.begin(__doc__)
    rows = results.read(RESULTS)
    if not only_draw:
        texts = Texts(MEASURED)
        wanted = [("base", 0.0), ("fresh", CUTS[-1]), *((method, share) for share in reversed(CUTS) for method in METHODS)]
        for method, share in wanted:
            if (method, share) not in [(row["method"], row["cut"]) for row in rows]:
                rows.append(measure(method, share, texts) if method in METHODS else control(share, texts))
                results.write(RESULTS, rows)
                print(table(rows), flush=True)
    draw(rows, HERE / "figure.svg")
    print(table(rows))


if __name__ == "__main__":
    main()
