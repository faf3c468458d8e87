"""Writes down the versions that are installed: requirements.lock, what the service runs with, and requirements-dev.lock, what
tests and tools take on top of it. torch is in neither: which build of it comes is the reader's choice."""

from importlib.metadata import distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).resolve().parents[1]
RUNS = ("otel", "parquet", "postgres", "s3")
"""Extras of what the service runs with."""
LEFT_OUT = {"narrow", "narrow-client", "pip", "setuptools", "torch"}


def needed(name: str, extras: tuple[str, ...], found: set[tuple[str, tuple[str, ...]]]) -> set[str]:
    """The installed distributions that one needs, with the extras, and what they need; those with their extras go into `found`.
    torch's own come with torch."""
    for line in (name != "torch" and distribution(name).requires) or ():
        requirement = Requirement(line)
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            continue
        wanted = canonicalize_name(requirement.name), tuple(sorted(requirement.extras))
        if wanted not in found:
            found.add(wanted)
            needed(*wanted, found)
    return {name for name, _ in found}


def main() -> None:
    runs = needed("narrow", RUNS, set())
    tools = needed("narrow", (*RUNS, "dev"), set()) - runs
    lines = {name: f"{d.name}=={d.version}\n" for d in distributions() if (name := canonicalize_name(d.name)) not in LEFT_OUT}
    (HERE / "requirements.lock").write_text("".join(lines[name] for name in sorted(lines) if name in runs))
    (HERE / "requirements-dev.lock").write_text(
        "-r requirements.lock\n" + "".join(lines[name] for name in sorted(lines) if name in tools)
    )


if __name__ == "__main__":
    main()
