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


def needed(name: str, extras: tuple[str, ...], found: set[str]) -> None:
    """Adds the installed distributions that one needs, with the extras, and what they need. torch's own come with torch."""
    if name == "torch":
        return
    for line in distribution(name).requires or ():
        requirement = Requirement(line)
        wanted = canonicalize_name(requirement.name)
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            continue
        if (key := f"{wanted}{sorted(requirement.extras)}") not in found:
            found |= {key, wanted}
            needed(wanted, tuple(requirement.extras), found)


def main() -> None:
    runs: set[str] = set()
    every: set[str] = set()
    needed("narrow", RUNS, runs)
    needed("narrow", (*RUNS, "dev"), every)
    lines = {name: f"{d.name}=={d.version}\n" for d in distributions() if (name := canonicalize_name(d.name)) not in LEFT_OUT}
    tools = every - runs
    (HERE / "requirements.lock").write_text("".join(lines[name] for name in sorted(lines) if name in runs))
    (HERE / "requirements-dev.lock").write_text(
        "-r requirements.lock\n" + "".join(lines[name] for name in sorted(lines) if name in tools)
    )


if __name__ == "__main__":
    main()
