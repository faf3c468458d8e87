"""Artifacts by content hash, in a folder. A file is there whole or not at all, and is stored once however often it occurs."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path


class Storage:
    """`root`/ab/abcdef...: the first two digits of the SHA-256, then all of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        return self.root / sha256[:2] / sha256

    def put(self, source: Path) -> str:
        """Stores a copy of a file, durably, and returns its SHA-256."""
        with source.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        target = self.path(sha256)
        if target.exists():
            return sha256
        target.parent.mkdir(exist_ok=True)
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

    def remove(self, sha256: str) -> None:
        self.path(sha256).unlink(missing_ok=True)
