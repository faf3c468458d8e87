"""`narrow`: the command line. On a machine with the engine or the service installed, their commands join this one.

Exit status: 0 done, 1 the job failed or the service said no, 2 wrong usage, 130 interrupted.
"""

import errno
import json
import math
import platform
import re
import sys
from collections.abc import Callable
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

import click
from pydantic import BaseModel
from rich.console import Console

from narrow_client._calls import BadRows, hub_model
from narrow_client._compress import check_data, check_model, upload_spec
from narrow_client._compress import compress as run_compress
from narrow_client._errors import InvalidRequest, NarrowClientError
from narrow_client._files import check_out, folder_of
from narrow_client._render import ProgressDisplay, frontier_view, jobs_table, plain, plan_view, report_view
from narrow_client._sweep import create_sweep, follow, is_sweep, keep_frontier, read_sweep, shortfall, upload_sweep
from narrow_client._sync import Narrow
from narrow_client.models import Budget, Dataset, Event, Job, JobSpec, Method, SkillId


def words(model: type[BaseModel], field: str) -> tuple[str, ...]:
    """The words that a field of the API takes: its Literal, wherever it sits inside of list and Optional."""
    kind: Any = model.model_fields[field].annotation
    while get_origin(kind) is not Literal:
        kind = get_args(kind)[0]
    return get_args(kind)


ROLES = words(SkillId, "role")
# Commands of the full installation. Their help is told here: loading them would cost a second.
FULL = {
    "serve": "Start the service: the API and its workers.",
    "keys": "Make, list and revoke API keys, on the service's machine.",
    "tenants": "Show and limit what tenants use, on the service's machine.",
    "run": "Run a compression from a spec file.",
    "reproduce": "Run again what a report tells of, and compare.",
    "compare": "Compare two reports.",
    "run-model": "Continue a prompt with a result, in any of its formats.",
    "evaluate": "Put tasks of lm-evaluation-harness to two model folders.",
}
COLUMN = click.option("--column", default="text", show_default=True, help="Field of the text in each row.")
BAD_ROWS = click.option(
    "--bad-rows",
    type=click.Choice(words(Dataset, "bad_rows")),
    default="stop",
    show_default=True,
    help="What a bad row of a file does: refuse the file, or be left out and counted.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")


class Group(click.Group):
    """Commands of this package, and those that other packages add; loaded only when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *(e.name for e in entry_points(group="narrow.commands"))})

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        own = super().get_command(ctx, name)
        if own is not None:
            return own
        for entry in entry_points(group="narrow.commands"):
            if entry.name == name:
                command: click.Command = entry.load()
                return command
        if name in FULL and not ctx.resilient_parsing:
            ctx.fail(f"'narrow {name}' comes with the full installation, and only the client is here: pip install narrow.")
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = []
        for name in self.list_commands(ctx):
            own = super().get_command(ctx, name)
            rows.append((name, own.get_short_help_str() if own else FULL.get(name, "")))
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            # What it says is what became of the job.
            click.echo(": ".join(["interrupted", *(plain(str(said)) for said in interrupt.args)]), err=True)
            sys.exit(130)
        except OSError as error:
            if error.errno == errno.EPIPE:  # `narrow jobs | head`: click ends quietly
                raise
            click.echo(f"narrow: {plain(str(error))}", err=True)
            sys.exit(1)
        except NarrowClientError as error:
            click.echo(f"narrow: {plain(str(error))}", err=True)
            if isinstance(error, InvalidRequest):
                for item in error.errors[1:6]:
                    click.echo(f"  {plain(item.pointer)}: {plain(item.detail)}", err=True)
            sys.exit(1)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("narrow-client"), prog_name="narrow")
def main() -> None:
    """Turn a general language model into a small one for one domain, and see which skills it kept.

    Start a service with `narrow serve`, or point NARROW_URL at one; then `narrow compress`.
    """


def checked(check: Callable[[str], None]) -> Callable[[click.Context, click.Parameter, str], str]:
    """An option that names something local or an id, checked before anything is uploaded."""

    def callback(_: click.Context, __: click.Parameter, value: str) -> str:
        try:
            check(value)
        except NarrowClientError as error:
            raise click.BadParameter(str(error)) from error
        return value

    return callback


def parse_skill(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    for value in values:
        name, equals, rest = value.partition("=")
        path, colon, role = rest.rpartition(":")
        if not colon or role not in ROLES:
            path, role = rest, "watch"
        if not equals or not name or not path:
            raise click.BadParameter(f"{value!r} does not look like NAME=FILE:ROLE with a role of {', '.join(ROLES)}.")
        if name in found:
            raise click.BadParameter(f"{name!r} is named twice: give each skill a name of its own.")
        found[name] = (checked(check_data)(ctx, parameter, path), role)
    return found


def parse_answer(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str | None, dict[str, str]]:
    """By skill, whose name was checked to be one when this is used; None is the target."""
    found: dict[str | None, dict[str, str]] = {}
    for value in values:
        # A skill's name has neither a colon nor an equals sign; an expression may have both.
        parts = re.fullmatch(r"(?:([^:=]+)=)?([^:=]+)(?::(.+))?", value, re.DOTALL)
        if not parts:
            raise click.BadParameter(f"{value!r} does not look like COLUMN, SKILL=COLUMN or SKILL=COLUMN:REGEX.")
        name, column, extract = parts.groups()
        if name in found:
            raise click.BadParameter(f"the answers of {name or 'the target'} are told twice.")
        found[name] = {"column": column, **({"extract": extract} if extract else {})}
    return found


QUANTITIES = tuple(name for name in Budget.model_fields if name != "keep")


def parse_budget(_: click.Context, __: click.Parameter, value: str | None) -> dict[str, float] | None:
    if value is None:
        return None
    quantity, equals, amount = value.rpartition("=")
    try:
        # A comma counts between groups of three only: 0,5 is not 5.
        grouped = re.fullmatch(r"[1-9]\d{0,2}(,\d{3})+", amount)
        number = float(amount.replace(",", "") if grouped else amount)
    except ValueError:
        number = -1.0
    if not (number > 0 and math.isfinite(number)) or (equals and quantity not in QUANTITIES):
        raise click.BadParameter(
            f"{value!r} is neither a share like 0.5 nor a number of parameters like 4000000, nor another quantity like "
            f"bytes=8000000 or flops=0.5 (there are {', '.join(QUANTITIES)})."
        )
    if quantity == "retention" and number > 1:
        raise click.BadParameter(f"{value!r} is above 1: retention is a share of the target skill, such as 0.95.")
    if number > 1 and quantity != "latency" and not number.is_integer():
        raise click.BadParameter(
            f"{value!r} is above 1, which makes it a count, and a count must be whole; a share is at most 1."
        )
    return {quantity or "parameters": number}


@main.command()
@click.option(
    "--base", required=True, callback=checked(check_model), help="A model folder, an id (mdl_...) or hub:OWNER/NAME[@REVISION]."
)
@click.option(
    "--target",
    required=True,
    callback=checked(check_data),
    help="A file of the domain's text (.jsonl, .csv, .tsv, .txt, also .gz or .zst; .parquet), or an id (ds_...).",
)
@click.option(
    "--budget",
    callback=parse_budget,
    help="Share of parameters to keep, or their number; or bytes=..., flops=... By default 0.5; of what is only exported, all.",
)
@click.option(
    "--skill",
    "skills",
    multiple=True,
    callback=parse_skill,
    metavar="NAME=FILE:ROLE",
    help="Also measure this; role keep, forget or watch.",
)
@click.option("--method", type=click.Choice(words(Method, "kind")), default="prune", show_default=True)
@click.option(
    "--unit",
    "units",
    multiple=True,
    type=click.Choice(words(Method, "units")),
    help="Kind of unit to cut. Repeat for several.",
)
@click.option("--importance", type=click.Choice(words(Method, "importance")), help="How units are scored.")
@click.option("--recover-tokens", type=click.IntRange(0), help="Tokens to train on after the cut.")
@COLUMN
@BAD_ROWS
@click.option(
    "--answer",
    "answers",
    multiple=True,
    callback=parse_answer,
    metavar="[SKILL=]COLUMN[:REGEX]",
    help="The text of this skill, or else of the target, is prompts, and this field their answer: count how many are answered. "
    "Of answers and of what models write, the last match of REGEX is compared.",
)
@click.option(
    "--export",
    "exports",
    multiple=True,
    type=click.Choice(words(JobSpec, "export")),
    help="Format. Repeat for several; by default safetensors and onnx.",
)
@click.option(
    "--dtype", type=click.Choice(words(JobSpec, "dtype")), help="Type of the weights in safetensors; by default the base's."
)
@click.option("--seed", default=0, show_default=True)
@click.option("--out", default="narrow-out", show_default=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--dry-run", is_flag=True, help="Only say what would come out. Uploads what is local, but queues no job.")
@JSON
def compress(
    base: str,
    target: str,
    budget: dict[str, float] | None,
    skills: dict[str, tuple[str, str]],
    method: str,
    units: tuple[str, ...],
    importance: str | None,
    recover_tokens: int | None,
    column: str,
    bad_rows: BadRows,
    answers: dict[str | None, dict[str, str]],
    exports: tuple[str, ...],
    dtype: str | None,
    seed: int,
    out: Path,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Compress a model to one domain: upload, run, download."""
    chosen: dict[str, Any] = {"kind": method}
    if units:
        chosen["units"] = list(units)
    if importance:
        chosen["importance"] = importance
    if recover_tokens is not None:
        chosen["recover"] = {"tokens": recover_tokens}
    export = exports or ("safetensors", "onnx")
    options = {"dtype": dtype} if dtype else {}
    if unknown := answers.keys() - skills.keys() - {None}:
        raise click.BadParameter(f"there is no --skill {unknown.pop()!r} whose answers it could tell.", param_hint="--answer")
    asked = {name: (*skill, answers[name]) if name in answers else skill for name, skill in skills.items()}
    with Narrow() as client:
        if dry_run:
            spec = upload_spec(
                client, base, target, budget, asked, chosen, export, column, answers.get(None), seed, options, bad_rows=bad_rows
            )
            plan = client.plan(spec)
            if as_json:
                click.echo(plan.model_dump_json(indent=2))
            else:
                Console().print(plan_view(plan))
            return
        result = run_compress(
            base,
            target,
            budget,
            out,
            skills=asked,
            method=chosen,
            export=export,
            column=column,
            answer=answers.get(None),
            seed=seed,
            options=options,
            bad_rows=bad_rows,
            client=client,
            progress=not as_json,
        )
    if as_json:
        click.echo(result.report.model_dump_json(indent=2))
        return
    Console().print(report_view(result.report, {**result.paths, "report": result.report_path}))


@main.command()
@click.argument("spec", metavar="SPEC_OR_SWEEP")
@click.option("--out", default="narrow-sweep", show_default=True, type=click.Path(file_okay=False, path_type=Path))
@JSON
def sweep(spec: str, out: Path, as_json: bool) -> None:
    """Compare methods × budgets × seeds: run them all, show the frontier.

    SPEC is a JSON file: base, target and skills as ids or as {"path": ...}, with methods, budgets and seeds. An id (swp_...)
    takes up a sweep that is there. Ctrl-C cancels a sweep that this command has made.
    """
    path = Path(spec)
    wanted = {}
    if not is_sweep(spec):
        if not path.is_file():
            raise click.UsageError(f"There is no file at {spec!r}, and it is not the id of a sweep (swp_...) either.")
        try:
            wanted = read_sweep(path)
        except NarrowClientError as error:
            raise click.UsageError(str(error)) from error
    check_out(out)
    with Narrow() as client:
        found = create_sweep(client, upload_sweep(client, wanted)) if wanted else client.sweeps.get(spec)
        found = follow(client, found, show=not as_json, cancel=bool(wanted))
        frontier = keep_frontier(client, found, out)
    if as_json:
        click.echo(frontier.model_dump_json(indent=2))
    else:
        paths = {"page": out / "frontier.html", "data": out / "frontier.json"}
        Console().print(frontier_view(frontier, paths))
    if missing := shortfall(found):
        _fail(missing)


@main.command()
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@COLUMN
@BAD_ROWS
@click.option("--name", help="What reports call it; by default the name of the file or folder.")
def upload(path: Path, column: str, bad_rows: BadRows, name: str | None) -> None:
    """Upload a model folder or a file of text and print its id, which is good for any number of jobs."""
    with Narrow() as client:
        made = client.models.upload(path, name) if path.is_dir() else client.datasets.upload(path, name, column, bad_rows)
    if isinstance(made, Dataset) and made.skipped:
        click.echo(f"{made.skipped:,} bad rows were left out. The first: {plain(made.skipped_reason or '')}", err=True)
    click.echo(made.id)


@main.command()
@click.argument("model", metavar="OWNER/NAME[@REVISION]")
@click.option("--name", help="What reports call it; by default as the hub does.")
def fetch(model: str, name: str | None) -> None:
    """Have the service fetch a model from its hub and print its id. NARROW_HUB_TOKEN: for one that not everybody may read."""
    found = hub_model(f"hub:{model.removeprefix('hub:')}")
    if not found:
        raise click.BadParameter(f"{model!r} does not look like OWNER/NAME or OWNER/NAME@REVISION.")
    with Narrow() as client:
        click.echo(client.models.fetch(*found, name=name).id)


@main.command()
@click.option("--status", type=click.Choice(words(Job, "status")), help="Only jobs in this state.")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True)
@JSON
def jobs(status: str | None, limit: int, as_json: bool) -> None:
    """List jobs, newest first."""
    with Narrow() as client:
        found = [job for job, _ in zip(client.jobs.list(status), range(limit), strict=False)]
    if as_json:
        click.echo(json.dumps([job.model_dump(mode="json") for job in found], indent=2))
    else:
        Console().print(jobs_table(found) if found else "no jobs")


@main.command()
@click.argument("job")
def show(job: str) -> None:
    """Print a job, as JSON."""
    with Narrow() as client:
        click.echo(client.jobs.get(job).model_dump_json(indent=2))


@main.command()
@click.argument("job")
@JSON
def watch(job: str, as_json: bool) -> None:
    """Follow a job until it is finished; exit status 1 unless it succeeds."""
    with Narrow() as client:
        client.jobs.get(job)
        try:
            if as_json:
                _each(client, job, lambda event: click.echo(event.model_dump_json()))
            else:
                with ProgressDisplay() as display:
                    _each(client, job, display)
            found = client.jobs.wait(job)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"the job {job} goes on; 'narrow cancel {job}' ends it") from None
    if found.status != "succeeded":
        _fail(found.error.message if found.error else f"the job is {found.status}")


@main.command()
@click.argument("job")
def cancel(job: str) -> None:
    """Cancel a job, or a sweep (swp_...)."""
    with Narrow() as client:
        if is_sweep(job):
            counts = client.sweeps.cancel(job).counts
            click.echo(", ".join(f"{count} {status}" for status, count in sorted(counts.items())))
        else:
            click.echo(client.jobs.cancel(job).status)


@main.command()
@click.argument("job")
def pause(job: str) -> None:
    """Stop a job where it is; 'narrow resume' lets it go on from there."""
    with Narrow() as client:
        click.echo(client.jobs.pause(job).status)


@main.command()
@click.argument("job")
def resume(job: str) -> None:
    """Let a paused job go on."""
    with Narrow() as client:
        click.echo(client.jobs.resume(job).status)


@main.command()
@click.argument("job")
@JSON
def report(job: str, as_json: bool) -> None:
    """Show the report of a finished job."""
    with Narrow() as client:
        found = client.jobs.report(job)
    if as_json:
        click.echo(found.model_dump_json(indent=2))
    else:
        Console().print(report_view(found))


@main.command()
@click.argument("job")
@click.option("--out", default="narrow-out", show_default=True, type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--format", "form", type=click.Choice(words(JobSpec, "export")), help="Only this format; by default all, and the report."
)
@click.option("--only", default="", metavar="PREFIX", help="Only files whose path begins so: report.html, onnx/model.onnx.")
def download(job: str, out: Path, form: str | None, only: str) -> None:
    """Download what a job made; a broken download goes on where it broke, and what arrived is checked by its digest."""
    if form and only:
        raise click.UsageError("--format and --only both say which files: give one of them.")
    with Narrow() as client:
        for path in client.jobs.download(job, out, f"{folder_of(form)}/" if form else only):
            click.echo(plain(str(path)))


@main.command()
@JSON
def doctor(as_json: bool) -> None:
    """Say whether the service can be reached and take work."""
    with Narrow() as client:
        facts = {"client": version("narrow-client"), "python": platform.python_version(), "service": client.url}
        try:
            health = client.ready()
            facts |= {"status": health.status, **{f"check {name}": value for name, value in (health.checks or {}).items()}}
        except NarrowClientError as error:
            facts |= {"status": "unavailable", "why": str(error)}
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        for name, value in facts.items():
            click.echo(f"{name:16s} {plain(value)}")
    if facts["status"] != "ok":
        sys.exit(1)


def _each(client: Narrow, job: str, show: Callable[[Event], None]) -> None:
    for event in client.jobs.events(job):
        show(event)


def _fail(message: str) -> NoReturn:
    click.echo(f"narrow: {plain(message)}", err=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
