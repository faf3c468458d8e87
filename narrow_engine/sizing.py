"""How large a model is, and how large it becomes: parameters, bytes, FLOPs and memory from its config. No torch.

`solve` turns a budget into the number of units kept, and is the only place that does: the API's dry run and the
engine's plan call it alike, so that what was promised is what is cut. Widths are the same in every layer, because stock
transformers, vLLM and ONNX tools read one width from the config.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from narrow_engine import footprint
from narrow_engine.errors import NarrowError
from narrow_engine.families import Dimensions, Family, dimensions, family_of, present, tensor_shapes
from narrow_engine.report.model import Size
from narrow_engine.spec import (
    BYTES,
    PLURAL,
    TOP,
    Options,
    Quantity,
    Role,
    Unit,
    chooses,
    chosen_units,
    controls,
    leaves_a_choice,
    taught,
)

REFIT_PASSES = 4
"""How often the refit's training of a layer goes through the calibration tokens. (Here, where torch is not imported.)"""

SHARES = (0.75, 0.5, 0.25, 0.125)
"""Of a kind's units, where `allocate` measures what cutting it costs."""
TRIAL_TOKENS = 8192
"""That the refit for a point of such a curve sees, and as many that a trial is judged on."""
CUTS = (0.25, 0.5, 0.75, 0.9)
"""Shares of a kind's units that are cut where `locality` measures what each skill loses."""
SHORTLIST, HALVINGS = 3, 5
"""Shapes of one size that are tried, and sizes after the first guess."""
CHOICE, SEARCH = 16, 8
"""What part of the recovery a shape on the shortlist gets, and one that is tried for its retention."""

WIDE, WIDE_MULTIPLE, MULTIPLE = 4096, 64, 8
"""Neurons are kept in multiples where a budget leaves the choice, since odd widths waste vector lanes and tiles."""
Q8_MULTIPLE = 32
"""And where the result is to be a GGUF in Q8_0, whose blocks have so many: other widths stay in F16."""

CANDIDATES = 8000
"""Combinations of the coarse kinds that are looked at, about: where there are more, each kind takes longer steps."""

MEASURES: dict[Quantity, tuple[str, str]] = {
    "parameters": ("parameters", "parameters"),
    "bytes": ("bytes", "bytes"),
    "flops": ("flops_per_token", "FLOPs a token"),
}
"""What a budget can limit: the field of `Size` and its name in a sentence."""

SECONDS_PER_FLOP = 1 / 100e9
FIXED_SECONDS = 45.0
"""What two laptop-class cores reach in training, and what imports, export and checks take whatever the size."""


Keep = dict[Unit, int]
"""How many units of each kind are kept: in every layer, or in the model."""


@dataclass(frozen=True)
class Sizes:
    """A dry run."""

    before: Size
    after: Size
    keep: Keep
    memory: dict[str, int]
    """Bytes at the peak of each stage, by name."""
    least_memory_bytes: int
    """What the job can be done in, with training done in slower ways and the base parked (`footprint`)."""
    lacking: str
    """What does not fit into the machine's memory, as a sentence; empty if all does."""
    flops: float
    seconds: float
    notices: list[str]

    @property
    def memory_bytes(self) -> int:
        return max(self.memory.values())


def parameters(config: dict[str, Any], dims: Dimensions) -> int:
    """Number of parameters of a model with this config and these lengths; a tied head counts once."""
    one_layer = tensor_shapes(config, replace(dims, layers=1))
    prefix = family_of(config).layers + "."
    return sum(math.prod(shape) * (dims.layers if name.startswith(prefix) else 1) for name, shape in one_layer.items())


def size_of(config: dict[str, Any], dims: Dimensions, bytes_per_parameter: int) -> Size:
    count = parameters(config, dims)
    met = count - _idle(config, dims)
    embedding = dims.vocab * dims.hidden
    return Size(
        parameters=count,
        bytes=count * bytes_per_parameter,
        # Each weight that a token meets is one multiply-add, but for the embedding, which is looked up, unless it is the
        # head too.
        flops_per_token=2 * (met if dims.tied else met - embedding),
        layers=dims.layers,
        hidden=dims.hidden,
        width=dims.width,
        heads=dims.heads,
        kv_heads=dims.kv_heads,
        vocabulary=dims.vocab,
        experts=dims.experts,
    )


def _idle(config: dict[str, Any], dims: Dimensions) -> int:
    """Parameters that a token does not meet: those of the experts that it is not routed to."""
    family = family_of(config)
    routed = [tensor for tensor in present(family.layer_tensors, family, config) if tensor.routed]
    one = sum(math.prod(dims.axis(axis) for axis in tensor.axes[1:]) for tensor in routed)
    return dims.layers * (dims.experts - dims.active) * one


def unit_counts(dims: Dimensions) -> Keep:
    """How many units of each kind there are: in a layer (neurons: in an expert), or in the model for layers, hidden dimensions
    and tokens."""
    return {
        "neuron": dims.width,
        "head": dims.heads,
        "kv_group": dims.kv_heads,
        "layer": dims.layers,
        "expert": dims.experts,
        "residual": dims.hidden,
        "token": dims.vocab,
    }


def shrink(dims: Dimensions, keep: Keep) -> Dimensions:
    """The lengths once `keep` units of each kind are left. Kinds that are not named stay whole."""
    kv_heads = keep.get("kv_group", dims.kv_heads)
    heads = keep.get("head", kv_heads * (dims.heads // dims.kv_heads))
    return replace(
        dims,
        hidden=keep.get("residual", dims.hidden),
        width=keep.get("neuron", dims.width),
        layers=keep.get("layer", dims.layers),
        heads=heads,
        kv_heads=kv_heads,
        experts=keep.get("expert", dims.experts),
        vocab=keep.get("token", dims.vocab),
    )


def solve(
    config: dict[str, Any],
    options: Options,
    bytes_per_parameter: int,
    tokens: int | None = None,
) -> tuple[Keep, list[str]]:
    """How many units of each kind to keep, and what had to be rounded.

    With `budget.keep`, each fraction is rounded to whole units (heads: the same number in each KV group). With an amount
    of parameters, bytes or FLOPs, the shape within it whose kinds keep most nearly the same fraction. With a budget that only
    measuring can meet, all. As many experts stay as a token is routed to.

    How many `tokens` a trimmed vocabulary keeps is known once the target's text is read. Until then the vocabulary counts
    whole or, where that does not fit, as large as fits.
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
    budget = options.budget
    if options.method.kind == "export":
        return whole(dims, units), []
    if budget.keep is not None:
        return round_fractions(config, {unit: budget.keep.get(unit, 1.0) for unit in units}, tokens)
    amount = budget.amount()
    if amount is None:
        told = "How much can be cut is measured by the job: shown is the base, which is the most it can be."
        return whole(dims, units, tokens), [told]

    found = affordable(config, options, bytes_per_parameter, tokens)
    cost, _ = cost_and_limit(config, *amount, bytes_per_parameter, saved_bytes(options, bytes_per_parameter))
    total = cost({})
    best = min(found, key=lambda keep: _unevenness(dims, keep) - cost(keep) / total)
    notices = [rounding(config, options, bytes_per_parameter, best)]
    if leaves_a_choice(options) and cost(best) < total:
        notices.append("How much is cut of which kind is measured by the job: shown is about the same share of each.")
    return best, notices


def affordable(config: dict[str, Any], options: Options, bytes_per_parameter: int, tokens: int | None = None) -> list[Keep]:
    """The shapes within a budget of parameters, bytes or FLOPs; there is one at least. Raises NarrowError (budget_too_small)."""
    family, dims, units = family_of(config), dimensions(config), options.method.units
    amount = options.budget.amount()
    assert amount is not None
    cost, limit = cost_and_limit(config, *amount, bytes_per_parameter, saved_bytes(options, bytes_per_parameter))
    found = shapes(config, options, cost, limit, tokens)
    least = tokens or (1 if "token" in units else dims.vocab)
    if not found and least == 1:
        small = shapes(config, options, cost, limit, least, fill=False)
        found = [_fill("token", dims.vocab, keep, limit, cost, 1) for keep in small]
    if not found:
        smallest = cost(smallest_shape(config, options, least))
        raise NarrowError(
            "budget_too_small",
            f"Cutting {' and '.join(PLURAL[u] for u in units)} can bring this model from {cost({}):,} to {smallest:,} "
            f"{MEASURES[amount[0]][1]}, not to {limit:,}: raise the budget{_more_units(family, dims, units)}."
            f"{_floor(dims, units)}",
        )
    return found


def rounding(config: dict[str, Any], options: Options, bytes_per_parameter: int, keep: Keep) -> str:
    """What a shape makes of a budget of parameters, bytes or FLOPs, as a sentence."""
    amount = options.budget.amount()
    assert amount is not None
    cost, limit = cost_and_limit(config, *amount, bytes_per_parameter, saved_bytes(options, bytes_per_parameter))
    total, word = cost({}), MEASURES[amount[0]][1]
    if cost(keep) == total:
        return f"{limit:,} {word} were asked for and the base has {total:,}: nothing is cut."
    return f"{limit:,} {word} were asked for; whole units make it {cost(keep):,}."


def saved_bytes(options: Options, bytes_per_parameter: int) -> int:
    """Bytes of a parameter of the result, of a base that has so many."""
    return BYTES[options.dtype] if options.dtype else bytes_per_parameter


def cost_and_limit(
    config: dict[str, Any], quantity: Quantity, asked: float, bytes_per_parameter: int, saved: int
) -> tuple[Callable[[Keep], int], int]:
    """What a shape costs in a quantity, and how much it may. A parameter has `bytes_per_parameter` in the base, `saved` in it."""
    dims, field = dimensions(config), MEASURES[quantity][0]

    def cost(keep: Keep, size: int = saved) -> int:
        return int(getattr(size_of(config, shrink(dims, keep), size), field))

    return cost, int(asked * cost({}, bytes_per_parameter)) if asked <= 1 else int(asked)


def whole(dims: Dimensions, units: list[Unit], tokens: int | None = None) -> Keep:
    """All units of these kinds, and all `tokens` of a vocabulary that is trimmed."""
    counts = unit_counts(dims) | {"token": tokens or dims.vocab}
    return {unit: counts[unit] for unit in units}


def vocabulary_is_fixed(options: Options) -> bool:
    """Whether the budget says how many tokens a trimmed vocabulary keeps, and not the target's text."""
    return "token" in (options.budget.keep or ()) or options.method.units == ["token"]


def shapes(
    config: dict[str, Any],
    options: Options,
    cost: Callable[[Keep], float],
    limit: float,
    tokens: int | None = None,
    fill: bool = True,
) -> list[Keep]:
    """The shapes that cost no more than `limit`: for every combination of the coarse kinds, the most neurons that fit.

    `cost` must be linear in the neurons. Without `fill`, the fewest neurons. A vocabulary that is trimmed keeps `tokens`.
    """
    family, dims, units = family_of(config), dimensions(config), options.method.units
    multiple = _multiple(family, dims, options)
    found = [keep for keep in _candidates(family, dims, units, multiple, tokens or dims.vocab) if cost(keep) <= limit]
    if fill and "neuron" in units:
        return [_fill("neuron", dims.width, keep, limit, cost, multiple) for keep in found]
    return found


def smallest_shape(config: dict[str, Any], options: Options, tokens: int | None = None) -> Keep:
    family, dims = family_of(config), dimensions(config)
    return next(_candidates(family, dims, options.method.units, _multiple(family, dims, options), tokens or dims.vocab))


def _multiple(family: Family, dims: Dimensions, options: Options) -> int:
    own = WIDE_MULTIPLE if dims.width >= WIDE else Q8_MULTIPLE if "gguf-q8_0" in options.export else MULTIPLE
    return math.lcm(options.method.multiple or own, family.multiple)


def _more_units(family: Family, dims: Dimensions, units: list[Unit]) -> str:
    """The kinds of unit that could be cut as well, as the end of a sentence."""
    counts = unit_counts(dims) | {"head": dims.heads // dims.kv_heads}
    more = [unit for unit in family.units if unit not in units and counts[unit] > 1]
    return f" or add {', '.join(more)} to method.units" if more else ""


def _floor(dims: Dimensions, units: list[Unit]) -> str:
    """Why not more experts can go, as a sentence that follows another."""
    return f" Each token is routed to {dims.active} experts, so as many must stay." if "expert" in units else ""


def plan_sizes(
    config: dict[str, Any],
    options: Options,
    bytes_per_parameter: int = 2,
    roles: Sequence[Role] = (),
    teacher: tuple[dict[str, Any], str] | None = None,
    machine: footprint.Machine = footprint.UNKNOWN,
) -> Sizes:
    """The dry run of a job: shapes, bytes, FLOPs, memory and a rough time. Raises like `solve`.

    `roles` are those of the skills beside the target; `teacher` is the config of one that is not the base, and the type that it
    is stored in. What does not fit on the `machine` is told, and refused by nobody but the job.
    """
    dims = dimensions(config)
    keep, notices = solve(config, options, bytes_per_parameter)
    small = shrink(dims, keep)
    if "token" in keep and not vocabulary_is_fixed(options):
        notices.append(
            "The vocabulary counts whole here: the job trims it to what the target's text uses, and keeps more of the rest."
            if keep["token"] == dims.vocab
            else f"This fits only if the target's text needs no more than {keep['token']:,} of the {dims.vocab:,} tokens."
        )
    before, after = size_of(config, dims, bytes_per_parameter), size_of(config, small, saved_bytes(options, bytes_per_parameter))
    method = options.method
    recover = method.recover
    lasso_tokens = method.regularizer.tokens if method.regularizer else 0
    # What is scored and taught by is the base with its vocabulary trimmed.
    trimmed = size_of(config, shrink(dims, {"token": small.vocab}), bytes_per_parameter)
    teaching = size_of(teacher[0], dimensions(teacher[0]), 1) if teacher else trimmed
    told = teaching.flops_per_token if taught(method) else 0
    if recover.cache and taught(method):
        states = dimensions(teacher[0] if teacher else config).hidden
        width = states if recover.cache == "hidden" else 3 * (recover.top or TOP) + 1
        notices.append(f"The cache of what the teacher says takes up to {2 * width * recover.tokens / 1e9:,.1f} GB of disk.")
    compared, skills = controls(options), 1 + len(roles)
    # Least squares runs the base once and the cut model three times; training is forward and backward.
    refit_flops = trimmed.flops_per_token + (3.0 + 3.0 * REFIT_PASSES) * after.flops_per_token
    scored = method.calibration_tokens if chooses(method) else 0
    refits = method.refit * (2 if "random" in compared else 1)
    refit_steps = REFIT_PASSES * (method.calibration_tokens / footprint.refit_batch(method.calibration_tokens) - 1) * refits
    cut, uncut = (footprint.counts(config, shape) for shape in (small, shrink(dims, {"token": small.vocab})))
    steps = recover.tokens / recover.batch_tokens if recover.optimizer == "muon" else 0.0
    flops = (
        3.0 * trimmed.flops_per_token * (scored + lasso_tokens + (recover.correction.tokens if recover.correction else 0))
        + refit_flops * method.calibration_tokens * refits
        + cut.muon_flops * cut.layers * (refit_steps + steps)
        + uncut.muon_flops * uncut.layers * steps * ("trained" in compared)
        + 3.0 * trimmed.flops_per_token * (recover.tokens + lasso_tokens) * ("trained" in compared)
        + (3.0 * after.flops_per_token + told) * recover.tokens
        + (2.0 * before.flops_per_token + (3.0 + len(compared)) * after.flops_per_token) * options.skill_tokens * skills
    )
    if options.locality and roles and scored:
        each = 3.0 * trimmed.flops_per_token + len(chosen_units(options)) * len(CUTS) * after.flops_per_token / 2
        flops += each * footprint.SHARED_TOKENS * skills
    if options.relearn:
        # At most: the result, one cut at random and one with fresh weights.
        flops += 3 * 3.0 * after.flops_per_token * options.relearn.tokens * roles.count("forget")
    if leaves_a_choice(options):
        curves = len(SHARES) * len(chosen_units(options))
        whole_shapes, part = (HALVINGS + 1, SEARCH) if options.budget.retention is not None else (SHORTLIST, CHOICE)
        flops += curves * (trimmed.flops_per_token + 6.0 * after.flops_per_token) * TRIAL_TOKENS
        flops += whole_shapes * refit_flops * method.calibration_tokens / 2
        flops += whole_shapes * (3.0 * after.flops_per_token + told) * recover.tokens / part

    other = footprint.teaching(*teacher, machine) if teacher else None

    def job(shape: Dimensions) -> footprint.Job:
        base = shrink(dims, {"token": shape.vocab})
        return footprint.Job(config, options, dims, base, shape, bytes_per_parameter, roles, other, machine)

    plain, lacking = job(small), ""
    # As the job does it before it has read the text.
    asked = job(small if "token" not in keep or vocabulary_is_fixed(options) else replace(small, vocab=1))
    try:
        footprint.check(replace(asked, parked=footprint.parks(asked)))
    except NarrowError as error:
        lacking = str(error)
    memory, least = footprint.stages(plain), footprint.least(plain)
    return Sizes(before, after, keep, memory, least, lacking, flops, FIXED_SECONDS + flops * SECONDS_PER_FLOP, notices)


def _candidates(
    family: Family,
    dims: Dimensions,
    units: list[Unit],
    multiple: int,
    tokens: int,
    given: Mapping[Unit, Sequence[int]] | None = None,
) -> Iterator[Keep]:
    """Combinations of the coarse kinds, the smallest first, with the fewest neurons: they are filled in afterwards.

    `given` are the numbers of each kind to try, heads in a KV group among them; else as many as make about CANDIDATES.
    """
    whole_groups = dims.heads // dims.kv_heads
    kinds: list[tuple[Unit, int, int, int]] = [
        ("layer", 1, dims.layers, 1),
        ("kv_group", 1, dims.kv_heads, 1),
        ("head", 1, whole_groups, 1),
        ("expert", dims.active, dims.experts, 1),
        ("residual", multiple, dims.hidden, multiple),
    ]
    free = [most for unit, least, most, _ in kinds if unit in units and least < most]
    most_steps = max(2, int(CANDIDATES ** (1 / max(1, len(free)))))
    numbers: list[Sequence[int]] = [
        [most] if unit not in units else given[unit] if given else _steps(least, most, step, most_steps)
        for unit, least, most, step in kinds
    ]
    for layer, group, head, expert, hidden in product(*numbers):
        if family.heads_divide_hidden and hidden % (group * head):
            continue
        if hidden < dims.hidden and hidden % family.multiple:
            continue
        keep: Keep = {"layer": layer, "kv_group": group, "head": group * head, "expert": expert, "residual": hidden}
        keep |= {"token": tokens, "neuron": min(multiple, dims.width)}
        yield {unit: keep[unit] for unit in units}


def _steps(least: int, most: int, step: int, count: int) -> list[int]:
    """About `count` numbers from `least` to `most`, both among them, in whole steps but for the last."""
    whole = range(least, most, step)
    return [*whole[:: -(-len(whole) // count) or 1], most]


def _fill(unit: Unit, of: int, keep: Keep, limit: float, cost: Callable[[Keep], float], multiple: int) -> Keep:
    """`keep` with as many units of a kind as the limit allows, in whole multiples, up to all that there are."""
    least = keep[unit]
    one = cost({**keep, unit: least + 1}) - cost(keep)
    most = min(of, least + int((limit - cost(keep)) / one)) if one > 0 else of
    return {**keep, unit: most if most == of else max(least, most // multiple * multiple)}


def _unevenness(dims: Dimensions, keep: Keep) -> float:
    """How far apart the kept fractions of the kinds are, as the spread of their logarithms; what text needs is not chosen."""
    counts = unit_counts(dims)
    logs = [math.log(kept / counts[unit]) for unit, kept in keep.items() if unit != "token"]
    return max(logs, default=0.0) - min(logs, default=0.0)


def round_fractions(config: dict[str, Any], fractions: dict[Unit, float], tokens: int | None = None) -> tuple[Keep, list[str]]:
    """The whole numbers of units nearest to the fractions, among those that stock transformers takes, and what was rounded."""
    family, dims = family_of(config), dimensions(config)
    counts = unit_counts(dims)

    def distance(keep: Keep) -> float:
        return sum(abs(keep[unit] / counts[unit] - fraction) for unit, fraction in fractions.items())

    def near(unit: Unit, least: int, most: int, reach: int = 0) -> range:
        nearest = min(most, max(least, round(fractions.get(unit, 1) * most)))
        return range(max(least, nearest - reach), min(most, nearest + reach) + 1)

    given: dict[Unit, Sequence[int]] = {
        "layer": near("layer", 1, dims.layers),
        "kv_group": range(1, dims.kv_heads + 1),
        "head": range(1, dims.heads // dims.kv_heads + 1),
        "expert": near("expert", dims.active, dims.experts),
        # Where heads must divide the hidden size, the nearest size that any number of heads divides is not far.
        "residual": near("residual", 1, dims.hidden, max(dims.heads, family.multiple)),
    }
    vocabulary = tokens or max(1, round(fractions.get("token", 1.0) * dims.vocab))
    keep = min(_candidates(family, dims, list(fractions), 1, vocabulary, given), key=distance)
    if "neuron" in fractions:
        step = family.multiple
        keep["neuron"] = min(dims.width, step * max(1, round(fractions["neuron"] * dims.width / step)))
    notices = [
        f"{fraction:.3g} of {counts[unit]} {PLURAL[unit]} is {fraction * counts[unit]:.1f}; {keep[unit]} are kept."
        for unit, fraction in fractions.items()
        if not math.isclose(fraction * counts[unit], keep[unit])
    ]
    if round(fractions.get("expert", 1) * dims.experts) < dims.active:
        notices.append(_floor(dims, ["expert"]).strip())
    return keep, notices
