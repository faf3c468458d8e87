"""Scores + budget → plan. A plan is data: which units are kept, by their index in the base, and nothing else."""

from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from narrow_engine.families import Dimensions, dimensions
from narrow_engine.report.model import Cut
from narrow_engine.sizing import shrink, unit_counts
from narrow_engine.spec import Unit

Scores = dict[Unit, Tensor]
"""Larger is more important: neuron [layers, experts × width], expert [layers, experts], head [layers, heads], kv_group
[layers, kv_heads], layer [layers], residual [hidden], token [vocab]. A dense model's MLP is its one expert."""


class Plan(BaseModel):
    """Kept units, ascending. `layers`, `residual`, `tokens`: numbers in the base; the others: a list for each *kept* layer.

    Neurons are numbered through all experts of a layer: neuron i of expert e is e · width + i.
    """

    layers: list[int]
    residual: list[int]
    neurons: list[list[int]]
    kv_groups: list[list[int]]
    heads: list[list[int]]
    experts: list[list[int]]
    tokens: list[int]

    @staticmethod
    def read(path: Path) -> "Plan":
        return Plan.model_validate_json(path.read_bytes())


def make_plan(config: dict[str, Any], scores: Scores, keep: dict[Unit, int]) -> Plan:
    """Keeps the best `keep[unit]` of each kind named in it, the same number in every layer, and all of the other kinds.

    Heads: the same number in each kept KV group, since stock attention pairs them by division.
    """
    dims = dimensions(config)
    small = shrink(dims, keep)
    layers = _best(scores["layer"], small.layers) if "layer" in keep else list(range(dims.layers))
    per_group = small.heads // small.kv_heads
    neurons, kv_groups, heads, experts = [], [], [], []
    for layer in layers:
        chosen = _best(scores["expert"][layer], small.experts) if "expert" in keep else list(range(dims.experts))
        experts.append(chosen)
        neurons.append([neuron for expert in chosen for neuron in _neurons(dims, expert, scores, layer, small.width)])
        groups = _best(scores["kv_group"][layer], small.kv_heads) if "kv_group" in keep else list(range(dims.kv_heads))
        kv_groups.append(groups)
        heads.append([head for group in groups for head in _heads(dims, group, scores, layer, per_group)])
    residual = _best(scores["residual"], small.hidden) if "residual" in keep else list(range(dims.hidden))
    tokens = _best(scores["token"], small.vocab) if "token" in keep else list(range(dims.vocab))
    return Plan(
        layers=layers,
        residual=residual,
        neurons=neurons,
        kv_groups=kv_groups,
        heads=heads,
        experts=experts,
        tokens=tokens,
    )


def unscored(config: dict[str, Any]) -> Scores:
    """Equal scores of all units: a plan made from them keeps the first of each kind."""
    dims = dimensions(config)
    counts = {**unit_counts(dims), "neuron": dims.experts * dims.width}
    whole = ("layer", "residual", "token")
    return {unit: torch.zeros(count if unit in whole else (dims.layers, count)) for unit, count in counts.items()}


def whole_plan(config: dict[str, Any], tokens: list[int] | None = None) -> Plan:
    """The plan that cuts nothing, or nothing but the vocabulary to `tokens`: slicing by it copies the model."""
    made = make_plan(config, {}, {})
    return made if tokens is None else made.model_copy(update={"tokens": tokens})


def cuts(config: dict[str, Any], plan: Plan, units: list[Unit]) -> list[Cut]:
    """What the plan keeps of each kind, for the report."""
    whole: dict[Unit, list[int]] = {"layer": plan.layers, "residual": plan.residual, "token": plan.tokens}
    by_layer: dict[Unit, list[int]] = {
        "neuron": [len(row) // len(experts) for row, experts in zip(plan.neurons, plan.experts, strict=True)],
        "head": [len(row) for row in plan.heads],
        "kv_group": [len(row) for row in plan.kv_groups],
        "expert": [len(row) for row in plan.experts],
    }
    counts = unit_counts(dimensions(config))
    return [
        Cut(
            unit=unit,
            kept=len(whole[unit]) if unit in whole else by_layer[unit][0],
            of=counts[unit],
            per_layer=plan.layers if unit == "layer" else by_layer.get(unit, []),
        )
        for unit in units
    ]


def _neurons(dims: Dimensions, expert: int, scores: Scores, layer: int, count: int) -> list[int]:
    first = expert * dims.width
    if count == dims.width:
        return list(range(first, first + dims.width))
    return [first + neuron for neuron in _best(scores["neuron"][layer, first : first + dims.width], count)]


def _heads(dims: Dimensions, group: int, scores: Scores, layer: int, count: int) -> list[int]:
    size = dims.heads // dims.kv_heads
    first = group * size
    if count == size:
        return list(range(first, first + size))
    return [first + head for head in _best(scores["head"][layer, first : first + size], count)]


def _best(scores: Tensor, count: int) -> list[int]:
    """Indices of the `count` largest, ascending; ties go to the lower index, so that a plan is reproducible."""
    return sorted(scores.argsort(descending=True, stable=True)[:count].tolist())
