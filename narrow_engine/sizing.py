"""How large a model is, and how large it becomes: parameters, bytes, FLOPs and memory from its config. No torch.

`solve` turns a budget into the number of units kept, and is the only place that does: the API's dry run and the
engine's plan call it alike, so that what was promised is what is cut. Widths are the same in every layer, because stock
transformers, vLLM and ONNX tools read one width from the config.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from narrow_engine.errors import NarrowError
from narrow_engine.families import Dimensions, Family, dimensions, family_of, tensor_shapes
from narrow_engine.report.model import Size
from narrow_engine.spec import Options, Quantity, Unit

REFIT_PASSES = 4
"""How often the refit's training of a layer goes through the calibration tokens. (Here, where torch is not imported.)"""

WIDE, WIDE_MULTIPLE, MULTIPLE = 4096, 64, 8
"""Neurons are kept in multiples where a budget leaves the choice, since odd widths waste vector lanes and tiles."""

MEASURES: dict[Quantity, tuple[str, str]] = {
    "parameters": ("parameters", "parameters"),
    "bytes": ("bytes", "bytes"),
    "flops": ("flops_per_token", "FLOPs a token"),
}
"""What a budget can limit: the field of `Size` and its name in a sentence."""

SECONDS_PER_FLOP = 1 / 100e9
FIXED_SECONDS = 45.0
"""What two laptop-class cores reach in training, and what imports, export and checks take whatever the size."""


@dataclass(frozen=True)
class Sizes:
    """A dry run."""

    before: Size
    after: Size
    keep: dict[Unit, int]
    memory_bytes: int
    flops: float
    seconds: float
    notices: list[str]


def parameters(config: dict[str, Any], dims: Dimensions) -> int:
    """Number of parameters of a model with this config and these lengths; a tied head counts once."""
    one_layer = tensor_shapes(config, replace(dims, layers=1))
    prefix = family_of(config).layers + "."
    return sum(math.prod(shape) * (dims.layers if name.startswith(prefix) else 1) for name, shape in one_layer.items())


def size_of(config: dict[str, Any], dims: Dimensions, bytes_per_parameter: int) -> Size:
    count = parameters(config, dims)
    embedding = dims.vocab * dims.hidden
    return Size(
        parameters=count,
        bytes=count * bytes_per_parameter,
        # Each weight is one multiply-add a token, but for the embedding, which is looked up, unless it is the head too.
        flops_per_token=2 * (count if dims.tied else count - embedding),
        layers=dims.layers,
        hidden=dims.hidden,
        width=dims.width,
        heads=dims.heads,
        kv_heads=dims.kv_heads,
        vocabulary=dims.vocab,
    )


def unit_counts(dims: Dimensions) -> dict[Unit, int]:
    """How many units of each kind there are: in a layer, or layers in the model."""
    return {"neuron": dims.width, "head": dims.heads, "kv_group": dims.kv_heads, "layer": dims.layers}


def shrink(dims: Dimensions, keep: dict[Unit, int]) -> Dimensions:
    """The lengths once `keep` units of each kind are left. Kinds that are not named stay whole."""
    kv_heads = keep.get("kv_group", dims.kv_heads)
    heads = keep.get("head", kv_heads * (dims.heads // dims.kv_heads))
    return replace(
        dims,
        width=keep.get("neuron", dims.width),
        layers=keep.get("layer", dims.layers),
        heads=heads,
        kv_heads=kv_heads,
    )


def solve(config: dict[str, Any], options: Options, bytes_per_parameter: int) -> tuple[dict[Unit, int], list[str]]:
    """How many units of each kind to keep, and what had to be rounded.

    With `budget.keep`, each fraction is rounded to whole units (heads: the same number in each KV group). With an amount
    of parameters, bytes or FLOPs, all kinds keep about the same fraction: the coarse kinds (layers, KV groups, heads) are
    rounded to it and neurons fill what the budget leaves. The result never exceeds the budget.
    Raises NarrowError (block_too_long, unit_not_supported, budget_too_small).
    """
    family, dims = family_of(config), dimensions(config)
    if options.block_tokens > dims.context:
        raise NarrowError(
            "block_too_long",
            f"block_tokens is {options.block_tokens}, but the model's context is {dims.context} tokens: lower it.",
        )
    units = options.method.units
    for unit in units:
        if unit not in family.units:
            raise NarrowError(
                "unit_not_supported",
                f"Units of kind {unit!r} cannot be cut from a {family.model_type} model so that stock transformers loads the "
                f"result exactly: it takes {', '.join(family.units)}.",
            )
    if options.budget.keep is not None:
        return _round_fractions(family, dims, {unit: options.budget.keep[unit] for unit in units})

    amount = options.budget.amount()
    assert amount is not None
    quantity, asked = amount
    field, word = MEASURES[quantity]

    def cost(keep: dict[Unit, int]) -> int:
        return int(getattr(size_of(config, shrink(dims, keep), bytes_per_parameter), field))

    multiple = options.method.multiple or (WIDE_MULTIPLE if dims.width >= WIDE else MULTIPLE)
    total = cost({})
    limit = int(asked * total) if asked <= 1 else int(asked)
    candidates = [keep for keep in _candidates(family, dims, units, multiple) if cost(keep) <= limit]
    if "neuron" in units:
        candidates = [_fill(dims, keep, limit, cost, multiple) for keep in candidates]
    if not candidates:
        smallest = min(cost(keep) for keep in _candidates(family, dims, units, multiple))
        raise NarrowError(
            "budget_too_small",
            f"Cutting {' and '.join(f'{u}s' for u in units)} can bring this model from {total:,} to {smallest:,} {word}, "
            f"not to {limit:,}: raise the budget{_more_units(family, dims, units)}.",
        )
    best = min(candidates, key=lambda keep: _unevenness(dims, keep) - cost(keep) / total)
    if limit >= total:
        return best, [f"{limit:,} {word} were asked for and the base has {total:,}: nothing is cut."]
    return best, [f"{limit:,} {word} were asked for; whole units make it {cost(best):,}."]


def _more_units(family: Family, dims: Dimensions, units: list[Unit]) -> str:
    """The kinds of unit that could be cut as well, as the end of a sentence."""
    counts = unit_counts(dims) | {"head": dims.heads // dims.kv_heads}
    more = [unit for unit in family.units if unit not in units and counts[unit] > 1]
    return f" or add {', '.join(more)} to method.units" if more else ""


def plan_sizes(config: dict[str, Any], options: Options, bytes_per_parameter: int = 2, skills: int = 1) -> Sizes:
    """The dry run of a job: shapes, bytes, FLOPs, memory and a rough time. Raises like `solve`.

    `skills` counts the datasets that are measured, the target's among them.
    """
    dims = dimensions(config)
    keep, notices = solve(config, options, bytes_per_parameter)
    small = shrink(dims, keep)
    before, after = size_of(config, dims, bytes_per_parameter), size_of(config, small, bytes_per_parameter)
    method = options.method
    recover = method.recover
    lasso_tokens = method.regularizer.tokens if method.regularizer else 0
    teacher = before.flops_per_token if recover.objective != "next_token" else 0
    # Least squares runs the base once and the cut model three times; training is forward and backward.
    refit_flops = before.flops_per_token + (3.0 + 3.0 * REFIT_PASSES) * after.flops_per_token
    flops = (
        3.0 * before.flops_per_token * (method.calibration_tokens + lasso_tokens)
        + refit_flops * method.calibration_tokens * method.refit
        + (3.0 * after.flops_per_token + teacher) * recover.tokens
        + (2.0 * before.flops_per_token + 3.0 * after.flops_per_token) * options.skill_tokens * skills
    )
    # fp32 base, gradients of a pass over it, Gram matrices; or student with gradients and two moments beside the base;
    # and in either case the activations of a batch.
    grams = 8 * small.layers * (dims.width**2 + dims.axis("q") ** 2)
    activations = 4 * recover.batch_tokens * (small.layers * (10 * dims.hidden + 4 * small.width) + 256)
    memory = 600 * 2**20 + max(8 * before.parameters + grams, 4 * before.parameters + 16 * after.parameters) + activations
    return Sizes(before, after, keep, memory, flops, FIXED_SECONDS + flops * SECONDS_PER_FLOP, notices)


def _candidates(family: Family, dims: Dimensions, units: list[Unit], multiple: int) -> Iterator[dict[Unit, int]]:
    """Every combination of the coarse kinds, with the fewest neurons; neurons are filled in afterwards."""
    per_group = dims.heads // dims.kv_heads
    layers = range(1, dims.layers + 1) if "layer" in units else [dims.layers]
    groups = range(1, dims.kv_heads + 1) if "kv_group" in units else [dims.kv_heads]
    heads = range(1, per_group + 1) if "head" in units else [per_group]
    for layer, group, head in product(layers, groups, heads):
        if family.heads_divide_hidden and dims.hidden % (group * head):
            continue
        keep: dict[Unit, int] = {"layer": layer, "kv_group": group, "head": group * head, "neuron": min(multiple, dims.width)}
        yield {unit: keep[unit] for unit in units}


def _fill(
    dims: Dimensions, keep: dict[Unit, int], limit: int, cost: Callable[[dict[Unit, int]], int], multiple: int
) -> dict[Unit, int]:
    """`keep` with as many neurons as the limit allows, in whole multiples."""
    least = keep["neuron"]
    one = cost({**keep, "neuron": least + 1}) - cost(keep)
    neurons = min(dims.width, least + (limit - cost(keep)) // one)
    return {**keep, "neuron": neurons if neurons == dims.width else max(least, neurons // multiple * multiple)}


def _unevenness(dims: Dimensions, keep: dict[Unit, int]) -> float:
    """How far apart the kept fractions of the kinds are, as the spread of their logarithms."""
    counts = unit_counts(dims)
    logs = [math.log(kept / counts[unit]) for unit, kept in keep.items()]
    return max(logs) - min(logs)


def _round_fractions(family: Family, dims: Dimensions, fractions: dict[Unit, float]) -> tuple[dict[Unit, int], list[str]]:
    """The whole numbers of units nearest to the fractions, among those that stock transformers takes."""
    counts = unit_counts(dims)

    def distance(keep: dict[Unit, int]) -> float:
        return sum(abs(keep[unit] / counts[unit] - fraction) for unit, fraction in fractions.items())

    units = list(fractions)
    keep = min(_candidates(family, dims, units, 1), key=distance)
    if "neuron" in fractions:
        keep["neuron"] = max(1, round(fractions["neuron"] * dims.width))
    notices = [
        f"{fraction:.3g} of {counts[unit]} {unit}s is {fraction * counts[unit]:.1f}; {keep[unit]} are kept."
        for unit, fraction in fractions.items()
        if not math.isclose(fraction * counts[unit], keep[unit])
    ]
    return keep, notices
