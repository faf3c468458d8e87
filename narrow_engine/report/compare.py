"""Two reports side by side: what differs in what was asked for, in what came out, and whether that can be told from noise."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from narrow_engine.errors import NarrowError
from narrow_engine.report.model import Interval, Learner, Report
from narrow_engine.report.page import template
from narrow_engine.spec import Role, clear, printable

LIMIT = 1e300
SIZES = ("parameters", "bytes", "flops_per_token", "layers", "hidden", "experts", "width", "heads", "kv_heads", "vocabulary")
Value = str | float | int | bool | None


class Option(BaseModel):
    """An option of the spec in which the two differ, by its path; None where a spec does not have it."""

    name: str
    a: Value
    b: Value


class SizeRow(BaseModel):
    name: str
    a: float
    b: float


class SkillRow(BaseModel):
    """A skill that either has. `apart`: the intervals of the loss do not overlap; None where one of them has no figure."""

    name: str
    roles: tuple[Role | None, Role | None]
    a: Interval | None = Field(description="Loss after recovery, nats per token of the base.")
    b: Interval | None
    retention_a: Interval | None
    retention_b: Interval | None
    apart: bool | None


class ProbeRow(BaseModel):
    """What a report says of a skill beside its loss, in words; None where it was not asked."""

    skill: str
    probe: Literal["prompts answered", "learned again"]
    a: str | None
    b: str | None


class Comparison(BaseModel):
    """Of reports A and B, named as the person who asked did."""

    a: str
    b: str
    warnings: list[str] = Field(description="Why figures may not compare.")
    options: list[Option]
    sizes: list[SizeRow]
    skills: list[SkillRow]
    probes: list[ProbeRow]


def read_report(path: Path) -> Report:
    """A report.json, or that of a folder that a run or a download has filled. Raises NarrowError (missing_file, bad_report)."""
    file = report_file(path)
    text = file.read_bytes()
    try:
        json.loads(text, parse_float=_finite, parse_int=_finite, parse_constant=_finite)
        return Report.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(clear, first["loc"])) or "its text"
        why = f"{where}: {first['msg'][:200]}"
    except (ValueError, RecursionError) as error:
        why = str(error)[:200]
    raise NarrowError("bad_report", f"{file} is not a report of this version of Narrow: {why}.")


def report_file(path: Path) -> Path:
    """Where a report is. Raises NarrowError (missing_file)."""
    places = [path] if path.is_file() else [path / "report.json", path / "result" / "report.json"]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise NarrowError("missing_file", f"There is no report.json at {path}.")
    return file


def _finite(text: str) -> float:
    """A number as it is read, which no figure of a run exceeds."""
    if not abs(float(text)) < LIMIT:
        raise ValueError(f"the number {text[:20]}")
    return float(text)


def compare(a: Report, b: Report, names: tuple[str, str]) -> Comparison:
    """What differs between two reports."""
    before, after = dict(_flat(a.spec)), dict(_flat(b.spec))
    keys = [key for key in dict.fromkeys([*before, *after]) if before.get(key) != after.get(key)]
    sizes = [SizeRow(name=name, a=getattr(a.after, name), b=getattr(b.after, name)) for name in SIZES]
    speeds = [{s.format: s.narrow.decode / s.base.decode for s in report.speed if s.base} for report in (a, b)]
    sizes += [
        SizeRow(name=f"decoding as {form}, ÷ the base's", a=speeds[0][form], b=speeds[1][form])
        for form in speeds[0]
        if form in speeds[1]
    ]
    return Comparison(
        a=names[0],
        b=names[1],
        warnings=_warnings(a, b),
        options=[Option(name=key, a=before.get(key), b=after.get(key)) for key in keys],
        sizes=[row for row in sizes if row.a != row.b],
        skills=[_skill(name, a, b) for name in dict.fromkeys([*a.skills, *b.skills])],
        probes=[row for name in dict.fromkeys([*a.skills, *b.skills]) for row in _probes(name, a, b)],
    )


def render_comparison(comparison: Comparison) -> str:
    """The page as HTML text."""
    return template("compare.html").render(comparison=comparison, verdict=verdict(comparison))


def verdict(comparison: Comparison) -> str:
    """The result in a sentence."""
    both = [row for row in comparison.skills if row.a and row.b]
    better = [row.name for row in both if row.apart and row.a.value < row.b.value]  # type: ignore[union-attr]
    worse = [row.name for row in both if row.apart and row.a.value > row.b.value]  # type: ignore[union-attr]
    if not both:
        return "They have no skill in common."
    if not (better or worse):
        return "On no skill that both have are they further apart than their intervals."
    said = [f"{comparison.a} is better on {_listed(better)}"] if better else []
    said += [f"{comparison.b} is better on {_listed(worse)}"] if worse else []
    return f"{', and '.join(said)}."


def lines(comparison: Comparison) -> list[str]:
    """The comparison for a terminal."""
    names = (comparison.a, comparison.b)
    said = [verdict(comparison), *comparison.warnings, "", _line("loss after recovery, nats a token", *names)]

    def figure(found: Interval | None) -> str:
        return f"{found.value:.3f} ({found.low:.3f} – {found.high:.3f})" if found else "–"

    said += [_line(row.name, figure(row.a), figure(row.b), " *" if row.apart else "") for row in comparison.skills]
    if any(row.apart for row in comparison.skills):
        said.append("* the intervals do not overlap")

    if comparison.probes:
        said += ["", _line("probes", *names)]
        said += [_line(f"{row.skill}: {row.probe}", row.a or "–", row.b or "–") for row in comparison.probes]

    def number(value: float) -> str:
        return f"{value:,.0f}" if value == int(value) else f"{value:.2f}"

    if comparison.sizes:
        rows = [_line(row.name.replace("_", " "), number(row.a), number(row.b)) for row in comparison.sizes]
        said += ["", _line("size", *names), *rows]
    if comparison.options:
        said += ["", _line("options", *names), *(_line(row.name, str(row.a), str(row.b)) for row in comparison.options)]
    return [printable(line) for line in said]


def _line(name: str, a: str, b: str, end: str = "") -> str:
    return f"{name[:40]:<40}  {a[:26]:>26}  {b[:26]:>26}{end}"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _warnings(a: Report, b: Report) -> list[str]:
    found = []
    if a.provenance.sha256("base") != b.provenance.sha256("base"):
        found.append("They come of different bases: losses are per token of each one's base and may not compare.")
    for name in a.skills.keys() & b.skills.keys():
        one, other = a.skills[name], b.skills[name]
        if (one.documents, one.tokens, one.base.loss) != (other.documents, other.tokens, other.base.loss):
            found.append(f"{name} was not measured on the same text.")
    return sorted(found)


def _skill(name: str, a: Report, b: Report) -> SkillRow:
    rows = [report.skills.get(name) for report in (a, b)]
    fits = [None if row is None else row.recovered for row in rows]
    one, other = (None if fit is None else Interval(value=fit.loss, low=fit.low, high=fit.high) for fit in fits)
    return SkillRow(
        name=name,
        roles=(rows[0] and rows[0].role, rows[1] and rows[1].role),
        a=one,
        b=other,
        retention_a=rows[0] and rows[0].retention,
        retention_b=rows[1] and rows[1].retention,
        apart=None if one is None or other is None else one.high < other.low or other.high < one.low,
    )


def _probes(name: str, a: Report, b: Report) -> Iterator[ProbeRow]:
    asked = [skill and skill.answers for skill in (a.skills.get(name), b.skills.get(name))]
    shares = [found and f"{found.recovered.value:.1%} of {found.prompts:,}" for found in asked]
    if any(shares):
        yield ProbeRow(skill=name, probe="prompts answered", a=shares[0], b=shares[1])
    learned = [report.relearning.get(name) for report in (a, b)]
    tokens = [found and _back(found.narrow, found.tokens) for found in learned]
    if any(tokens):
        yield ProbeRow(skill=name, probe="learned again", a=tokens[0], b=tokens[1])


def _back(learner: Learner, tokens: int) -> str:
    """When a model had learned a skill again."""
    return f"not in {tokens:,} tokens" if learner.tokens is None else f"after {learner.tokens:,} tokens"


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Value]]:
    """The leaves of an object by their path; a list counts as one."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}" if path else key)
    else:
        yield path, ", ".join(map(str, value)) if isinstance(value, list) else value
