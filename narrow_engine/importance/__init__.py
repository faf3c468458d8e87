"""Importance criteria: one file each, all with the same `score(model, statistics, seed) -> Scores`.

Hidden dimensions belong to no layer: `residual` scores them, by every criterion. To add a criterion: a file with `score`,
an entry in CRITERIA (and one in `spec.Criterion`), what it needs of the statistics, and what it means in `residual`.
"""

from collections.abc import Callable, Iterable

from transformers import PreTrainedModel

from narrow_engine.importance import activation, attribution, fisher, magnitude, random, reconstruction, residual
from narrow_engine.importance.statistics import LayerStatistics, collect
from narrow_engine.plan import Scores
from narrow_engine.spec import Criterion

CRITERIA: dict[Criterion, Callable[[PreTrainedModel, Iterable[LayerStatistics], int], Scores]] = {
    "reconstruction": reconstruction.score,
    "fisher": fisher.score,
    "attribution": attribution.score,
    "activation": activation.score,
    "magnitude": magnitude.score,
    "random": random.score,
}
NEEDS_GRADIENTS: set[Criterion] = {"fisher", "attribution"}
NEEDS_GRAMS: set[Criterion] = {"reconstruction"}

__all__ = ["CRITERIA", "NEEDS_GRADIENTS", "NEEDS_GRAMS", "LayerStatistics", "collect", "random", "residual"]
