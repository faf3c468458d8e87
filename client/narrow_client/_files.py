"""Small facts that both clients need: when a job is over, and where its files go."""

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from narrow_client._errors import NarrowClientError
from narrow_client.models import Artifact, Job

TERMINAL = ("succeeded", "failed", "cancelled")


def folder_of(form: str) -> str:
    """Where a result's files of a format are. All others are made of what is in `model`."""
    return "model" if form == "safetensors" else form


def is_terminal(job: Job) -> bool:
    return job.status in TERMINAL


def check_out(out: Path) -> None:
    """Before a job that may take hours: whether its results can be written at all."""
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise NarrowClientError(f"Nothing can be written to {out}: {there} is not a folder that you may write to.")


def no_files(job: Job) -> NarrowClientError:
    if job.status == "succeeded":
        return NarrowClientError(f"The job {job.id} has succeeded, but the service lists no files of it: ask again.")
    return NarrowClientError(f"The job {job.id} has no files since it is {job.status}: they come when a job has succeeded.")


def targets(artifacts: Sequence[Artifact], out: Path, prefix: str) -> list[tuple[Artifact, Path]]:
    """Where each artifact is saved. A service that names a path outside of `out` is not believed."""
    chosen = [artifact for artifact in artifacts if artifact.path.startswith(prefix)]
    if not chosen:
        known = sorted({first + slash for first, slash, _ in (artifact.path.partition("/") for artifact in artifacts)})
        raise NarrowClientError(f"No file of the job begins with {prefix!r}; there are {', '.join(known)}.")
    for artifact in chosen:
        path = PurePosixPath(artifact.path)
        if path.is_absolute() or ".." in path.parts or "\\" in artifact.path:
            raise NarrowClientError(f"The service names a file {artifact.path!r}, which does not stay inside {out}.")
    return [(artifact, out / artifact.path) for artifact in chosen]
