"""The report as one HTML file that needs nothing else: no script, no font, no connection.

Everything on it comes from the `Report`. The bars of the skills are drawn by the template, so that they fit any width;
the curves are matplotlib's SVG in the page's own colours, so that they fit a light and a dark theme. Every string is
escaped by the template.
"""

import io
import re
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from narrow_engine.report.model import Cut, LocalityCurve, Relearning, Report, Skill, Speed
from narrow_engine.spec import PLURAL, ROUNDED, Control

COLOURS = {"#010203": "currentColor", "#010204": "var(--soft)", "#010205": "var(--line)", "#010206": "var(--accent)"}
COLOURS |= {"#010207": "var(--warn)", "#010208": "var(--third)", "#010209": "var(--page)"}
INK, SOFT, LINE, ACCENT, WARN, THIRD, PAPER = COLOURS
"""Colours that nothing else has, for matplotlib, which knows no CSS; the SVG gets the page's."""

STAGES = (
    *("load", "measure_base", "score", "allocate", "sparsify", "plan", "slice", "reconstruct"),
    *("correct", "teach", "recover", "controls", "measure", "answer", "locality", "relearn", "export_base", "export"),
)
LEARNERS = {"narrow": "this model", "random": "cut at random", "fresh": "fresh weights"}
RUNTIMES = {"torch": "torch", "onnxruntime": "ONNX Runtime", "llama.cpp": "llama.cpp"}
STILL_THERE = 0.5
"""Retention above which a skill to forget is not called forgotten."""
_DRAWING = threading.Lock()
NAME_CHARACTERS = 30
"""Of a skill's name, beside its bar: what a phone has room for. The table under it has all of it."""


def render_page(report: Report) -> str:
    """The page as HTML text."""
    row = report.skills[report.target]
    seconds = report.provenance.seconds
    return template("page.html").render(
        report=report,
        row=row,
        runs_in=runs_in,
        units=PLURAL,
        compared=[control for control in get_args(Control) if getattr(row, control)],
        verdict=verdict(report),
        summary=" ".join(summary(report)),
        share=report.after.parameters / report.before.parameters,
        sizes=_ratios(report),
        weights=_weights(report),
        rounded=[form for form in ROUNDED if any(form in skill.rounded for skill in report.skills.values())],
        # An interval from few documents may have no end worth drawing.
        scale=1.02 * max(1.0, *(min(s.retention.high, 1.5 * max(1.0, s.retention.value)) for s in report.skills.values())),
        first=next((point.validation for point in report.curve if point.phase == "recover"), None),
        curve_chart=svg(lambda axes: _curve(axes, report)) if len(report.curve) > 1 else "",
        cut_chart=svg(lambda axes: _cuts(axes, report)) if any(cut.unit != "token" for cut in report.cuts) else "",
        locality_charts={curve.unit: svg(partial(_losses, curve=curve, report=report)) for curve in _curves(report)},
        relearning_charts={name: svg(partial(_relearning, row=row)) for name, row in report.relearning.items()},
        learners=LEARNERS,
        asked={name: skill.answers for name, skill in report.skills.items() if skill.answers},
        seconds={name: seconds[name] for name in sorted(seconds, key=_order) if seconds[name] >= 0.05},
    )


def template(name: str) -> Template:
    """A template of this folder, with the filters that pages use."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    return environment.get_template(name)


def verdict(report: Report) -> str:
    """The result in half a sentence."""
    kept = report.skills[report.target].retention
    size = f"{report.after.parameters / report.before.parameters:.0%} of the size"
    if kept.low >= 1:
        return f"{size}, and nothing of {report.target} lost that could be measured."
    if kept.high >= 1:
        return f"{size}, and as good on {report.target} as the base within the error of the measurement."
    return f"{size}, {_percent(kept.value)} of {report.target} kept."


def summary(report: Report) -> list[str]:
    """What a person would say of it in a few sentences, the bad as well as the good."""
    row = report.skills[report.target]
    said = [
        f"On {row.documents:,} held-out documents of {report.target} ({row.tokens:,} tokens) its perplexity is "
        f"{row.recovered.perplexity:.4g}, the base’s {row.base.perplexity:.4g}."
    ]
    speeds = [f"{s.narrow.decode / s.base.decode:.2f} × the base’s in {runs_in(s)}" for s in report.speed[:2] if s.base]
    if speeds:
        said.append(f"Its decoding speed is {' and '.join(speeds)}.")
    others = {name: skill for name, skill in report.skills.items() if name != report.target}
    watched = {name: skill.retention.value for name, skill in others.items() if skill.role == "watch"}
    if len(watched) == 1:
        said += [f"Only watched: {name}, at {_percent(value)}." for name, value in watched.items()]
    elif watched:
        least, most = min(watched, key=watched.__getitem__), max(watched, key=watched.__getitem__)
        said.append(
            f"Of the {len(watched)} skills that were only watched, {least} kept least ({_percent(watched[least])}) "
            f"and {most} most ({_percent(watched[most])})."
        )
    said += [_sentence(name, skill, report.relearning.get(name)) for name, skill in others.items() if skill.role != "watch"]
    return said


def _sentence(name: str, skill: Skill, relearning: Relearning | None) -> str:
    value = _percent(skill.retention.value)
    if skill.role == "keep":
        return f"To be kept as well: {name}, at {value}."
    said = f"To be forgotten: {name}, {'still' if skill.retention.high > STILL_THERE else 'down to'} {value}"
    if not relearning or relearning.narrow.tokens == 0:
        return f"{said}."
    if relearning.narrow.tokens is None:
        return f"{said}, and not back after {relearning.narrow.curve[-1].tokens:,} tokens of training on it."
    return f"{said}, but back after {relearning.narrow.tokens:,} tokens of training on it."


def _ratios(report: Report) -> dict[str, float]:
    """What the result needs, ÷ what the base does."""
    found = {
        "parameters": report.after.parameters / report.before.parameters,
        "bytes of weights": report.after.bytes / report.before.bytes,
        "FLOPs a token": report.after.flops_per_token / report.before.flops_per_token,
    }
    for speed in report.speed:
        if speed.base:
            found[f"time to write a token, {runs_in(speed)}"] = speed.base.decode / speed.narrow.decode
    return found


def _weights(report: Report) -> dict[str, int]:
    """Bytes of each format's files."""
    found: dict[str, int] = {}
    for file in report.files:
        folder = file.path.partition("/")[0]
        form = "safetensors" if folder == "model" else folder
        found[form] = found.get(form, 0) + file.bytes
    return found


def runs_in(speed: Speed) -> str:
    """ONNX Runtime, int8"""
    precision = speed.format.partition("-")[2]
    return f"{RUNTIMES[speed.runtime]}, {precision}" if precision else RUNTIMES[speed.runtime]


def _order(stage: str) -> int:
    return STAGES.index(stage) if stage in STAGES else len(STAGES)


def _short(number: float) -> str:
    """1,234,567 → 1.23 M."""
    for size, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return f"{number:.3g}"


def _percent(share: float) -> str:
    return f"{share:.1%}" if share == 0 or share >= 0.001 else "under 0.1%"


def _duration(seconds: float) -> str:
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


FILTERS: dict[str, Callable[[Any], str]] = {
    "count": lambda number: f"{number:,}",
    "short": _short,
    "percent": _percent,
    "duration": _duration,
    "words": lambda name: name.replace("_", " "),
    "clip": lambda name: name if len(name) <= NAME_CHARACTERS else name[: NAME_CHARACTERS - 1] + "…",
}
"""What pages say for numbers and names."""


def svg(draw: Callable[[Any], None]) -> Markup:
    """A chart that `draw` draws on matplotlib's axes. The service draws in threads, and matplotlib's settings are global."""
    # Imported here: it takes half a second that a run without a report need not spend.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with _DRAWING, rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "svg.hashsalt": "narrow"}):
        figure = Figure(figsize=(5.2, 3.1), layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(LINE)
        axes.tick_params(labelcolor=SOFT, color=LINE, length=0, pad=5)
        axes.grid(axis="y", color=LINE, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.xaxis.label.set_color(SOFT)
        axes.yaxis.label.set_color(SOFT)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for placeholder, colour in COLOURS.items():
        text = text.replace(placeholder, colour)
    text = re.sub(r"font: (\d+)px 'sans-serif'", r"font: \1px system-ui, sans-serif", text)
    text = re.sub(
        r'<svg [^>]*viewBox="([^"]+)"[^>]*>',
        r'<svg viewBox="\1" aria-hidden="true" xmlns:xlink="http://www.w3.org/1999/xlink">',
        text,
        count=1,
    )
    # matplotlib escapes text; what it wrote is markup.
    return Markup(text)  # noqa: S704


def _curve(axes: Any, report: Report) -> None:
    """Held-out loss against tokens; the phases follow each other on one axis."""
    unit, name = (1e6, "million") if max(p.tokens for p in report.curve) > 2e6 else (1e3, "thousand")
    offset = 0
    for phase in dict.fromkeys(point.phase for point in report.curve):
        points = [p for p in report.curve if p.phase == phase]
        seen = [(offset + p.tokens, p.validation) for p in points if p.validation is not None]
        axes.plot(
            [tokens / unit for tokens, _ in seen],
            [loss for _, loss in seen],
            color=ACCENT if phase == "recover" else WARN,
            linewidth=1.8,
            marker="o",
            markersize=3.2,
            label={"recover": "recovery", "sparsify": "group lasso, before the cut"}.get(phase, phase),
        )
        offset += points[-1].tokens
    axes.axhline(
        report.skills[report.target].base.loss, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="base, all held-out text"
    )
    axes.margins(y=0.1)
    axes.set_xlabel(f"{name} tokens trained on")
    axes.set_ylabel("loss, nats per token")
    legend(axes, columns=1)


def _cuts(axes: Any, report: Report) -> None:
    """Share of units that each of the base's layers keeps; a layer that is gone keeps nothing."""
    dropped = next((cut for cut in report.cuts if cut.unit == "layer"), None)
    layers = dropped.per_layer if dropped else list(range(report.before.layers))
    inner = [cut for cut in report.cuts if cut.unit not in ("layer", "token")]
    if not inner and dropped:
        inner = [Cut(unit="layer", kept=1, of=1, per_layer=[1] * len(layers))]
    everywhere = range(report.before.layers)
    thick = 0.78 / len(inner)
    for number, cut in enumerate(inner):
        shift = (number - (len(inner) - 1) / 2) * thick
        axes.bar([layer + shift for layer in everywhere], [1.0] * len(everywhere), width=0.86 * thick, color=LINE)
        axes.bar(
            [layer + shift for layer in layers],
            [kept / cut.of for kept in cut.per_layer or [cut.kept] * len(layers)],
            width=0.86 * thick,
            color=(ACCENT, WARN, THIRD)[number % 3],
            label=PLURAL[cut.unit],
        )
    axes.grid(visible=False)
    axes.set_xlabel("layer of the base")
    axes.set_ylabel("share kept")
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.5, 1], ["0", "50%", "100%"])
    axes.xaxis.get_major_locator().set_params(integer=True)
    legend(axes, columns=3)


def _curves(report: Report) -> list[LocalityCurve]:
    return [curve for curve in report.locality.curves if curve.cut] if report.locality else []


def _losses(axes: Any, curve: LocalityCurve, report: Report) -> None:
    """What every skill loses as the target's least important units go; the target last, so that it lies on top."""
    names = sorted(curve.loss, key=lambda name: (name == report.target, -curve.loss[name][-1]))
    for number, name in enumerate(names):
        own = name == report.target
        style = (WARN, THIRD, SOFT, INK)[number % 4], ("-", (0, (5, 2)), (0, (1, 1.5)))[number // 4 % 3]
        axes.plot(
            [0.0, *(100 * share for share in curve.cut)],
            [0.0, *curve.loss[name]],
            color=ACCENT if own else style[0],
            linestyle="-" if own else style[1],
            linewidth=2.4 if own else 1.4,
            marker="o",
            markersize=3.2,
            label=name if len(name) <= NAME_CHARACTERS else name[: NAME_CHARACTERS - 1] + "…",
        )
    cut = next(cut for cut in report.cuts if cut.unit == curve.unit)
    axes.axvline(100 * (1 - cut.kept / cut.of), color=INK, linewidth=1, linestyle=(0, (4, 3)), label="cut in this model")
    axes.set_xlabel(f"% of {PLURAL[curve.unit]} cut")
    axes.set_ylabel("nats per token above the base")
    axes.set_xlim(left=0)
    axes.margins(y=0.06)
    legend(axes, columns=1)


def _relearning(axes: Any, row: Relearning) -> None:
    """Held-out loss of the skill against tokens of training on it."""
    for who, colour in (("fresh", SOFT), ("random", WARN), ("narrow", ACCENT)):
        learner = getattr(row, who)
        if learner is None:
            continue
        seen = [(point.tokens / 1e3, point.validation) for point in learner.curve if point.validation is not None]
        axes.plot(
            [tokens for tokens, _ in seen],
            [loss for _, loss in seen],
            color=colour,
            linewidth=2.4 if who == "narrow" else 1.6,
            marker="o",
            markersize=3.2,
            label=LEARNERS[who],
        )
    axes.axhline(row.base + row.within, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=f"base + {row.within:g} nats")
    axes.margins(y=0.08)
    axes.set_xlabel("thousand tokens of the skill trained on")
    axes.set_ylabel("loss, nats per token")
    legend(axes, columns=1)


def legend(axes: Any, columns: int) -> None:
    options = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.4} if columns > 1 else {}
    for text in axes.legend(frameon=False, ncols=columns, handlelength=1.4, columnspacing=1.4, **options).get_texts():
        text.set_color(INK)
