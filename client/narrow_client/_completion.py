"""Completion in shells: click does it, and this completes ids by asking the service, briefly and silently."""

from collections.abc import Callable, Iterator
from itertools import islice

import click
from click.shell_completion import CompletionItem, get_completion_class

from narrow_client._errors import NarrowClientError
from narrow_client._files import TERMINAL
from narrow_client._render import plain, wanted_text
from narrow_client._sync import Narrow

SHELLS = ("bash", "zsh", "fish")
INSTALL = {
    "bash": "narrow completion bash > ~/.local/share/bash-completion/completions/narrow",
    "zsh": 'narrow completion zsh > "${fpath[1]}/_narrow"',
    "fish": "narrow completion fish > ~/.config/fish/completions/narrow.fish",
}
SECONDS = 1.0
"""That a press of the tab key waits for the service."""
MOST = 50

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def script(shell: str) -> str:
    """What a shell reads to complete `narrow`."""
    from narrow_client.cli import main

    kind = get_completion_class(shell)
    assert kind is not None
    lines = kind(main, {}, "narrow", "_NARROW_COMPLETE").source().strip().split("\n")
    # zsh looks at the first line of a file to see what it completes.
    lines.insert(1 if shell == "zsh" else 0, f"# To install: {INSTALL[shell]}")
    return "\n".join(lines)


def complete_ids(*kinds: str, running: bool = False) -> Completer:
    """Completes ids of these kinds; `running`: of what has not ended."""

    def complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        try:
            with Narrow(timeout=SECONDS, max_retries=0) as client:
                found = [item for kind in kinds for item in islice(_known(client, kind, running), MOST)]
        except (NarrowClientError, OSError):
            return []
        return [CompletionItem(name, help=plain(told)) for name, told in found if name.startswith(incomplete)]

    return complete


def _known(client: Narrow, kind: str, running: bool) -> Iterator[tuple[str, str]]:
    if kind == "job":
        found = (job for job in client.jobs.list(limit=MOST) if not (running and job.status in TERMINAL))
        yield from ((job.id, f"{job.status}, {wanted_text(job.spec)}") for job in found)
    elif kind == "sweep":
        yield from ((sweep.id, "ended" if sweep.finished else "goes on") for sweep in client.sweeps.list(limit=MOST))
    elif kind == "model":
        yield from ((model.id, f"{model.name}, {model.parameters:,} parameters") for model in client.models.list(limit=MOST))
    else:
        yield from ((data.id, f"{data.name}, {data.documents:,} documents") for data in client.datasets.list(limit=MOST))


def _with_paths(kind: str, paths: str) -> Completer:
    """Paths, and ids where what is there begins as one."""
    ids, prefix = complete_ids(kind), {"model": "mdl_", "dataset": "ds_"}[kind]

    def complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        begins = prefix.startswith(incomplete) or incomplete.startswith(prefix)
        return [CompletionItem(incomplete, type=paths), *(ids(ctx, parameter, incomplete) if begins else [])]

    return complete


complete_model = _with_paths("model", "dir")
complete_data = _with_paths("dataset", "file")
