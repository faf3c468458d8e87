"""A report's run once more, from the same inputs, and whether it comes to the same.

A report names its inputs by hash and by file name, not by place: whoever wants to repeat it says where they are, and what is not
byte for byte the same is not taken.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from narrow_engine.earlier import dataset_sha256
from narrow_engine.errors import NarrowError
from narrow_engine.model_files import inspect_model
from narrow_engine.report.model import Input, Report
from narrow_engine.spec import CompressionSpec

SAME = "The same model, byte for byte."


def spec_of(report: Report, places: Iterable[Path]) -> CompressionSpec:
    """The spec of a report's run, with its inputs found among `places`: model folders, files, and folders of either.

    Raises NarrowError (missing_input) naming what is not there.
    """
    known: dict[str, Path] = {}
    for place in places:
        for path in [place, *sorted(place.iterdir())] if place.is_dir() else [place]:
            if path.is_file():
                known.setdefault(dataset_sha256(path), path)
            elif (path / "config.json").is_file():
                known.setdefault(inspect_model(path).sha256, path)

    def found(item: Input) -> dict[str, Any]:
        if item.sha256 not in known:
            kind = "model folder" if item.part in ("base", "teacher") else "file"
            raise NarrowError(
                "missing_input",
                f"The {item.part} of this report, the {kind} {item.name!r} with the SHA-256 {item.sha256[:16]}…, is not among "
                "what was given: say where it is.",
            )
        return {"path": known[item.sha256], **({"column": item.column} if item.column else {})}

    spec: dict[str, Any] = {**report.spec, "skills": []}
    for item in report.provenance.inputs:
        if item.part == "skill":
            assert item.skill is not None
            spec["skills"].append({**found(item), "name": item.skill, "role": report.skills[item.skill].role})
        else:
            spec[item.part] = found(item)
    return CompressionSpec.model_validate(spec)


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
