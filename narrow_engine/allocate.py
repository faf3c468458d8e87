"""Which shape: how much to cut of which kind of unit, where the budget leaves a choice, found by cutting and looking.

What a score says of one neuron against another it does not say of a neuron against a layer. So each kind is cut alone, to
a few depths, and the loss after the refit is measured on training text set apart: its sensitivity. The loss of a shape is
predicted as the sum of what its kinds cost alone, and the shapes that the budget allows are ranked by it. Kinds interact,
and what is best before training need not be after it (arXiv 2502.07780), so the best few are cut in earnest, recovered
for a sixteenth of the tokens, and the one that is then best is taken.

A budget of retention bisects the number of parameters: the smallest model that keeps enough after an eighth of the
recovery, from which the rest can only gain. A budget of latency asks the machine: a line through the times of a few shapes,
a + b·layers + c·FLOPs, says which shapes could do, and the best of them are timed until one fits.
"""

import json
import math
import tempfile
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedModel

from narrow_engine import corpus, skills, speed, train
from narrow_engine.errors import NarrowError
from narrow_engine.families import Dimensions, dimensions
from narrow_engine.models import config_dict
from narrow_engine.plan import Plan, Scores, make_plan
from narrow_engine.reconstruct import refit
from narrow_engine.report.model import Allocation, Trial
from narrow_engine.run import write_json
from narrow_engine.sizing import (
    CHOICE,
    HALVINGS,
    REFIT_PASSES,
    SEARCH,
    SHARES,
    SHORTLIST,
    TRIAL_TOKENS,
    Keep,
    affordable,
    cost_and_limit,
    parameters,
    round_fractions,
    rounding,
    shapes,
    shrink,
    size_of,
    smallest_shape,
    unit_counts,
    whole,
)
from narrow_engine.slice import slice_model
from narrow_engine.spec import PLURAL, CompressionSpec, Unit, chosen_units
from narrow_engine.teacher import Live

TIMINGS = 6
"""Shapes that are timed, at most."""
CLOSE = 0.97
"""A model that takes this much of the time that it may take is near enough."""


@dataclass(frozen=True)
class Workshop:
    """What trials need: the base with its scores, the target's training text in two parts, and a file that keeps results."""

    spec: CompressionSpec
    config: dict[str, Any]
    """Of the base as it was brought: budgets count from it."""
    bytes_per_parameter: int
    tokens: int | None
    """That a trimmed vocabulary keeps; `base` has no others any more."""
    base: PreTrainedModel
    scores: Scores
    text: corpus.Documents
    judge: corpus.Documents
    base_loss: float
    results: Path
    progress: Callable[[int, int], None]
    """Called with (done, total) within whatever is being tried; may raise to stop."""

    @property
    def dims(self) -> Dimensions:
        return dimensions(self.config)

    @property
    def units(self) -> list[Unit]:
        return chosen_units(self.spec)

    @property
    def blocks(self) -> corpus.Blocks:
        """Of the text that trials are fitted and trained on."""
        return corpus.Blocks(self.text.tokens, self.spec.block_tokens, self.spec.seed)

    def shapes(self, cost: Callable[[Keep], float], limit: float) -> list[Keep]:
        return shapes(self.config, self.spec, cost, limit, self.tokens)

    def plan(self, keep: Keep) -> Plan:
        return make_plan(config_dict(self.base), self.scores, {unit: keep[unit] for unit in keep if unit != "token"})


def open_workshop(
    spec: CompressionSpec,
    config: dict[str, Any],
    bytes_per_parameter: int,
    tokens: int | None,
    base: PreTrainedModel,
    scores: Scores,
    training: corpus.Documents,
    results: Path,
    progress: Callable[[int, int], None],
) -> Workshop:
    """`results` is a file that outlives a kill: what was tried is not tried again."""
    text, apart = corpus.hold_out(training, 16 * TRIAL_TOKENS, 0.1, "The target", lambda *_: None)
    judge = corpus.sample(apart, TRIAL_TOKENS, spec.block_tokens, spec.seed)
    loss = skills.loss_of(base, judge, spec.block_tokens)
    return Workshop(spec, config, bytes_per_parameter, tokens, base, scores, text, judge, loss, results, progress)


def allocate(shop: Workshop) -> tuple[Allocation, list[str]]:
    """The shape for a budget that leaves a choice, and sentences about it. Raises like `sizing.affordable`."""
    budget = shop.spec.budget
    curves = {unit: sensitivity(shop, unit) for unit in shop.units}

    def predicted(keep: Keep) -> float:
        return sum(interpolate(curves[unit], unit, shop.dims, keep) for unit in shop.units)

    if budget.retention is not None:
        found = smallest_that_keeps(shop, predicted, budget.retention)
    elif budget.latency is not None:
        found = best_within_time(shop, predicted, budget.latency)
    else:
        found = best_of_size(shop, predicted)
    part = CHOICE if budget.retention is None else SEARCH
    spent = sum(short_recovery(shop, part)[1] for trial in found.trials if trial.recovered is not None)
    return Allocation(keep=found.chosen.keep, sensitivity=curves, trials=found.trials, recovery_tokens=spent), found.told


class Found(NamedTuple):
    """The trials of a search, the one that it ends with, and what to tell about it."""

    chosen: Trial
    trials: list[Trial]
    told: list[str]


def attempt(shop: Workshop, keep: Keep, part: int = 0) -> Trial:
    """Cuts the base to a shape and refits it; with `part`, trains it for that part of the recovery as well."""
    key = json.dumps([sorted(keep.items()), part])
    known = json.loads(shop.results.read_text()) if shop.results.exists() else {}
    if key not in known:
        known[key] = _attempt(shop, keep, part).model_dump()
        write_json(shop.results, known)
    return Trial.model_validate(known[key])


def _attempt(shop: Workshop, keep: Keep, part: int) -> Trial:
    method, length = shop.spec.method, shop.spec.block_tokens
    blocks, plan = shop.blocks, shop.plan(keep)
    model = slice_model(shop.base, plan)
    if method.refit:
        # The curves need no more than least squares on few tokens; what may be chosen is refitted nearly as it will be.
        passes, tokens = (REFIT_PASSES, method.calibration_tokens // 2) if part else (0, TRIAL_TOKENS)
        refit(shop.base, model, plan, blocks, min(tokens, method.calibration_tokens), shop.progress, passes)

    def gap() -> float:
        measured = skills.measure(model.eval(), [], shop.judge, length, shop.progress)[0]
        return measured.mean_loss() - shop.base_loss

    refitted, recovered = gap(), None
    if part and method.recover.tokens:
        with tempfile.TemporaryDirectory() as folder:
            train.train(
                model,
                blocks,
                short_recovery(shop, part)[0],
                phase="allocate",
                folder=Path(folder),
                emit=lambda *_: None,
                check=lambda: shop.progress(0, 1),
                validate=lambda _: 0.0,
                teacher=Live(shop.base),  # also where another will teach: shapes are compared here, not teachers
            )
        recovered = gap()
    size = parameters(shop.config, shrink(shop.dims, keep))
    return Trial(keep=keep, parameters=size, refitted=refitted, recovered=recovered)


def short_recovery(shop: Workshop, part: int) -> tuple[train.Settings, int]:
    """A part of the spec's recovery, with its whole schedule, and the tokens that it takes."""
    settings = train.settings_of(shop.spec.method)
    settings = replace(settings, tokens=settings.tokens // part)
    rows, steps = train.shape(settings, shop.blocks)
    return settings, rows * steps * shop.spec.block_tokens


def sensitivity(shop: Workshop, unit: Unit) -> list[Trial]:
    """The loss where one kind of unit alone is cut, to each of SHARES."""
    shapes_of_kind = [round_fractions(shop.config, {unit: share})[0] for share in SHARES]
    counts = dict.fromkeys(keep[unit] for keep in shapes_of_kind)
    return [attempt(shop, {unit: count}) for count in counts if count < unit_counts(shop.dims)[unit]]


def interpolate(curve: list[Trial], unit: Unit, dims: Dimensions, keep: Keep) -> float:
    """What cutting one kind costs in a shape: linear in the logarithm of the share kept, and never less for fewer."""
    if not curve:
        return 0.0
    count = unit_counts(dims)[unit]
    depths = [0.0, *(math.log(count / trial.keep[unit]) for trial in curve)]
    losses = np.maximum.accumulate([0.0, *(trial.refitted for trial in curve)])
    # Heads that go with their group count as the group's.
    there = keep.get("kv_group", dims.kv_heads) * dims.heads // dims.kv_heads if unit == "head" else count
    depth = math.log(there / keep[unit])
    steepest = (losses[-1] - losses[-2]) / (depths[-1] - depths[-2])
    return float(np.interp(depth, depths, losses) + max(0.0, depth - depths[-1]) * steepest)


def best_of_size(shop: Workshop, predicted: Callable[[Keep], float]) -> Found:
    """The shape within an amount of parameters, bytes or FLOPs that is best after a short recovery."""
    picked: list[Keep] = []
    for keep in sorted(affordable(shop.config, shop.spec, shop.bytes_per_parameter, shop.tokens), key=predicted):
        if len(picked) < SHORTLIST and all(_differ(keep, one) for one in picked):
            picked.append(keep)
    trials = [attempt(shop, keep, CHOICE) for keep in picked]
    chosen = min(trials, key=_final)
    tried = "; ".join(f"{_words(trial.keep)}: {_final(trial):+.3f}" for trial in trials)
    made = rounding(shop.config, shop.spec, shop.bytes_per_parameter, chosen.keep)
    return Found(chosen, trials, [made, f"Of the shapes that were tried, the best is taken. Nats above the base: {tried}."])


def smallest_that_keeps(shop: Workshop, predicted: Callable[[Keep], float], wanted: float) -> Found:
    """The smallest shape whose retention is at least `wanted` after a short recovery."""
    cost, _ = cost_and_limit(shop.config, "parameters", 1.0, shop.bytes_per_parameter, shop.bytes_per_parameter)
    everything = whole(shop.dims, shop.spec.method.units, shop.tokens)
    total = cost(everything)
    chosen, trials = Trial(keep=everything, parameters=total, refitted=0.0), []

    def shape(limit: float) -> Keep:
        return min(shop.shapes(cost, limit), key=predicted)

    small = float(cost(smallest_shape(shop.config, shop.spec, shop.tokens)))
    large = float(total)
    # Where the refit alone would do, by the curves: the first guess.
    step = (total / small) ** (1 / 64)
    guess = small * step ** bisect_left(range(64), True, key=lambda n: math.exp(-predicted(shape(small * step**n))) >= wanted)
    for number in range(HALVINGS + 1):
        limit = min(guess, 0.99 * total) if number == 0 else math.sqrt(small * large)
        trial = attempt(shop, shape(max(limit, small)), SEARCH)
        trials.append(trial)
        if math.exp(-_final(trial)) >= wanted:
            large = float(trial.parameters)
            chosen = min(chosen, trial, key=lambda t: t.parameters)
        else:
            small = max(small, limit)
        if large <= 1.02 * small:
            break
    kept = math.exp(-_final(chosen))
    told = (
        f"{chosen.parameters:,} of {total:,} parameters are the fewest that were found to keep {wanted:g}: {_words(chosen.keep)}."
    )
    if chosen.keep == everything:
        return Found(
            chosen, trials, [f"No smaller model was found to keep {wanted:g} of the target: all {_words(everything)} stay."]
        )
    return Found(chosen, trials, [f"{told} In its trial it kept {kept:.3f}."])


def best_within_time(shop: Workshop, predicted: Callable[[Keep], float], asked: float) -> Found:
    """The shape that is predicted best of those whose decoding is fast enough on this machine."""
    dims = shop.dims

    def model(keep: Keep) -> PreTrainedModel:
        return slice_model(shop.base, shop.plan(keep))

    def terms(keep: Keep) -> list[float]:
        size = size_of(shop.config, shrink(dims, keep), 1)
        return [1.0, float(size.layers), float(size.flops_per_token)]

    half: Keep = {"neuron": max(1, dims.width // 2)}
    few: Keep = {"layer": max(1, dims.layers // 2)}
    known: list[Keep] = [{}, half, few, {**half, **few}]
    times = speed.token_seconds([shop.base, *(model(keep) for keep in known[1:])], lambda: shop.progress(0, 1))
    line = np.maximum(np.linalg.lstsq(np.array([terms(keep) for keep in known]), np.array(times), rcond=None)[0], 0.0)
    limit = asked * times[0] if asked <= 1 else asked / 1000
    aim = limit
    trials: list[Trial] = []
    chosen: Trial | None = None
    for _ in range(TIMINGS):
        found = shop.shapes(lambda keep: float(line @ terms(keep)), aim)
        if not found:
            break
        keep = min(found, key=predicted)
        if any(trial.keep == keep for trial in trials):
            break
        base_time, time = speed.token_seconds([shop.base, model(keep)], lambda: shop.progress(0, 1))
        # Machines drift: what was asked for as a share is held against the base's time of this moment.
        limit = asked * base_time if asked <= 1 else limit
        trial = attempt(shop, keep).model_copy(update={"latency": 1000 * time})
        trials.append(trial)
        if time <= limit and (chosen is None or predicted(keep) < predicted(chosen.keep)):
            chosen = trial
        if CLOSE * limit <= time <= limit:
            break
        aim *= limit / time
    if chosen is None:
        fastest = (
            f"{min(t.latency or 0.0 for t in trials):.2f} ms was the best of {len(trials)}" if trials else "no shape is near it"
        )
        raise NarrowError(
            "budget_too_small",
            f"No model that this machine runs in {1000 * limit:.2f} ms a token was found by cutting "
            f"{' and '.join(PLURAL[u] for u in shop.units)} ({fastest}; the base takes {1000 * times[0]:.2f} ms): "
            "raise the budget or add kinds to method.units.",
        )
    told = f"{chosen.latency:.2f} ms a token where {1000 * limit:.2f} were asked for: {_words(chosen.keep)}."
    return Found(chosen, trials, [told])


def _final(trial: Trial) -> float:
    """A recovery that harms is not kept, and a short one at its full rate can."""
    return trial.refitted if trial.recovered is None else min(trial.refitted, trial.recovered)


def _differ(one: Keep, other: Keep) -> bool:
    """Whether some kind is cut by a fifth more in one than in the other."""
    return any(abs(math.log(one[unit] / other[unit])) > math.log(1.2) for unit in one)


def _words(keep: Keep) -> str:
    return ", ".join(f"{count} {PLURAL[unit]}" for unit, count in keep.items())
