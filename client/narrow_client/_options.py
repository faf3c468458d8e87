"""Options of the command line: how what is written becomes what the API takes."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
from pydantic import BaseModel

from narrow_client._completion import complete_data, complete_ids, complete_model
from narrow_client._compress import data_input, model_input
from narrow_client._errors import InvalidArgument
from narrow_client.models import Budget, Dataset, SkillId


def words(model: type[BaseModel], field: str) -> tuple[str, ...]:
    """The words that a field of the API takes: its Literal, wherever it sits inside of list and Optional."""
    kind: Any = model.model_fields[field].annotation
    while get_origin(kind) is not Literal:
        kind = get_args(kind)[0]
    return get_args(kind)


ROLES = words(SkillId, "role")
QUANTITIES = tuple(name for name in Budget.model_fields if name != "keep")


def examples(*lines: str, read: str = "") -> str:
    """The end of a command's help: lines that work, and where to read on."""
    shown = "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)
    return f"{shown}\n\nRead on: {read}" if read else shown


def checked(check: Callable[[str], Any]) -> Callable[[click.Context, click.Parameter, str], str]:
    """An option that names something local or an id, checked before anything is uploaded."""

    def callback(_: click.Context, __: click.Parameter, value: str) -> str:
        try:
            check(value)
        except InvalidArgument as error:
            raise click.BadParameter(str(error)) from error
        return value

    return callback


def not_empty(_: click.Context, __: click.Parameter, value: str) -> str:
    if not value:
        raise click.BadParameter("it is empty: name the field, or leave the option out for 'text'.")
    return value


def parse_skill(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    for value in values:
        name, equals, rest = value.partition("=")
        path, colon, role = rest.rpartition(":")
        if not colon or role not in ROLES:
            if colon and Path(path).is_file() and not Path(rest).exists():
                raise click.BadParameter(f"{role!r} is not a role: there are {', '.join(ROLES)}.")
            path, role = rest, "watch"
        if not equals or not name or not path:
            raise click.BadParameter(f"{value!r} does not look like NAME=FILE:ROLE with a role of {', '.join(ROLES)}.")
        if name in found:
            raise click.BadParameter(f"{name!r} is named twice: give each skill a name of its own.")
        found[name] = (checked(data_input)(ctx, parameter, path), role)
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


JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else on stdout.")
QUIET = click.option("--quiet", "-q", is_flag=True, help="Do not show progress.")
LIMIT = click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="How many at most.")
COLUMN = click.option("--column", default="text", show_default=True, callback=not_empty, help="Field of the text in each row.")
BAD_ROWS = click.option(
    "--bad-rows",
    type=click.Choice(words(Dataset, "bad_rows")),
    default="stop",
    show_default=True,
    help="What a bad row of a file does: refuse the file, or be left out and counted.",
)
BASE = click.option(
    "--base",
    required=True,
    callback=checked(model_input),
    shell_complete=complete_model,
    help="A model folder, an id (mdl_...) or hub:OWNER/NAME[@REVISION].",
)
TARGET = click.option(
    "--target",
    required=True,
    callback=checked(data_input),
    shell_complete=complete_data,
    help="A file of the domain's text (.jsonl, .csv, .tsv, .txt, also .gz or .zst; .parquet), or an id (ds_...).",
)
BUDGET = click.option(
    "--budget",
    callback=parse_budget,
    help="Share of parameters to keep, or their number; or bytes=..., flops=..., retention=..., latency=... By default 0.5; of "
    "what is only exported, all.",
)
JOB = click.argument("job", shell_complete=complete_ids("job"))


def out_option(default: str) -> Callable[[Any], Any]:
    """`--out`."""
    kind = click.Path(file_okay=False, path_type=Path)
    return click.option("--out", default=default, show_default=True, type=kind, help="Folder for what comes out.")
