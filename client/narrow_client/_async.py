"""`AsyncNarrow`: the twin of `Narrow` for asyncio."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from narrow_client import _calls
from narrow_client._errors import JobTimeout
from narrow_client._files import is_terminal, no_files, targets
from narrow_client._transport import AsyncTransport
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


class AsyncNarrow:
    """A client of one service. `url` and `api_key` default to NARROW_URL and NARROW_API_KEY.

    Transient failures are retried; what the service refuses raises an `ApiError`.
    """

    def __init__(self, url: str | None = None, api_key: str | None = None) -> None:
        self._transport = AsyncTransport(url, api_key)
        self.jobs = AsyncJobs(self._transport)
        self.sweeps = AsyncSweeps(self._transport)
        self.models = AsyncModels(self._transport)
        self.datasets = AsyncDatasets(self._transport)
        self.keys = AsyncKeys(self._transport)

    @property
    def url(self) -> str:
        return str(self._transport.http.base_url)

    async def plan(self, spec: Mapping[str, Any]) -> Plan:
        """A dry run of a job spec: sizes, memory and time, with nothing queued."""
        return await self._transport.send(_calls.create_plan(spec))

    async def usage(self) -> Usage:
        """Jobs, bytes and hours of the key's tenant, and how much of each it may have."""
        return await self._transport.send(_calls.get_usage())

    async def ready(self) -> Health:
        """Whether the service can take work; raises ServerError (503) if it cannot."""
        return await self._transport.send(_calls.ready())

    async def close(self) -> None:
        await self._transport.http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncJobs:
    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def create(self, spec: Mapping[str, Any], idempotency_key: str | None = None) -> Job:
        """Queues a job. A key is made if none is given, so that retries never make two."""
        return await self._transport.send(_calls.create_job(spec, idempotency_key))

    async def get(self, job_id: str) -> Job:
        return await self._transport.send(_calls.get_job(job_id))

    def list(self, status: str | None = None, sweep: str | None = None) -> AsyncIterator[Job]:
        """All jobs, or those of a sweep, newest first; pages are fetched as they are needed."""
        return self._transport.all(lambda cursor: _calls.list_jobs(cursor, status, sweep))

    async def cancel(self, job_id: str) -> Job:
        return await self._transport.send(_calls.cancel_job(job_id))

    async def pause(self, job_id: str) -> Job:
        """Asks a job to stop where it is; it keeps what it has done."""
        return await self._transport.send(_calls.pause_job(job_id))

    async def resume(self, job_id: str) -> Job:
        """Puts a paused job back into the queue."""
        return await self._transport.send(_calls.resume_job(job_id))

    async def delete(self, job_id: str) -> None:
        await self._transport.send(_calls.delete_job(job_id))

    def events(self, job_id: str, after: int = 0) -> AsyncIterator[Event]:
        """The job's events, live, until it is finished; a broken stream goes on where it broke."""
        return self._transport.events(job_id, after)

    async def wait(self, job_id: str, timeout: float | None = None) -> Job:  # noqa: ASYNC109
        """The job once it is finished, however it ended. Raises JobTimeout after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not is_terminal(job := await self.get(job_id)):
            if deadline is not None and time.monotonic() > deadline:
                raise JobTimeout(f"The job {job_id} is still {job.status} after {timeout:g} s; it goes on.")
            await asyncio.sleep(0.5)
        return job

    async def report(self, job_id: str) -> Report:
        return await self._transport.send(_calls.get_report(job_id))

    async def artifacts(self, job_id: str) -> Sequence[Artifact]:
        return (await self._transport.send(_calls.list_artifacts(job_id))).data

    async def download(self, job_id: str, out: Path | str, prefix: str = "") -> Sequence[Path]:
        """Downloads the job's files, or those whose path begins with `prefix`, into `out`; resumed and verified."""
        artifacts = await self.artifacts(job_id)
        if not artifacts:
            raise no_files(await self.get(job_id))
        chosen = targets(artifacts, Path(out), prefix)
        for artifact, target in chosen:
            await self._transport.download(job_id, artifact, target)
        return [target for _, target in chosen]


class AsyncSweeps:
    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def create(self, spec: Mapping[str, Any], idempotency_key: str | None = None) -> SweepPoints:
        """Queues a job for each method, budget and seed of a sweep spec; a key is made if none is given."""
        return await self._transport.send(_calls.create_sweep(spec, idempotency_key))

    async def get(self, sweep_id: str) -> SweepPoints:
        return await self._transport.send(_calls.get_sweep(sweep_id))

    def list(self) -> AsyncIterator[Sweep]:
        """All sweeps, newest first, without their points."""
        return self._transport.all(_calls.list_sweeps)

    async def cancel(self, sweep_id: str) -> SweepPoints:
        """Cancels what has not ended; the frontier of what has stays."""
        return await self._transport.send(_calls.cancel_sweep(sweep_id))

    async def delete(self, sweep_id: str) -> None:
        await self._transport.send(_calls.delete_sweep(sweep_id))

    async def wait(self, sweep_id: str, timeout: float | None = None) -> SweepPoints:  # noqa: ASYNC109
        """The sweep once all its points have ended, however they did. Raises JobTimeout after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not (sweep := await self.get(sweep_id)).finished:
            if deadline is not None and time.monotonic() > deadline:
                raise JobTimeout(f"The sweep {sweep_id} has not ended after {timeout:g} s; it goes on.")
            await asyncio.sleep(1)
        return sweep

    async def frontier(self, sweep_id: str) -> Frontier:
        """Loss against parameters and against tokens, of the points that have succeeded so far."""
        return await self._transport.send(_calls.get_frontier(sweep_id))

    async def frontier_page(self, sweep_id: str) -> str:
        """The same as an HTML page with plots, which needs nothing else."""
        return await self._transport.send(_calls.get_frontier_page(sweep_id))


class AsyncModels:
    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def upload(self, folder: Path | str, name: str | None = None) -> Model:
        """Uploads a model folder in the Hugging Face layout. Large files come in pieces: after a break call it again."""
        large = [path for path in _calls.model_files(Path(folder)) if _calls.is_large(path)]
        uploads = [await self._transport.upload(path) for path in large]
        return await self._transport.send(_calls.upload_model(Path(folder), uploads, name))

    async def fetch(self, hub: str, revision: str = "main", name: str | None = None, token: str | None = None) -> Model:
        """Has the service fetch OWNER/NAME from its hub, if it has one; what it has fetched before is there at once.

        `token` is one of the hub's, for a model that it does not show to everybody; by default NARROW_HUB_TOKEN.
        """
        return await self._transport.send(_calls.fetch_model(hub, revision, name, token))

    async def get(self, model_id: str) -> Model:
        return await self._transport.send(_calls.get_model(model_id))

    def list(self) -> AsyncIterator[Model]:
        return self._transport.all(_calls.list_models)

    async def delete(self, model_id: str) -> None:
        await self._transport.send(_calls.delete_model(model_id))


class AsyncDatasets:
    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def upload(
        self, path: Path | str, name: str | None = None, column: str = "text", bad_rows: _calls.BadRows = "stop"
    ) -> Dataset:
        """Uploads JSON Lines, CSV, TSV or plain text, also packed with gzip or Zstandard, or Parquet. As resumable as models.

        `column` names the text in each row. A bad row refuses the dataset, or with "skip" is left out and counted.
        """
        upload = await self._transport.upload(Path(path)) if _calls.is_large(Path(path)) else None
        return await self._transport.send(_calls.upload_dataset(Path(path), upload, name, column, bad_rows))

    async def get(self, dataset_id: str) -> Dataset:
        return await self._transport.send(_calls.get_dataset(dataset_id))

    def list(self) -> AsyncIterator[Dataset]:
        return self._transport.all(_calls.list_datasets)

    async def delete(self, dataset_id: str) -> None:
        await self._transport.send(_calls.delete_dataset(dataset_id))


class AsyncKeys:
    """API keys of one's own tenant; they take a key of an admin."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def create(self, name: str, role: str = "write", expires_in_days: float | None = None) -> SecretKey:
        """A new key. `role` is read, write or admin; its `key` is in this answer and nowhere else."""
        return await self._transport.send(_calls.create_key(name, role, expires_in_days))

    def list(self) -> AsyncIterator[Key]:
        """All keys, without themselves, newest first."""
        return self._transport.all(_calls.list_keys)

    async def renew(self, key_id: str, overlap_hours: float = 24.0) -> SecretKey:
        """A new key in the place of an old one, which still counts for `overlap_hours`."""
        return await self._transport.send(_calls.renew_key(key_id, overlap_hours))

    async def revoke(self, key_id: str) -> None:
        """Ends a key at once."""
        await self._transport.send(_calls.revoke_key(key_id))
