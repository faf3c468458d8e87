"""A report's run once more, from the same inputs, and whether it comes to the same.

A report names its inputs by hash and by file name, not by place: whoever wants to repeat it says where they are, and what is not
byte for byte the same is not taken.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from narrow_engine.documents import ending
from narrow_engine.earlier import dataset_sha256
from narrow_engine.errors import NarrowError
from narrow_engine.model_files import inspect_model
from narrow_engine.report.model import Input, Report
from narrow_engine.spec import INPUTS, CompressionSpec, first_fault

SAME = "The same model, byte for byte."


def spec_of(report: Report, places: Iterable[Path]) -> CompressionSpec:
    """The spec of a report's run, with its inputs found among `places`: model folders, files, and folders of either.

    Raises NarrowError (missing_input, bad_report) naming what is not there.
    """
    models, files = _by_bytes(list(places))
    skills = [item.skill for item in report.provenance.inputs if item.part == "skill"]
    single = [item.part for item in report.provenance.inputs if item.part != "skill"]
    if not {"base", "target"} <= set(single) or len(set(single)) < len(single) or {report.target, *skills} != set(report.skills):
        raise NarrowError("bad_report", "The report's inputs are not those of its run: was it edited?")
    # What an edited spec says of places is not looked at.
    spec: dict[str, Any] = {key: value for key, value in report.spec.items() if key not in INPUTS} | {"skills": []}
    for item in report.provenance.inputs:
        found = {"path": models.get(item.sha256)} if item.part in ("base", "teacher") else _dataset(item, files)
        if found["path"] is None:
            raise NarrowError(
                "missing_input",
                f"The {item.part} of this report, {item.name!r} with the SHA-256 {item.sha256[:16]}…, is not among what was "
                "given: say where it is.",
            )
        if item.skill is not None:
            spec["skills"].append({**found, "name": item.skill, "role": report.skills[item.skill].role})
        else:
            spec[item.part] = found
    try:
        return CompressionSpec.model_validate(spec)
    except ValidationError as error:
        raise NarrowError("bad_report", f"The report's spec: {first_fault(error)}") from error


def _by_bytes(places: list[Path]) -> tuple[dict[str, Path], dict[str, list[Path]]]:
    """Models and files by their digests: those that are named, and those that lie in a folder that is named."""
    models: dict[str, Path] = {}
    files: dict[str, list[Path]] = {}
    for place in places:
        inside = [] if place.is_file() or (place / "config.json").is_file() else sorted(place.iterdir())
        for path in inside or [place]:
            if path.is_file():
                files.setdefault(dataset_sha256(path), []).append(path)
            elif (path / "config.json").is_file():
                try:
                    models.setdefault(inspect_model(path).sha256, path)
                except NarrowError as error:
                    if path in places:
                        raise NarrowError(error.code, f"{path}: {error}") from error
    return models, files


def _dataset(item: Input, files: dict[str, list[Path]]) -> dict[str, Any]:
    """The file of an input, whose name's ending says how it is read."""
    same = files.get(item.sha256, [])
    wanted = ending(item.name)
    fitting = [path for path in same if path.name == item.name] + [path for path in same if ending(path.name) == wanted]
    if same and not fitting:
        raise NarrowError("missing_input", f"{same[0]} has the bytes of {item.name!r}: give it the ending {wanted!r} as well.")
    found = {
        "path": fitting[0] if fitting else None,
        "answer": item.answer and item.answer.model_dump(),
        "bad_rows": item.bad_rows,
    }
    return found | ({"column": item.column} if item.column else {})


def differences(then: Report, now: Report) -> list[str]:
    """What came out otherwise, and what of the surroundings is another, as sentences; nothing where the weights are the same."""
    if _weights(then) == _weights(now):
        return []
    said = []
    for name, row in then.skills.items():
        one, other = row.recovered, now.skills[name].recovered
        place = "inside" if one.low <= other.loss <= one.high else "outside"
        said.append(
            f"{name}: {other.loss:.4f} nats instead of {one.loss:.4f}, {place} its interval ({one.low:.4f} – {one.high:.4f})."
        )
    for what in ("versions", "machine"):
        before, after = getattr(then.provenance, what), getattr(now.provenance, what)
        said += [
            f"{key} is {after.get(key)} and was {before.get(key)}."
            for key in sorted({*before, *after})
            if before.get(key) != after.get(key)
        ]
    return said


def agrees(then: Report, now: Report) -> bool:
    """Whether every loss lies in the interval that the report gave it."""
    return all(row.recovered.low <= now.skills[name].recovered.loss <= row.recovered.high for name, row in then.skills.items())


def _weights(report: Report) -> dict[str, str]:
    return {
        file.path: file.sha256 for file in report.files if file.path.startswith("model/") and file.path.endswith(".safetensors")
    }
