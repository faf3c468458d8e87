"""What a notebook shows: progress as one display that is updated, and jobs, plans and reports in short. All text is escaped."""

import html
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib import import_module
from typing import Any, Self

from narrow_client._render import WORDS, Display, ProgressDisplay, figures_of, memory_text, plain, sizes_of, wanted_text
from narrow_client.models import Event, Job, Plan, Report

SECONDS = 0.2
"""Between two updates: a training step tells its progress more often than a browser should be told."""


def display_here(progress: bool | Callable[[Event], None]) -> Display:
    """What shows a job's progress: a function of the caller's, nothing, a notebook's display, or the terminal's."""
    if callable(progress):
        return _Told(progress)
    if not progress:
        return _Told(lambda event: None)
    return NotebookDisplay() if in_notebook() else ProgressDisplay()


def in_notebook() -> bool:
    """Whether this runs in a kernel: of Jupyter, JupyterLab, VS Code, Colab. IPython in a terminal has none."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return any(kind.__name__ == "ZMQInteractiveShell" for kind in type(shell).__mro__)


class _Told:
    """Tells events to a function, and nothing else to anybody."""

    def __init__(self, tell: Callable[[Event], None]) -> None:
        self.tell = tell

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, event: Event) -> None:
        self.tell(event)

    def say(self, text: str, time: datetime) -> None:
        pass


@dataclass
class _Phase:
    started: datetime
    done: int = 0
    total: int = 0
    figures: str = ""
    seconds: float | None = None


class NotebookDisplay:
    """Shows a job's events as one table that is updated. Use as a context manager and call it."""

    def __init__(self) -> None:
        self.phases: dict[str, _Phase] = {}
        self.lines: list[str] = []
        self.handle: Any = None
        self.shown = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._show()

    def __call__(self, event: Event) -> None:
        data = event.data or {}
        status = data.get("status")
        if event.kind == "notice":
            self.lines.append(f"note: {event.message}")
        elif event.kind == "state":
            self.lines.append(event.message)
            if status not in ("cancelling", "pausing"):
                for phase in self.phases.values():
                    phase.seconds = phase.seconds if phase.seconds is not None else _between(phase.started, event.time)
        elif event.kind == "started" or (event.kind in ("progress", "finished") and event.phase not in self.phases):
            self.phases[event.phase] = _Phase(event.time)
        if event.kind == "progress":
            phase = self.phases[event.phase]
            phase.done, phase.total, phase.figures = data.get("done", 0), data.get("total", 0), figures_of(event)
        elif event.kind == "finished":
            self.phases[event.phase].seconds = data.get("seconds", 0.0)
        if event.kind != "progress" or time.monotonic() - self.shown > SECONDS:
            self._show()

    def say(self, text: str, time: datetime) -> None:
        self.lines.append(text)
        self._show()

    def _show(self) -> None:
        display: Any = import_module("IPython.display").display

        self.shown = time.monotonic()
        content = {"text/html": self._html(), "text/plain": "\n".join(map(plain, self.lines))}
        if self.handle is None:
            self.handle = display(content, raw=True, display_id=True)
        else:
            self.handle.update(content, raw=True)

    def _html(self) -> str:
        rows: list[tuple[str, ...]] = []
        for name, phase in self.phases.items():
            ended = phase.seconds is not None
            share = (1, 1) if ended else (phase.done, phase.total)
            bar = f'<progress value="{share[0]:d}" max="{share[1]:d}"></progress>' if share[1] else ""
            seconds = phase.seconds if phase.seconds is not None else _between(phase.started, datetime.now(UTC))
            rows.append((_Raw(_text(WORDS.get(name, name))), _Raw(bar), phase.figures, str(timedelta(seconds=int(seconds)))))
        return _table(rows) + "".join(f"<div>{_text(line)}</div>" for line in self.lines)


class _Raw(str):
    """HTML already."""


def _between(start: datetime, end: datetime) -> float:
    return max(0.0, (end - start).total_seconds())


def html_of(thing: object) -> str | None:
    """A short form of what has one, as HTML."""
    if isinstance(thing, Job):
        return _job(thing)
    if isinstance(thing, Plan):
        return _plan(thing)
    return _report(thing) if isinstance(thing, Report) else None


def _job(job: Job) -> str:
    doing = job.phase if not job.progress else f"{job.phase}, {job.progress.done:,} of {job.progress.total:,}"
    rows = [
        ("status", job.status),
        ("phase", doing),
        ("budget", wanted_text(job.spec)),
        ("created", f"{job.created_at:%Y-%m-%d %H:%M}"),
    ]
    rows += [("error", f"{job.error.code}: {job.error.message}")] if job.error else []
    return _table(rows, f"Job {job.id}")


def _plan(plan: Plan) -> str:
    rows = [(name, f"{old:,}", f"{new:,}", f"{new / old:.2f}") for name, old, new in sizes_of(plan.before, plan.after)]
    rows.append(("memory, estimated", "", memory_text(plan), ""))
    rows.append(("time, estimated", "", f"{plan.seconds / 60:.1f} minutes", ""))
    notes = "".join(f"<div>note: {_text(notice)}</div>" for notice in plan.notices)
    return _table(rows, "What would come out", ("", "base", "narrow", "ratio")) + notes


def _report(report: Report) -> str:
    kept = report.skills[report.target].retention
    size = report.after.parameters / report.before.parameters
    head = f"{size:.0%} of the size, {kept.value:.1%} of {report.target} kept ({kept.low:.1%} to {kept.high:.1%})"
    rows: list[tuple[str, ...]] = []
    for name, skill in report.skills.items():
        losses = (f"{figures.loss:.3f}" for figures in (skill.base, skill.cut, skill.recovered))
        found = skill.retention
        rows.append((name, skill.role, *losses, f"{found.value:.3f} ({found.low:.3f} – {found.high:.3f})"))
    return _table(rows, head, ("skill", "role", "base", "cut", "recovered", "retention (95 %)"))


def _table(rows: Iterable[Sequence[str]], title: str = "", header: Sequence[str] = ()) -> str:
    def row(cells: Sequence[str], tag: str = "td") -> str:
        inside = (cell if isinstance(cell, _Raw) else _text(cell) for cell in cells)
        return "<tr>" + "".join(f'<{tag} style="text-align:left">{cell}</{tag}>' for cell in inside) + "</tr>"

    top = f'<caption style="text-align:left"><b>{_text(title)}</b></caption>' if title else ""
    return f"<table>{top}{row(header, 'th') if header else ''}{''.join(map(row, rows))}</table>"


def _text(text: str) -> str:
    return html.escape(plain(text))
