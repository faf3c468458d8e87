"""No score at all: the control. A criterion that is not clearly better than this has found nothing."""

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from narrow_engine.families import Dimensions, dimensions
from narrow_engine.importance.statistics import LayerStatistics
from narrow_engine.models import config_dict
from narrow_engine.plan import Scores


def score(model: PreTrainedModel, found: Iterable[LayerStatistics], seed: int) -> Scores:
    return draw(dimensions(config_dict(model)), seed)


def draw(dims: Dimensions, seed: int) -> Scores:
    """Of every unit that a layer or the stream has."""
    random = torch.Generator().manual_seed(seed)
    return {
        "neuron": torch.rand(dims.layers, dims.experts * dims.width, generator=random),
        "head": torch.rand(dims.layers, dims.heads, generator=random),
        "kv_group": torch.rand(dims.layers, dims.kv_heads, generator=random),
        "layer": torch.rand(dims.layers, generator=random),
        "expert": torch.rand(dims.layers, dims.experts, generator=random),
        "residual": torch.rand(dims.hidden, generator=random),
    }
