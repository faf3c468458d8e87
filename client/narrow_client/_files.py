"""Small facts that both clients need: when a job is over, and where its files go."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from narrow_client._errors import NarrowClientError
from narrow_client.models import Artifact, Job

TERMINAL = ("succeeded", "failed", "cancelled")


def is_terminal(job: Job) -> bool:
    return job.status in TERMINAL


def targets(artifacts: Sequence[Artifact], out: Path, prefix: str) -> list[tuple[Artifact, Path]]:
    """Where each artifact is saved. A service that names a path outside of `out` is not believed."""
    chosen = [artifact for artifact in artifacts if artifact.path.startswith(prefix)]
    for artifact in chosen:
        path = PurePosixPath(artifact.path)
        if path.is_absolute() or ".." in path.parts or "\\" in artifact.path:
            raise NarrowClientError(f"The service names a file {artifact.path!r}, which does not stay inside {out}.")
    return [(artifact, out / artifact.path) for artifact in chosen]
