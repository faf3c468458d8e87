"""Writes docs/reference/ from the code: `python docs/generate.py`. With --check it only says what is not as the code has it.

Settings have a generator of their own: `python -m service.settings`. Nothing here imports torch, so that checking takes two
seconds. What a description lacks is written in the code, where whoever changes it sees it.
"""

import ast
import importlib
import inspect
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import click
import griffe
import yaml
from pydantic.json_schema import models_json_schema

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "reference"
Schema = dict[str, Any]

for place in (ROOT, ROOT / "client"):
    sys.path.insert(0, str(place))

from narrow_engine import events, footprint, spec  # noqa: E402
from narrow_engine.families import dimensions  # noqa: E402
from service.auth import needs  # noqa: E402
from service.problems import ALWAYS, TITLES  # noqa: E402

# --- What all pages have in common ---


def page(title: str, *parts: str) -> str:
    return "\n\n".join([f"# {title}", *(part for part in parts if part)]) + "\n"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown; empty without rows."""
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("\n", " ").replace("|", "\\|") for cell in line) + " |" for line in lines)


def anchor(heading: str) -> str:
    """As GitHub and MyST make it of a heading."""
    return "".join(c for c in heading.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def prose(text: str | None) -> str:
    """A docstring or description as Markdown: a paragraph a line."""
    paragraphs = inspect.cleandoc(text or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


# --- Models: what can be sent, and what comes back ---


class Home(NamedTuple):
    """The page that tells of a model, and where these pages link to it."""

    page: str
    names: list[str]


def link(name: str, here: str, homes: list[Home]) -> str:
    for home in homes:
        if name in home.names:
            return f"[`{name}`]({'' if home.page == here else home.page}#{anchor(name)})"
    return f"`{name}`"


def kind(schema: Schema, here: str, homes: list[Home]) -> str:
    """What a field holds, with its bounds."""
    if "$ref" in schema:
        return link(schema["$ref"].rpartition("/")[2], here, homes)
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " or ".join(kind(option, here, homes) for option in schema[several] if option.get("type") != "null")
    if "allOf" in schema:
        return kind(schema["allOf"][0], here, homes)
    if "enum" in schema or "const" in schema:
        words = [f"`{json.dumps(word)}`" for word in schema.get("enum", [schema.get("const")])]
        return ", ".join(words)
    what = schema.get("type", "anything")
    if what == "array":
        items = kind(schema["items"], here, homes) if schema.get("items") else "anything"
        return f"list of {items}{_bounds(schema, 'minItems', 'maxItems', 'of them')}"
    if what == "object":
        named = list(schema.get("patternProperties", {}).values())
        values, names = schema.get("additionalProperties") or (named or [None])[0], schema.get("propertyNames", {})
        keys = f" from {kind(names, here, homes)}" if "enum" in names else ""
        return f"object{keys} to {kind(values, here, homes)}" if isinstance(values, dict) and values else "object"
    what = {"string": "text", "boolean": "`true` or `false`"}.get(what, what)
    what = {"path": "path", "date-time": "time", "binary": "file"}.get(schema.get("format", ""), what)
    if schema.get("contentMediaType"):
        what = "file"
    return what + _bounds(schema, "minimum", "maximum") + _bounds(schema, "minLength", "maxLength", "characters")


def _bounds(schema: Schema, low: str, high: str, of: str = "") -> str:
    least, most = schema.get(low), schema.get(high)
    above = schema.get("exclusiveMinimum") if low == "minimum" else None
    below = schema.get("exclusiveMaximum") if high == "maximum" else None
    if of and least == 0:
        least = None
    if least is not None and most is not None:
        told = f"{_number(least)} to {_number(most)}"
    else:
        signs = (("≥", least), (">", above), ("≤", most), ("<", below))
        told = " and ".join(f"{sign} {_number(value)}" for sign, value in signs if value is not None)
    return f", {told}{f' {of}' if of else ''}" if told else ""


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) or value < 1e6 else f"{value:g}"


def fields(schema: Schema, here: str, homes: list[Home], defaults: bool = True) -> str:
    """The fields of a model as a table: first those that are required, if there are defaults at all."""
    rows = []
    required = schema.get("required", [])
    for name, field in sorted(schema.get("properties", {}).items(), key=lambda item: defaults and item[0] not in required):
        examples = field.get("examples", [])
        told = prose(field.get("description") or _of_its_model(field))
        if examples:
            told += f"{' ' if told else ''}Such as {', '.join(f'`{json.dumps(example)}`' for example in examples)}."
        default = "required" if name in required else _default(field)
        rows.append([f"`{name}`", kind(field, here, homes), *([default] if defaults else []), told])
    return table(["field", "type", *(["default"] if defaults else []), "what it is"], rows)


def _of_its_model(field: Schema) -> str:
    """The first sentence of what a field's model says of itself."""
    names = list(_named({key: value for key, value in field.items() if key != "default"}))
    told = MODELS[names[0]].get("description", "") if len(names) == 1 else ""
    return told.partition("\n\n")[0].partition(". ")[0].rstrip(".").replace("\n", " ") + "." if told else ""


def _default(field: Schema) -> str:
    value = field.get("default")
    return "" if value is None else f"`{json.dumps(value, ensure_ascii=False)}`"


def model(name: str, schema: Schema, here: str, homes: list[Home], defaults: bool = True) -> str:
    told = prose(schema.get("description"))
    return "\n\n".join(part for part in (f"## {name}", told, fields(schema, here, homes, defaults)) if part)


def in_order(roots: list[str], definitions: dict[str, Schema]) -> list[str]:
    """Models, each after what names it first."""
    found: list[str] = []
    waiting = list(roots)
    while waiting:
        name = waiting.pop(0)
        if name not in found:
            found.append(name)
            waiting += list(_named(definitions[name]))
    return found


def _named(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"].rpartition("/")[2]
        for inner in value.values():
            yield from _named(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _named(inner)


SPECS = ["JobSpec", "CompressionSpec", "SweepSpec"]
_, _found = models_json_schema([(getattr(spec, name), "validation") for name in SPECS], ref_template="#/$defs/{model}")
SPEC_MODELS: dict[str, Schema] = _found["$defs"]
REPORT: Schema = json.loads((ROOT / "docs" / "report.schema.json").read_text())
CONTRACT: Schema = yaml.load((ROOT / "openapi.yaml").read_text(), yaml.CSafeLoader)
API_MODELS: dict[str, Schema] = CONTRACT["components"]["schemas"]
MODELS = {**API_MODELS, **REPORT["$defs"], **SPEC_MODELS}


def _homes() -> list[Home]:
    specs = in_order(SPECS, SPEC_MODELS)
    reports = [name for name in in_order(list(_named(REPORT["properties"])), REPORT["$defs"]) if name not in specs]
    reports = ["Report", *reports]
    own = [name for name in API_MODELS if name not in specs and name not in reports and not name.startswith(("Page_", "Body_"))]
    return [Home("spec.md", specs), Home("report.md", reports), Home("api.md", sorted(own))]


HOMES = _homes()

# --- The pages ---


def spec_page() -> str:
    here = "spec.md"
    kinds = [
        [f"`{name}`", ", ".join(f"`{option}` is `{json.dumps(value)}`" for option, value in _flat(changed)) or "as below"]
        for name, changed in spec.DEFAULTS.items()
    ]
    rules = [[where, told] for where, told in _rules()]
    return page(
        "Spec",
        "What to compress, into what, and how. The same words are in spec files, in the API, in reports and in the client: "
        "[`JobSpec`](#jobspec) is what `POST /jobs` and `POST /plans` take, with inputs by id; "
        "[`CompressionSpec`](#compressionspec) what `narrow run` reads, with inputs by path; [`SweepSpec`](#sweepspec) what "
        "`POST /sweeps` takes. An option that is not here is refused, never ignored.",
        *(model(name, SPEC_MODELS[name], here, HOMES) for name in HOMES[0].names),
        "## What a method's kind changes",
        "Where these say otherwise than the tables above, they are the defaults:",
        table(["`method.kind`", "defaults"], kinds),
        "## What does not go together",
        "Besides the bounds above, these are refused with a sentence:",
        table(["in", "refused"], rules),
    )


def _flat(options: Schema, before: str = "method.") -> Iterator[tuple[str, Any]]:
    for name, value in options.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _rules() -> Iterator[tuple[str, str]]:
    """The sentences with which spec.py refuses, and in which model. What several of them refuse stands in a function."""
    for node in ast.parse((ROOT / "narrow_engine" / "spec.py").read_text()).body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef):
            continue
        where = f"`{node.name}`" if node.name in HOMES[0].names else "specs"
        for inner in ast.walk(node):
            if isinstance(inner, ast.Raise) and isinstance(inner.exc, ast.Call) and "ValueError" in ast.unparse(inner.exc.func):
                yield where, _wording(inner.exc.args[0], None)


def report_page() -> str:
    here = "report.md"
    return page(
        "Report",
        "`report.json` of a run and `GET /jobs/{id}/report`. Its JSON Schema is [report.schema.json](../report.schema.json); "
        "what the figures mean is in [how it works](../how-it-works.md#measure).",
        model("Report", REPORT, here, HOMES, defaults=False),
        *(model(name, REPORT["$defs"][name], here, HOMES, defaults=False) for name in HOMES[1].names[1:]),
    )


def api_page() -> str:
    here = "api.md"
    by_tag: dict[str, list[str]] = {}
    for path, operations in CONTRACT["paths"].items():
        for method, operation in operations.items():
            by_tag.setdefault(operation.get("tags", ["service"])[0], []).append(_operation(method.upper(), path, operation))
    always = ", ".join(f"{status} ({TITLES[status].lower()})" for status in ALWAYS)
    return page(
        "API",
        "The contract is [openapi.yaml](../../openapi.yaml), from which this page is made. Bodies are JSON where nothing else is "
        "said. Where the service needs keys, each request has `Authorization: Bearer nrw_...`, of a key with at least the role "
        "that is told. An answer other than 2xx is a [`Problem`](#problem) of the type `application/problem+json`; "
        f"[problems](problems.md) has their codes. Besides what is told, any call can be answered with {always}. Lists come in "
        "pages, newest first: ask again with `cursor` set to `next_cursor` until that is null.",
        *(part for tag, operations in by_tag.items() for part in (f"## {tag.capitalize()}", *operations)),
        "## What comes back",
        "What is sent to `POST /jobs`, `/plans` and `/sweeps` is in [spec](spec.md), reports are in [report](report.md).",
        *(model(name, API_MODELS[name], here, HOMES, defaults=False).replace("## ", "### ", 1) for name in HOMES[2].names),
    )


def _operation(method: str, path: str, operation: Schema) -> str:
    here = "api.md"
    parts = [f"### {method} {path}", prose(operation.get("description") or operation["summary"] + ".")]
    if operation.get("security"):
        parts[-1] += f" Role: `{needs(method, path)}`."
    rows = [
        [f"`{given['name']}`", given["in"], kind(given["schema"], here, HOMES), prose(given.get("description"))]
        for given in operation.get("parameters", [])
        if given["in"] != "path"
    ]
    body = operation.get("requestBody", {}).get("content", {})
    for media, sent in body.items():
        name = sent["schema"].get("$ref", "").rpartition("/")[2]
        if name.startswith("Body_"):
            form = API_MODELS[name]
            rows += [
                [f"`{field}`", "form" if "form" in media else "body", kind(value, here, HOMES), prose(value.get("description"))]
                for field, value in form["properties"].items()
            ]
        else:
            rows.append(["", "body", link(name, here, HOMES) if name else f"`{media}`", ""])
    parts.append(table(["parameter", "in", "type", "what it is"], rows))
    parts.append(_answers(operation["responses"]))
    return "\n\n".join(part for part in parts if part)


def _answers(responses: Schema) -> str:
    good, bad = [], []
    for status, response in responses.items():
        if status[0] in "45":
            bad += [status] if int(status) not in ALWAYS else []
            continue
        told = [_content(media, given.get("schema", {})) for media, given in response.get("content", {}).items()]
        good.append(f"{status}{': ' if told else ''}{' or '.join(told)}")
    return f"Answers {'; '.join(good)}." + (f" Problems: {', '.join(sorted(bad))}." if bad else "")


def _content(media: str, schema: Schema) -> str:
    name = schema.get("$ref", "").rpartition("/")[2]
    if name.startswith("Page_"):
        items = API_MODELS[name]["properties"]["data"]["items"]
        return f"a page of {kind(items, 'api.md', HOMES)}"
    return link(name, "api.md", HOMES) if name else f"`{media}`"


def events_page() -> str:
    rows = []
    for name, told in events.KINDS.items():
        data = [f"`{key}`: {meaning}" for key, meaning in events.DATA[name].items()]
        rows.append([f"`{name}`", told, "<br>".join(data)])
    notices = sorted({(found.phase, found.code, found.told) for found in _notices()})
    return page(
        "Events",
        "What a run says about itself, one JSON object each, numbered from 1 without gaps: in `events.jsonl` of a run's folder, "
        "as a page of [`GET /jobs/{id}/events`](api.md#get-jobsjob_idevents), or there as a stream of Server-Sent Events, whose "
        "`id` is the number. A client that reconnects with `Last-Event-ID` misses nothing. The stream ends with an event named "
        "`end`.",
        fields(events.Event.model_json_schema(), "events.md", HOMES, defaults=False),
        "## Kinds",
        table(["kind", "when", "`data`"], rows),
        "## Phases",
        "The stages of [the line](../how-it-works.md), in their order; those that a run does not need are left out.",
        "`" + "`, `".join(word for word in _phases() if word) + "`",
        "## Notices",
        "Something was truncated, skipped, rounded or fell back. Each is also in the report. `code` is stable and for programs; "
        "… stands for what a notice says of its own case.",
        table(
            ["phase", "code", "says"],
            [[phase and f"`{phase}`", f"`{code}`", told.strip("… ") and told] for phase, code, told in notices],
        ),
    )


def _phases() -> list[str]:
    from service.api.schemas import Phase

    return list(Phase.__args__)


class Said(NamedTuple):
    phase: str
    code: str
    told: str


def _notices() -> Iterator[Said]:
    """All calls that emit a notice: `emit("notice", phase, message, {"code": code})` under any name; and the ways of training,
    whose codes are data."""
    config = json.loads((ROOT / "demo" / "base" / "config.json").read_text())
    task = footprint.Task(config, dimensions(config), 4, 512, "muon", False)
    for code, sentence in footprint.told(task, footprint.Way(2, recompute=True, bfloat16=True), 10**9):
        yield Said("recover", code, re.sub(r"\b[\d.]*\d\b(?! parts)|\b2(?= parts)", "…", sentence))
    for source in _sources():
        for function, call in _calls(source):
            if len(call.args) >= 4 and _constant(call.args[0]) == "notice" and isinstance(call.args[3], ast.Dict):
                code = _constant(call.args[3].values[0])
                # The code of an error that became a notice is among the problems.
                if code:
                    yield Said(_constant(call.args[1]) or "", code, _wording(call.args[2], function))


def problems_page() -> str:
    said = {*_errors(), *_of_http()}
    codes = sorted({code for _, code, _ in said})
    rows = []
    for code in codes:
        mine = sorted((status, told) for status, name, told in said if name == code)
        statuses = ", ".join(sorted({status for status, _ in mine if status}))
        sentences = list(dict.fromkeys(told for _, told in mine if told.strip(" …")))
        shown = "<br>".join(sentences[:3]) + ("<br>and others" if len(sentences) > 3 else "")
        rows.append([f"`{code}`", statuses, shown])
    return page(
        "Problems",
        "Every error is a sentence that says what was wrong, where, and what to do, and a `code` that is stable, for programs. "
        "Over HTTP it is a [`Problem`](api.md#problem) (RFC 9457) with the status below, or 422 where none is told; what fails a "
        "job is its [`error`](api.md#joberror), and what ends `narrow run` is in `failure.json`. … stands for what a sentence "
        "says of its own case.",
        table(["code", "status", "says"], rows),
    )


ERRORS = {"ApiError": (0, 1, 2), **dict.fromkeys(("NarrowError", "BadRow", "_Refused", "_failed"), (None, 0, 1))}
"""What makes an error: the places of its status, code and sentence among the arguments."""
SAYING = {*ERRORS, "not_found", "_unknown", "_refuse"}


def _errors() -> Iterator[tuple[str, str, str]]:
    for source in _sources():
        for function, call in _calls(source):
            name = _name(call)
            if name == "not_found" and (what := _constant(call.args[0])):
                yield "404", f"{what}_not_found", f"There is no {what} …."
            elif name == "_unknown" and (code := _constant(call.args[0])):
                yield "401", code, _wording(call.args[1], function)
            elif name == "_refuse" and source.name.startswith("gguf"):
                yield "422", "gguf_unsupported", ""
            elif name in ERRORS:
                at_status, at_code, at_told = ERRORS[name]
                if len(call.args) > at_told and (code := _constant(call.args[at_code])):
                    # The engine's errors are answered with 422 where the API meets them.
                    status = "" if at_status is None else str(_constant(call.args[at_status]) or "")
                    yield status, code, _wording(call.args[at_told], function)
            for given in call.args:
                told = isinstance(given, ast.Dict) and [_constant(key) for key in given.keys if key] == ["code", "message"]
                if told and (code := _constant(given.values[0])):
                    yield "", code, _wording(given.values[1], function)


def _of_http() -> Iterator[tuple[str, str, str]]:
    """What is refused before any handler: `http_error` in service/problems.py."""
    for status in (400, 404, 405, 413, 415):
        yield str(status), TITLES[status].lower().replace(" ", "_"), ""


def _sources() -> list[Path]:
    return [path for folder in ("narrow_engine", "service") for path in sorted((ROOT / folder).rglob("*.py"))]


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id if isinstance(call.func, ast.Name) else ""


@cache
def _calls(source: Path) -> list[tuple[ast.FunctionDef | None, ast.Call]]:
    """The calls in a file that could tell a person something, with the function that they stand in."""
    text = source.read_text()
    found: list[tuple[ast.FunctionDef | None, ast.Call]] = []

    def walk(node: ast.AST, function: ast.FunctionDef | None) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Call) and (
                _name(child) in SAYING or any(isinstance(given, ast.Dict) for given in child.args)
            ):
                found.append((function, child))
            if not isinstance(child, ast.expr_context | ast.operator | ast.Constant | ast.Name):
                walk(child, child if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else function)  # type: ignore[arg-type]

    if any(word in text for word in (*SAYING, '"notice"', '"code":')):
        walk(ast.parse(text), None)
    return found


def _constant(node: ast.expr) -> Any:
    return node.value if isinstance(node, ast.Constant) else None


def _wording(node: ast.expr, function: ast.FunctionDef | None) -> str:
    """A sentence in the code, with … for what is put into it. A name stands for what the function gives it."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)  # type: ignore[misc]
    if isinstance(node, ast.BinOp):
        return _wording(node.left, function) + _wording(node.right, function)
    if isinstance(node, ast.IfExp):
        return _wording(node.body, function) or _wording(node.orelse, function)
    if isinstance(node, ast.Name) and function is not None:
        given = [
            inner
            for inner in ast.walk(function)
            if isinstance(inner, ast.Assign) and inner.lineno < node.lineno and ast.unparse(inner.targets[0]) == node.id
        ]
        if given:
            return _wording(max(given, key=lambda inner: inner.lineno).value, None)
    return "…"


def cli_page() -> str:
    from narrow_client import cli

    context = click.Context(cli.main)
    commands = {name: cli.main.get_command(context, name) for name in cli.main.list_commands(context)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name, place in project["entry-points"]["narrow.commands"].items():
        module, _, attribute = place.partition(":")
        commands[name] = getattr(importlib.import_module(module), attribute)
    summary, _, rest = inspect.cleandoc(cli.__doc__ or "").partition("\n\n")
    return page(
        "Command line",
        prose(summary),
        _docstring(rest),
        "Each command has `--help`. `NARROW_URL` says where the service is, `NARROW_API_KEY` is the key, if it needs one.",
        *(_command(f"narrow {name}", commands[name]) for name in sorted(commands)),
    )


def _command(name: str, command: click.Command, level: str = "##") -> str:
    context = click.Context(command, info_name=name)
    parts = [f"{level} {name}"]
    if isinstance(command, click.Group):
        parts.append(_help(command.help))
        inner = command.commands
        parts += [_command(f"{name} {word}", inner[word], level + "#") for word in sorted(inner)]
        return "\n\n".join(parts)
    parts.append(f"```text\n{' '.join([name, *command.collect_usage_pieces(context)])}\n```")
    parts.append(_help(command.help))
    rows = []
    for parameter in command.get_params(context):
        if isinstance(parameter, click.Option) and not parameter.hidden and "--help" not in parameter.opts:
            rows.append([_option(parameter, context), _option_default(parameter), prose(parameter.help)])
    parts.append(table(["option", "default", "what it does"], rows))
    parts.append(_help(command.epilog))
    return "\n\n".join(part for part in parts if part)


def _option(option: click.Option, context: click.Context) -> str:
    names = ", ".join([*option.opts, *option.secondary_opts])
    value = "" if option.is_flag or option.count else f" {option.make_metavar(context)}"
    return f"`{names}{value}`" + (", required" if option.required else "") + (", repeatable" if option.multiple else "")


def _option_default(option: click.Option) -> str:
    value = option.default
    if option.is_flag or option.multiple or callable(value) or value in (None, "", ()) or not _is_plain(value):
        return ""
    # What depends on the machine is no default to be written down.
    return "" if option.name == "threads" else f"`{value}`"


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | float | Path)


def _help(text: str | None) -> str:
    r"""Help of click as Markdown: what stands after \b is shown as it is written."""
    parts = []
    for paragraph in inspect.cleandoc(text or "").split("\n\n"):
        if paragraph.startswith("\b"):
            first, *rest = paragraph.removeprefix("\b").strip("\n").split("\n")
            heading = not first.startswith(" ") and first.endswith(":") and bool(rest)
            block = inspect.cleandoc("\n".join(["", *rest] if heading else ["", first, *rest]))
            parts += [first] if heading else []
            parts.append(f"```text\n{block}\n```")
        elif paragraph:
            parts.append(" ".join(paragraph.split()))
    return "\n\n".join(parts)


def client_page() -> str:
    import narrow_client

    things = {name: getattr(narrow_client, name) for name in narrow_client.__all__}
    functions = [name for name, thing in things.items() if inspect.isroutine(thing)]
    errors = [name for name, thing in things.items() if inspect.isclass(thing) and issubclass(thing, Exception)]
    classes = [name for name in things if name not in functions and name not in errors]
    module = importlib.import_module(things["Narrow"].__module__)
    resources = [
        thing
        for name, thing in vars(module).items()
        if inspect.isclass(thing) and thing.__module__ == module.__name__ and not name.startswith("_") and name != "Narrow"
    ]
    return page(
        "Python client",
        "`pip install ./client` installs `narrow_client` without torch. `AsyncNarrow` has the methods of `Narrow` and of what "
        "hangs on it, to be awaited; iterators are asynchronous ones. Models of what comes back are generated from the contract: "
        "see [API](api.md#what-comes-back) and [report](report.md).",
        "## Functions",
        *(_callable(name, things[name]) for name in functions),
        "## Classes",
        *(_class(name, things[name]) for name in classes),
        "## What hangs on a client",
        *(_class(f"Narrow.{thing.__name__.lower()}", thing, made=False) for thing in resources),
        "## Errors",
        "```text\n"
        + inspect.cleandoc(importlib.import_module("narrow_client._errors").__doc__ or "").partition("\n\n")[2]
        + "\n```",
        *(f"### {name}\n\n{_docstring(things[name].__doc__)}" for name in sorted(errors)),
    )


def _class(name: str, thing: type, made: bool = True) -> str:
    parts = [f"### {name}", _docstring(thing.__doc__) if thing.__doc__ and not thing.__doc__.startswith(f"{name}(") else ""]
    if made and not issubclass(thing, tuple) and "__init__" in vars(thing):
        parts.insert(1, f"```text\n{name}{_signature(thing)}\n```")
    for attribute, member in vars(thing).items():
        if attribute.startswith("_") or name == "AsyncNarrow":
            continue
        if isinstance(member, property):
            parts.append(f"#### {name}.{attribute}\n\n{_docstring(member.fget.__doc__ if member.fget else '')}".rstrip())
        elif inspect.isroutine(member):
            parts.append(_callable(f"{name}.{attribute}", member, "####"))
    fields_of = getattr(thing, "__dataclass_fields__", {})
    rows = [[f"`{field}`", f"`{_annotation(value.type)}`"] for field, value in fields_of.items()]
    parts.append(table(["field", "type"], rows))
    return "\n\n".join(part for part in parts if part)


def _callable(name: str, thing: Any, level: str = "###") -> str:
    return "\n\n".join(
        part for part in (f"{level} {name}", f"```text\n{name}{_signature(thing)}\n```", _docstring(thing.__doc__)) if part
    )


def _signature(thing: Any) -> str:
    found = inspect.signature(thing)
    kept = [p for p in found.parameters.values() if p.name != "self"]
    kept = [p.replace(annotation=Plain(_annotation(p.annotation))) for p in kept if p.annotation is not p.empty] or kept
    returned = found.return_annotation
    end = found.empty if returned is found.empty else Plain(_annotation(returned))
    text = str(found.replace(parameters=kept, return_annotation=end))
    if len(text) < 100:
        return text
    lines = [f"    {p}," for p in kept]
    star = next((number for number, p in enumerate(kept) if p.kind is p.KEYWORD_ONLY), None)
    if star is not None:
        lines.insert(star, "    *,")
    return "(\n" + "\n".join(lines) + "\n)" + ("" if end is found.empty else f" -> {end}")


class Plain:
    """An annotation that shows itself as it is written."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _annotation(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    for module in (
        "collections.abc.",
        "typing.",
        "pathlib.",
        "narrow_client.models.",
        "narrow_client._sync.",
        "narrow_client._compress.",
    ):
        text = text.replace(module, "")
    return text


def _docstring(text: str | None) -> str:
    """A docstring as Markdown, also with Google's sections."""
    if not text:
        return ""
    parts = []
    for section in griffe.Docstring(inspect.cleandoc(text)).parse("google", warnings=False):
        if section.kind.value == "text":
            parts.append(_with_examples(str(section.value)))
        elif section.kind.value == "examples":
            parts.append("**Example**")
            parts += [_code(value) if kind.value == "examples" else value for kind, value in section.value]
        elif section.kind.value == "admonition":
            parts.append(f"**{section.title}**\n\n{_with_examples(section.value.contents)}")
        else:
            title = section.kind.value.capitalize()
            rows = [f"- {_item(item)}" for item in section.value]
            parts.append("\n".join([f"**{title}**", "", *rows]))
    return "\n\n".join(parts)


def _item(item: Any) -> str:
    name = getattr(item, "name", "") or str(getattr(item, "annotation", "") or "")
    told = " ".join(item.description.split())
    return f"`{name}`: {told}" if name else told


def _with_examples(text: str) -> str:
    """Paragraphs, of which those that are code or tables in plain text stay as they are written."""
    parts = []
    for paragraph in text.split("\n\n"):
        lines = paragraph.split("\n")
        if lines[0].startswith(">>>"):
            parts.append(_code(paragraph))
        elif all(line.startswith("    ") for line in lines if line):
            parts.append(_code(inspect.cleandoc("\n" + paragraph)))
        elif any("  " in line.strip() for line in lines) or lines[0].startswith(("|", "- ", "* ", "```")):
            parts.append(paragraph if lines[0].startswith(("|", "- ", "* ", "```")) else f"```text\n{paragraph}\n```")
        else:
            parts.append(" ".join(paragraph.split()))
    return "\n\n".join(parts)


def _code(text: str) -> str:
    return f"```python\n{text}\n```"


PAGES = {
    "spec.md": spec_page,
    "api.md": api_page,
    "problems.md": problems_page,
    "events.md": events_page,
    "report.md": report_page,
    "cli.md": cli_page,
    "client.md": client_page,
}


def main() -> int:
    check, stale = "--check" in sys.argv[1:], []
    for name, make in PAGES.items():
        path, made = OUT / name, make()
        if check and (not path.exists() or path.read_text() != made):
            stale.append(path.relative_to(ROOT).as_posix())
        elif not check:
            path.write_text(made)
    if stale:
        sys.stderr.write(f"{', '.join(stale)}: not as the code has it. Run: python docs/generate.py\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
