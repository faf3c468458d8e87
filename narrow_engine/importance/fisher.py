"""Σ (h·g)²: like attribution, but effects of opposite sign at different tokens do not cancel.

It is the diagonal empirical Fisher information of a gate on the unit (Molchanov et al., arXiv 1906.10771, equation 8).
"""

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from narrow_engine.importance.statistics import LayerStatistics
from narrow_engine.plan import Scores


def score(model: PreTrainedModel, found: Iterable[LayerStatistics], seed: int) -> Scores:
    layers = list(found)
    return {
        "neuron": torch.stack([torch.cat([reader.effect_squared for reader in layer.mlp]) for layer in layers]),
        "expert": torch.stack([layer.experts.effect_squared for layer in layers]),
        "head": torch.stack([layer.attention.effect_squared for layer in layers]),
        "kv_group": torch.stack([layer.group_effect_squared for layer in layers]),
        "layer": torch.stack([layer.effect_squared for layer in layers]),
    }
