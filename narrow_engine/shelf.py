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
import stat
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
REMOVE_SECONDS = 60.0
"""Somebody may fill a folder as fast as it is emptied: then the next round goes on."""
FOLDERS, DEPTH, UNKNOWN = 1000, 20, 2**62
"""Of an entry, whose stage makes a few; and the size of one that has more."""


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


def tidy(shelf: Path, seconds: float, most_bytes: int) -> None:
    """Removes entries that no run has taken or put for so long, what a kill left of putting and removing, and what else is here
    and is no entry; and while there are more than `most_bytes`, what was used longest ago."""
    left: list[tuple[bool, float, int, Path]] = []
    for entry in shelf.iterdir():
        with suppress(FileNotFoundError):
            status = entry.lstat()
            known = stat.S_ISDIR(status.st_mode) and not entry.name.startswith(".")
            # Who writes here can also give a time that is still to come.
            age = abs(time.time() - status.st_mtime)
            if entry.name.startswith(".lock-") and _is_held(entry):
                continue
            if entry.name.startswith(".gone-") or age > (seconds if known else TORN_SECONDS):
                _clear(entry)
            else:
                size = _size(entry)
                left.append((size < UNKNOWN, status.st_mtime, size, entry))
    total = sum(size for _, _, size, _ in left)
    for _, _, size, entry in sorted(left):
        if total > most_bytes:
            _clear(entry)
            total -= size


def _clear(entry: Path) -> None:
    gone = entry if entry.name.startswith(".gone-") else entry.with_name(f".gone-{secrets.token_hex(8)}")
    with suppress(FileNotFoundError):
        entry.rename(gone)
        remove(gone)


def remove(path: Path) -> None:
    """Removes a file or folder as far as that goes. `shutil.rmtree` fails where somebody has made a folder within a folder a
    thousand times, and every janitor with it: here what is deep is pulled up first."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    left, until = True, time.monotonic() + REMOVE_SECONDS
    while left and time.monotonic() < until:
        left = False
        with suppress(OSError):
            for entry in path.iterdir():
                with suppress(OSError):
                    _remove_level(path, entry)
                    left = True
    with suppress(OSError):
        path.rmdir()


def _remove_level(top: Path, entry: Path) -> None:
    """Removes what is in a folder of `top`, but for folders, which come into `top`; or a file of it."""
    if entry.is_symlink() or not entry.is_dir():
        entry.unlink()
        return
    entry.chmod(0o700)
    for child in list(entry.iterdir()):
        if child.is_symlink() or not child.is_dir():
            child.unlink()
        else:
            child.chmod(0o700)
            child.rename(top / f".gone-{secrets.token_hex(8)}")
    entry.rmdir()


def _size(entry: Path) -> int:
    """Bytes on the disk, where a file that is long and holds nothing takes none; UNKNOWN of what no run has made."""
    total, folders = 512 * entry.lstat().st_blocks, [entry] if stat.S_ISDIR(entry.lstat().st_mode) else []
    for number, folder in enumerate(folders):
        if number > FOLDERS or len(folder.parts) > len(entry.parts) + DEPTH:
            return UNKNOWN
        try:
            for child in folder.iterdir():
                status = child.lstat()
                total += 512 * status.st_blocks
                if stat.S_ISDIR(status.st_mode):
                    folders.append(child)
        except OSError:
            return UNKNOWN
    return total


def _is_held(lock: Path) -> bool:
    with suppress(OSError), os.fdopen(os.open(lock, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
        return not _locked(file)
    return False


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
