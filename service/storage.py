"""Artifacts by content hash, in a folder. A file is there whole or not at all, and is stored once however often it occurs."""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def doubt(path: Path) -> Path:
    """The mark beside a file or folder that says that perhaps no row knows it.

    Set before the row comes or goes, taken away after. After a kill the janitor looks at what is marked, and at nothing
    else: a service that was started over the wrong database must not take all files for litter.
    """
    return path.with_name(f".{path.name}.doubt")


class Storage:
    """`root`/ab/abcdef...: the first two digits of the SHA-256, then all of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        return self.root / sha256[:2] / sha256

    def put(self, source: Path) -> str:
        """Stores a copy of a file, durably, and returns its SHA-256. Only within `publishing`."""
        with source.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        target = self.path(sha256)
        target.parent.mkdir(exist_ok=True)
        doubt(target).touch()
        if target.exists():
            return sha256
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".tmp-")
        try:
            with os.fdopen(handle, "wb") as out, source.open("rb") as file:
                shutil.copyfileobj(file, out, 2**20)
                out.flush()
                os.fsync(out.fileno())
            Path(name).rename(target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        return sha256

    # A file that is there already is not copied again, so nobody may remove it between `put` and the commit of its row.
    # Publishers therefore share a lock from the first `put` to the commit, and files are removed only under the whole
    # lock. The kernel releases it when its holder dies, and it does not matter how long a publication takes.

    @contextmanager
    def publishing(self) -> Iterator[None]:
        with (self.root / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            yield

    @contextmanager
    def removing(self) -> Iterator[bool]:
        """Whether files can be removed now; if not, their marks stay for the janitor."""
        with (self.root / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
