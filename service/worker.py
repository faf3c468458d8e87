"""The worker: claims a job, runs the engine on it as a process, and carries its events and results into the database.

It never imports torch. Whatever happens to the job process, the worker lives on; whatever happens to the worker, the
lease runs out and another one goes on in the same run folder, where finished stages are not run again.
"""

import errno
import logging
import math
import mimetypes
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import httpx
from opentelemetry.trace import Span
from pydantic import ValidationError
from sqlalchemy import Engine
from sqlalchemy.exc import NoResultFound
from sqlmodel import Session

from narrow_engine.documents import ending
from narrow_engine.errors import NarrowError, tells_of_no_memory
from narrow_engine.events import Event
from narrow_engine.spec import INPUTS, PLACING, CompressionSpec, DatasetId, JobSpec, ModelId, first_fault
from service import janitor, logs, metrics, queue, told, traces
from service.db import session as db
from service.db.session import connect, open_session, publishing, read_session
from service.db.tables import TERMINAL, ArtifactRow, DatasetRow, JobRow, ModelRow, OutcomeRow, now
from service.runners import local, ray
from service.saves import Saves
from service.settings import Settings
from service.storage import Storage, StorageAway, artifact_key, open_storage

LOOK_SECONDS = 0.25
USE_SECONDS = 2.0
"""Between two looks at what a job takes."""
PAUSE_SECONDS = 1.0
"""Between two tries while the database fails."""

PROCESS_LOST = "process_lost"
"""What the engine says when one of the processes that it trains on is gone."""

FULL_BYTES = 2**20
"""A disk with less than this left counts as full."""

SAVE_LEASES = 1.5
"""Between two saves of a run folder, in lengths of a lease: so long nobody hears of a lost machine, and as much is lost again."""

EVENT_BYTES = 2**20
"""Of a job's events that are read at a time."""
EVENTS_A_SECOND, EVENTS = 2, 100_000
"""The most that the engine tells of progress; and of everything else, in all."""
TOLD_BYTES = 2**16
"""Of what a process that fails says."""

PATIENCE = 5
"""Tries that are left to a worker that is to stop."""

AWAY = (*db.AWAY, StorageAway)
"""What is not there for a while: the database, or the bucket."""

T = TypeVar("T")
log = logging.getLogger("narrow.worker")


def work(settings: Settings, stop: threading.Event) -> None:
    """Runs jobs one after the other until `stop` is set, or has a cluster run them."""
    settings.prepare()
    engine, storage = connect(settings), open_storage(settings)
    cluster = ray.Cluster(settings) if settings.runner == "ray" else None
    tidied = -math.inf
    while not stop.is_set():
        job = None
        try:
            if time.monotonic() - tidied > settings.janitor_seconds:
                tidied = time.monotonic()
                janitor.tidy(engine, settings, storage)
            if cluster:
                ray.look(settings, engine, cluster)
            else:
                with open_session(engine) as session:
                    job = queue.claim(session, settings.lease_seconds, settings.max_attempts)
        except (*AWAY, httpx.HTTPError, OSError) as error:
            _complain(error)
            stop.wait(PAUSE_SECONDS)
            continue
        if job is None:
            stop.wait(settings.poll_seconds)
            continue
        _run(settings, engine, storage, job, stop)
    engine.dispose()


def _run(settings: Settings, engine: Engine, storage: Storage, job: JobRow, stop: threading.Event) -> None:
    with logs.concerning(job=job.id, tenant=job.tenant, attempt=job.attempt), traces.of_job(job) as span:
        _carry(_Execution(settings, engine, storage, job, span, stop), stop)


def _carry(execution: "_Execution", stop: threading.Event) -> None:
    job, began, outcome = execution.job, time.monotonic(), "error"
    metrics.claims.labels("first" if job.attempt == 1 else "later").inc()
    if job.attempt == 1:
        metrics.waits.observe((now() - job.created_at).total_seconds())
    log.info("claimed")
    try:
        execution.run()
        outcome = execution.outcome
        if outcome in TERMINAL:
            # Only now: in a bucket it takes a while, and while a result is being published nobody else can remove anything.
            janitor.remove_run(execution.settings, execution.storage, job.id)
    except queue.LeaseLost:
        log.warning("%s was taken over by another worker", job.id)
        outcome = "lost"
    except Exception:
        # The lease runs out, and the job has another attempt or fails by their number.
        log.exception("%s could not be carried on", job.id)
        stop.wait(PAUSE_SECONDS)
    seconds = time.monotonic() - began
    metrics.runs.labels(outcome).observe(seconds)
    traces.ended(execution.span, outcome, execution.error)
    log.info("let go", extra={"fields": {"outcome": outcome, "seconds": round(seconds, 1)}})


def _complain(error: Exception) -> None:
    what = "storage" if isinstance(error, StorageAway) else "cluster" if isinstance(error, httpx.HTTPError) else "database"
    metrics.troubles.labels(what).inc()
    words = str(getattr(error, "orig", error)).partition("\n")[0]
    log.error("%s: trying again in %g s: %s", what, PAUSE_SECONDS, words or type(error).__name__)


class _Execution:
    """One start of one job."""

    def __init__(
        self, settings: Settings, engine: Engine, storage: Storage, job: JobRow, span: Span, stop: threading.Event
    ) -> None:
        assert job.lease_token is not None
        self.settings, self.engine, self.storage, self.stop = settings, engine, storage, stop
        self.job, self.id, self.token = job, job.id, job.lease_token
        self.folder = settings.tenants / job.tenant / "runs" / job.id
        self.read, self.told = 0, job.engine_seq
        self.shelf = settings.tenants / job.tenant / "stages"
        self.processes = max(1, job.spec.get("resources", {}).get("gpus", 0))
        self.memory = job.spec.get("resources", {}).get("memory")
        self.saves = Saves(storage, job.id, job.last_seq, self.folder) if settings.storage_url else None
        self.held = time.monotonic()
        self.outcome = "error"
        self.exceeded: NarrowError | None = None
        self.error: dict[str, str] | None = None
        self.span = span
        self.started: dict[str, Event] = {}

    def run(self) -> None:
        try:
            self._run()
        except told.Unfit as error:
            # As after every failure of the engine nothing is gained by another start; and it may have been taken over.
            log.error("%s wrote what the engine does not: %s", self.id, error)
            self._failed("engine_error", f"The engine failed, which must not happen: {error}.")

    def _run(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._beating():
                if self.saves:
                    self._patiently(self.saves.restore)
                spec, inputs = self._patiently(self._write_spec)
            self._patiently(self._ingest)  # what the last worker here had no time for
            process = local.start(
                self.settings, spec, inputs, self.folder.resolve(), self.shelf.resolve(), self.told, self.processes, self.memory
            )
        except OSError as error:
            self._failed(
                "disk_full" if error.errno == errno.ENOSPC else "not_started",
                f"The job could not start: {error.strerror}.",
            )
            return
        except (ValidationError, NoResultFound) as error:
            log.error("%s: its spec cannot be built: %s", self.id, error)
            self._failed("bad_spec", f"The job cannot be told to the engine: {_reason(error)} Make a new job.")
            return
        with self._saving():
            try:
                status = self._follow(process)
            finally:
                # Also when the lease is lost or the worker itself fails: nothing runs on unobserved.
                local.end(process, 0)
        self._patiently(self._ingest)
        if status == "cancelling":
            self._finish("cancelled")
        elif status == "exceeded":
            assert self.exceeded
            self._failed(self.exceeded.code, str(self.exceeded))
        elif process.returncode != 0 and (self.stop.is_set() or status in ("pausing", "away")):
            self._save()
            self._release(counts=False)
        else:
            self._conclude(process.returncode)

    def _follow(self, process: subprocess.Popen[bytes]) -> str:
        """Waits for the process, with an eye on who wants it to end; returns the job's last status, "away" or "exceeded"."""
        status, beaten, self.held = "running", 0.0, time.monotonic()
        began = looked = self.held
        shelf = local.kept(self.shelf)
        threading.Thread(target=self._guard, args=(process,), daemon=True).start()
        while process.poll() is None:
            try:
                if time.monotonic() - beaten > min(0.5, self.settings.lease_seconds / 4):
                    beaten = time.monotonic()
                    with open_session(self.engine) as session:
                        status = queue.heartbeat(session, self.id, self.token, self.settings.lease_seconds)
                    self.held = beaten
                self._ingest()
            except AWAY as error:
                _complain(error)
                if time.monotonic() - self.held + PAUSE_SECONDS > self.settings.lease_seconds:
                    # From now on another worker may have the job, and two must not run in one folder.
                    return "away"
                time.sleep(PAUSE_SECONDS)
            if time.monotonic() - looked > USE_SECONDS:
                looked = time.monotonic()
                self.exceeded = self._exceeded(process, self.job.seconds + looked - began, shelf)
                if self.exceeded:
                    local.end(process, 0)
                    return "exceeded"
            if status == "cancelling":
                local.end(process, self.settings.cancel_seconds)
            elif self.stop.is_set() or status == "pausing":
                local.end(process, self.settings.drain_seconds)
            else:
                time.sleep(LOOK_SECONDS)
        return status

    def _exceeded(self, process: subprocess.Popen[bytes], seconds: float, shelf: local.Kept) -> NarrowError | None:
        """What a job has taken too much of. `shelf`: what was on its tenant's as it began."""
        if seconds > self.settings.max_job_seconds:
            return NarrowError(
                "too_long",
                f"The job has run for {self.settings.max_job_seconds:g} s, which is all that this service gives one: recover on "
                "fewer tokens, or cut by an importance that costs less.",
            )
        memory, processes = local.taken(process)
        # Twice, since the process that checks a result loads it beside the one that has made it.
        most = 2 * self.processes * local.memory_of(self.settings, self.memory)
        if memory > most:
            return NarrowError(
                "out_of_memory",
                f"The job's processes took {memory:,} bytes of memory together, of {most:,}: give it more, in resources.memory, "
                "or lower method.recover.batch_tokens or block_tokens.",
            )
        if processes > self.processes * local.PROCESSES:
            told = f"The job began {processes} processes, which no method needs: it was ended."
            return NarrowError("too_many_processes", told)
        own, others = local.kept(self.folder), local.kept(self.shelf)
        size, files = own.bytes + max(0, others.bytes - shelf.bytes), own.files + max(0, others.files - shelf.files)
        if size > self.settings.max_job_bytes or files > local.KEPT_FILES:
            return NarrowError(
                "too_much_disk",
                f"The job keeps {size:,} bytes in {files:,} files while it runs, and the service gives it "
                f"{self.settings.max_job_bytes:,} bytes in {local.KEPT_FILES:,} files (NARROW_MAX_JOB_BYTES).",
            )
        return None

    def _guard(self, process: subprocess.Popen[bytes]) -> None:
        """Ends the process when its lease has run out, also where a call of the database hangs and nobody can see it."""
        while process.poll() is None:
            if time.monotonic() - self.held > self.settings.lease_seconds:
                log.error("the lease ran out while the database was silent: the job process is ended")
                local.end(process, 0)
            time.sleep(LOOK_SECONDS)

    def _patiently(self, act: Callable[[], T]) -> T:
        """Does something with the database, again and again while it is away: a job is too dear to be lost to that."""
        left = PATIENCE
        while True:
            try:
                return act()
            except AWAY as error:
                left -= self.stop.is_set()
                if not left:
                    raise
                _complain(error)
                time.sleep(PAUSE_SECONDS)

    def _ingest(self) -> None:
        """Whole new lines of events.jsonl, into the table."""
        with suppress(FileNotFoundError), told.opened(self.folder / "events.jsonl") as file:
            file.seek(self.read)
            while whole := told.whole_lines(file.read(EVENT_BYTES)):
                self._tell([told.event(line) for line in whole.splitlines()])
                self.read += len(whole)
                if self.read > told.EVENTS_BYTES:
                    raise told.Unfit(f"its events have more than {told.EVENTS_BYTES >> 20} MiB")
                file.seek(self.read)

    def _tell(self, events: list[Event]) -> None:
        most = EVENTS + EVENTS_A_SECOND * self.settings.max_job_seconds
        if max(item.seq for item in events) > most:
            raise told.Unfit(f"it told of more than {most:,.0f} events")
        with open_session(self.engine) as session:
            queue.ingest(session, self.id, self.token, events)
        self.told = max(self.told, events[-1].seq)
        for item in events:
            if item.kind == "started":
                self.started[item.phase] = item
            elif item.kind == "finished" and not item.data.get("reused") and item.phase in self.started:
                began = self.started[item.phase]
                metrics.stages.labels(item.phase).observe((item.time - began.time).total_seconds())
                traces.of_stage(self.span, began, item)

    def _conclude(self, code: int) -> None:
        failure = told.failure(self.folder / "failure.json")
        # Of several processes torchrun only says whether all ended well.
        lost = self.processes > 1 and code == 1
        if code == 0:
            try:
                self._patiently(self._publish)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                self._failed(
                    "disk_full",
                    "The disk is full: the results could not be kept. Free some space and start the job again.",
                )
        elif code == 1 and failure and failure.code != PROCESS_LOST:
            self._failed(failure.code, failure.message)
        elif code > 0 and code != 130 and not lost and shutil.disk_usage(self.folder).free < FULL_BYTES:
            # On a full disk the engine cannot even write down what was wrong.
            self._failed("disk_full", "The disk was full while the job ran: free some space and start the job again.")
        elif code < 0 or code == 130 or lost:
            name = signal.Signals(-code).name if code < 0 else "the end of one of its processes" if lost else "SIGTERM"
            if self.job.attempt < self.settings.max_attempts:
                log.warning("%s: the job process was ended by %s, it will be started again", self.id, name)
                self._release(counts=True)
            else:
                self._failed(
                    "process_killed",
                    f"The job process was ended by {name} {self.job.attempt} times, most often because memory ran out: "
                    "lower method.recover.batch_tokens or block_tokens, or take a machine with more.",
                )
        else:
            last = (_end_of(self.folder / "stderr.log").strip().splitlines() or [""])[-1]
            if tells_of_no_memory(last):
                self._failed(
                    "out_of_memory",
                    "The job ran out of memory as it began: give it more (resources.memory, NARROW_MAX_JOB_MEMORY).",
                )
                return
            log.error("%s failed: %s", self.id, last[:500])
            self._failed("engine_error", f"The engine failed, which must not happen: {last[:200]}")

    def _publish(self) -> None:
        """Stores the results, then ends the job in one transaction: a reader sees all of them or none."""
        result = self.folder / "result"
        with publishing(self.engine, self.settings.data) as held, self._beating():
            files: list[ArtifactRow] = []
            for path in told.files(result, local.FILE_PER_MODEL * self.settings.max_model_bytes):
                name = path.relative_to(result).as_posix()
                media_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
                files.append(
                    ArtifactRow(
                        job_id=self.id,
                        path=name,
                        bytes=path.stat().st_size,
                        sha256=self.storage.put_artifact(path),
                        media_type=media_type,
                    )
                )
            model = self._keep_model(result / "model")
            rows: list[Any] = [*files, model]
            if self.job.sweep:
                rows.append(OutcomeRow(job_id=self.id, outcome=told.outcome_of(result / "report.json")))
            held()
            self._finish("succeeded", rows=rows)
        with suppress(StorageAway):  # a mark that stays costs the janitor a look
            self.storage.sure(*(artifact_key(f.sha256) for f in files), f"models/{model.id}")

    @contextmanager
    def _beating(self) -> Iterator[None]:
        """Keeps the lease while results are copied, which for a large model takes longer than it lasts."""
        done = threading.Event()

        def beat() -> None:
            while not done.wait(self.settings.lease_seconds / 4):
                with suppress(queue.LeaseLost, *AWAY), open_session(self.engine) as session:
                    queue.heartbeat(session, self.id, self.token, self.settings.lease_seconds)

        thread = threading.Thread(target=beat)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """Saves the folder now and then, for a machine that has to go on without this one."""
        done = threading.Event()

        def save() -> None:
            took = 0.0
            # At most a tenth of the time goes into it, however large the folder is.
            while not done.wait(max(SAVE_LEASES * self.settings.lease_seconds, 10 * took)):
                began = time.monotonic()
                self._save(done.is_set)
                took = time.monotonic() - began

        thread = threading.Thread(target=save)
        if self.saves:
            thread.start()
        try:
            yield
        finally:
            done.set()
            if self.saves:
                thread.join()

    def _save(self, enough: Callable[[], bool] = lambda: False) -> None:
        if self.saves:
            try:
                with self._beating():
                    self.saves.save(enough)
            except (StorageAway, OSError, RecursionError) as error:
                log.warning("the run folder is not saved this time: %s", error)

    def _keep_model(self, source: Path) -> ModelRow:
        # The id follows from the job's, so a publication that was interrupted is repeated in the same place.
        identifier = "mdl_" + self.id.removeprefix("job_")
        temporary = self.settings.data / "models" / f".{identifier}"
        # People download it and go on from it: it is held to the rules of what is uploaded.
        paths = told.model_files(source)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for path in paths:
            shutil.copyfile(path, temporary / path.name, follow_symlinks=False)
        try:
            info = local.try_model(temporary).model_dump(mode="json")
        except NarrowError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise told.Unfit(f"the model that it made is none: {error}") from error
        stored = sum(path.stat().st_size for path in temporary.iterdir())
        self.storage.doubt(f"models/{identifier}")
        self.storage.keep(temporary, f"models/{identifier}")
        name = self._patiently(self._model_name)
        return ModelRow(id=identifier, name=name[:100], info=info, stored=stored, job_id=self.id, created_at=now())

    def _model_name(self) -> str:
        with read_session(self.engine) as session:
            return f"{self._target_name(session)} from {session.get_one(ModelRow, self.job.spec['base']['model']).name}"

    def _write_spec(self) -> tuple[Path, list[Path]]:
        """The engine's spec: the job's, with ids replaced by paths; and these."""
        spec = JobSpec.model_validate(self.job.spec)
        with read_session(self.engine) as session:

            def dataset(given: DatasetId) -> dict[str, Any]:
                row = session.get_one(DatasetRow, given.dataset)
                path = self.storage.folder(f"datasets/{row.id}").resolve() / row.file
                answer = given.answer and given.answer.model_dump()
                called = f"{row.name}{ending(row.file)}"
                return {
                    "path": str(path),
                    "called": called,
                    "column": row.text_column,
                    "answer": answer,
                    "bad_rows": row.bad_rows,
                }

            def model(reference: ModelId) -> dict[str, Any]:
                row = session.get_one(ModelRow, reference.model)
                path = self.storage.folder(f"models/{row.id}").resolve()
                return {"path": str(path), "called": row.name, "hub": row.hub, "commit": row.hub_commit}

            options = spec.model_dump(exclude={*INPUTS, *PLACING})
            made = CompressionSpec.model_validate(
                {
                    **options,
                    "base": model(spec.base),
                    "teacher": spec.teacher and model(spec.teacher),
                    "target": dataset(spec.target),
                    "target_name": self._target_name(session),
                    "skills": [{**dataset(s), "name": s.name, "role": s.role} for s in spec.skills],
                    "broad": spec.broad and dataset(spec.broad),
                }
            )
        path = self.folder.resolve() / "spec.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(made.model_dump_json())
        temporary.rename(path)
        models = [made.base, made.teacher] if made.teacher else [made.base]
        return path, [*(model.path for model in models), *(data.path for data in made.data)]

    def _target_name(self, session: Session) -> str:
        return session.get_one(DatasetRow, self.job.spec["target"]["dataset"]).name

    def _failed(self, code: str, message: str) -> None:
        self._finish("failed", {"code": code, "message": told.clean(message)})

    def _finish(self, status: Any, error: dict[str, str] | None = None, rows: list[Any] | None = None) -> None:
        def finish() -> None:
            with open_session(self.engine) as session:
                queue.finish(session, self.id, self.token, status, error, rows or [])

        self._patiently(finish)
        self.outcome, self.error = status, error

    def _release(self, counts: bool) -> None:
        def release() -> None:
            with open_session(self.engine) as session:
                queue.release(session, self.id, self.token, counts)

        self._patiently(release)
        self.outcome = "released"


def _end_of(path: Path) -> str:
    try:
        with told.opened(path) as file:
            file.seek(max(0, path.stat().st_size - TOLD_BYTES))
            return file.read(TOLD_BYTES).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


def _reason(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return "a model or dataset that it names is gone."
    return first_fault(error)


def work_on(settings: Settings, job_id: str, stop: threading.Event) -> None:
    """Runs one job, if it still waits for somebody."""
    settings.prepare()
    engine, storage = connect(settings), open_storage(settings)
    job = None
    for _ in range(PATIENCE):
        try:
            with open_session(engine) as session:
                job = queue.claim(session, settings.lease_seconds, settings.max_attempts, only=job_id)
        except AWAY as error:
            _complain(error)
        if job is not None or stop.wait(PAUSE_SECONDS):  # the row may be locked by who looks after it
            break
    if job is not None:
        _run(settings, engine, storage, job, stop)
        with suppress(*AWAY, OSError):
            janitor.tidy(engine, settings, storage)
    engine.dispose()


def main() -> None:
    """A worker as a process: SIGTERM or SIGINT puts the job back and ends. With the id of a job it runs that one and ends."""
    settings = Settings()
    logs.configure(settings.log)
    traces.configure("narrow-worker")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    os.nice(5)  # the API answers first
    local.adopt()
    if len(sys.argv) > 1:
        work_on(settings, sys.argv[1], stop)
    else:
        work(settings, stop)


if __name__ == "__main__":
    main()
