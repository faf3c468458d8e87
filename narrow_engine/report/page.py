"""The report as one HTML file that needs nothing else: no script, no font, no connection.

Everything on it comes from the `Report`. Charts are matplotlib's SVG, drawn in the page's own text colour so that they
fit a light and a dark theme. Every string is escaped by the template.
"""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from narrow_engine.report.model import Report

INK, ACCENT, QUIET, WARN = "#010203", "#2f6fde", "#8a94a6", "#c2571a"
"""INK is a colour that nothing else has, replaced by `currentColor` in the SVG."""


def render_page(report: Report) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["count"] = lambda number: f"{number:,}"
    environment.filters["short"] = _short
    row = report.skills[report.target]
    return environment.get_template("page.html").render(
        report=report,
        row=row,
        verdict=_verdict(report),
        share=report.after.parameters / report.before.parameters,
        retention_chart=_svg(lambda axes: _retention(axes, report), 0.42 * len(report.skills) + 0.9),
        curve_chart=_svg(lambda axes: _curve(axes, report), 3.0) if len(report.curve) > 1 else "",
        cut_chart=_svg(lambda axes: _cuts(axes, report), 2.2) if any(c.unit != "layer" for c in report.cuts) else "",
    )


def _verdict(report: Report) -> str:
    kept = report.skills[report.target].retention
    size = report.after.parameters / report.before.parameters
    if kept.low >= 1:
        return f"{size:.0%} of the size, and nothing of {report.target} lost that could be measured."
    return f"{size:.0%} of the size, {kept.value:.1%} of {report.target} kept."


def _short(number: float) -> str:
    """1,234,567 → 1.23 M."""
    for size, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return f"{number:.3g}"


def _svg(draw: Callable[[Any], None], height: float) -> Markup:
    # Imported here: it takes half a second that a run without a report need not spend.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "svg.hashsalt": "narrow"}):
        figure = Figure(figsize=(7.2, height), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(QUIET)
        axes.tick_params(colors=INK, which="both", color=QUIET)
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(
        r'<svg [^>]*viewBox="([^"]+)"[^>]*>',
        r'<svg viewBox="\1" aria-hidden="true" xmlns:xlink="http://www.w3.org/1999/xlink">',
        svg,
        count=1,
    )
    # matplotlib escapes text; what it wrote is markup.
    return Markup(svg)  # noqa: S704


def _retention(axes: Any, report: Report) -> None:
    names = list(report.skills)[::-1]
    colours = {"keep": ACCENT, "watch": QUIET, "forget": WARN}
    for at, name in enumerate(names):
        row = report.skills[name]
        kept = row.retention
        axes.barh(at, kept.value, height=0.55, color=colours[row.role])
        axes.plot([kept.low, kept.high], [at, at], color=INK, linewidth=1.2, solid_capstyle="butt")
        for end in (kept.low, kept.high):
            axes.plot([end, end], [at - 0.13, at + 0.13], color=INK, linewidth=1.2)
        axes.text(max(kept.high, kept.value) + 0.02, at, f"{kept.value:.3f}", va="center", color=INK)
    axes.axvline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_yticks(range(len(names)), [name if len(name) <= 24 else name[:23] + "…" for name in names], parse_math=False)
    axes.set_xlim(0, max(1.15, *(row.retention.high + 0.15 for row in report.skills.values())))
    axes.set_xlabel("retention (1 = as good as the base)")


def _curve(axes: Any, report: Report) -> None:
    tokens, offset = [], 0
    for phase in dict.fromkeys(point.phase for point in report.curve):
        points = [p for p in report.curve if p.phase == phase]
        tokens = [(p.tokens + offset) / 1e3 for p in points if p.validation is not None]
        axes.plot(
            tokens,
            [p.validation for p in points if p.validation is not None],
            color=ACCENT if phase == "recover" else WARN,
            marker="o",
            markersize=3.5,
            label={"recover": "recovery", "sparsify": "group lasso"}.get(phase, phase),
        )
        offset += points[-1].tokens
    axes.set_xlabel("thousand tokens trained on")
    axes.set_ylabel("held-out loss, nats")
    legend = axes.legend(frameon=False)
    for text in legend.get_texts():
        text.set_color(INK)


def _cuts(axes: Any, report: Report) -> None:
    bars = [cut for cut in report.cuts if cut.unit != "layer"]
    for number, cut in enumerate(bars):
        height = 0.8 / len(bars)
        left = [layer + number * height - 0.4 + height / 2 for layer in range(len(cut.per_layer))]
        axes.bar(left, [1.0] * len(left), width=height * 0.92, color=QUIET, alpha=0.25)
        colour = (ACCENT, WARN, "#4d9a6a")[number % 3]
        axes.bar(
            left,
            [kept / cut.of for kept in cut.per_layer],
            width=height * 0.92,
            color=colour,
            label=cut.unit.replace("_", " "),
        )
    axes.set_xlabel("layer")
    axes.set_ylabel("share kept")
    axes.set_ylim(0, 1.05)
    axes.xaxis.get_major_locator().set_params(integer=True)
    for text in axes.legend(frameon=False, loc="upper right").get_texts():
        text.set_color(INK)
