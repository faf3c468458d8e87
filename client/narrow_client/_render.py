"""What a person sees in the terminal: a run live, and its report. Text from elsewhere never reaches the terminal raw."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import monotonic
from typing import Any, Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from narrow_client._calls import LARGE
from narrow_client._files import TERMINAL
from narrow_client.models import (
    Answers,
    Budget,
    Dataset,
    Event,
    Frontier,
    Job,
    JobSpec,
    Model,
    Plan,
    Point,
    Report,
    Size,
    Spread,
    SweepPoints,
)

WORDS = {
    "load": "read model and data",
    "measure_base": "measure the base",
    "score": "score units",
    "allocate": "choose the shape",
    "sparsify": "group lasso",
    "plan": "plan the cut",
    "slice": "slice",
    "reconstruct": "refit",
    "correct": "train the teacher",
    "teach": "hear the teacher",
    "recover": "recover",
    "controls": "make the controls",
    "measure": "measure skills",
    "answer": "ask for answers",
    "locality": "compare skills",
    "relearn": "learn again",
    "export_base": "export the base, to time it",
    "export": "export and check",
    "report": "report",
}
CONTROLS = {"random": "at random", "trained": "base trained"}
LINE_SECONDS = 30.0
"""Between two lines of a log about one phase."""


def plain(text: str, keep_lines: bool = False) -> str:
    """Text without control characters, which could move the cursor or recolour the screen."""
    return "".join(c if c.isprintable() or (keep_lines and c == "\n") else " " for c in text)


class Display(Protocol):
    """Shows a job's events. Use as a context manager and call it."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def __call__(self, event: Event) -> None: ...

    def say(self, text: str, time: datetime) -> None: ...


def is_live(console: Console) -> bool:
    """Whether what is shown can be moved and drawn over: in a log it cannot, nor in the dumbest of terminals."""
    return console.is_terminal and not console.is_dumb_terminal


class Elapsed(ProgressColumn):
    """A phase's time by its events, since whoever watches may have come late. The service's clock may be ahead of ours."""

    def render(self, task: Task) -> Text:
        seconds = task.fields["seconds"]
        if seconds is None:
            seconds = (datetime.now(UTC) - task.fields["started"]).total_seconds()
        return Text(str(timedelta(seconds=int(max(0.0, seconds)))), style="progress.elapsed")


class ProgressDisplay:
    """Shows a job's events: bars in a terminal, lines with their time in a log. Use as a context manager and call it."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.live = is_live(self.console)
        self.bars = Progress(
            TextColumn("{task.description}", justify="left", markup=False),
            BarColumn(bar_width=28, complete_style="blue", finished_style="green"),
            TaskProgressColumn(),
            TextColumn("{task.fields[figures]}", style="dim", markup=False),
            Elapsed(),
            console=self.console,
        )
        self.tasks: dict[str, TaskID] = {}
        self.told = monotonic()

    def __enter__(self) -> Self:
        if self.live:
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.bars.stop()

    def __call__(self, event: Event) -> None:
        data = event.data or {}
        if event.kind == "notice":
            self.say(f"note: {event.message}", event.time)
        elif event.kind == "state":
            status = data.get("status")
            if status not in ("cancelling", "pausing"):
                self._stop_bars(event.time)
            if not self.live or status in ("cancelling", "pausing", "paused", "queued"):
                # Why a job failed is told by whoever watches it, at the end.
                self.say("failed" if status == "failed" else event.message, event.time)
        elif event.kind in ("started", "progress", "finished"):
            if self.live:
                self._bar(event, data)
            else:
                self._line(event, data)

    def _bar(self, event: Event, data: dict[str, Any]) -> None:
        if event.kind == "started" and event.phase in self.tasks:
            # After a crash a phase begins anew.
            self.bars.remove_task(self.tasks.pop(event.phase))
        if event.phase not in self.tasks:
            word = WORDS.get(event.phase, plain(event.phase))
            self.tasks[event.phase] = self.bars.add_task(word, total=None, figures="", started=event.time, seconds=None)
        task = self.tasks[event.phase]
        if event.kind == "progress":
            self.bars.update(task, completed=data.get("done", 0), total=data.get("total") or None, figures=figures_of(event))
        elif event.kind == "finished":
            self.bars.update(task, total=1, completed=1, seconds=data.get("seconds", 0.0))

    def _stop_bars(self, time: datetime) -> None:
        for task in self.bars.tasks:
            if task.fields["seconds"] is None:
                self.bars.update(task.id, seconds=(time - task.fields["started"]).total_seconds())

    def _line(self, event: Event, data: dict[str, Any]) -> None:
        word = WORDS.get(event.phase, plain(event.phase))
        if event.kind == "finished":
            again = ", already done" if data.get("reused") else ""
            self.say(f"{word}: done in {data.get('seconds', 0):.1f} s{again}", event.time)
        elif event.kind == "progress" and monotonic() - self.told > LINE_SECONDS:
            self.say(f"{word}: {data.get('done', 0):,} of {data.get('total', 0):,} {figures_of(event)}".rstrip(), event.time)

    def say(self, text: str, time: datetime) -> None:
        """Prints a line, in a log with the time at which it came true."""
        self.told = monotonic()
        stamp = "" if self.live else time.astimezone().strftime("%H:%M:%S ")
        self.console.print(Text(stamp + plain(text)), soft_wrap=True)


def figures_of(event: Event) -> str:
    """What a progress event measures, or says."""
    data = event.data or {}
    parts = [f"loss {data['loss']:.3f}"] if "loss" in data else []
    if "sparsity" in data:
        parts.append(f"{data['sparsity']:.0%} zero")
    return "  ".join(parts) or plain(event.message)[:40]


class TransferDisplay:
    """Shows how far large files are that go up or come down: a bar in a terminal, a line for each in a log."""

    def __init__(self, show: bool, console: Console | None = None) -> None:
        self.console, self.show = console or Console(stderr=True), show
        self.live = is_live(self.console)
        self.bar: Progress | None = None
        self.name = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def __call__(self, name: str, done: int, total: int) -> None:
        if not self.show or total < LARGE:
            return
        if name != self.name:
            self._stop()
            self.name = name
            if self.live:
                columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=28, complete_style="blue"))
                self.bar = Progress(
                    *columns, DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(), console=self.console
                )
                self.bar.add_task(plain(name), total=total, completed=done)
                self.bar.start()
            else:
                self.console.print(Text(f"{plain(name)}: {total / 1e9:.2f} GB"), soft_wrap=True)
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=done)
        if done >= total:
            self._stop()

    def _stop(self) -> None:
        """Leaves what is shown, so that something else can be."""
        if self.bar:
            self.bar.stop()
        self.bar = None


class SweepDisplay:
    """Shows how far a sweep is: a bar in a terminal, and a line for each point that ends."""

    def __init__(self, sweep: SweepPoints, show: bool, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.show = show
        self.live = show and is_live(self.console)
        self.told: set[str] = set()
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28, complete_style="blue", finished_style="green"),
            TextColumn("{task.completed} of {task.total}"),
            TextColumn("{task.fields[doing]}", style="dim", markup=False),
            console=self.console,
        )
        self.task = self.bar.add_task("points", total=len(sweep.points), doing="")
        if show:
            line = f"sweep {sweep.id}, {len(sweep.points)} points: 'narrow sweep {sweep.id}' takes it up from anywhere"
            self.console.print(Text(line), soft_wrap=True)
        self(sweep, None)

    def __enter__(self) -> Self:
        if self.live:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.bar.stop()

    def __call__(self, sweep: SweepPoints, running: Job | None) -> None:
        ended = [(number, point) for number, point in enumerate(sweep.points, 1) if point.status in TERMINAL]
        for number, point in ended:
            if self.show and point.job not in self.told:
                self.told.add(point.job)
                self.console.print(Text(f"{number} of {len(sweep.points)}: {plain(_point(point))}"), soft_wrap=True)
        self.bar.update(self.task, completed=len(ended), doing=WORDS.get(running.phase, "") if running else "")


def _point(point: Point) -> str:
    name = f"{point.method}, {budget_text(point.budget)}, seed {point.seed}"
    if point.figures:
        return f"{name}: {point.figures.parameters:,} parameters, loss {point.figures.loss:.3f}"
    return f"{name}: {point.status}" + (f". {point.error.message}" if point.error else "")


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="dim", box=None, padding=(0, 2, 0, 0))


def frontier_view(frontier: Frontier, paths: dict[str, Path] | None = None) -> RenderableType:
    """The frontier as a table; `paths` are told at the end."""
    table = _table(f"{plain(frontier.target)}: {frontier.finished} of {frontier.of} points; ● is beaten by none in size and loss")
    table.add_column("")
    table.add_column("method", overflow="fold")
    table.add_column("budget", overflow="fold")
    for column in ("parameters", "before training", "loss", "retention", "tokens"):
        table.add_column(column, justify="right")
    for point in frontier.points:
        figures = (_spread(point.cut_loss), _spread(point.loss), _spread(point.retention), f"{point.tokens.mean:,.0f}")
        row = ("" if point.dominated else "●", point.method, budget_text(point.budget), f"{point.parameters.mean:,.0f}", *figures)
        table.add_row(*(Text(plain(cell)) for cell in row), style="dim" if point.dominated else "")
    if frontier.points:
        table.add_row("", "the base", "", f"{frontier.base_parameters:,}", "", f"{frontier.base_loss:.3f}", "1.000", "")
    parts: list[RenderableType] = [table if frontier.points else Text("no point has succeeded")]
    if paths:
        grid = Table.grid(padding=(0, 2))
        for name, path in paths.items():
            grid.add_row(Text(name, style="dim"), Text(str(path)))
        parts += [Text(), grid]
    return Group(*parts)


def _spread(figure: Spread) -> str:
    span = f" ({figure.low:.3f} – {figure.high:.3f})" if figure.low != figure.high else ""
    return f"{figure.mean:.3f}{span}"


def report_view(report: Report, paths: dict[str, Path] | None = None) -> RenderableType:
    """The report as tables; `paths` are told at the end."""
    target = report.skills[report.target]
    kept = target.retention
    head = Text.assemble(
        (f"{report.after.parameters / report.before.parameters:.0%}", "bold"),
        f" of the size ({report.before.parameters:,} → {report.after.parameters:,} parameters), ",
        (f"{kept.value:.1%}", "bold"),
        f" of {plain(report.target)} kept (95 % interval {kept.low:.1%} to {kept.high:.1%})",
    )
    answers = {name: skill.answers for name, skill in report.skills.items() if skill.answers}
    parts: list[RenderableType] = [head, Text(), _skills(report), Text()]
    if answers:
        parts += [_answers(answers), Text()]
    parts.append(_sizes(report))
    notes = [(name, skill.note) for name, skill in report.skills.items() if skill.note]
    notes += [(f"{name}, answers", found.note) for name, found in answers.items() if found.note]
    if notes:
        parts += [Text(), *(Text(plain(f"{name}: {note}"), style="yellow") for name, note in notes)]
    found = [("Gone or hidden?", row.note) for row in (report.relearning or {}).values()]
    if report.locality and report.locality.summary:
        found.append(("What the skills share.", report.locality.summary))
    if found:
        parts += [Text(), *(Text.assemble((title, "bold"), f" {plain(note)}") for title, note in found)]
    if report.samples:
        parts += [Text(), _sample(report)]
    if paths:
        table = Table.grid(padding=(0, 2))
        for name, path in paths.items():
            table.add_row(Text(name, style="dim"), Text(str(path)))
        parts += [Text(), table]
    return Group(*parts)


def _skills(report: Report) -> Table:
    table = _table("Skills: nats a token on held-out documents")
    table.add_column("skill")
    table.add_column("role")
    controls = [control for control in CONTROLS if any(getattr(skill, control) for skill in report.skills.values())]
    columns = ("base", "cut", "recovered", "retention", "95 % interval", *(CONTROLS[control] for control in controls))
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for name, skill in report.skills.items():
        kept = skill.retention
        colour = "green" if kept.low >= 0.95 else "yellow" if kept.value >= 0.75 else "red"
        table.add_row(
            Text(plain(name)),
            skill.role,
            f"{skill.base.loss:.3f}",
            f"{skill.cut.loss:.3f}",
            f"{skill.recovered.loss:.3f}",
            Text(f"{kept.value:.3f}", style=colour),
            f"{kept.low:.3f} – {kept.high:.3f}",
            *(f"{found.loss:.3f}" if (found := getattr(skill, control)) else "" for control in controls),
        )
    return table


def _answers(answers: dict[str, Answers]) -> Table:
    table = _table("Answers: held-out prompts that are answered, with the 95 % interval")
    table.add_column("skill")
    for column in ("prompts", "base", "cut", "recovered"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, found in answers.items():
        shares = (f"{share.value:.0%} ({share.low:.0%} – {share.high:.0%})" for share in (found.base, found.cut, found.recovered))
        table.add_row(Text(plain(name)), f"{found.prompts:,}", *shares)
    return table


def sizes_of(before: Size, after: Size) -> list[tuple[str, int, int]]:
    """What sizes are compared by."""
    return [
        ("parameters", before.parameters, after.parameters),
        ("bytes of weights", before.bytes, after.bytes),
        ("FLOPs a token", before.flops_per_token, after.flops_per_token),
    ]


def _size_table(title: str, before: Size, after: Size) -> Table:
    table = _table(title)
    table.add_column("")
    for column in ("base", "narrow", "ratio"):
        table.add_column(column, justify="right")
    for name, old, new in sizes_of(before, after):
        table.add_row(name, f"{old:,}", f"{new:,}", f"{new / old:.2f}")
    return table


def _sizes(report: Report) -> Table:
    table = _size_table("Size and speed", report.before, report.after)
    for speed in report.speed:
        for name in ("prefill", "decode"):
            fast, slow = getattr(speed.narrow, name), getattr(speed.base, name) if speed.base else None
            ratio = (f"{slow:,.0f}", f"{fast:,.0f}", f"{fast / slow:.2f}") if slow else ("–", f"{fast:,.0f}", "")
            table.add_row(f"{name}, tokens/s ({speed.format})", *ratio)
    return table


def _sample(report: Report) -> Panel:
    sample = report.samples[0]
    table = Table.grid(padding=(0, 3), expand=True)
    table.add_column(ratio=1)
    table.add_column(ratio=1)
    table.add_row(Text("base", style="dim"), Text("narrow", style="dim"))
    table.add_row(Text(plain(sample.base, keep_lines=True)), Text(plain(sample.narrow, keep_lines=True)))
    return Panel(
        Group(Text(plain(sample.prompt, keep_lines=True), style="bold"), Text(), table),
        title="a held-out beginning, continued by both",
        title_align="left",
        border_style="dim",
    )


def memory_text(plan: Plan) -> str:
    """The peak, the stage that it is in, and what would do as well."""
    stage = max(plan.memory, key=lambda name: plan.memory[name])
    said = f"{plan.memory_bytes / 1e9:.1f} GB, in {plain(stage)}"
    less = plan.least_memory_bytes < 0.95 * plan.memory_bytes
    return f"{said}; {plan.least_memory_bytes / 1e9:.1f} GB do, more slowly" if less else said


def plan_view(plan: Plan) -> RenderableType:
    """A dry run: what would come out and what the job would need."""
    whole = dict.fromkeys(("layer", "residual", "token"), "")
    inside = {**whole, "neuron": " an expert" if (plan.before.experts or 1) > 1 else " a layer"}
    kept = [f"{count:,} {unit}s{inside.get(unit, ' a layer')}" for unit, count in plan.keep.items()]
    table = Table.grid(padding=(0, 2))
    table.add_row(Text("kept", style="dim"), Text(plain(", ".join(kept))))
    table.add_row(Text("memory, estimated", style="dim"), Text(memory_text(plan)))
    table.add_row(Text("time, estimated", style="dim"), Text(f"{plan.seconds / 60:.1f} minutes"))
    notices = [Text(f"note: {plain(notice)}", style="yellow") for notice in plan.notices]
    return Group(_size_table("What would come out", plan.before, plan.after), Text(), table, *notices)


def job_view(job: Job) -> RenderableType:
    """A job, but for the options of its spec."""
    table = Table.grid(padding=(0, 2))

    def row(name: str, value: object) -> None:
        if value not in (None, ""):
            table.add_row(Text(name, style="dim"), Text(plain(str(value))))

    row("job", job.id)
    row("status", job.status)
    row("phase", WORDS.get(job.phase, job.phase))
    row("progress", f"{job.progress.done:,} of {job.progress.total:,} {job.progress.message}" if job.progress else None)
    row("error", f"{job.error.message} ({job.error.code})" if job.error else None)
    row("base", job.spec.base.model)
    row("target", job.spec.target.dataset)
    row("skills", ", ".join(f"{skill.name} ({skill.role})" for skill in job.spec.skills or []))
    row("budget", wanted_text(job.spec))
    row("method", job.spec.method.kind if job.spec.method else None)
    row("result", job.result_model)
    row("sweep", job.sweep)
    row("attempt", job.attempt if job.attempt > 1 else None)
    for name in ("created", "started", "finished"):
        at = getattr(job, f"{name}_at")
        row(name, _when(at) if at else None)
    return table


def models_table(models: list[Model]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("model", min_width=max(len(model.id) for model in models))
    for column in ("name", "family", "parameters", "from", "created"):
        table.add_column(column, overflow="fold", justify="right" if column == "parameters" else "left")
    for model in models:
        origin = model.job or (f"hub:{model.source.hub}" if model.source else "upload")
        row = (model.id, model.name, model.family, f"{model.parameters:,}", origin, _when(model.created_at))
        table.add_row(*(Text(plain(cell)) for cell in row))
    return table


def datasets_table(datasets: list[Dataset]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("dataset", min_width=max(len(data.id) for data in datasets))
    for column in ("name", "documents", "bytes", "created"):
        table.add_column(column, overflow="fold", justify="right" if column in ("documents", "bytes") else "left")
    for data in datasets:
        row = (data.id, data.name, f"{data.documents:,}", f"{data.bytes:,}", _when(data.created_at))
        table.add_row(*(Text(plain(cell)) for cell in row))
    return table


def _when(at: datetime) -> str:
    return at.astimezone().strftime("%d %b %H:%M")


def jobs_table(jobs: list[Job]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    # Ids are there to be copied: on a small screen the others are folded.
    table.add_column("job", min_width=max(len(job.id) for job in jobs))
    for column in ("status", "phase", "budget", "created"):
        table.add_column(column, overflow="fold")
    for job in jobs:
        status = f"{job.status}: {job.error.code}" if job.error else job.status
        row = (job.id, status, job.phase, wanted_text(job.spec), _when(job.created_at))
        table.add_row(*(Text(plain(cell)) for cell in row))
    return table


def wanted_text(spec: JobSpec) -> str:
    """What a job is to make: its budget, or what it only exports."""
    if spec.budget is None or (spec.method and spec.method.kind == "export"):
        return f"exported as {', '.join(spec.export or [])}"
    return budget_text(spec.budget)


def budget_text(budget: Budget) -> str:
    """As `--budget` takes it: 0.5, 4,000,000, bytes=8,000,000; and neuron=0.25 for a shape."""
    asked = budget.model_dump(exclude_none=True)
    sizes = {**asked.pop("keep", {}), **asked}.items()
    words = [f"{name}={value:,.15g}" for name, value in sizes]
    return ", ".join(words).removeprefix("parameters=")
