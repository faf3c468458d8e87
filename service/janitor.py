"""Removes what a kill, a crash or a deletion left behind. Workers call it when they start and while they wait for jobs."""

import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from sqlalchemy import Engine
from sqlmodel import Session, col, select

from narrow_engine import shelf
from service.db.session import open_session, read_session
from service.db.tables import TERMINAL, ArtifactRow, DatasetRow, JobRow, ModelRow
from service.settings import Settings
from service.storage import Storage, doubt

STALE_SECONDS = 6 * 3600.0
"""An upload that began so long ago has ended, one way or the other."""


def tidy(engine: Engine, settings: Settings, stale_seconds: float = STALE_SECONDS) -> None:
    """One round. Several at once, also of several processes, do no harm."""
    for folder in settings.stages.iterdir():
        shelf.tidy(folder, settings.stage_seconds)
    with read_session(engine) as session:
        tidy_runs(session, settings)
        tidy_uploads(session, settings.data / "models", ModelRow, stale_seconds)
        tidy_uploads(session, settings.data / "datasets", DatasetRow, stale_seconds)
    with open_session(engine) as session:
        tidy_artifacts(session, Storage(settings.data / "artifacts"))


def tidy_runs(session: Session, settings: Settings) -> None:
    """Folders of jobs that have ended, however they did."""
    names = [folder.name for folder in (settings.data / "runs").iterdir()]
    for first in range(0, len(names), 500):
        wanted = col(JobRow.id).in_(names[first : first + 500]) & col(JobRow.status).in_(TERMINAL)
        for name in session.exec(select(JobRow.id).where(wanted)):
            remove_run(settings, name)


def remove_run(settings: Settings, job_id: str) -> None:
    """The run folder of a job that will not go on."""
    shutil.rmtree(settings.data / "runs" / job_id, ignore_errors=True)


def tidy_uploads(session: Session, folder: Path, table: type[ModelRow] | type[DatasetRow], stale_seconds: float) -> None:
    """Uploads that were interrupted: temporary folders, and marked ones without a row."""
    for entry in folder.glob(".*"):
        try:
            # Not the modification time, which a copied folder brings along.
            age = time.time() - entry.stat().st_ctime
        except FileNotFoundError:
            continue
        if age < stale_seconds:
            continue
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
            continue
        marked = folder / entry.name.removeprefix(".").removesuffix(".doubt")
        if doubt(marked) == entry:
            if session.get(table, marked.name) is None:
                shutil.rmtree(marked, ignore_errors=True)
            entry.unlink(missing_ok=True)


def tidy_artifacts(session: Session, storage: Storage, suspects: Iterable[str] = ()) -> None:
    """Files without a row, of those that are marked or suspected, and torn copies. Nothing while a result is being
    published: its marks stay for the next round. Ends the transaction."""
    with storage.removing() as free:
        if not free:
            return
        # Within a transaction that writes: a deletion marks and commits in one of those, so it is seen whole or not at all.
        session.connection()
        names = sorted({*suspects, *(m.name[1:].removesuffix(".doubt") for m in storage.root.glob("*/.*.doubt"))})
        used: set[str] = set()
        for first in range(0, len(names), 500):
            wanted = col(ArtifactRow.sha256).in_(names[first : first + 500])
            used.update(session.exec(select(ArtifactRow.sha256).where(wanted)))
        for sha256 in used:
            doubt(storage.path(sha256)).unlink(missing_ok=True)
        session.rollback()
        for sha256 in names:
            if sha256 not in used:
                storage.path(sha256).unlink(missing_ok=True)
                doubt(storage.path(sha256)).unlink(missing_ok=True)
        for torn in storage.root.glob("*/.tmp-*"):
            torn.unlink(missing_ok=True)
