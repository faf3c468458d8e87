"""Where files are kept: a folder, or a bucket of anything that speaks S3. Both hold them by key.

    artifacts/ab/abcdef...   what jobs made, by SHA-256: stored once however often it occurs
    models/mdl_.../NAME      what was uploaded and what came out, as the engine reads it
    datasets/ds_.../NAME
    uploads/upl_.../OFFSET   pieces of uploads that are not complete yet
    doubts/KEY               marks (below)

A file is there whole or not at all. The engine reads from folders, so of a bucket each machine fetches what its jobs need into
the data folder, under the same keys.

A mark says that perhaps no row knows what is kept under a key. It is set before the row comes or goes, and taken away after.
After a kill the janitor looks at what is marked, and at nothing else: a service that was started over the wrong database must
not take all files for litter.
"""

import hashlib
import os
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

from service.settings import Settings

CHUNK = 2**20
PART = 32 * 2**20
"""Of an upload to a bucket. S3 takes ten thousand of them, so files of up to 312 GiB."""
LINK_SECONDS = 3600
"""How long a presigned URL counts: a download that began in time goes on after it."""
MARKS = "doubts/"


class StorageAway(Exception):
    """The bucket did not answer, or refused: the same request may pass later."""


@dataclass(frozen=True)
class Stored:
    key: str
    bytes: int
    changed: float
    """Seconds since 1970."""


class Storage(ABC):
    """`root`: the data folder of this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @abstractmethod
    def put(self, key: str, source: Path) -> None:
        """Stores a copy of a file, durably."""

    @abstractmethod
    def move(self, key: str, source: Path) -> None:
        """Stores a file on the disk of `root` and takes it over."""

    @abstractmethod
    def has(self, key: str) -> bool: ...

    @abstractmethod
    def below(self, prefix: str) -> Iterator[Stored]:
        """What is kept below a prefix, which ends with a slash, in the order of the keys."""

    @abstractmethod
    def delete(self, keys: Iterable[str]) -> None:
        """Removes files; what is not there is no matter."""

    @abstractmethod
    def read(self, key: str, start: int, end: int) -> Iterator[bytes]:
        """The bytes of a file from `start` until before `end`. FileNotFoundError comes at the call, not while they are read."""

    @abstractmethod
    def file(self, key: str) -> Path | None:
        """The file itself, where it lies on this machine."""

    @abstractmethod
    def link(self, key: str) -> str | None:
        """A URL from which anybody may download the file for a while, if the storage has such a thing."""

    @abstractmethod
    def keep(self, folder: Path, key: str) -> None:
        """Stores the files of a folder below `key`, and takes the folder over. It lies on the disk of `root`."""

    @abstractmethod
    def folder(self, key: str) -> Path:
        """The folder with what is kept below `key`, on this machine."""

    @abstractmethod
    def forget(self, key: str) -> None:
        """Removes what is kept below `key`."""

    def put_artifact(self, source: Path) -> str:
        """Stores a file under its SHA-256, which it returns, and marks it. Only within `publishing`."""
        with source.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self.doubt(artifact_key(sha256))
        if not self.has(artifact_key(sha256)):
            self.put(artifact_key(sha256), source)
        return sha256

    def doubt(self, *keys: str) -> None:
        with tempfile.NamedTemporaryFile(dir=self.root / "uploads") as mark:
            for key in keys:
                self.put(MARKS + key, Path(mark.name))

    def sure(self, *keys: str) -> None:
        self.delete(MARKS + key for key in keys)

    def doubted(self, prefix: str, seconds: float = 0) -> list[str]:
        """Keys below `prefix` that have been marked for so long."""
        before = time.time() - seconds
        # Of a bucket's clock whole seconds are known, so `now` is no age to ask for.
        marks = (mark for mark in self.below(MARKS + prefix) if not seconds or mark.changed <= before)
        return [mark.key.removeprefix(MARKS) for mark in marks]


def open_storage(settings: Settings) -> Storage:
    return Bucket(settings.data, settings.storage_url) if settings.storage_url else Folder(settings.data)


def artifact_key(sha256: str) -> str:
    return f"artifacts/{sha256[:2]}/{sha256}"


class Folder(Storage):
    """Files below the data folder, under their keys. Hidden names are copies and folders that are not complete."""

    def put(self, key: str, source: Path) -> None:
        target = self.root / key
        target.parent.mkdir(parents=True, exist_ok=True)
        with _whole(target) as out, source.open("rb") as file:
            shutil.copyfileobj(file, out, CHUNK)
            out.flush()
            os.fsync(out.fileno())

    def move(self, key: str, source: Path) -> None:
        target = self.root / key
        target.parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as file:
            os.fsync(file.fileno())
        source.rename(target)

    def has(self, key: str) -> bool:
        return (self.root / key).exists()

    def below(self, prefix: str) -> Iterator[Stored]:
        for path in sorted((self.root / prefix).rglob("*")):
            if path.name.startswith(".") or not path.is_file():
                continue
            try:
                found = path.stat()
            except FileNotFoundError:
                continue
            # Not the modification time, which a copied folder brings along.
            yield Stored(path.relative_to(self.root).as_posix(), found.st_size, found.st_ctime)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            (self.root / key).unlink(missing_ok=True)

    def read(self, key: str, start: int, end: int) -> Iterator[bytes]:
        return _read(self.root / key, start, end)

    def file(self, key: str) -> Path | None:
        return self.root / key

    def link(self, key: str) -> str | None:
        return None

    def keep(self, folder: Path, key: str) -> None:
        shutil.rmtree(self.root / key, ignore_errors=True)
        folder.rename(self.root / key)

    def folder(self, key: str) -> Path:
        return self.root / key

    def forget(self, key: str) -> None:
        shutil.rmtree(self.root / key, ignore_errors=True)


class Bucket(Storage):
    """`s3://BUCKET/PREFIX`. Where it is and who may use it comes from AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
    AWS_REGION, ..., as for every program that speaks S3."""

    def __init__(self, root: Path, url: str) -> None:
        super().__init__(root)
        from obstore.store import from_url

        options: dict[str, Any] = {
            "client_options": {
                "allow_http": os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"),
                "connect_timeout": "5s",
                "timeout": "120s",
            },
            "retry_config": {"max_retries": 3, "retry_timeout": timedelta(seconds=10)},
        }
        self.store: Any = from_url(url, **options)

    def put(self, key: str, source: Path) -> None:
        import obstore

        with _reaching(), source.open("rb") as file:
            obstore.put(self.store, key, file, chunk_size=PART, max_concurrency=4)

    def move(self, key: str, source: Path) -> None:
        self.put(key, source)
        source.unlink()

    def has(self, key: str) -> bool:
        import obstore

        try:
            with _reaching():
                obstore.head(self.store, key)
        except FileNotFoundError:
            return False
        return True

    def below(self, prefix: str) -> Iterator[Stored]:
        import obstore

        with _reaching():
            found = [meta for page in obstore.list(self.store, prefix.rstrip("/")) for meta in page]
        for meta in sorted(found, key=lambda meta: meta["path"]):
            yield Stored(meta["path"], meta["size"], meta["last_modified"].timestamp())

    def delete(self, keys: Iterable[str]) -> None:
        import obstore

        with _reaching():
            for key in keys:
                try:
                    obstore.delete(self.store, key)
                except FileNotFoundError:
                    continue

    def read(self, key: str, start: int, end: int) -> Iterator[bytes]:
        import obstore

        if start == end:
            return iter(())
        with _reaching():
            found = obstore.get(self.store, key, options={"range": (start, end)})
        return _chunks(found.stream(min_chunk_size=CHUNK))

    def file(self, key: str) -> Path | None:
        return None

    def link(self, key: str) -> str | None:
        import obstore

        with _reaching():
            return str(obstore.sign(self.store, "GET", key, timedelta(seconds=LINK_SECONDS)))

    def keep(self, folder: Path, key: str) -> None:
        for path in sorted(folder.iterdir()):
            self.put(f"{key}/{path.name}", path)
        shutil.rmtree(self.root / key, ignore_errors=True)
        folder.rename(self.root / key)

    def folder(self, key: str) -> Path:
        here = self.root / key
        here.mkdir(parents=True, exist_ok=True)
        os.utime(here)  # when it was last needed, for the janitor
        for stored in self.below(f"{key}/"):
            self._fetch(stored, self.root / stored.key)
        return here

    def _fetch(self, stored: Stored, target: Path) -> None:
        if target.exists() and target.stat().st_size == stored.bytes:
            return
        with _whole(target) as out:
            for chunk in self.read(stored.key, 0, stored.bytes):
                out.write(chunk)
            if out.tell() != stored.bytes:
                raise StorageAway(f"{stored.key} came short of its {stored.bytes} bytes")

    def forget(self, key: str) -> None:
        self.delete([stored.key for stored in self.below(f"{key}/")])
        shutil.rmtree(self.root / key, ignore_errors=True)


@contextmanager
def _whole(target: Path) -> Iterator[BinaryIO]:
    """A file to write that gets its name when the block ends well, and vanishes when it does not."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".tmp-")
    try:
        with os.fdopen(handle, "wb") as out:
            yield out
        Path(name).rename(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def _reaching() -> Iterator[None]:
    """What the bucket's library raises, as StorageAway."""
    from obstore.exceptions import BaseError

    try:
        yield
    except BaseError as error:
        raise StorageAway(str(error).partition("\n")[0][:300]) from error


def _chunks(stream: Any) -> Iterator[bytes]:
    with _reaching():
        for chunk in stream:
            yield bytes(chunk)


def _read(path: Path, start: int, end: int) -> Iterator[bytes]:
    file = path.open("rb")

    def chunks() -> Iterator[bytes]:
        with file:
            file.seek(start)
            left = end - start
            while left and (chunk := file.read(min(CHUNK, left))):
                left -= len(chunk)
                yield chunk

    return chunks()
