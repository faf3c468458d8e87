"""`narrow sweep`: uploads what a spec file names, follows the sweep, and brings its frontier."""

import json
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from narrow_client._calls import is_id
from narrow_client._compress import unseen
from narrow_client._errors import Conflict, ConnectionFailed, InvalidArgument, NarrowClientError, ServerError
from narrow_client._render import SweepDisplay
from narrow_client._sync import Narrow
from narrow_client._transport import Patience
from narrow_client.models import Frontier, SweepPoints, SweepSpec

SECONDS = 1.0
"""Between two looks at a sweep."""
INPUTS = {"base": "model", "teacher": "model", "target": "dataset", "broad": "dataset"}
LOCAL, HUB = ("path", "column", "bad_rows"), ("hub", "revision")
"""What an input is told by that has no id yet."""
EXAMPLES = {"model": "mdl_0000000000000000", "dataset": "ds_0000000000000000"}


def read_sweep(path: Path) -> dict[str, Any]:
    """A spec file, with its local paths, which count from its own folder, made absolute. Nothing is uploaded yet.

    Inputs are {"path": ...} or an id, as `POST /sweeps` takes it, and models also {"hub": ..., "revision": ...}; the rest is what
    `POST /sweeps` takes.
    """
    try:
        spec = _object(json.loads(path.read_bytes()))
    except ValueError as error:
        raise InvalidArgument(f"{path.name} is not JSON: {error}.") from error
    if spec is None:
        raise InvalidArgument(f"{path.name} is not a JSON object.")
    inputs = [(kind, _object(spec.get(name))) for name, kind in INPUTS.items()]
    inputs += [("dataset", _object(skill)) for skill in _items(spec.get("skills"))]
    for kind, item in inputs:
        if item and "path" in item:
            found = path.resolve().parent / str(item["path"])
            if not (found.is_dir() if kind == "model" else found.is_file()):
                raise InvalidArgument(f"{path.name}: there is no {'folder' if kind == 'model' else 'file'} at {found}.")
            item["path"] = str(found)
    try:
        # What is misspelt is better told before anything is uploaded.
        SweepSpec.model_validate(_with_ids(spec, lambda kind, item: EXAMPLES[kind]))
    except ValidationError as error:
        first = min(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
        raise InvalidArgument(f"{path.name}: {_fault(first['type'], first['loc'], first['msg'])}") from error
    return spec


def _fault(kind: str, where: tuple[int | str, ...], told: str) -> str:
    """What pydantic found, as a sentence like those of the service."""
    place = ".".join(map(str, where))
    if kind == "extra_forbidden":
        return f"{place}: there is no option {where[-1]!r} here: is it misspelt?"
    if kind == "missing":
        return f"{place} is missing."
    subject, should, rest = told.replace(" after validation", "").partition(" should ")
    return f"{place} should {rest}." if should and " " not in subject else f"{place}: {told}."


def upload_sweep(client: Narrow, spec: dict[str, Any]) -> dict[str, Any]:
    """The spec with everything local uploaded, each file once, and what is on the service's hub fetched."""
    known: dict[tuple[str, ...], str] = {}

    def upload(kind: str, item: dict[str, Any]) -> str:
        if "hub" in item:
            return client.models.fetch(str(item["hub"]), str(item.get("revision", "main"))).id
        path, column = str(item["path"]), str(item.get("column", "text"))
        bad_rows: Any = str(item.get("bad_rows", "stop"))
        key = (kind, path, column, bad_rows)
        if key not in known:
            made = client.models.upload(path) if kind == "model" else client.datasets.upload(path, None, column, bad_rows)
            known[key] = made.id
        return known[key]

    return _with_ids(spec, upload)


OnInterrupt = bool | Callable[[SweepPoints], bool]
"""Whether Ctrl-C cancels the sweep, or a function that is asked with it."""


def create_sweep(client: Narrow, spec: dict[str, Any], cancel: OnInterrupt) -> SweepPoints:
    """Queues the sweep."""
    key = secrets.token_hex(16)
    try:
        return client.sweeps.create(spec, key)
    except KeyboardInterrupt:
        told = unseen(lambda: _interrupted(client, client.sweeps.create(spec, key), cancel))
        raise KeyboardInterrupt(told) from None


def _with_ids(spec: dict[str, Any], identify: Callable[[str, dict[str, Any]], str]) -> dict[str, Any]:
    def replace(kind: str, item: Any) -> Any:
        told = _object(item) or {}
        named = LOCAL if "path" in told else HUB if kind == "model" and "hub" in told else ()
        rest = {name: value for name, value in told.items() if name not in named}
        return {**rest, kind: identify(kind, told)} if named else item

    made = {**spec}
    for name, kind in INPUTS.items():
        if name in made:
            made[name] = replace(kind, made[name])
    if isinstance(made.get("skills"), list):
        made["skills"] = [replace("dataset", skill) for skill in _items(made["skills"])]
    return made


def _object(value: Any) -> dict[str, Any] | None:
    """What may be anything, if it is a JSON object."""
    if not isinstance(value, dict):
        return None
    found: dict[str, Any] = value
    return found


def _items(value: Any) -> list[Any]:
    """The items of what may be anything, if it is a list."""
    if not isinstance(value, list):
        return []
    items: list[Any] = value
    return items


def follow(client: Narrow, sweep: SweepPoints, show: bool, cancel: OnInterrupt) -> SweepPoints:
    """The sweep once it has ended. A lost connection never cancels it."""
    try:
        with SweepDisplay(sweep, show) as display:
            patience = Patience()
            while not sweep.finished:
                time.sleep(SECONDS)
                try:
                    sweep = client.sweeps.get(sweep.id)
                    patience.content()
                    running = next((point.job for point in sweep.points if point.status == "running"), None)
                    display(sweep, client.jobs.get(running) if running and show else None)
                except (ConnectionFailed, ServerError) as error:
                    patience.bear(error)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_interrupted(client, sweep, cancel)) from None
    except (ConnectionFailed, ServerError) as error:
        error.args = (f"{error} The {_left(sweep).removeprefix('the ')}.",)
        raise
    return sweep


def _left(sweep: SweepPoints) -> str:
    return f"the sweep {sweep.id} goes on: 'narrow sweep {sweep.id}' takes it up again"


def _interrupted(client: Narrow, sweep: SweepPoints, cancel: OnInterrupt) -> str:
    """Cancels the sweep, if that is wanted, and says what becomes of it. Another Ctrl-C leaves it."""
    try:
        if not (cancel(sweep) if callable(cancel) else cancel):
            return _left(sweep)
        client.sweeps.cancel(sweep.id)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_left(sweep)) from None
    except Conflict:
        return f"the sweep {sweep.id} had ended already: 'narrow sweep {sweep.id}' shows its frontier"
    except NarrowClientError as error:
        return f"the sweep {sweep.id} was not cancelled, so try 'narrow cancel {sweep.id}'. {error}"
    return f"the sweep {sweep.id} was cancelled: 'narrow sweep {sweep.id}' shows the frontier of what had finished"


def keep_frontier(client: Narrow, sweep: SweepPoints, out: Path) -> Frontier:
    """Writes frontier.json and frontier.html into `out`."""
    found, page = client.sweeps.frontier(sweep.id), client.sweeps.frontier_page(sweep.id)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "frontier.json").write_text(found.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (out / "frontier.html").write_text(page, encoding="utf-8")
    except OSError as error:
        again = f"'narrow sweep {sweep.id} --out DIR' tries again"
        raise NarrowClientError(f"{out} cannot be written: {error}. The sweep {sweep.id} has ended: {again}.") from error
    return found


def shortfall(sweep: SweepPoints) -> str:
    """What is missing of a sweep that has ended, as a sentence; empty if nothing is."""
    missing = [point for point in sweep.points if point.status != "succeeded"]
    if not missing:
        return ""
    counts = ", ".join(f"{count} {status}" for status, count in sorted(sweep.counts.items()))
    failed = next((point for point in missing if point.error), None)
    why = f" The first that failed, {failed.job}: {failed.error.message}" if failed and failed.error else ""
    return f"Not every point of {sweep.id} has succeeded: {counts}.{why}"


def is_sweep(text: str) -> bool:
    return is_id("sweep", text)
