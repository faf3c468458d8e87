"""The commands of `narrow` that take the client alone. Their first lines are told in `cli` too, which does not load them."""

import json
import sys
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel
from rich.console import Console

from narrow_client import _doctor
from narrow_client._calls import BadRows, Status, hub_model, is_id
from narrow_client._completion import SHELLS, complete_ids, script
from narrow_client._compress import Wanted, upload_spec
from narrow_client._compress import compress as run_compress
from narrow_client._files import check_out, folder_of
from narrow_client._options import (
    BAD_ROWS,
    BASE,
    BUDGET,
    COLUMN,
    JOB,
    JSON,
    LIMIT,
    QUIET,
    TARGET,
    examples,
    out_option,
    parse_answer,
    parse_budget,
    parse_skill,
    words,
)
from narrow_client._render import (
    ProgressDisplay,
    TransferDisplay,
    datasets_table,
    frontier_view,
    job_view,
    jobs_table,
    models_table,
    plain,
    plan_view,
    report_view,
)
from narrow_client._sweep import create_sweep, follow, is_sweep, keep_frontier, read_sweep, shortfall, upload_sweep
from narrow_client._sync import Narrow
from narrow_client.models import Dataset, Event, Job, JobSpec, Method, SweepPoints


@click.command(
    epilog=examples(
        "narrow compress --base demo/base --target demo/data/python.jsonl.gz --budget 0.5 --dry-run",
        "narrow compress --base demo/base --target demo/data/python.jsonl.gz --budget 0.5 \\",
        "    --recover-tokens 160000 --skill german=demo/data/german.jsonl.gz:watch --out narrow-python",
        "narrow compress --base demo/base --target demo/data/python.jsonl.gz --detach",
        read="docs/how-to/your-own-model.md, your-own-data.md, choose-a-size.md and choose-a-method.md",
    )
)
@BASE
@TARGET
@BUDGET
@click.option(
    "--skill",
    "skills",
    multiple=True,
    callback=parse_skill,
    metavar="NAME=FILE:ROLE",
    help="Also measure this; role keep, forget or watch.",
)
@click.option(
    "--method",
    type=click.Choice(words(Method, "kind")),
    default="prune",
    show_default=True,
    help="Cut the base; teach a smaller one; train one from nothing; or only change the format.",
)
@click.option(
    "--unit",
    "units",
    multiple=True,
    type=click.Choice(words(Method, "units")),
    help="Kind of unit to cut. Repeat for several.",
)
@click.option("--importance", type=click.Choice(words(Method, "importance")), help="How units are scored.")
@click.option("--recover-tokens", type=click.IntRange(0), help="Tokens to train on after the cut; a million by default.")
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
@click.option("--seed", default=0, show_default=True, help="Of everything that is random.")
@out_option("narrow-out")
@click.option("--dry-run", is_flag=True, help="Only say what would come out. Uploads what is local, but queues no job.")
@click.option("--detach", is_flag=True, help="Queue the job, print its id and leave it; 'narrow download' fetches what came out.")
@QUIET
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
    detach: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Compress a model to one domain: upload, run, download.

    Results are in the folder of --out: model/ for transformers, a folder for each other format, report.html and report.json.

    Ctrl-C in a terminal asks whether to cancel the job as well, and a second one leaves it; without a terminal Ctrl-C cancels it.
    A job does not need this command: if the connection or this machine goes, 'narrow watch JOB' and 'narrow download JOB' take up
    where it was.
    """
    chosen: dict[str, Any] = {"kind": method}
    if units:
        chosen["units"] = list(units)
    if importance:
        chosen["importance"] = importance
    if recover_tokens is not None:
        chosen["recover"] = {"tokens": recover_tokens}
    if dry_run and detach:
        raise click.UsageError("--dry-run queues no job that --detach could leave: give one of them.")
    if unknown := answers.keys() - skills.keys() - {None}:
        raise click.BadParameter(f"there is no --skill {unknown.pop()!r} whose answers it could tell.", param_hint="--answer")
    wanted: dict[str, Any] = {
        "base": base,
        "target": target,
        "budget": budget,
        "skills": {name: (*skill, answers[name]) if name in answers else skill for name, skill in skills.items()},
        "method": chosen,
        "export": exports or ("safetensors", "onnx"),
        "column": column,
        "answer": answers.get(None),
        "seed": seed,
        "options": {"dtype": dtype} if dtype else {},
        "bad_rows": bad_rows,
    }
    with TransferDisplay(not quiet) as shown, Narrow(on_transfer=shown) as client:
        if dry_run:
            plan = client.plan(upload_spec(client, Wanted(**wanted)))
            _say(plan, as_json, plan_view)
            return
        if detach:
            job = client.jobs.create(upload_spec(client, Wanted(**wanted)))
            click.echo(f"'narrow watch {job.id}' follows it, 'narrow download {job.id}' fetches what came out.", err=True)
            _say(job, as_json, lambda job: job.id)
            return
        result = run_compress(out=out, client=client, progress=not quiet, cancel_on_interrupt=_ask("job"), **wanted)
    _say(result.report, as_json, lambda report: report_view(report, {**result.paths, "report": result.report_path}))


@click.command(
    epilog=examples(
        "narrow sweep sweep.json --out sweep",
        "narrow sweep swp_01h455vb4pex5vsknk084sn02q",
        "narrow jobs --sweep swp_01h455vb4pex5vsknk084sn02q",
        read="docs/how-to/choose-a-size.md",
    )
)
@click.argument("spec", metavar="SPEC_OR_SWEEP", shell_complete=complete_ids("sweep"))
@out_option("narrow-sweep")
@click.option("--detach", is_flag=True, help="Queue the sweep, print its id and leave it; 'narrow sweep ID' takes it up.")
@QUIET
@JSON
def sweep(spec: str, out: Path, detach: bool, quiet: bool, as_json: bool) -> None:
    """Compare methods × budgets × seeds: run them all, show the frontier.

    SPEC is a JSON file: base, target and skills as ids or as {"path": ...}, with methods, budgets and seeds. An id (swp_...)
    takes up a sweep that is there. Ctrl-C does with a sweep that this command has made as in 'narrow compress'; others it leaves.
    """
    path = Path(spec)
    wanted = {}
    if not is_sweep(spec):
        if not path.is_file():
            raise click.UsageError(f"There is no file at {spec!r}, and it is not the id of a sweep (swp_...) either.")
        wanted = read_sweep(path)
    check_out(out)
    with TransferDisplay(not quiet) as shown, Narrow(on_transfer=shown) as client:
        cancel = _ask("sweep") if wanted else False
        found = create_sweep(client, upload_sweep(client, wanted), cancel) if wanted else client.sweeps.get(spec)
        if detach:
            _say(found, as_json, lambda sweep: sweep.id)
            return
        found = follow(client, found, show=not quiet, cancel=cancel)
        frontier = keep_frontier(client, found, out)
    paths = {"page": out / "frontier.html", "data": out / "frontier.json"}
    _say(frontier, as_json, lambda frontier: frontier_view(frontier, paths))
    if missing := shortfall(found):
        _fail(missing)


@click.command(
    epilog=examples(
        "narrow upload demo/base",
        "narrow upload questions.jsonl --column question",
        "narrow compress --base $(narrow upload demo/base) --target $(narrow upload demo/data/python.jsonl.gz)",
        read="docs/how-to/your-own-data.md",
    )
)
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@COLUMN
@BAD_ROWS
@click.option("--name", help="What reports call it; by default the name of the file or folder.")
@QUIET
@JSON
def upload(path: Path, column: str, bad_rows: BadRows, name: str | None, quiet: bool, as_json: bool) -> None:
    """Upload a model folder or a file of text, for any number of jobs.

    Prints its id. A large file comes in pieces: after a break the same command goes on where it was.
    """
    with TransferDisplay(not quiet) as shown, Narrow(on_transfer=shown) as client:
        made = client.models.upload(path, name) if path.is_dir() else client.datasets.upload(path, name, column, bad_rows)
    if isinstance(made, Dataset) and made.skipped:
        click.echo(f"Bad rows that were left out: {made.skipped:,}. The first: {plain(made.skipped_reason or '')}", err=True)
    _say(made, as_json, lambda made: made.id)


@click.command(epilog=examples("narrow fetch HuggingFaceTB/SmolLM2-135M", read="docs/how-to/your-own-model.md"))
@click.argument("model", metavar="OWNER/NAME[@REVISION]")
@click.option("--name", help="What reports call it; by default as the hub does.")
@JSON
def fetch(model: str, name: str | None, as_json: bool) -> None:
    """Have the service fetch a model from its hub.

    Prints its id. NARROW_HUB_TOKEN is sent along, for a model that not everybody may read. A service has a hub if it was started
    with one (NARROW_HUB).
    """
    found = hub_model(f"hub:{model.removeprefix('hub:')}")
    if not found:
        raise click.BadParameter(f"{model!r} does not look like OWNER/NAME or OWNER/NAME@REVISION.")
    with Narrow() as client:
        _say(client.models.fetch(*found, name=name), as_json, lambda made: made.id)


@click.command(epilog=examples("narrow jobs --status running", "narrow jobs --json | jq -r '.[].id'"))
@click.option("--status", type=click.Choice(words(Job, "status")), help="Only jobs in this state.")
@click.option("--sweep", "of", metavar="SWEEP", shell_complete=complete_ids("sweep"), help="Only the points of this sweep.")
@LIMIT
@JSON
def jobs(status: Status | None, of: str | None, limit: int, as_json: bool) -> None:
    """List jobs, newest first."""
    with Narrow() as client:
        _say_all(client.jobs.list(status, of, limit=limit), limit, as_json, jobs_table)


@click.command(epilog=examples("narrow models", "narrow models --json | jq -r '.[0].id'"))
@LIMIT
@JSON
def models(limit: int, as_json: bool) -> None:
    """List models, newest first.

    Those that were uploaded or fetched, and those that came out of jobs: each can be the base of another job.
    """
    with Narrow() as client:
        _say_all(client.models.list(limit=limit), limit, as_json, models_table)


@click.command(epilog=examples("narrow datasets"))
@LIMIT
@JSON
def datasets(limit: int, as_json: bool) -> None:
    """List datasets, newest first."""
    with Narrow() as client:
        _say_all(client.datasets.list(limit=limit), limit, as_json, datasets_table)


@click.command(epilog=examples("narrow delete ds_01h455vb4pex5vsknk084sn02q", "narrow delete --yes JOB DATASET MODEL"))
@click.argument("ids", nargs=-1, required=True, shell_complete=complete_ids("job", "sweep", "model", "dataset"))
@click.option("--yes", is_flag=True, help="Do not ask.")
@JSON
def delete(ids: tuple[str, ...], yes: bool, as_json: bool) -> None:
    """Delete models, datasets, and jobs or sweeps that have ended.

    IDS say what: mdl_..., ds_..., job_..., swp_... With a job its report and files go; the model that came out of it stays.
    In a terminal it asks first.
    """
    kinds = [next((kind for kind in ("model", "dataset", "job", "sweep") if is_id(kind, name)), None) for name in ids]
    if None in kinds:
        raise click.BadParameter(f"{ids[kinds.index(None)]!r} is not an id: mdl_..., ds_..., job_... or swp_...")
    if not yes and _terminal():
        click.confirm(f"Delete {', '.join(ids)} for good?", abort=True, err=True)
    with Narrow() as client:
        removers: dict[str | None, Callable[[str], None]] = {
            "model": client.models.delete,
            "dataset": client.datasets.delete,
            "job": client.jobs.delete,
            "sweep": client.sweeps.delete,
        }
        for kind, name in zip(kinds, ids, strict=True):
            removers[kind](name)
            if not as_json:
                click.echo(name)
    if as_json:
        click.echo(json.dumps({"deleted": ids}))


@click.command(epilog=examples("narrow show job_01h455vb4pex5vsknk084sn02q", "narrow show JOB --json | jq .spec"))
@JOB
@JSON
def show(job: str, as_json: bool) -> None:
    """Show a job.

    With --json all of it, also its spec.
    """
    with Narrow() as client:
        _say(client.jobs.get(job), as_json, job_view)


@click.command(epilog=examples("narrow watch JOB", "narrow watch JOB --json | jq -c 'select(.kind == \"notice\")'"))
@click.argument("job", shell_complete=complete_ids("job", running=True))
@QUIET
@JSON
def watch(job: str, quiet: bool, as_json: bool) -> None:
    """Follow a job until it has ended.

    Exit status 1 unless it succeeds. With --json its events, one a line, from the first on. Ctrl-C leaves the job as it is.
    """
    with Narrow() as client:
        client.jobs.get(job)
        try:
            if as_json:
                _each(client, job, lambda event: click.echo(event.model_dump_json()))
            elif not quiet:
                with ProgressDisplay() as display:
                    _each(client, job, display)
            found = client.jobs.wait(job)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"the job {job} goes on; 'narrow cancel {job}' ends it") from None
    if found.status != "succeeded":
        _fail(found.error.message if found.error else f"the job is {found.status}")


@click.command(epilog=examples("narrow cancel JOB"))
@click.argument("job", shell_complete=complete_ids("job", "sweep", running=True))
@JSON
def cancel(job: str, as_json: bool) -> None:
    """Cancel a job, or a sweep.

    A sweep (swp_...) loses what has not ended; the frontier of what has stays. Prints the new state.
    """
    with Narrow() as client:
        if is_sweep(job):
            _say(client.sweeps.cancel(job), as_json, _counts)
        else:
            _say(client.jobs.cancel(job), as_json, _status)


@click.command(epilog=examples("narrow pause JOB", "narrow resume JOB"))
@click.argument("job", shell_complete=complete_ids("job", running=True))
@JSON
def pause(job: str, as_json: bool) -> None:
    """Stop a job where it is; 'narrow resume' lets it go on from there.

    It frees its machine and keeps what it has done. Prints the new state.
    """
    with Narrow() as client:
        _say(client.jobs.pause(job), as_json, _status)


@click.command(epilog=examples("narrow resume JOB"))
@click.argument("job", shell_complete=complete_ids("job", running=True))
@JSON
def resume(job: str, as_json: bool) -> None:
    """Let a paused job go on.

    It takes its old place in the queue. Prints the new state.
    """
    with Narrow() as client:
        _say(client.jobs.resume(job), as_json, _status)


@click.command(epilog=examples("narrow report JOB", "narrow report JOB --json | jq .skills"))
@JOB
@JSON
def report(job: str, as_json: bool) -> None:
    """Show the report of a job that has succeeded.

    'narrow download JOB --only report.html' fetches the page, with its plots.
    """
    with Narrow() as client:
        _say(client.jobs.report(job), as_json, report_view)


@click.command(
    epilog=examples(
        "narrow download JOB --out narrow-python",
        "narrow download JOB --format onnx",
        "narrow download JOB --only report.html",
        read="docs/how-to/run-the-result.md",
    )
)
@JOB
@out_option("narrow-out")
@click.option(
    "--format", "form", type=click.Choice(words(JobSpec, "export")), help="Only this format; by default all, and the report."
)
@click.option("--only", default="", metavar="PREFIX", help="Only files whose path begins so: report.html, onnx/model.onnx.")
@QUIET
@JSON
def download(job: str, out: Path, form: str | None, only: str, quiet: bool, as_json: bool) -> None:
    """Download what a job made.

    Prints where the files are. A broken download goes on where it broke, and what arrived is checked by its digest.
    """
    if form and only:
        raise click.UsageError("--format and --only both say which files: give one of them.")
    check_out(out)
    with TransferDisplay(not quiet) as shown, Narrow(on_transfer=shown) as client:
        paths = client.jobs.download(job, out, f"{folder_of(form)}/" if form else only)
    if as_json:
        click.echo(json.dumps({"files": list(map(str, paths))}, indent=2))
    else:
        click.echo("\n".join(plain(str(path)) for path in paths))


@click.command(
    epilog=examples(
        "narrow doctor",
        "narrow doctor --base demo/base --budget 0.5 --recover-tokens 160000",
        read="docs/how-to/deploy-on-one-machine.md",
    )
)
@click.option(
    "--base",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A model folder: say what a job on it would need here.",
)
@click.option("--budget", callback=parse_budget, help="As of 'narrow compress', with --base; by default 0.5.")
@click.option("--recover-tokens", type=click.IntRange(0), help="As of 'narrow compress', with --base.")
@JSON
def doctor(base: Path | None, budget: dict[str, float] | None, recover_tokens: int | None, as_json: bool) -> None:
    """Say what this machine and the service can do, and what a job would need.

    Of this machine: versions, processors, memory, disk, GPUs, how fast it multiplies matrices in each type of number, which
    runtimes are installed, and what jobs can be shut in with. That takes the full installation, and some seconds. Of the service
    at NARROW_URL: whether it is there and can take work, and for whom. Exit status 3 if it was not reached or cannot.

    With --base: sizes, memory and time of such a job on this machine, by the same estimates as the service's dry run; no service
    is asked. Exit status 1 if the job does not fit into memory.
    """
    if base is None and (budget or recover_tokens is not None):
        raise click.UsageError("--budget and --recover-tokens describe a job: give its --base too.")
    found: dict[str, Any] = {}
    for title, facts in _doctor.examine(base, budget, recover_tokens):
        found[title] = facts
        if not as_json:
            _print(_doctor.view(title, facts))
    if as_json:
        click.echo(json.dumps(found, indent=2))
    sys.exit(_doctor.exit_status(found))


@click.command(
    epilog=examples(
        "narrow completion bash > ~/.local/share/bash-completion/completions/narrow",
        'eval "$(narrow completion bash)"',
    )
)
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print a script that completes commands, options and ids in your shell.

    Its first line says how to install it. Ids of jobs, sweeps, models and datasets come from the service at NARROW_URL; where it
    does not answer within a second, none are offered.
    """
    click.echo(script(shell))


def _say(found: BaseModel, as_json: bool, view: Callable[[Any], Any]) -> None:
    """Prints an answer: as JSON, or as a text or a table."""
    _print(found.model_dump_json(indent=2) if as_json else view(found))


def _say_all(found: Iterable[BaseModel], limit: int, as_json: bool, view: Callable[[list[Any]], Any]) -> None:
    rows = list(islice(found, limit))
    if as_json:
        click.echo(json.dumps([row.model_dump(mode="json") for row in rows], indent=2))
    elif rows:
        _print(view(rows))
    else:
        click.echo("There are none.", err=True)


def _print(what: Any) -> None:
    if isinstance(what, str):
        click.echo(what)
    else:
        Console().print(what)


def _status(job: Job) -> str:
    return job.status


def _counts(sweep: SweepPoints) -> str:
    return ", ".join(f"{count} {status}" for status, count in sorted(sweep.counts.items()))


def _each(client: Narrow, job: str, show: Callable[[Event], None]) -> None:
    for event in client.jobs.events(job):
        show(event)


def _terminal() -> bool:
    """Whether somebody is there who can be asked."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def _ask(what: str) -> Callable[[object], bool]:
    """Asks after a Ctrl-C whether to cancel a job or sweep. Without a terminal it is cancelled; a second Ctrl-C leaves it."""

    def ask(_: object) -> bool:
        if not _terminal():
            return True
        try:
            return click.confirm(f"\nCancel the {what} as well?", default=False, err=True)
        except click.Abort:
            click.echo(err=True)
            return False

    return ask


def _fail(message: str) -> None:
    click.echo(f"narrow: {plain(message)}", err=True)
    sys.exit(1)
