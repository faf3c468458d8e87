"""Stages that runs leave for each other: a folder with an entry for each stage and hash of its inputs.

An entry is put there under a temporary name and renamed, so it is there whole or not at all; of two runs that made the same one,
the first wins and both are right. It is taken by hard links where the file system has them: nobody changes a file in place.
The shelf only saves time. Where it fails, full or half removed, a run does the stage itself.
"""

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

RECORD = "record.json"
WAIT_SECONDS = 0.25
TORN_SECONDS = 3600.0
"""A temporary folder of that age was left by a run that was killed: putting takes seconds."""


def place(shelf: Path, stage: str, key: str) -> Path:
    """Where a stage's entry is. What other code made is another entry: a shelf outlives an update."""
    return shelf / f"{stage}-{hashlib.sha256(f'{key} {_code()}'.encode()).hexdigest()[:40]}"


@contextmanager
def turn(place: Path, wait: Callable[[], None]) -> Iterator[None]:
    """While another run is at the same stage, calls `wait` now and then, which may raise. A run that dies gives up its turn.

    Two that are at it all the same, since locks fail or one's file was removed under it, only do the work twice.
    """
    path = place.with_name(f".lock-{place.name}")
    with ExitStack() as stack:
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("w"))
            stack.callback(path.unlink, missing_ok=True)
            while not _locked(file):
                wait()
                time.sleep(WAIT_SECONDS)
        yield


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def put(place: Path, out: Path, record: Path) -> None:
    """Leaves a finished stage for other runs, unless one has done so already."""
    if place.exists():
        return
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=place.parent))
        try:
            shutil.copytree(out, temporary / "out", copy_function=_link)
            _link(record, temporary / RECORD)
            # Onto a folder that is not empty nothing is renamed: then another run was faster.
            temporary.rename(place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def take(place: Path, out: Path) -> dict[str, Any] | None:
    """Makes `out` the finished folder of a stage and returns its record; None, with nothing made, if there is no entry."""
    temporary = out.with_name(out.name + ".tmp")
    held = -1
    try:
        # Held open, the folder's inode is not given to one that is put in its place meanwhile.
        held = os.open(place, os.O_RDONLY)
        os.utime(place)  # in use: `tidy` leaves it alone
        record: dict[str, Any] = json.loads((place / RECORD).read_text())
        shutil.copytree(place / "out", temporary, copy_function=_link)
        # Removal begins with a new name: if the same entry is still here, nothing was missing from it a moment ago.
        if not os.path.samestat(os.fstat(held), place.stat()):
            raise FileNotFoundError(place)
        temporary.rename(out)
    except (OSError, ValueError):
        shutil.rmtree(temporary, ignore_errors=True)
        return None
    finally:
        if held >= 0:
            os.close(held)
    return record


def tidy(shelf: Path, seconds: float) -> None:
    """Removes entries that no run has taken or put for so long, and what a kill left of putting and removing."""
    for entry in shelf.iterdir():
        with suppress(FileNotFoundError):
            age = time.time() - entry.stat().st_mtime
            if entry.name.startswith(".gone-") or (entry.name.startswith(".tmp-") and age > TORN_SECONDS):
                shutil.rmtree(entry, ignore_errors=True)
            elif not entry.name.startswith(".") and age > seconds:
                gone = entry.with_name(f".gone-{secrets.token_hex(8)}")
                entry.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        # Another disk, or a file system without hard links.
        shutil.copyfile(source, target)
        with Path(target).open("rb") as file:
            os.fsync(file.fileno())


@cache
def _code() -> str:
    """Digest of what a stage's output depends on beside its inputs: this package's source and the libraries' versions."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    for name in ("torch", "transformers", "tokenizers", "numpy"):
        digest.update(version(name).encode())
    return digest.hexdigest()
