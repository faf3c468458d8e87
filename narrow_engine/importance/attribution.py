"""|Σ −h·g|: the first-order change of the summed loss if the unit were set to zero (arXiv 2505.15811, equation 2)."""

import torch
from transformers import PreTrainedModel

from narrow_engine.importance.statistics import LayerStatistics
from narrow_engine.plan import Scores


def score(model: PreTrainedModel, found: list[LayerStatistics], seed: int) -> Scores:
    return {
        "neuron": torch.stack([torch.cat([reader.effect for reader in layer.mlp]).abs() for layer in found]),
        "expert": torch.stack([layer.experts.effect.abs() for layer in found]),
        "head": torch.stack([layer.attention.effect.abs() for layer in found]),
        "kv_group": torch.stack([layer.group_effect.abs() for layer in found]),
        "layer": torch.stack([layer.effect.abs() for layer in found]),
    }
