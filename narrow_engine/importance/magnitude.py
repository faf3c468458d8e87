"""The norm of all the weights that belong to a unit. Sees no data: the base line that scores must beat."""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from narrow_engine.families import Axis, dimensions
from narrow_engine.importance.statistics import LayerStatistics
from narrow_engine.models import along, config_dict, layers
from narrow_engine.plan import Scores


def score(model: PreTrainedModel, found: Iterable[LayerStatistics], seed: int) -> Scores:
    dims = dimensions(config_dict(model))
    groups = dims.kv_heads
    neurons = _norms(model, "width", dims.width).reshape(dims.layers, -1)
    heads = _norms(model, "q", dims.heads) + _norms(model, "qkv", dims.heads)
    keys = _norms(model, "kv", groups)
    whole = [sum(p.detach().double().square().sum() for p in layer.parameters()) for layer in layers(model)]
    return {
        "neuron": neurons.sqrt(),
        "expert": _norms(model, "expert", dims.experts).sqrt(),
        "head": heads.sqrt(),
        "kv_group": (heads.reshape(len(heads), groups, -1).sum(2) + keys).sqrt(),
        "layer": torch.stack([torch.as_tensor(w) for w in whole]).sqrt(),
    }


def _norms(model: PreTrainedModel, axis: Axis, units: int) -> Tensor:
    """Squared norm of the weights of each of `units` along an axis, [layers, units]; of neurons, [layers × experts, units]."""
    rows = []
    for views in along(model, axis):
        total = torch.zeros(units, dtype=torch.float64, device=model.device)
        for view in views:
            total += view.double().reshape(units, -1).square().sum(1).to(total.device)
        rows.append(total)
    return torch.stack(rows)
