"""The frontier of a sweep, as data: what each method comes to at each size, over seeds, and which points nothing beats."""

from collections.abc import Iterable
from statistics import fmean

from pydantic import BaseModel, Field

from narrow_engine.report.model import CurvePoint, Interval, Report
from narrow_engine.spec import Budget


class Figures(BaseModel):
    """What a run came to on its target. Losses are nats per token of the base, on held-out text."""

    target: str
    base_parameters: int
    base_loss: float
    parameters: int
    cut_loss: float = Field(description="Before any training: after the cut and the refit.")
    loss: float = Field(description="After recovery.")
    retention: Interval
    tokens: int = Field(description="Trained on, with those of group lasso and of the teacher's correction.")
    seconds: float = Field(description="Of all its stages, also of those that another point did for it.")


class Outcome(Figures):
    """The same with the curve of the training, as the service keeps it of a finished point."""

    curve: list[CurvePoint]


class Spread(BaseModel):
    """A figure over seeds: mean and range."""

    mean: float
    low: float
    high: float


class FrontierPoint(BaseModel):
    """A method at a budget, over the seeds that have finished."""

    method: str
    budget: Budget
    seeds: list[int]
    parameters: Spread
    cut_loss: Spread
    loss: Spread
    retention: Spread
    tokens: Spread
    seconds: Spread
    dominated: bool = Field(description="Another point has no more parameters and no more loss, and less of one: by the means.")


class CurveMean(BaseModel):
    phase: str
    tokens: int = Field(description="Trained on so far, over all phases.")
    loss: Spread


class FrontierCurve(BaseModel):
    """Held-out loss against tokens, of a method at a budget. It is measured on a part of the text that the points have."""

    method: str
    budget: Budget
    points: list[CurveMean]


class Frontier(BaseModel):
    """Loss against parameters and against tokens, of what has finished of a sweep."""

    target: str = Field(description="The target's name; empty while nothing has finished.")
    finished: int = Field(description="Points of the sweep that have succeeded.")
    of: int
    base_parameters: int
    base_loss: float
    points: list[FrontierPoint] = Field(description="By parameters, the smallest first.")
    curves: list[FrontierCurve]


class Finished(BaseModel):
    """A point of a sweep that has succeeded."""

    method: str
    budget: Budget
    seed: int
    outcome: Outcome


def outcome(report: Report) -> Outcome:
    """What a sweep needs of a report."""
    row, origin = report.skills[report.target], report.provenance
    return Outcome(
        target=report.target,
        base_parameters=report.before.parameters,
        base_loss=row.base.loss,
        parameters=report.after.parameters,
        cut_loss=row.cut.loss,
        loss=row.recovered.loss,
        retention=row.retention,
        tokens=origin.recovery_tokens + origin.regularizer_tokens + origin.correction_tokens,
        seconds=round(sum(origin.seconds.values()), 3),
        curve=report.curve,
    )


def frontier(finished: Iterable[Finished], of: int) -> Frontier:
    """The frontier of what has finished of `of` points, in whatever order it comes."""
    groups: dict[tuple[str, str], list[Finished]] = {}
    for item in sorted(finished, key=lambda p: (p.method, p.budget.model_dump_json(), p.seed)):
        groups.setdefault((item.method, item.budget.model_dump_json()), []).append(item)
    found = sorted(map(_point, groups.values()), key=lambda p: (p.parameters.mean, p.loss.mean, p.method))
    for point in found:
        point.dominated = any(_beats(other, point) for other in found)
    outcomes = [item.outcome for group in groups.values() for item in group]
    return Frontier(
        target=outcomes[0].target if outcomes else "",
        finished=len(outcomes),
        of=of,
        base_parameters=outcomes[0].base_parameters if outcomes else 0,
        base_loss=fmean(o.base_loss for o in outcomes) if outcomes else 0.0,
        points=found,
        curves=[curve for curve in map(_curve, groups.values()) if len(curve.points) > 1],
    )


def _point(group: list[Finished]) -> FrontierPoint:
    outcomes = [point.outcome for point in group]
    return FrontierPoint(
        method=group[0].method,
        budget=group[0].budget,
        seeds=[point.seed for point in group],
        parameters=_spread(o.parameters for o in outcomes),
        cut_loss=_spread(o.cut_loss for o in outcomes),
        loss=_spread(o.loss for o in outcomes),
        retention=_spread(o.retention.value for o in outcomes),
        tokens=_spread(o.tokens for o in outcomes),
        seconds=_spread(o.seconds for o in outcomes),
        dominated=False,
    )


def _beats(one: FrontierPoint, other: FrontierPoint) -> bool:
    sizes, losses = (one.parameters.mean, other.parameters.mean), (one.loss.mean, other.loss.mean)
    return sizes[0] <= sizes[1] and losses[0] <= losses[1] and (sizes[0] < sizes[1] or losses[0] < losses[1])


def _curve(group: list[Finished]) -> FrontierCurve:
    """The mean where all seeds have been measured."""
    curves = [_seen(point.outcome.curve) for point in group]
    shared = [place for place in curves[0] if all(place in curve for curve in curves)]
    points = [
        CurveMean(phase=phase, tokens=tokens, loss=_spread(curve[phase, tokens] for curve in curves)) for phase, tokens in shared
    ]
    return FrontierCurve(method=group[0].method, budget=group[0].budget, points=points)


def _seen(curve: list[CurvePoint]) -> dict[tuple[str, int], float]:
    """Held-out loss by phase and by the tokens since the first phase began."""
    found, offset, last = {}, 0, 0
    for number, point in enumerate(curve):
        if number and point.phase != curve[number - 1].phase:
            offset += last
        last = point.tokens
        if point.validation is not None:
            found[point.phase, offset + point.tokens] = point.validation
    return found


def _spread(values: Iterable[float]) -> Spread:
    found = list(values)
    # fmean may round to just outside of the range where all values are the same.
    return Spread(mean=min(max(fmean(found), min(found)), max(found)), low=min(found), high=max(found))
