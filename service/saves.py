"""A job's run folder in the bucket, so that another machine goes on where this one stopped.

    runs/job_.../manifest.json   which files there are, and under which keys
    runs/job_.../VERSION/PATH    a file of the folder, as it was when it was saved

A file that changes, as a checkpoint does, is saved under another key, and the manifest comes last: whoever reads it finds a
folder as it was at one moment. A worker that has lost the job and does not know it yet can therefore do no harm but waste:
what it saves is a folder as good as any, and what it removes was its own.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from service.storage import Storage

CLAIM = ".claim"
"""In a run folder: the number of the claim that wrote there last."""
_OWN = {CLAIM, "events.jsonl", "spec.json", "stderr.log", "failure.json", "lock"}
"""What belongs to one start of a job, or to this machine."""


class Saves:
    """The saves of one start of a job. `claim` is the number of the event by which it was claimed, so later ones are higher."""

    def __init__(self, storage: Storage, job_id: str, claim: int, folder: Path) -> None:
        self.storage, self.key, self.claim, self.folder = storage, f"runs/{job_id}", claim, folder
        self.saved: dict[str, tuple[str, str]] = {}
        """By path: the version that is saved, and its key."""

    def restore(self) -> None:
        """Fetches the folder where another machine got further than this one."""
        mark = self.folder / CLAIM
        known = self._manifest()
        if known and known["claim"] > (int(mark.read_text()) if mark.exists() else 0):
            shutil.rmtree(self.folder)
            self.folder.mkdir()
            for path, (key, size) in known["files"].items():
                target = self.folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as file:
                    file.writelines(self.storage.read(key, 0, size))
                self.saved[path] = (_version(target), key)
        mark.write_text(str(self.claim))

    def save(self, enough: Callable[[], bool]) -> None:
        """Saves what has changed since the last time; gives it up at the next file once there is `enough`."""
        gone = {key for _, key in self.saved.values()}
        if not gone:
            self.storage.doubt(self.key)
        found: dict[str, tuple[str, str]] = {}
        sizes: dict[str, int] = {}
        for path in _files(self.folder):
            if enough():
                # What was stored in vain is under the run's key, and goes with it.
                return
            name = path.relative_to(self.folder).as_posix()
            with suppress(FileNotFoundError):  # a stage that ends takes its checkpoint away
                version = _version(path)
                if name not in self.saved or self.saved[name][0] != version:
                    key = f"{self.key}/{self.claim}-{version}/{name}"
                    self.storage.put(key, path)
                    found[name] = (version, key)
                else:
                    found[name] = self.saved[name]
                sizes[name] = int(version.rpartition("-")[2])
        if found == self.saved:
            return
        with tempfile.NamedTemporaryFile("w", dir=self.storage.root / "uploads") as file:
            json.dump({"claim": self.claim, "files": {name: (key, sizes[name]) for name, (_, key) in found.items()}}, file)
            file.flush()
            self.storage.put(f"{self.key}/manifest.json", Path(file.name))
        self.saved = found
        self.storage.delete(gone - {key for _, key in found.values()})

    def _manifest(self) -> Any:
        key = f"{self.key}/manifest.json"
        sizes = [stored.bytes for stored in self.storage.below(f"{self.key}/") if stored.key == key]
        return json.loads(b"".join(self.storage.read(key, 0, sizes[0]))) if sizes else None


def _files(folder: Path) -> Iterator[Path]:
    """Records of stages first: when one is there, so is what it tells of."""
    records = sorted((folder / "stages").glob("*.json"))
    yield from records
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if parts[0] in _OWN or parts[0] == "stages" or any(part.endswith(".tmp") for part in parts) or not path.is_file():
            continue
        yield path


def _version(path: Path) -> str:
    found = path.stat()
    return f"{found.st_mtime_ns:x}-{found.st_size}"
