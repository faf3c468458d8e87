"""`narrow run SPEC.json --out DIR`: the engine without a server.

The folder is the run: events.jsonl tells what happens, result/ holds what came out, and running the same command again
goes on where it stopped. Exit status: 0 done, 1 failed with a sentence (also in failure.json), 2 for a spec that cannot be
read, 130 stopped on request.

`torchrun --nproc-per-node N -m narrow_engine SPEC.json --out DIR` is the same on several processes, of which the first is the
run and has its exit status. That of torchrun itself is 0 or 1.
"""

import ctypes
import errno
import fcntl
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import ValidationError

from narrow_engine import processors
from narrow_engine.errors import Cancelled, NarrowError, out_of_memory
from narrow_engine.events import EventLog
from narrow_engine.spec import CompressionSpec, clear, first_fault, printable

if TYPE_CHECKING:
    from narrow_engine.events import Kind

LOCK_SECONDS = 30
LINE_SECONDS, LOG_SECONDS = 5.0, 30.0
"""Between two lines about progress, in a terminal and in a log."""
SHORT_SECONDS = 0.1
"""Stages that took less are not told."""
LOST = "gloo/transport"
"""In what torch raises where another process has ended."""
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# Threads that wait for each other by spinning keep the ones they wait for off a core that is also wanted elsewhere: beside
# one other busy process on two cores, a training step took more than four times as long. Sleeping costs a tenth when idle.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# NVIDIA's containers set it, and what reports state in float32 would have products of 10 bits (TF32).
os.environ["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"] = "0"
if (_threads := processors.threads()) is not None:
    os.environ.setdefault("OMP_NUM_THREADS", str(_threads))


JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else on stdout.")
OUT = click.option(
    "--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="The run's folder; made if missing."
)


@click.command(
    epilog="\b\nExamples:\n"
    """  echo '{"base": {"path": "demo/base"}, "target": {"path": "demo/data/python.jsonl.gz"},\n"""
    """         "budget": {"parameters": 0.5}, "method": {"recover": {"tokens": 160000}}}' > spec.json\n"""
    "  narrow run spec.json --out run\n\n"
    "Read on: docs/reference/spec.md has every option of a spec."
)
@click.argument("spec", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@OUT
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
@JSON
@click.option("--shared", type=click.Path(file_okay=False, path_type=Path), hidden=True)  # where the service's jobs share stages
@click.option("--events-after", default=0, hidden=True)  # what the service knows of a run that went on elsewhere
def run(spec: Path, out: Path, quiet: bool, as_json: bool, shared: Path | None, events_after: int) -> None:
    """Run a compression from a spec file.

    Without a service. Paths in the spec count from its own folder. The same command again goes on where it stopped. Ctrl-C stops
    it at the next step, with exit status 130. Progress goes to stderr; with --json the report goes to stdout.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.UsageError(f"{out} cannot be made: {error.strerror}.") from error
    failure = out / "failure.json"
    try:
        wanted = read_spec(spec)
    except NarrowError as error:
        click.echo(f"narrow run: {error}", err=True)
        sys.exit(2)
    if "RANK" in os.environ:
        _end_with_parent()
    if int(os.environ.get("RANK", "0")) > 0:
        _follow(wanted, out)
        return
    try:
        with _lock(out / "lock"):
            failure.unlink(missing_ok=True)
            result = _run(wanted, out, quiet, shared, events_after)
    except Cancelled as error:
        click.echo(str(error), err=True)
        sys.exit(130)
    except NarrowError as error:
        from narrow_engine.run import write_json

        with suppress(OSError):
            write_json(failure, {"code": error.code, "message": str(error)})
        click.echo(f"narrow run: {error}", err=True)
        sys.exit(1)
    if as_json:
        click.echo((result / "report.json").read_text(encoding="utf-8"))
    elif not quiet:
        click.echo("\n".join(_outcome(result)))


@click.command(epilog="\b\nExamples:\n  narrow reproduce narrow-python/report.json demo/base demo/data --out again")
@click.argument("report", type=click.Path(exists=True, path_type=Path))
@click.argument("inputs", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@OUT
@JSON
def reproduce(report: Path, inputs: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Run again what a report tells of, and compare.

    INPUTS are where its base and data are: files, model folders, or folders of them. They are known by their bytes. Exit status 1
    if what came out is not the same.
    """
    from narrow_engine import reproduce as again
    from narrow_engine.report.compare import read_report

    with _told("reproduce"):
        then = read_report(report)
        spec = again.spec_of(then, inputs)
        if (out / "result").exists():
            raise NarrowError("would_overwrite", f"{out} holds the results of a run already: take another folder.")
        out.mkdir(parents=True, exist_ok=True)
        with _lock(out / "lock"):
            result = _run(spec, out, False)
        now = read_report(out / "result")
    found, agrees = again.differences(then, now), again.agrees(then, now)
    if as_json:
        click.echo(json.dumps({"agrees": agrees, "differences": found}, indent=2))
    else:
        click.echo("\n".join([*_outcome(result), *(found or [again.SAME])]))
    sys.exit(0 if agrees else 1)


@click.command(epilog="\b\nExamples:\n  narrow compare narrow-python narrow-c --html page.html")
@click.argument("a", type=click.Path(exists=True, path_type=Path))
@click.argument("b", type=click.Path(exists=True, path_type=Path))
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write the page here as well.")
@JSON
def compare(a: Path, b: Path, html: Path | None, as_json: bool) -> None:
    """Compare two reports.

    A and B are each report.json, or the folder that it lies in.
    """
    from narrow_engine.report import compare as reports

    with _told("compare"):
        found = reports.compare(reports.read_report(a), reports.read_report(b), _names(a, b))
        if html and html.exists() and any(html.samefile(reports.report_file(place)) for place in (a, b)):
            raise NarrowError("would_overwrite", f"{html} is one of the reports: write the page somewhere else.")
        if html:
            html.write_text(reports.render_comparison(found), encoding="utf-8")
    click.echo(found.model_dump_json(indent=2) if as_json else "\n".join(reports.lines(found)))


@click.command(
    epilog="\b\nExamples:\n  narrow evaluate demo/base narrow-python/model --task ./tasks --limit 200\n\n"
    "It takes lm-evaluation-harness: pip install 'narrow[eval]'."
)
@click.argument("base", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("narrow", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--task",
    "tasks",
    multiple=True,
    required=True,
    help="A YAML file of a task, a folder of them, or the name of one of the harness's own. Repeat for several.",
)
@click.option("--limit", type=click.IntRange(1), help="Rows of each task that are asked, at most.")
@JSON
def evaluate(base: Path, narrow: Path, tasks: tuple[str, ...], limit: int | None, as_json: bool) -> None:
    """Put tasks of lm-evaluation-harness to two model folders.

    Offline. A task may name Python code, which runs here: use only tasks that you trust.
    """
    from narrow_engine import tasks as harness

    with _told("evaluate"):
        found = harness.evaluate(base, narrow, tasks, limit)
    click.echo(found.model_dump_json(indent=2) if as_json else "\n".join(map(printable, harness.lines(found))))


@click.command(
    epilog="\b\nExamples:\n  narrow run-model narrow-python/model 'def main():'\n"
    "  narrow run-model narrow-python/onnx 'def main():' --tokens 40\n\n"
    "Read on: docs/how-to/run-the-result.md"
)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("prompt")
@click.option("--tokens", type=click.IntRange(1), default=128, show_default=True, help="To write, at most.")
@click.option(
    "--threads",
    type=click.IntRange(1),
    default=max(1, int(processors.usable())),
    show_default=True,
    help="That it computes with.",
)
@JSON
def run_model(folder: Path, prompt: str, tokens: int, threads: int, as_json: bool) -> None:
    """Continue a prompt with a result, in any of its formats.

    FOLDER is that of a format: model/ runs in torch, onnx*/ in ONNX Runtime, gguf*/ in llama.cpp. The likeliest token is always
    taken, so that formats can be compared.
    """
    from narrow_engine.export import runtimes

    with _told("run-model"):
        if as_json:
            text = "".join(runtimes.write(folder, prompt, tokens, threads))
            click.echo(json.dumps({"prompt": prompt, "text": text}))
            return
        for piece in runtimes.write(folder, prompt, tokens, threads):
            click.echo("".join(c for c in piece if c.isprintable() or c in "\n\t"), nl=False)
            sys.stdout.flush()
        click.echo()


@contextmanager
def _told(command: str) -> Iterator[None]:
    """What the user can mend, as a sentence."""
    try:
        yield
    except Cancelled as error:
        click.echo(str(error), err=True)
        sys.exit(130)
    except NarrowError as error:
        click.echo(printable(f"narrow {command}: {error}"), err=True)
        sys.exit(1)
    except OSError as error:
        told = f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror or error}."
        click.echo(printable(f"narrow {command}: {told}"), err=True)
        sys.exit(1)


def _names(a: Path, b: Path) -> tuple[str, str]:
    """Short names of two places, from their end on as long as they are the same."""
    one, other = (place.resolve().parts for place in (a, b))
    for end in range(1, min(len(one), len(other)) + 1):
        if one[-end] != other[-end]:
            return clear(one[-end]), clear(other[-end])
    return clear(a), clear(b)


def read_spec(path: Path) -> CompressionSpec:
    """A spec file; its relative paths count from its own folder. Raises NarrowError (bad_spec)."""
    try:
        spec = CompressionSpec.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise NarrowError("bad_spec", f"{path.name}: {first_fault(error)}") from error
    root = path.resolve().parent

    def absolute(item: Any) -> Any:
        found = root / item.path
        if not found.exists():
            raise NarrowError("missing_file", f"{path.name}: there is nothing at {found}.")
        return item.model_copy(update={"path": found})

    return spec.model_copy(
        update={
            "base": absolute(spec.base),
            "teacher": spec.teacher and absolute(spec.teacher),
            "target": absolute(spec.target),
            "skills": [absolute(s) for s in spec.skills],
            "broad": spec.broad and absolute(spec.broad),
        }
    )


def _run(spec: CompressionSpec, out: Path, quiet: bool, shared: Path | None = None, events_after: int = 0) -> Path:
    """Runs it, and returns the folder of what came out."""
    # Imported here: it takes seconds, and a mistake in the spec should be told at once.
    from narrow_engine import shard
    from narrow_engine.pipeline import run as run_line

    log = EventLog(out / "events.jsonl", events_after)
    last, often = 0.0, LINE_SECONDS if sys.stderr.isatty() else LOG_SECONDS

    def sink(kind: "Kind", phase: str, message: str, data: dict[str, Any]) -> None:
        nonlocal last
        log(kind, phase, message, data)
        if quiet or kind == "failed" or (kind == "progress" and time.monotonic() - last < often):
            return
        line = _line(kind, phase, message, data)
        if line:
            last = time.monotonic()
            click.echo(f"{time.strftime('%H:%M:%S')} {line}", err=True)

    try:
        with shard.processes() as mesh:
            return run_line(spec, out, sink, _stop_on_signals(), shared, mesh)
    except Cancelled:
        raise
    except NarrowError as error:
        with suppress(OSError):  # a full disk has no room to be told on
            sink("failed", "", str(error), {"code": error.code})
        raise
    except Exception as error:
        told = _known(error)
        if told is None:
            raise
        with suppress(OSError):
            sink("failed", "", str(told), {"code": told.code})
        raise told from error


def _outcome(result: Path) -> list[str]:
    """What came out, in lines for a person."""
    from narrow_engine.report.model import Report
    from narrow_engine.report.page import summary, verdict

    report = Report.model_validate_json((result / "report.json").read_bytes())
    return [verdict(report), *summary(report), f"All that came out is in {result}; begin with report.html."]


def _follow(spec: CompressionSpec, out: Path) -> None:
    """The part of another process than the first in a run."""
    from narrow_engine import shard
    from narrow_engine.pipeline import follow

    try:
        with shard.processes() as mesh:
            assert mesh is not None
            follow(spec, out, _stop_on_signals(), mesh)
    except NarrowError as error:
        # A cancelled run is told by the first; what is wrong here may be so only here.
        if not isinstance(error, Cancelled):
            click.echo(f"narrow run, process {os.environ['RANK']}: {error}", err=True)
            sys.exit(1)
    except RuntimeError as error:
        if LOST not in str(error):
            raise


def _end_with_parent() -> None:
    """A torchrun that is killed with -9 ends nobody, so its processes see to that themselves (PR_SET_PDEATHSIG; Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _stop_on_signals() -> threading.Event:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


def _line(kind: "Kind", phase: str, message: str, data: dict[str, Any]) -> str:
    """What a person is told of an event; empty for what would only be noise."""
    name = phase.replace("_", " ") or "run"
    if kind == "notice":
        return f"{name}: note: {message}"
    if kind == "finished" and data["seconds"] >= SHORT_SECONDS:
        return f"{name}: {message or 'done'}" + ("" if data["reused"] else f" in {data['seconds']:.1f} s")
    if kind == "progress" and data["done"] < data["total"]:
        more = f", {message}" if message else f", loss {data['loss']:.3f}" if "loss" in data else ""
        return f"{name}: {data['done']} of {data['total']}{more}"
    return ""


def _known(error: Exception) -> NarrowError | None:
    """The machine's limits, as sentences; None for what is a fault of ours."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NarrowError("disk_full", "The disk is full: free some space and start the job again; what was finished is kept.")
    # Writers in native code (safetensors) tell a full disk in words only.
    if "No space left on device" in str(error):
        return NarrowError("disk_full", "The disk is full: free some space and start the job again; what was finished is kept.")
    if LOST in str(error):
        return NarrowError(
            "process_lost",
            "Another process of this run has ended; what it said is above. Start the run again: it goes on where it was.",
        )
    if out_of_memory(error):
        return NarrowError(
            "out_of_memory",
            "The job ran out of memory: give it more, where it has a limit (resources.memory, NARROW_MAX_JOB_MEMORY), or take a "
            "machine with more; in training, lower method.recover.batch_tokens or block_tokens.",
        )
    return None


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Keeps a second process out of a run's folder; waits a while, since a killed one may still be going down."""
    with path.open("w") as file:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise NarrowError("run_is_busy", f"Another process is working on {path.parent}: wait for it.") from error
                time.sleep(0.2)
        yield
