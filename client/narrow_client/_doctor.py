"""`narrow doctor`: what this machine and the service can do, and what a job would need.

What it says of the machine and of a job comes from the full installation, by the entry points of the group `narrow.doctor`.
"""

import platform
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import httpx
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from narrow_client import _calls
from narrow_client._errors import InvalidArgument, NarrowClientError
from narrow_client._render import plain
from narrow_client._transport import Transport

SECONDS = 5.0
"""That the service has for an answer."""
SKEW = 30.0
"""Seconds between two clocks that are worth a word: webhooks and keys that expire count on them."""
UNITS = {
    "_bytes": (1e-9, "GB"),
    "_gflop_per_second": (1, "GFLOP/s"),
    "_gb_per_second": (1, "GB/s"),
    "_milliseconds": (1, "ms"),
    "_seconds": (1, "s"),
}
SMALL, LONG = 10**8, 120
"""Bytes below which, and seconds from which on, a number is told as in a dry run: whole, and in minutes."""
STATES: tuple[_calls.Status, ...] = ("queued", "running")
"""Of jobs, which are counted."""
Facts = dict[str, Any]
ONLY_CLIENT = "only the client is installed here (pip install narrow)"


def examine(base: Path | None, budget: dict[str, float] | None, recover_tokens: int | None) -> Iterator[tuple[str, Facts]]:
    """What is found, by section: what takes long comes last. Raises InvalidArgument."""
    parts = {entry.name: entry for entry in entry_points(group="narrow.doctor")}
    if base is not None:
        if "job" not in parts:
            raise InvalidArgument(f"--base takes the full installation, and {ONLY_CLIENT}.")
        yield "job", parts["job"].load()(base, budget, recover_tokens)
        return
    yield "client", {"narrow-client": version("narrow-client"), "python": platform.python_version()}
    yield "service", _service(Transport(None, None, SECONDS, retries=0))
    machine: dict[str, Facts] = parts["machine"].load()() if "machine" in parts else {"machine": {"note": ONLY_CLIENT}}
    yield from machine.items()


def exit_status(found: Facts) -> int:
    if "job" in found:
        return 0 if found["job"]["fits"] else 1
    return 0 if found["service"]["status"] == "ok" else 3


def _service(transport: Transport) -> Facts:
    """What a service says of itself, and of the key that asks."""
    facts: Facts = {"url": transport.url}
    try:
        asked = time.monotonic()
        answer = transport.answer(_calls.ready())
        milliseconds = (time.monotonic() - asked) * 1000
        health = _calls.ready().read(answer)
    except NarrowClientError as error:
        return facts | {"status": "not reached", "why": str(error)}
    facts |= {"status": health.status, "version": health.version, "answer_milliseconds": round(milliseconds, 1)}
    facts["checks"] = health.checks or {}
    skew = _skew(answer)
    if skew is not None:
        facts["clock_skew_seconds"] = round(skew)
    notes: list[str] = []
    try:
        facts["role"] = transport.send(_calls.get_usage()).role
        pages = {status: transport.send(_calls.list_jobs(None, _calls.PAGE, status, None)) for status in STATES}
        facts["jobs"] = {status: len(page.data) for status, page in pages.items()}
        notes += [f"there are more than {_calls.PAGE} {status} jobs" for status, page in pages.items() if page.next_cursor]
    except NarrowClientError as error:
        facts["role"] = f"none: {error}"
    if health.version != version("narrow-client"):
        notes.append(f"the service is of version {health.version}, the client of {version('narrow-client')}")
    if skew is not None and abs(skew) > SKEW:
        notes.append(f"the clocks of the service and of this machine are {abs(skew):,.0f} s apart")
    return facts | ({"notes": notes} if notes else {})


def _skew(answer: httpx.Response) -> float | None:
    """How far the service's clock is ahead of ours, to a second."""
    try:
        date = parsedate_to_datetime(answer.headers.get("date", ""))
    except ValueError:
        return None
    return (date - datetime.now(UTC)).total_seconds() if date.tzinfo else None


def view(title: str, facts: Facts) -> RenderableType:
    """A section as a table."""
    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=18)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        label, told = _row(name, value)
        table.add_row(Text(label.replace("_", " "), style="dim"), Text(plain(told, keep_lines=True)))
    return Group(Text(title, style="bold"), table, Text())


def _row(name: str, value: Any) -> tuple[str, str]:
    """A fact for a person: what it is, and with its unit, which is the end of its name."""
    if name.endswith("_bytes") and isinstance(value, int) and value < SMALL:
        return name.removesuffix("_bytes"), f"{value:,} bytes"
    if name.endswith("_seconds") and isinstance(value, int | float) and value >= LONG:
        return name.removesuffix("_seconds"), f"{value / 60:,.1f} minutes"
    for end, (factor, unit) in UNITS.items():
        if name.endswith(end) and isinstance(value, int | float):
            return name.removesuffix(
                end
            ), f"{value * factor:,.3g} {unit}" if value * factor < 1000 else f"{value * factor:,.0f} {unit}"
    return name, _words(value)


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        facts: Facts = value
        return ", ".join(f"{name} {_words(item)}" for name, item in facts.items())
    if isinstance(value, list):
        items: list[Any] = value
        return "\n".join(map(_words, items)) or "none"
    if value is None:
        return "none"
    return f"{value:,}" if isinstance(value, int | float) else str(value)
