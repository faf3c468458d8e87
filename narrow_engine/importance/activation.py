"""‖h‖ · ‖w‖: the norm of a unit's activations times that of the weights that read it. Forward passes only.

Wanda's metric (Sun et al., arXiv 2306.11695, equation 1) summed over the unit's structure. A layer's score is the share
of the residual stream's energy that it writes; an expert's the mean of gate · ‖output‖ over the tokens that are routed to
it (REAP, Lasby et al., arXiv 2510.13999).
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from narrow_engine.families import dimensions
from narrow_engine.importance.statistics import LayerStatistics
from narrow_engine.models import config_dict, family, layers, neuron_readers, output_weight
from narrow_engine.plan import Scores


def score(model: PreTrainedModel, found: Iterable[LayerStatistics], seed: int) -> Scores:
    table, dims = family(model), dimensions(config_dict(model))
    neurons, experts, heads, whole = [], [], [], []
    for layer, statistics in zip(layers(model), found, strict=True):
        readers = zip(neuron_readers(layer, table), statistics.mlp, strict=True)
        neurons.append(torch.cat([_energy(weight, reader.energy).sqrt() for weight, reader in readers]))
        attention = _energy(output_weight(layer, table, table.attention_out), statistics.attention.energy)
        heads.append(attention.reshape(dims.heads, -1).sum(1))
        experts.append(statistics.experts.mean_output)
        whole.append(statistics.share)
    by_head = torch.stack(heads)
    return {
        "neuron": torch.stack(neurons),
        "expert": torch.stack(experts),
        "head": by_head.sqrt(),
        "kv_group": by_head.reshape(dims.layers, dims.kv_heads, -1).sum(2).sqrt(),
        "layer": torch.stack(whole),
    }


def _energy(weight: Tensor, inputs: Tensor) -> Tensor:
    return inputs * weight.double().square().sum(0)
