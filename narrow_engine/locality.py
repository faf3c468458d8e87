"""How far skills share units: the second finding of arXiv 2505.15811 (section 4) as a measurement.

Two questions. Which units matter most to a skill, and how many of them matter most to another as well? Any such list is
noisy, so each skill's text is halved and a skill is compared with itself by its two halves: that, not 1, is what two names
of one skill would show. And as units go in the target's order, what does each skill lose? Nothing is refitted or trained:
this is about the base.

Units are ranked by Σ (h·g)² over a skill's tokens, the first-order effect on the loss of taking them out (`importance.fisher`).
On the embedded model, whose neurons `activation` and `reconstruction` were tried on too, all three find the same: of Python's
top quarter, 0.49 to 0.52 are C's and 0.31 to 0.36 German's, where Python with itself has 0.80 to 0.85 and chance 0.25.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from narrow_engine import importance, skills
from narrow_engine.corpus import Blocks, Documents
from narrow_engine.families import dimensions
from narrow_engine.footprint import SHARED_TOKENS
from narrow_engine.models import config_dict
from narrow_engine.plan import Scores, make_plan
from narrow_engine.report.model import Cut, Locality, LocalityCurve, Overlap
from narrow_engine.sizing import CUTS, round_fractions, unit_counts
from narrow_engine.slice import slice_model
from narrow_engine.spec import PLURAL, Unit

TOP = 0.25
"""Share of the units that are a skill's most important ones."""
FEW = 8
"""Fewer units than that in a layer, or in the model where it has them, make no list worth comparing."""


def halves(documents: Documents, length: int, seed: int) -> tuple[Blocks, Blocks] | None:
    """Blocks of every other document, and of the rest; None where that is too little text for a block each."""
    sides = [documents.take(np.arange(start, len(documents), 2)) for start in (0, 1)]
    if min(len(side.tokens) for side in sides) <= 2 * length:
        return None
    first, second = (Blocks(side.tokens, length, seed) for side in sides)
    return first, second


def scores(model: PreTrainedModel, blocks: Blocks, residual: bool, progress: Callable[[int, int], None]) -> Scores:
    """Of the units of every kind, on one half of a text; of the hidden dimensions only where they are asked for."""
    tokens = min(SHARED_TOKENS // 2, blocks.count * blocks.length)
    found = importance.collect(model, blocks, tokens, True, progress, grams=False)
    made = importance.CRITERIA["fisher"](model, found, blocks.seed)
    if residual:
        made["residual"] = importance.residual.score(model, blocks, tokens, "fisher", progress)
    return made


def overlaps(found: list[tuple[Scores, Scores]]) -> list[Overlap]:
    """Skills by skills for every kind of unit of which there are enough, from the scores of both halves of each skill."""
    made = []
    for unit, example in found[0][0].items():
        if example.shape[-1] < FEW:
            continue
        sides = [[top(half[unit]) for half in skill] for skill in found]
        # Each pair is compared as a skill is with itself: by halves of different text.
        shared = [[(_shared(a[0], b[1]) + _shared(b[0], a[1])) / 2 for b in sides] for a in sides]
        made.append(Overlap(unit=unit, top=_count(example.shape[-1]), of=example.shape[-1], shared=shared))
    return made


def _count(units: int) -> int:
    return max(1, round(TOP * units))


def top(scores: Tensor) -> Tensor:
    """Whether a unit is among the most important: those of a layer where layers have them, else of the model."""
    best = scores.argsort(dim=-1, descending=True, stable=True)[..., : _count(scores.shape[-1])]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)


def _shared(one: Tensor, other: Tensor) -> float:
    return float((one & other).sum() / one.sum())


def curve(
    model: PreTrainedModel,
    unit: Unit,
    order: Scores,
    texts: dict[str, tuple[Documents, float]],
    length: int,
    progress: Callable[[int, int], None],
) -> LocalityCurve:
    """What each of `texts` loses as units of a kind go, the least important first by the target's scores.

    Beside a text is the number of its predicted tokens for one of the base's. `progress` is called with (done, total) cuts.
    """
    config = config_dict(model)
    whole = unit_counts(dimensions(config))[unit]
    keeps = dict.fromkeys(round_fractions(config, {unit: 1 - share})[0][unit] for share in CUTS)
    counts = [keep for keep in keeps if keep < whole]
    made = LocalityCurve(unit=unit, cut=[1 - keep / whole for keep in counts], loss={name: [] for name in texts})
    before = {name: skills.loss_of(model, text, length) for name, (text, _) in texts.items()}
    for number, keep in enumerate(counts):
        progress(number, len(counts))
        small = slice_model(model, make_plan(config, order, {unit: keep}))
        for name, (text, per_base_token) in texts.items():
            made.loss[name].append(per_base_token * (skills.loss_of(small, text, length) - before[name]))
        del small  # before the next is made
    return made


def summary(found: Locality, target: str, cuts: list[Cut]) -> str:
    """The figures in sentences: what skills lose where about as much is cut as in the result, and which share most."""
    said = []
    for curve in found.curves:
        gone = next(1 - cut.kept / cut.of for cut in cuts if cut.unit == curve.unit)
        others = [name for name in curve.loss if name != target]
        if gone == 0 or not curve.cut or not others:
            continue
        at = min(range(len(curve.cut)), key=lambda index: abs(curve.cut[index] - gone))
        lost = {name: values[at] for name, values in curve.loss.items()}
        most, least = max(others, key=lost.__getitem__), min(others, key=lost.__getitem__)
        also = f" and {least} {_cost(lost[least])}" if least != most else ""
        said.append(
            f"Cutting the {curve.cut[at]:.0%} of {PLURAL[curve.unit]} that {target} needs least costs {target} "
            f"{_cost(lost[target])} before any refit, and also costs {most} {_cost(lost[most])}{also}."
        )
    if target not in found.skills or len(found.skills) < 2:
        return " ".join(said)
    own = found.skills.index(target)
    for overlap in found.overlaps[:1]:
        chance, itself = overlap.top / overlap.of, overlap.shared[own][own]
        shared = {name: value for name, value in zip(found.skills, overlap.shared[own], strict=True) if name != target}
        most, least = max(shared, key=shared.__getitem__), min(shared, key=shared.__getitem__)
        also = f", and {shared[least]:.0%} to {least}" if least != most else ""
        said.append(
            f"Of the {PLURAL[overlap.unit]} that matter most to {target}, {shared[most]:.0%} matter most to {most} as well"
            f"{also}; chance would make it {chance:.0%}, and two samples of {target} share {itself:.0%}."
        )
        if shared[most] - chance > 0.1 * (itself - chance):
            said.append("Skills share structure: what is cut for one is missed by others.")
    return " ".join(said)


def _cost(nats: float) -> str:
    return f"{nats:.2f} nats" if nats >= 0.005 else "nothing"
