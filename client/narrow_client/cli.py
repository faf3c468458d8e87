"""`narrow`: the command line. On a machine with the engine or the service installed, their commands join this one.

Exit status:

| status | means |
|---|---|
| 0 | done |
| 1 | failed: the job failed or was cancelled, or the service said no (it is not there, not allowed, not in this state) |
| 2 | wrong usage, found here or by the service (400, 413, 415, 422): nothing was queued, and the command must change |
| 3 | the service was not reached or could not answer (429, 5xx) after all retries: the same may work later |
| 130 | interrupted; what became of the job is told |

What a command was asked for goes to stdout, as text or with --json as one JSON object (a stream of events: one a line), and
nothing else does. Progress, notes and errors go to stderr; progress is bars in a terminal and lines in a log, and --quiet leaves
it out.

This module loads nothing but click: a command's own module is loaded when it is asked for.
"""

import errno
import sys
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points, version
from typing import Any

import click
from click.shell_completion import CompletionItem

GROUPS: dict[str, dict[str, str]] = {
    "Compress": {
        "compress": "Compress a model to one domain: upload, run, download.",
        "sweep": "Compare methods × budgets × seeds: run them all, show the frontier.",
    },
    "Jobs": {
        "jobs": "List jobs, newest first.",
        "show": "Show a job.",
        "watch": "Follow a job until it has ended.",
        "pause": "Stop a job where it is; 'narrow resume' lets it go on from there.",
        "resume": "Let a paused job go on.",
        "cancel": "Cancel a job, or a sweep.",
        "report": "Show the report of a job that has succeeded.",
        "download": "Download what a job made.",
    },
    "Models and data": {
        "upload": "Upload a model folder or a file of text, for any number of jobs.",
        "fetch": "Have the service fetch a model from its hub.",
        "models": "List models, newest first.",
        "datasets": "List datasets, newest first.",
        "delete": "Delete models, datasets, and jobs or sweeps that have ended.",
    },
    "Service": {
        "serve": "Start the service: the API and its workers.",
        "keys": "Make, list and revoke API keys, on the service's machine.",
        "tenants": "Show and limit what tenants use, on the service's machine.",
    },
    "Engine, without a service": {
        "run": "Run a compression from a spec file.",
        "run-model": "Continue a prompt with a result, in any of its formats.",
        "compare": "Compare two reports.",
        "evaluate": "Put tasks of lm-evaluation-harness to two model folders.",
        "reproduce": "Run again what a report tells of, and compare.",
    },
    "This machine": {
        "doctor": "Say what this machine and the service can do, and what a job would need.",
        "completion": "Print a script that completes commands, options and ids in your shell.",
    },
}
"""All commands with their first line, so that the help of all loads none of them."""
NUMBERS = {"integer range": "whole number", "integer": "whole number", "float range": "number", "float": "number"}
"""What click calls the values of options, and what people do."""
FULL = {"serve", "keys", "tenants", "run", "run-model", "compare", "evaluate", "reproduce"}
"""Those of the full installation."""


class Group(click.Group):
    """Commands of this package, and those that other packages add; loaded only when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        own = [name for group in GROUPS.values() for name in group if name not in FULL]
        return [*own, *sorted(entry.name for entry in entry_points(group="narrow.commands") if entry.name not in own)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in FULL and any(cmd_name in group for group in GROUPS.values()):
            own: click.Command = getattr(import_module("narrow_client._commands"), cmd_name)
            return own
        for entry in entry_points(group="narrow.commands"):
            if entry.name == cmd_name:
                command: click.Command = entry.load()
                return command
        if not ctx.resilient_parsing and not cmd_name.startswith("-"):
            if cmd_name in FULL:
                ctx.fail(
                    f"'narrow {cmd_name}' comes with the full installation, and only the client is here: pip install narrow."
                )
            near = get_close_matches(cmd_name, self.list_commands(ctx), 1)
            ctx.fail(f"There is no command {cmd_name!r}." + (f" Did you mean '{near[0]}'?" if near else ""))
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        there = self.list_commands(ctx)
        width = max(map(len, there))
        others = {name: "" for name in there if not any(name in group for group in GROUPS.values())}
        for title, group in {**GROUPS, "From other packages": others}.items():
            rows = [(name.ljust(width), line) for name, line in group.items() if name in there]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """As click does, without loading every command for its first line."""
        lines = {name: line for group in GROUPS.values() for name, line in group.items()}
        names = [name for name in self.list_commands(ctx) if name.startswith(incomplete)]
        options = click.Command.shell_complete(self, ctx, incomplete)
        return [*(CompletionItem(name, help=lines.get(name)) for name in names), *options]

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            # What it says is what became of the job.
            click.echo(": ".join(["interrupted", *(_plain(str(said)) for said in interrupt.args)]), err=True)
            sys.exit(130)
        except OSError as error:
            if error.errno == errno.EPIPE:  # `narrow jobs | head`: click ends quietly
                raise
            click.echo(f"narrow: {_plain(_of_system(error))}", err=True)
            sys.exit(1)
        except click.BadParameter as error:
            told = error.message
            for kind, name in NUMBERS.items():
                told = told.replace(f"is not a valid {kind}.", f"is not a {name}.")
            if told == error.message:
                raise
            raise click.BadParameter(told, error.ctx, error.param, error.param_hint) from error
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            status = _told(error, ctx.invoked_subcommand)
            if status is None:
                raise
            sys.exit(status)


def _told(error: Exception, command: str | None) -> int | None:
    """Tells an error of the client as a sentence, and returns the exit status for it; None if it is none of the client's."""
    from narrow_client import _errors as errors

    if not isinstance(error, errors.NarrowClientError):
        return None
    click.echo(f"narrow: {_plain(str(error))}", err=True)
    if isinstance(error, errors.InvalidRequest):
        for item in error.errors[1:6]:
            click.echo(f"  {_plain(item.pointer)}: {_plain(item.detail)}", err=True)
        if command == "compress" and "method.units" in str(error):
            click.echo("  Here --unit names the kinds, all of them: --unit neuron --unit token --unit layer.", err=True)
    if isinstance(error, errors.NotAllowed) and error.status == 401:
        click.echo("  NARROW_API_KEY holds the key that this command sends.", err=True)
    if isinstance(error, errors.InvalidArgument | errors.InvalidRequest):
        return 2
    return 3 if isinstance(error, errors.ConnectionFailed | errors.ServerError | errors.TooManyRequests) else 1


def _of_system(error: OSError) -> str:
    """What the system said, as a sentence."""
    if error.strerror is None:
        return str(error)
    reason = error.strerror[:1].lower() + error.strerror[1:]
    return f"{error.filename}: {reason}." if error.filename else f"What was asked for cannot be written: {reason}."


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


@click.group(
    cls=Group,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="\b\nExamples:\n"
    "  narrow serve\n"
    "  narrow compress --base demo/base --target demo/data/python.jsonl.gz --budget 0.5\n"
    "  narrow COMMAND --help\n"
    "\n\b\nEnvironment:\n"
    "  NARROW_URL      where the service is; http://127.0.0.1:8000 by default\n"
    "  NARROW_API_KEY  a key of the service's, where it asks for one\n"
    "  NO_COLOR        no colours\n"
    "\nExit status: 0 done, 1 failed, 2 wrong usage, 3 the service was not reached, 130 interrupted. "
    "Read on in docs/ of the repository; docs/tutorial.md begins.",
)
@click.version_option(version("narrow-client"), prog_name="narrow")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Turn a general language model into a small one for one domain, and see which skills it kept.

    Start a service with `narrow serve`, or point NARROW_URL at one; then `narrow compress`.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


if __name__ == "__main__":
    main()
