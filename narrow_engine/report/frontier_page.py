"""The frontier of a sweep as one HTML file that needs nothing else, drawn as the report's page is."""

from collections.abc import Sequence
from typing import Any

from narrow_engine.report.frontier import Frontier, FrontierPoint
from narrow_engine.report.page import ACCENT, INK, PAPER, SOFT, THIRD, WARN, legend, svg, template
from narrow_engine.spec import PLURAL, QUANTITIES, Budget

LOOKS = [(colour, marker) for marker in ("o", "s") for colour in (ACCENT, WARN, THIRD, SOFT, INK)]
"""Colour and marker of each method: a sweep has at most ten."""
STROKES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
WIDE = 1.8
"""Ratio of the largest loss to the smallest from which their axis is logarithmic."""
LEGEND = "\N{HAIR SPACE}"
"""Before a name in a legend: matplotlib leaves out those that begin with an underscore."""


def render_frontier(frontier: Frontier) -> str:
    """The page as HTML text."""
    return template("frontier.html").render(
        frontier=frontier,
        verdict=verdict(frontier),
        best=[point for point in frontier.points if not point.dominated],
        told=budget_words,
        size_chart=svg(lambda axes: _sizes(axes, frontier)) if frontier.points else "",
        token_chart=svg(lambda axes: _tokens(axes, frontier)) if frontier.curves else "",
    )


def verdict(frontier: Frontier) -> str:
    """The result in a sentence."""
    if not frontier.points:
        return "No point of this sweep has finished yet."
    best = [point for point in frontier.points if not point.dominated]
    methods = list(dict.fromkeys(point.method for point in best))
    if len({point.method for point in frontier.points}) == 1:
        return f"{frontier.target} at {_counted(len(frontier.points), 'size')}."
    if len(best) == 1:
        once = ", in one run each" if all(len(point.seeds) == 1 for point in frontier.points) else ""
        return f"For {frontier.target}, {methods[0]} at {budget_words(best[0].budget)} is beaten by none{once}."
    if len(methods) == 1:
        return f"At every size on the frontier, {methods[0]} is the best for {frontier.target}."
    return f"On the frontier for {frontier.target}: {', '.join(methods[:-1])} and {methods[-1]}."


def budget_words(budget: Budget) -> str:
    """25% of parameters; 4,000,000 bytes; 95% of the target kept; 25% of neurons."""
    if budget.retention is not None:
        return f"{_share(budget.retention)} of the target kept"
    if budget.latency is not None:
        return f"{_share(budget.latency)} of latency" if budget.latency <= 1 else f"{budget.latency:.4g} ms a token"
    if budget.keep is not None:
        return ", ".join(f"{_share(share)} of {PLURAL[unit]}" for unit, share in budget.keep.items())
    quantity, amount = next((name, getattr(budget, name)) for name in QUANTITIES if getattr(budget, name) is not None)
    return f"{_share(amount)} of {quantity}" if amount <= 1 else f"{amount:,.0f} {quantity}"


def _share(share: float) -> str:
    return f"{100 * share:.4g}%"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _look(frontier: Frontier, method: str) -> tuple[str, str]:
    names = sorted({point.method for point in frontier.points})
    return LOOKS[names.index(method) % len(LOOKS)]


def _sizes(axes: Any, frontier: Frontier) -> None:
    """Loss against parameters: a line for each method, with the range over seeds; what something beats is hollow."""
    unit, name = _unit([frontier.base_parameters, *(point.parameters.mean for point in frontier.points)])
    for method in sorted({point.method for point in frontier.points}):
        points = [point for point in frontier.points if point.method == method]
        colour, marker = _look(frontier, method)
        sizes = [point.parameters.mean / unit for point in points]
        axes.plot(
            sizes, [p.loss.mean for p in points], color=colour, linewidth=1.6, label=LEGEND + method, marker=marker, markersize=5
        )
        for size, point in zip(sizes, points, strict=True):
            _whiskers(axes, unit, size, point, colour)
            if point.dominated:
                axes.plot([size], [point.loss.mean], color=PAPER, marker=marker, markersize=2.6, linewidth=0)
    axes.axhline(frontier.base_loss, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.plot(
        [frontier.base_parameters / unit],
        [frontier.base_loss],
        color=INK,
        marker="D",
        markersize=5,
        linewidth=0,
        label="the base",
    )
    axes.set_xlabel(f"{name}parameters")
    _losses(axes, [point.loss.mean for point in frontier.points])
    legend(axes, columns=3)


def _losses(axes: Any, shown: list[float]) -> None:
    """The axis of losses: by ratios where methods are far apart, so that those near the base are told from each other."""
    axes.set_ylabel("loss, nats per token")
    axes.margins(y=0.1)
    if max(shown) < WIDE * min(shown):
        return
    # Imported here, as the rest of matplotlib is.
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _whiskers(axes: Any, unit: float, size: float, point: FrontierPoint, colour: str) -> None:
    if len(point.seeds) > 1:
        loss, parameters = point.loss, point.parameters
        axes.plot([size, size], [loss.low, loss.high], color=colour, linewidth=1.2)
        axes.plot([parameters.low / unit, parameters.high / unit], [loss.mean, loss.mean], color=colour, linewidth=1.2)


def _tokens(axes: Any, frontier: Frontier) -> None:
    """Held-out loss while training: methods by colour, budgets by stroke."""
    budgets = list({budget_words(curve.budget): None for curve in frontier.curves})
    unit, name = _unit([point.tokens for curve in frontier.curves for point in curve.points])
    told: set[str] = set()
    for curve in frontier.curves:
        colour, marker = _look(frontier, curve.method)
        axes.plot(
            [point.tokens / unit for point in curve.points],
            [point.loss.mean for point in curve.points],
            color=colour,
            linewidth=1.5,
            linestyle=STROKES[budgets.index(budget_words(curve.budget)) % len(STROKES)],
            marker=marker,
            markersize=2.4,
        )
        told.add(curve.method)
    for method in sorted(told):
        colour, marker = _look(frontier, method)
        axes.plot([], [], color=colour, linewidth=1.5, marker=marker, markersize=3.5, label=LEGEND + method)
    for number, words in enumerate(budgets if 1 < len(budgets) <= len(STROKES) else []):
        axes.plot([], [], color=SOFT, linewidth=1.2, linestyle=STROKES[number], label=words)
    axes.axhline(frontier.base_loss, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="the base, all held-out text")
    axes.set_xlabel(f"{name}tokens trained on")
    _losses(axes, [point.loss.mean for curve in frontier.curves for point in curve.points])
    legend(axes, columns=2)


def _unit(numbers: Sequence[float]) -> tuple[float, str]:
    """What to count in, and its name before the noun."""
    sizes = ((1e9, "billion "), (1e6, "million "), (1e3, "thousand "))
    return next(((size, name) for size, name in sizes if max(numbers) > 2 * size), (1, ""))
