"""|Σ −h·g|: the first-order change of the summed loss if the unit were set to zero (arXiv 2505.15811, equation 2)."""

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from narrow_engine.importance.statistics import LayerStatistics
from narrow_engine.plan import Scores


def score(model: PreTrainedModel, found: Iterable[LayerStatistics], seed: int) -> Scores:
    layers = list(found)
    return {
        "neuron": torch.stack([torch.cat([reader.effect for reader in layer.mlp]).abs() for layer in layers]),
        "expert": torch.stack([layer.experts.effect.abs() for layer in layers]),
        "head": torch.stack([layer.attention.effect.abs() for layer in layers]),
        "kv_group": torch.stack([layer.group_effect.abs() for layer in layers]),
        "layer": torch.stack([layer.effect.abs() for layer in layers]),
    }
