"""Removes what a kill, a crash or a deletion left behind. Workers call it when they start and while they wait for jobs."""

import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from sqlalchemy import Engine
from sqlmodel import Session, col, delete, select

from narrow_engine import shelf
from service.db.session import open_session, read_session, removing
from service.db.tables import TERMINAL, ArtifactRow, AuditRow, DatasetRow, JobRow, MessageRow, ModelRow, UploadRow, now
from service.settings import Settings
from service.storage import Storage, StorageAway, artifact_key

STALE_SECONDS = 6 * 3600.0
"""An upload that began so long ago has ended, one way or the other."""
MESSAGE_DAYS = 30
"""So long the list of what webhooks were told goes back."""
MARK_SECONDS = 60.0
"""So has the transaction of a deletion that has marked files: no statement of it waits for so long."""


def tidy(engine: Engine, settings: Settings, storage: Storage, stale_seconds: float = STALE_SECONDS) -> None:
    """One round. Several at once, also of several processes, do no harm."""
    for folder in settings.tenants.glob("*/stages"):
        with suppress(OSError):  # a job can make its tenant's unreadable: that is its tenant's loss
            shelf.tidy(folder, settings.stage_seconds, settings.max_stage_bytes)
    tidy_pieces(engine, storage)
    with open_session(engine) as session:
        session.exec(delete(AuditRow).where(col(AuditRow.time) < now() - timedelta(days=settings.audit_days)))
        told = col(MessageRow.next_at).is_(None) & (col(MessageRow.created_at) < now() - timedelta(days=MESSAGE_DAYS))
        session.exec(delete(MessageRow).where(told))
        session.commit()
    with read_session(engine) as session:
        tidy_runs(session, settings, storage)
        for table in (ModelRow, DatasetRow):
            tidy_uploads(session, storage, table, stale_seconds)
            if settings.storage_url:
                tidy_fetched(session, settings, table)
    with open_session(engine) as session:
        tidy_artifacts(session, settings, storage, marked_seconds=min(MARK_SECONDS, stale_seconds))


def tidy_runs(session: Session, settings: Settings, storage: Storage) -> None:
    """Folders of jobs that have ended, however they did, and what is saved in the bucket of such that are gone."""
    here = {folder.name for folder in settings.tenants.glob("*/runs/*")}
    saved = {key.removeprefix("runs/") for key in storage.doubted("runs/")}
    names = sorted(here | saved)
    for first in range(0, len(names), 500):
        some = names[first : first + 500]
        found = dict(session.execute(select(JobRow.id, JobRow.status).where(col(JobRow.id).in_(some))).all())
        for name in some:
            if found.get(name) in TERMINAL or (name in saved and name not in found):
                remove_run(settings, storage, name)


def remove_run(settings: Settings, storage: Storage, job_id: str) -> None:
    """The run folder of a job that will not go on, and what is saved of it: later, if the bucket is away."""
    for folder in settings.tenants.glob(f"*/runs/{job_id}"):
        shelf.remove(folder)
    with suppress(StorageAway):
        storage.forget(f"runs/{job_id}")
        storage.sure(f"runs/{job_id}")


def tidy_uploads(session: Session, storage: Storage, table: type[ModelRow] | type[DatasetRow], stale_seconds: float) -> None:
    """Uploads that were interrupted: temporary folders, and what is marked and has no row."""
    kind = f"{table.__tablename__}s"
    for entry in (storage.root / kind).glob(".*"):
        # Not the modification time, which a copied folder brings along.
        if _age(entry, changed=False) >= stale_seconds:
            shutil.rmtree(entry, ignore_errors=True)
    for key in storage.doubted(f"{kind}/", stale_seconds):
        if session.get(table, key.removeprefix(f"{kind}/")) is None:
            storage.forget(key)
        storage.sure(key)


def tidy_pieces(engine: Engine, storage: Storage) -> None:
    """Uploads of which nothing was made in time, or something was and their pieces are not needed any more."""
    for piece in (storage.root / "uploads").glob(".piece-*"):
        if _age(piece) > STALE_SECONDS:
            piece.unlink(missing_ok=True)
    for fetched in (storage.root / "uploads").glob(".fetch-*"):
        if _age(fetched) > STALE_SECONDS:
            shutil.rmtree(fetched, ignore_errors=True)
    with open_session(engine) as session:
        expired = list(session.exec(select(UploadRow.id).where(col(UploadRow.expires_at) < now())))
    for identifier in expired:
        storage.forget(f"uploads/{identifier}")
        with open_session(engine) as session:
            session.exec(delete(UploadRow).where(col(UploadRow.id) == identifier))
            session.commit()


def tidy_fetched(session: Session, settings: Settings, table: type[ModelRow] | type[DatasetRow]) -> None:
    """What this machine has fetched from the bucket, and of which no row knows or that no job has needed for long."""
    folders = {folder.name: folder for folder in (settings.data / f"{table.__tablename__}s").glob("[!.]*")}
    known = set(session.exec(select(table.id).where(col(table.id).in_(folders))))
    needed = str(list(session.exec(select(JobRow.spec).where(col(JobRow.status).not_in(TERMINAL)))))
    for name, folder in folders.items():
        if name not in known or (name not in needed and _age(folder) > settings.stage_seconds):
            shutil.rmtree(folder, ignore_errors=True)


def _age(path: Path, changed: bool = True) -> float:
    """Seconds since a folder was made or got another name or, with `changed`, since something in it has changed."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0.0
    return time.time() - (found.st_mtime if changed else found.st_ctime)


def tidy_artifacts(
    session: Session,
    settings: Settings,
    storage: Storage,
    suspects: Iterable[str] = (),
    marked_seconds: float = MARK_SECONDS,
) -> None:
    """Files without a row, of those that have been marked for a while or are suspected, and torn copies. Nothing while a result
    is being published: its marks stay for the next round. Ends the transaction."""
    with removing(session.get_bind(), settings.data) as free:  # type: ignore[arg-type]
        if not free:
            return
        marked = {key.rpartition("/")[2] for key in storage.doubted("artifacts/", marked_seconds)}
        names = sorted({*suspects, *marked})
        used: set[str] = set()
        for first in range(0, len(names), 500):
            wanted = col(ArtifactRow.sha256).in_(names[first : first + 500])
            used.update(session.exec(select(ArtifactRow.sha256).where(wanted)))
        session.rollback()
        storage.delete(artifact_key(sha256) for sha256 in names if sha256 not in used)
        storage.sure(*(artifact_key(sha256) for sha256 in names if sha256 in marked or sha256 not in used))
        for torn in (storage.root / "artifacts").glob("*/.tmp-*"):
            torn.unlink(missing_ok=True)
