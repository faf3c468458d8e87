"""`Narrow`: the service's resources as methods."""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from narrow_client import _calls
from narrow_client._errors import JobTimeout
from narrow_client._files import is_terminal, no_files, targets
from narrow_client._transport import Transport
from narrow_client.models import (
    Artifact,
    Dataset,
    Event,
    Frontier,
    Health,
    Job,
    Key,
    Model,
    Plan,
    Report,
    SecretKey,
    Sweep,
    SweepPoints,
    Usage,
)


class Narrow:
    """A client of one service. `url` and `api_key` default to NARROW_URL and NARROW_API_KEY.

    Transient failures are retried; what the service refuses raises an `ApiError`.
    """

    def __init__(self, url: str | None = None, api_key: str | None = None) -> None:
        self._transport = Transport(url, api_key)
        self.jobs = Jobs(self._transport)
        self.sweeps = Sweeps(self._transport)
        self.models = Models(self._transport)
        self.datasets = Datasets(self._transport)
        self.keys = Keys(self._transport)

    @property
    def url(self) -> str:
        return str(self._transport.http.base_url)

    def plan(self, spec: Mapping[str, Any]) -> Plan:
        """A dry run of a job spec: sizes, memory and time, with nothing queued."""
        return self._transport.send(_calls.create_plan(spec))

    def usage(self) -> Usage:
        """Jobs, bytes and hours of the key's tenant, and how much of each it may have."""
        return self._transport.send(_calls.get_usage())

    def ready(self) -> Health:
        """Whether the service can take work; raises ServerError (503) if it cannot."""
        return self._transport.send(_calls.ready())

    def close(self) -> None:
        self._transport.http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Jobs:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(self, spec: Mapping[str, Any], idempotency_key: str | None = None) -> Job:
        """Queues a job. A key is made if none is given, so that retries never make two."""
        return self._transport.send(_calls.create_job(spec, idempotency_key))

    def get(self, job_id: str) -> Job:
        return self._transport.send(_calls.get_job(job_id))

    def list(self, status: str | None = None, sweep: str | None = None) -> Iterator[Job]:
        """All jobs, or those of a sweep, newest first; pages are fetched as they are needed."""
        return self._transport.all(lambda cursor: _calls.list_jobs(cursor, status, sweep))

    def cancel(self, job_id: str) -> Job:
        return self._transport.send(_calls.cancel_job(job_id))

    def pause(self, job_id: str) -> Job:
        """Asks a job to stop where it is; it keeps what it has done."""
        return self._transport.send(_calls.pause_job(job_id))

    def resume(self, job_id: str) -> Job:
        """Puts a paused job back into the queue."""
        return self._transport.send(_calls.resume_job(job_id))

    def delete(self, job_id: str) -> None:
        self._transport.send(_calls.delete_job(job_id))

    def events(self, job_id: str, after: int = 0) -> Iterator[Event]:
        """The job's events, live, until it is finished; a broken stream goes on where it broke."""
        return self._transport.events(job_id, after)

    def wait(self, job_id: str, timeout: float | None = None) -> Job:
        """The job once it is finished, however it ended. Raises JobTimeout after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not is_terminal(job := self.get(job_id)):
            if deadline is not None and time.monotonic() > deadline:
                raise JobTimeout(f"The job {job_id} is still {job.status} after {timeout:g} s; it goes on.")
            time.sleep(0.5)
        return job

    def report(self, job_id: str) -> Report:
        return self._transport.send(_calls.get_report(job_id))

    def artifacts(self, job_id: str) -> Sequence[Artifact]:
        return self._transport.send(_calls.list_artifacts(job_id)).data

    def download(self, job_id: str, out: Path | str, prefix: str = "") -> Sequence[Path]:
        """Downloads the job's files, or those whose path begins with `prefix`, into `out`; resumed and verified."""
        artifacts = self.artifacts(job_id)
        if not artifacts:
            raise no_files(self.get(job_id))
        chosen = targets(artifacts, Path(out), prefix)
        for artifact, target in chosen:
            self._transport.download(job_id, artifact, target)
        return [target for _, target in chosen]


class Sweeps:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(self, spec: Mapping[str, Any], idempotency_key: str | None = None) -> SweepPoints:
        """Queues a job for each method, budget and seed of a sweep spec; a key is made if none is given."""
        return self._transport.send(_calls.create_sweep(spec, idempotency_key))

    def get(self, sweep_id: str) -> SweepPoints:
        return self._transport.send(_calls.get_sweep(sweep_id))

    def list(self) -> Iterator[Sweep]:
        """All sweeps, newest first, without their points."""
        return self._transport.all(_calls.list_sweeps)

    def cancel(self, sweep_id: str) -> SweepPoints:
        """Cancels what has not ended; the frontier of what has stays."""
        return self._transport.send(_calls.cancel_sweep(sweep_id))

    def delete(self, sweep_id: str) -> None:
        self._transport.send(_calls.delete_sweep(sweep_id))

    def wait(self, sweep_id: str, timeout: float | None = None) -> SweepPoints:
        """The sweep once all its points have ended, however they did. Raises JobTimeout after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not (sweep := self.get(sweep_id)).finished:
            if deadline is not None and time.monotonic() > deadline:
                raise JobTimeout(f"The sweep {sweep_id} has not ended after {timeout:g} s; it goes on.")
            time.sleep(1)
        return sweep

    def frontier(self, sweep_id: str) -> Frontier:
        """Loss against parameters and against tokens, of the points that have succeeded so far."""
        return self._transport.send(_calls.get_frontier(sweep_id))

    def frontier_page(self, sweep_id: str) -> str:
        """The same as an HTML page with plots, which needs nothing else."""
        return self._transport.send(_calls.get_frontier_page(sweep_id))


class Models:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def upload(self, folder: Path | str, name: str | None = None) -> Model:
        """Uploads a model folder in the Hugging Face layout. Large files come in pieces: after a break call it again."""
        large = [path for path in _calls.model_files(Path(folder)) if _calls.is_large(path)]
        uploads = [self._transport.upload(path) for path in large]
        return self._transport.send(_calls.upload_model(Path(folder), uploads, name))

    def fetch(self, hub: str, revision: str = "main", name: str | None = None, token: str | None = None) -> Model:
        """Has the service fetch OWNER/NAME from its hub, if it has one; what it has fetched before is there at once.

        `token` is one of the hub's, for a model that it does not show to everybody; by default NARROW_HUB_TOKEN.
        """
        return self._transport.send(_calls.fetch_model(hub, revision, name, token))

    def get(self, model_id: str) -> Model:
        return self._transport.send(_calls.get_model(model_id))

    def list(self) -> Iterator[Model]:
        return self._transport.all(_calls.list_models)

    def delete(self, model_id: str) -> None:
        self._transport.send(_calls.delete_model(model_id))


class Datasets:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def upload(
        self, path: Path | str, name: str | None = None, column: str = "text", bad_rows: _calls.BadRows = "stop"
    ) -> Dataset:
        """Uploads JSON Lines, CSV, TSV or plain text, also packed with gzip or Zstandard, or Parquet. As resumable as models.

        `column` names the text in each row. A bad row refuses the dataset, or with "skip" is left out and counted.
        """
        upload = self._transport.upload(Path(path)) if _calls.is_large(Path(path)) else None
        return self._transport.send(_calls.upload_dataset(Path(path), upload, name, column, bad_rows))

    def get(self, dataset_id: str) -> Dataset:
        return self._transport.send(_calls.get_dataset(dataset_id))

    def list(self) -> Iterator[Dataset]:
        return self._transport.all(_calls.list_datasets)

    def delete(self, dataset_id: str) -> None:
        self._transport.send(_calls.delete_dataset(dataset_id))


class Keys:
    """API keys of one's own tenant; they take a key of an admin."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(self, name: str, role: str = "write", expires_in_days: float | None = None) -> SecretKey:
        """A new key. `role` is read, write or admin; its `key` is in this answer and nowhere else."""
        return self._transport.send(_calls.create_key(name, role, expires_in_days))

    def list(self) -> Iterator[Key]:
        """All keys, without themselves, newest first."""
        return self._transport.all(_calls.list_keys)

    def renew(self, key_id: str, overlap_hours: float = 24.0) -> SecretKey:
        """A new key in the place of an old one, which still counts for `overlap_hours`."""
        return self._transport.send(_calls.renew_key(key_id, overlap_hours))

    def revoke(self, key_id: str) -> None:
        """Ends a key at once."""
        self._transport.send(_calls.revoke_key(key_id))
