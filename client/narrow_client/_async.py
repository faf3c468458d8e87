"""`AsyncNarrow`: the service's resources as methods, for asyncio. `Narrow` in _sync.py is made of it: `make openapi`."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from narrow_client import _calls
from narrow_client._errors import ConnectionFailed, JobTimeout, ServerError, not_ready
from narrow_client._files import is_terminal, no_files, targets
from narrow_client._pages import AsyncPages
from narrow_client._transport import RETRIES, AsyncTransport, OnTransfer, Patience
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
    """A client of one service, for asyncio: `Narrow` with `await`.

    What fails in passing (connections, 408, 429, 5xx) is sent again where that is safe, at growing intervals or when the service
    asks for it (Retry-After); a job or sweep is sent again with the same Idempotency-Key, so that there is never a second one.
    What the service refuses raises an `ApiError`, and what it cannot be asked a `NarrowClientError` of another kind.

    Args:
        url: Where the service is; by default NARROW_URL, or http://127.0.0.1:8000.
        api_key: One of the service's keys (nrw_...); by default NARROW_API_KEY.
        timeout: Seconds of silence after which a call counts as lost. By default a minute, and more where the service works
            before it answers. Uploads and downloads take as long as they take, as long as bytes go through.
        max_retries: How often a call is sent again.
        on_transfer: Called with the name of a file that goes up in pieces or comes down, the bytes that are through, and all.

    Raises:
        InvalidArgument: `url` is none, `api_key` cannot be sent, or a number is none that can be.

    Examples:
        >>> async with narrow_client.AsyncNarrow("http://127.0.0.1:8000", timeout=10) as client:
        ...     client.url
        'http://127.0.0.1:8000'
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float | None = None,
        max_retries: int = RETRIES,
        on_transfer: OnTransfer | None = None,
    ) -> None:
        self._transport = AsyncTransport(url, api_key, timeout, max_retries, on_transfer)
        self.jobs = AsyncJobs(self._transport)
        self.sweeps = AsyncSweeps(self._transport)
        self.models = AsyncModels(self._transport)
        self.datasets = AsyncDatasets(self._transport)
        self.keys = AsyncKeys(self._transport)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    @property
    def url(self) -> str:
        """Where the service is.

        Examples:
            >>> client.url.startswith("http")
            True
        """
        return self._transport.url

    async def plan(self, spec: Mapping[str, Any]) -> Plan:
        """A dry run of a job spec, with nothing queued.

        Args:
            spec: What `POST /jobs` takes, as a dict.

        Returns:
            Sizes before and after, what is kept, and estimates of memory and time.

        Raises:
            InvalidRequest: The spec is wrong, or its budget cannot be met.
            NotFound: There is no such model or dataset.

        Examples:
            >>> plan = await client.plan(spec)
            >>> plan.after.parameters < plan.before.parameters
            True
        """
        return await self._transport.send(_calls.create_plan(spec))

    async def usage(self) -> Usage:
        """What the key's tenant uses, and how much of it it may.

        Returns:
            Jobs, bytes and hours, with their limits.

        Examples:
            >>> (await client.usage()).bytes > 0
            True
        """
        return await self._transport.send(_calls.get_usage())

    async def ready(self) -> Health:
        """Whether the service can take work.

        Returns:
            Its checks, all of which are "ok".

        Raises:
            ServerError: It cannot (503); the sentence says why.

        Examples:
            >>> (await client.ready()).status
            'ok'
        """
        health = await self._transport.send(_calls.ready())
        if health.status != "ok":
            raise not_ready(health)
        return health

    async def close(self) -> None:
        """Closes the connections. `async with AsyncNarrow() as client` does so at its end.

        Examples:
            >>> client = narrow_client.AsyncNarrow()
            >>> await client.close()
        """
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncJobs:
    """Compressions: `client.jobs`."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def create(self, spec: Mapping[str, Any], idempotency_key: str | None = None) -> Job:
        """Queues a job.

        Args:
            spec: What `POST /jobs` takes, as a dict: base, target and budget, and any option.
            idempotency_key: Sent again with the same key, the call is answered with the job that it made first, also by another
                process. One is made if none is given, so that retries never make two.

        Returns:
            The job, which is queued.

        Raises:
            InvalidRequest: The spec is wrong, or its budget cannot be met.
            NotFound: There is no such model or dataset.
            NotAllowed: The key may not, or a quota is used up.

        Examples:
            >>> job = await client.jobs.create(spec, idempotency_key="nightly-2026-01-02")
            >>> job.status
            'queued'
            >>> (await client.jobs.create(spec, idempotency_key="nightly-2026-01-02")).id == job.id
            True
        """
        return await self._transport.send(_calls.create_job(spec, idempotency_key))

    async def get(self, job_id: str) -> Job:
        """A job as it is now.

        Args:
            job_id: Its id (job_...).

        Returns:
            The job: its `status`, `phase`, `progress`, `error`, ...

        Raises:
            NotFound: There is no such job.

        Examples:
            >>> (await client.jobs.get(job.id)).status
            'succeeded'
        """
        return await self._transport.send(_calls.get_job(job_id))

    def list(
        self,
        status: _calls.Status | None = None,
        sweep: str | None = None,
        *,
        cursor: str | None = None,
        limit: int | None = None,
    ) -> AsyncPages[Job]:
        """Jobs, newest first.

        Args:
            status: Only those in this state: queued, running, pausing, paused, cancelling, succeeded, failed or cancelled.
            sweep: Only the points of this sweep (swp_...).
            cursor: Where to go on: the `next_cursor` of a page.
            limit: Jobs at most; by default all.

        Returns:
            An iterable over them: pages, of 100 at most, are fetched as they are needed. `.pages()` gives the pages.

        Examples:
            >>> async for job in client.jobs.list(status="succeeded"):
            ...     print(job.status, job.phase)
            succeeded report
        """
        if sweep is not None:
            _calls.path_of("sweep", sweep)  # an id, or an InvalidArgument
        return self._transport.all(lambda at, most: _calls.list_jobs(at, most, status, sweep), cursor, limit)

    async def cancel(self, job_id: str) -> Job:
        """Asks a job to end. A queued one is cancelled at once, a running one within seconds.

        Args:
            job_id: Its id (job_...).

        Returns:
            The job, which is cancelled or cancelling.

        Raises:
            Conflict: It has ended.
            NotFound: There is no such job.

        Examples:
            >>> job = await client.jobs.create(spec)
            >>> (await client.jobs.cancel(job.id)).status
            'cancelled'
        """
        return await self._transport.send(_calls.cancel_job(job_id))

    async def pause(self, job_id: str) -> Job:
        """Asks a job to stop where it is; it keeps what it has done, and `resume` lets it go on from there.

        Args:
            job_id: Its id (job_...).

        Returns:
            The job, which is paused or pausing.

        Raises:
            Conflict: It has ended, or is about to.
            NotFound: There is no such job.

        Examples:
            >>> job = await client.jobs.create(spec)
            >>> (await client.jobs.pause(job.id)).status
            'paused'
        """
        return await self._transport.send(_calls.pause_job(job_id))

    async def resume(self, job_id: str) -> Job:
        """Puts a paused job back into the queue, at its old place.

        Args:
            job_id: Its id (job_...).

        Returns:
            The job, which is queued.

        Raises:
            Conflict: It is not paused.
            NotFound: There is no such job.

        Examples:
            >>> job = await client.jobs.pause((await client.jobs.create(spec)).id)
            >>> (await client.jobs.resume(job.id)).status
            'queued'
        """
        return await self._transport.send(_calls.resume_job(job_id))

    async def delete(self, job_id: str) -> None:
        """Forgets a job that has ended, with its events and files. The model that came out of it stays.

        Args:
            job_id: Its id (job_...).

        Raises:
            Conflict: It has not ended: cancel it first.
            NotFound: There is no such job.

        Examples:
            >>> job = await client.jobs.cancel((await client.jobs.create(spec)).id)
            >>> await client.jobs.delete(job.id)
        """
        await self._transport.send(_calls.delete_job(job_id))

    def events(self, job_id: str, after: int = 0) -> AsyncIterator[Event]:
        """The job's events, live, until it has ended; a broken stream goes on where it broke, without a gap.

        Args:
            job_id: Its id (job_...).
            after: Only those that follow the event with this `seq`.

        Returns:
            An iterator over the events.

        Raises:
            NotFound: There is no such job.
            ConnectionFailed: The service was away for more than a minute.

        Examples:
            >>> [event.message async for event in client.jobs.events(job.id)][-1]
            'succeeded'
        """
        return self._transport.events(job_id, after)

    async def wait(self, job_id: str, timeout: float | None = None) -> Job:  # noqa: ASYNC109
        """Waits until a job has ended, however it did.

        Args:
            job_id: Its id (job_...).
            timeout: Seconds to wait at most; by default for ever.

        Returns:
            The job, which is succeeded, failed or cancelled.

        Raises:
            JobTimeout: It took longer than `timeout`; it goes on.
            NotFound: There is no such job.
            ConnectionFailed: The service was away for more than a minute.

        Examples:
            >>> (await client.jobs.wait(job.id, timeout=60)).status
            'succeeded'
        """
        _calls.check_seconds("timeout", timeout, zero=True)
        deadline, patience = None if timeout is None else time.monotonic() + timeout, Patience()
        while True:
            try:
                job = await self.get(job_id)
                patience.content()
                if is_terminal(job):
                    return job
                if deadline is not None and time.monotonic() > deadline:
                    raise JobTimeout(f"The job {job_id} is still {job.status} after {timeout:g} s; it goes on.")
            except (ConnectionFailed, ServerError) as error:
                patience.bear(error)
            await asyncio.sleep(0.5)

    async def report(self, job_id: str) -> Report:
        """What came of a job: sizes, skills, speed, what was cut, and how to run it again.

        Args:
            job_id: Its id (job_...).

        Returns:
            The report.

        Raises:
            NotFound: There is no such job.
            Conflict: It has not succeeded (yet).

        Examples:
            >>> report = await client.jobs.report(job.id)
            >>> 0 < report.skills["python"].retention.value < 2
            True
        """
        return await self._transport.send(_calls.get_report(job_id))

    async def artifacts(self, job_id: str) -> Sequence[Artifact]:
        """The files that a job has made, with their sizes and digests.

        Args:
            job_id: Its id (job_...).

        Returns:
            The files; none before the job has succeeded.

        Raises:
            NotFound: There is no such job.

        Examples:
            >>> [file.path for file in await client.jobs.artifacts(job.id) if file.path.endswith("model.safetensors")]
            ['model/model.safetensors']
        """
        return (await self._transport.send(_calls.list_artifacts(job_id))).data

    async def download(self, job_id: str, out: Path | str, prefix: str = "") -> Sequence[Path]:
        """Downloads the job's files. What broke off goes on where it was, and what arrives is checked by its digest.

        Args:
            job_id: Its id (job_...).
            out: The folder to put them in; made if it is missing.
            prefix: Only those whose path begins so: "model/", "onnx/model.onnx", "report.html".

        Returns:
            Where the files are.

        Raises:
            NotFound: There is no such job.
            NarrowClientError: The job has no files, or none that begins so.
            DigestMismatch: What arrived is not what the service announced, twice.

        Examples:
            >>> [path.name for path in await client.jobs.download(job.id, out, "report.html")]
            ['report.html']
        """
        folder = _calls.a_path("out", out)
        artifacts = await self.artifacts(job_id)
        if not artifacts:
            raise no_files(await self.get(job_id))
        chosen = targets(artifacts, folder, prefix)
        for artifact, target in chosen:
            await self._transport.download(job_id, artifact, target)
        return [target for _, target in chosen]


class AsyncSweeps:
    """Comparisons of methods, budgets and seeds over one base and target: `client.sweeps`."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def create(self, spec: Mapping[str, Any], idempotency_key: str | None = None) -> SweepPoints:
        """Queues a job for each method, budget and seed.

        Args:
            spec: What `POST /sweeps` takes, as a dict.
            idempotency_key: As in `jobs.create`.

        Returns:
            The sweep with its points.

        Raises:
            InvalidRequest: The spec is wrong, or a budget cannot be met.
            NotFound: There is no such model or dataset.
            NotAllowed: The key may not, or a quota is used up.

        Examples:
            >>> budgets = [{"parameters": 0.9}, {"parameters": 0.85}]
            >>> sweep = await client.sweeps.create({"base": spec["base"], "target": spec["target"], "budgets": budgets})
            >>> sweep.counts
            {'queued': 2}
        """
        return await self._transport.send(_calls.create_sweep(spec, idempotency_key))

    async def get(self, sweep_id: str) -> SweepPoints:
        """A sweep as it is now.

        Args:
            sweep_id: Its id (swp_...).

        Returns:
            The sweep with its points and, of those that have succeeded, their figures.

        Raises:
            NotFound: There is no such sweep.

        Examples:
            >>> (await client.sweeps.get(sweep.id)).finished
            False
        """
        return await self._transport.send(_calls.get_sweep(sweep_id))

    def list(self, *, cursor: str | None = None, limit: int | None = None) -> AsyncPages[Sweep]:
        """Sweeps, newest first, without their points.

        Args:
            cursor: Where to go on: the `next_cursor` of a page.
            limit: Sweeps at most; by default all.

        Returns:
            An iterable over them: pages, of 100 at most, are fetched as they are needed. `.pages()` gives the pages.

        Examples:
            >>> sweep.id in [found.id async for found in client.sweeps.list()]
            True
        """
        return self._transport.all(lambda at, most: _calls.list_sweeps(at, most), cursor, limit)

    async def cancel(self, sweep_id: str) -> SweepPoints:
        """Cancels what has not ended; the frontier of what has stays.

        Args:
            sweep_id: Its id (swp_...).

        Returns:
            The sweep.

        Raises:
            Conflict: All of it has ended.
            NotFound: There is no such sweep.

        Examples:
            >>> (await client.sweeps.cancel(sweep.id)).counts
            {'cancelled': 1}
        """
        return await self._transport.send(_calls.cancel_sweep(sweep_id))

    async def delete(self, sweep_id: str) -> None:
        """Forgets a sweep that has ended, with its jobs and their files. The models that came out of it stay.

        Args:
            sweep_id: Its id (swp_...).

        Raises:
            Conflict: It has not ended: cancel it first.
            NotFound: There is no such sweep.

        Examples:
            >>> sweep = await client.sweeps.cancel(sweep.id)
            >>> await client.sweeps.delete(sweep.id)
        """
        await self._transport.send(_calls.delete_sweep(sweep_id))

    async def wait(self, sweep_id: str, timeout: float | None = None) -> SweepPoints:  # noqa: ASYNC109
        """Waits until all points of a sweep have ended, however they did.

        Args:
            sweep_id: Its id (swp_...).
            timeout: Seconds to wait at most; by default for ever.

        Returns:
            The sweep.

        Raises:
            JobTimeout: It took longer than `timeout`; it goes on.
            NotFound: There is no such sweep.
            ConnectionFailed: The service was away for more than a minute.

        Examples:
            >>> sweep = await client.sweeps.cancel(sweep.id)
            >>> (await client.sweeps.wait(sweep.id, timeout=60)).finished
            True
        """
        _calls.check_seconds("timeout", timeout, zero=True)
        deadline, patience = None if timeout is None else time.monotonic() + timeout, Patience()
        while True:
            try:
                sweep = await self.get(sweep_id)
                patience.content()
                if sweep.finished:
                    return sweep
                if deadline is not None and time.monotonic() > deadline:
                    raise JobTimeout(f"The sweep {sweep_id} has not ended after {timeout:g} s; it goes on.")
            except (ConnectionFailed, ServerError) as error:
                patience.bear(error)
            await asyncio.sleep(1)

    async def frontier(self, sweep_id: str) -> Frontier:
        """Loss against parameters and against tokens, of the points that have succeeded so far.

        Args:
            sweep_id: Its id (swp_...).

        Returns:
            A row for each method and budget, with the spread over the seeds.

        Raises:
            NotFound: There is no such sweep.

        Examples:
            >>> (await client.sweeps.frontier(sweep.id)).finished
            0
        """
        return await self._transport.send(_calls.get_frontier(sweep_id))

    async def frontier_page(self, sweep_id: str) -> str:
        """The frontier as an HTML page with plots, which needs nothing else.

        Args:
            sweep_id: Its id (swp_...).

        Returns:
            The page.

        Raises:
            NotFound: There is no such sweep.

        Examples:
            >>> (await client.sweeps.frontier_page(sweep.id))[:15]
            '<!doctype html>'
        """
        return await self._transport.send(_calls.get_frontier_page(sweep_id))


class AsyncModels:
    """Base models, and those that came out of jobs: `client.models`."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def upload(self, folder: Path | str, name: str | None = None) -> Model:
        """Uploads a model folder in the Hugging Face layout.

        Large files come in pieces, so after a break call it again: it goes on where it was. The same files under the same name
        are not sent a second time: the model that is there is returned.

        Args:
            folder: With config.json, tokenizer.json and model*.safetensors; other files are left.
            name: What reports call it; by default the folder's name.

        Returns:
            The model, whose `id` is good for any number of jobs.

        Raises:
            InvalidArgument: There is no such folder, or no config.json in it.
            InvalidRequest: It is no model that the service takes; the sentence says why.
            NotAllowed: The key may not, or a quota is used up.

        Examples:
            >>> (await client.models.upload(folder, "my base")).name
            'my base'
        """
        folder = _calls.model_folder(folder)
        name = _calls.model_name(folder, name)
        files = await asyncio.to_thread(_calls.describe, *_calls.model_files(folder))
        async for known in self.list(sha256=_calls.model_sha256(files)):
            if _calls.same_name(known.name, name or ""):
                return known
        uploads = [await self._transport.upload(file) for file in files if file.large]
        return await self._transport.send(_calls.upload_model(files, uploads, name))

    async def fetch(self, hub: str, revision: str = "main", name: str | None = None, token: str | None = None) -> Model:
        """Has the service fetch a model from its hub, if it has one; what it has fetched before is there at once.

        Args:
            hub: OWNER/NAME there.
            revision: A branch, a tag or a commit.
            name: What reports call it; by default as the hub does.
            token: One of the hub's, for a model that it does not show to everybody; by default NARROW_HUB_TOKEN.

        Returns:
            The model; its `source` has the commit.

        Raises:
            InvalidRequest: The service has no hub, or does not take what is there; the sentence says why.

        Examples:
            >>> try:
            ...     await client.models.fetch("HuggingFaceTB/SmolLM2-135M")
            ... except narrow_client.ApiError as error:
            ...     print(error.code)
            no_hub
        """
        return await self._transport.send(_calls.fetch_model(hub, revision, name, token))

    async def get(self, model_id: str) -> Model:
        """A model.

        Args:
            model_id: Its id (mdl_...).

        Returns:
            The model: its family, parameters, config, the kinds of unit that can be cut from it, ...

        Raises:
            NotFound: There is no such model.

        Examples:
            >>> (await client.models.get(model.id)).family
            'llama'
        """
        return await self._transport.send(_calls.get_model(model_id))

    def list(self, *, cursor: str | None = None, limit: int | None = None, sha256: str | None = None) -> AsyncPages[Model]:
        """Models, newest first.

        Args:
            cursor: Where to go on: the `next_cursor` of a page.
            limit: Models at most; by default all.
            sha256: Only those of this digest, which the service has of names and digests of their files.

        Returns:
            An iterable over them: pages, of 100 at most, are fetched as they are needed. `.pages()` gives the pages.

        Examples:
            >>> model.id in [found.id async for found in client.models.list()]
            True
        """
        return self._transport.all(lambda at, most: _calls.list_models(at, most, sha256), cursor, limit)

    async def delete(self, model_id: str) -> None:
        """Forgets a model and its files.

        Args:
            model_id: Its id (mdl_...).

        Raises:
            Conflict: A job that has not ended needs it.
            NotFound: There is no such model.

        Examples:
            >>> await client.models.delete((await client.models.upload(folder, "a second one")).id)
        """
        await self._transport.send(_calls.delete_model(model_id))


class AsyncDatasets:
    """Texts to compress to and to measure on: `client.datasets`."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def upload(
        self, path: Path | str, name: str | None = None, column: str = "text", bad_rows: _calls.BadRows = "stop"
    ) -> Dataset:
        """Uploads a file of text. A large one comes in pieces, so after a break call it again: it goes on where it was.

        The same file under the same name, read in the same way, is not sent a second time: the dataset that is there is returned.

        Args:
            path: JSON Lines, CSV, TSV or plain text, also packed with gzip or Zstandard, or Parquet; its ending says which.
            name: What reports call it; by default the file's name.
            column: The text in each row.
            bad_rows: "stop": a bad row refuses the file. "skip": it is left out and counted.

        Returns:
            The dataset, whose `id` is good for any number of jobs.

        Raises:
            InvalidArgument: There is no such file.
            InvalidRequest: A row is bad; the sentence says which, and what is wrong with it.
            NotAllowed: The key may not, or a quota is used up.

        Examples:
            >>> (await client.datasets.upload(file)).documents
            60
        """
        [file] = await asyncio.to_thread(_calls.describe, _calls.data_file(path))
        async for known in self.list(sha256=file.sha256):
            if _calls.same_dataset(known, file, name, column, bad_rows):
                return known
        upload = await self._transport.upload(file) if file.large else None
        return await self._transport.send(_calls.upload_dataset(file, upload, name, column, bad_rows))

    async def get(self, dataset_id: str) -> Dataset:
        """A dataset.

        Args:
            dataset_id: Its id (ds_...).

        Returns:
            The dataset: its documents, bytes, a preview, ...

        Raises:
            NotFound: There is no such dataset.

        Examples:
            >>> (await client.datasets.get(dataset.id)).column
            'text'
        """
        return await self._transport.send(_calls.get_dataset(dataset_id))

    def list(self, *, cursor: str | None = None, limit: int | None = None, sha256: str | None = None) -> AsyncPages[Dataset]:
        """Datasets, newest first.

        Args:
            cursor: Where to go on: the `next_cursor` of a page.
            limit: Datasets at most; by default all.
            sha256: Only those of a file with this digest.

        Returns:
            An iterable over them: pages, of 100 at most, are fetched as they are needed. `.pages()` gives the pages.

        Examples:
            >>> dataset.id in [found.id async for found in client.datasets.list()]
            True
        """
        return self._transport.all(lambda at, most: _calls.list_datasets(at, most, sha256), cursor, limit)

    async def delete(self, dataset_id: str) -> None:
        """Forgets a dataset and its text.

        Args:
            dataset_id: Its id (ds_...).

        Raises:
            Conflict: A job that has not ended needs it.
            NotFound: There is no such dataset.

        Examples:
            >>> await client.datasets.delete((await client.datasets.upload(file, "a second one")).id)
        """
        await self._transport.send(_calls.delete_dataset(dataset_id))


class AsyncKeys:
    """API keys of one's own tenant: `client.keys`. They take a key of an admin."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def create(self, name: str, role: _calls.Role = "write", expires_in_days: float | None = None) -> SecretKey:
        """A new key.

        Args:
            name: What lists call it.
            role: "read", "write" or "admin".
            expires_in_days: Until it does not count any more; by default never.

        Returns:
            The key, whose `key` is in this answer and nowhere else.

        Raises:
            NotAllowed: The caller is not an admin.

        Examples:
            >>> (await client.keys.create("nightly", role="read")).key[:4]
            'nrw_'
        """
        return await self._transport.send(_calls.create_key(name, role, expires_in_days))

    def list(self, *, cursor: str | None = None, limit: int | None = None) -> AsyncPages[Key]:
        """Keys, without themselves, newest first.

        Args:
            cursor: Where to go on: the `next_cursor` of a page.
            limit: Keys at most; by default all.

        Returns:
            An iterable over them: pages, of 100 at most, are fetched as they are needed. `.pages()` gives the pages.

        Raises:
            NotAllowed: The caller is not an admin.

        Examples:
            >>> key.id in [found.id async for found in client.keys.list()]
            True
        """
        return self._transport.all(lambda at, most: _calls.list_keys(at, most), cursor, limit)

    async def renew(self, key_id: str, overlap_hours: float = 24.0) -> SecretKey:
        """A new key in the place of an old one.

        Args:
            key_id: The old one's id (key_...).
            overlap_hours: How long the old one still counts.

        Returns:
            The key, whose `key` is in this answer and nowhere else.

        Raises:
            NotAllowed: The caller is not an admin.
            NotFound: There is no such key.
            Conflict: The old one was revoked.

        Examples:
            >>> (await client.keys.renew(key.id, overlap_hours=1)).name == key.name
            True
        """
        return await self._transport.send(_calls.renew_key(key_id, overlap_hours))

    async def revoke(self, key_id: str) -> None:
        """Ends a key at once.

        Args:
            key_id: Its id (key_...).

        Raises:
            NotAllowed: The caller is not an admin.
            NotFound: There is no such key.

        Examples:
            >>> await client.keys.revoke(key.id)
        """
        await self._transport.send(_calls.revoke_key(key_id))
