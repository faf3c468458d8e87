"""Σ (h·g)²: like attribution, but effects of opposite sign at different tokens do not cancel.

It is the diagonal empirical Fisher information of a gate on the unit (Molchanov et al., arXiv 1906.10771, equation 8).
"""

import torch
from transformers import PreTrainedModel

from narrow_engine.importance.statistics import LayerStatistics
from narrow_engine.plan import Scores


def score(model: PreTrainedModel, found: list[LayerStatistics], seed: int) -> Scores:
    return {
        "neuron": torch.stack([torch.cat([reader.effect_squared for reader in layer.mlp]) for layer in found]),
        "expert": torch.stack([layer.experts.effect_squared for layer in found]),
        "head": torch.stack([layer.attention.effect_squared for layer in found]),
        "kv_group": torch.stack([layer.group_effect_squared for layer in found]),
        "layer": torch.stack([layer.effect_squared for layer in found]),
    }
