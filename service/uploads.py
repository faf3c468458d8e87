"""What users send: moved to a folder of its own, checked there by the engine's torch-free readers, and only then renamed.

The body has been spooled to disk by the time this runs, within the route's size limit. A refused upload leaves nothing.
"""

import hashlib
import os
import shutil
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastapi import UploadFile
from sqlmodel import Session

from narrow_engine.documents import read_documents
from narrow_engine.errors import NarrowError
from narrow_engine.model_files import accepted_name, inspect_model, refuse_name
from service.db.tables import DatasetRow, ModelRow, new_id, now
from service.problems import ApiError
from service.settings import Settings

PREVIEW_DOCUMENTS, PREVIEW_CHARACTERS = 3, 300
_ENDINGS = (".jsonl", ".ndjson", ".txt", ".text", ".md")


def store_model(session: Session, settings: Settings, files: list[UploadFile], name: str | None) -> ModelRow:
    """Keeps a model that was uploaded as its files. Raises NarrowError for what is wrong with it."""
    names = [_basename(file) for file in files]
    for given in names:
        if not accepted_name(given):
            raise refuse_name(given)
    if len(set(names)) != len(names):
        raise NarrowError("unexpected_file", "Two of the files have the same name: send each once.")
    with _folder(settings, "models", "mdl") as (identifier, folder):
        for file, given in zip(files, names, strict=True):
            _write(file, folder / given)
        info = inspect_model(folder)
        row = ModelRow(
            id=identifier,
            name=_clean(name) or f"{info.family} model",
            info=info.model_dump(mode="json"),
            created_at=now(),
        )
        session.add(row)
    session.commit()
    return row


def store_dataset(session: Session, settings: Settings, file: UploadFile, name: str | None, column: str) -> DatasetRow:
    """Keeps a dataset, read through once: every row is checked before a job can meet it."""
    given = _basename(file)
    plain = given.lower().removesuffix(".gz")
    ending = next((e for e in _ENDINGS if plain.endswith(e)), "")
    # Without an ending that is known the name stays, for the sentence that says so.
    stored = "data" + ending + (".gz" if given.lower().endswith(".gz") else "") if ending else given
    with _folder(settings, "datasets", "ds") as (identifier, folder):
        path = folder / stored
        sha256 = _write(file, path)
        documents, size = 0, 0
        preview: list[str] = []
        try:
            for text in read_documents(path, column):
                if not text:
                    continue
                documents, size = documents + 1, size + len(text.encode())
                if len(preview) < PREVIEW_DOCUMENTS:
                    preview.append(text[:PREVIEW_CHARACTERS])
        except NarrowError as error:
            raise NarrowError(error.code, str(error).replace(stored, given)) from error
        if not documents:
            raise NarrowError("empty_dataset", f"{given} holds no text: bring at least one document.")
        row = DatasetRow(
            id=identifier,
            name=_clean(name) or _clean(given.removesuffix(".gz").removesuffix(ending)) or "dataset",
            file=stored,
            text_column=column,
            documents=documents,
            bytes=size,
            sha256=sha256,
            preview=preview,
            created_at=now(),
        )
        session.add(row)
    session.commit()
    return row


def require_space(settings: Settings) -> None:
    """Refuses work when the disk is nearly full, while there is still room for what runs."""
    if shutil.disk_usage(settings.data).free < settings.min_free_bytes:
        raise ApiError(507, "disk_full", "The server's disk is nearly full: delete models, datasets or jobs, or try later.")


@contextmanager
def _folder(settings: Settings, kind: str, prefix: str) -> Iterator[tuple[str, Path]]:
    """A temporary folder that gets its final name when the block ends well, and vanishes when it does not."""
    identifier = new_id(prefix)
    final = settings.data / kind / identifier
    temporary = final.with_name(f".{identifier}")
    temporary.mkdir()
    try:
        yield identifier, temporary
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write(file: UploadFile, path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("xb") as out:
        while chunk := file.file.read(2**20):
            digest.update(chunk)
            out.write(chunk)
        out.flush()
        os.fsync(out.fileno())
    return digest.hexdigest()


def _basename(file: UploadFile) -> str:
    name = file.filename or ""
    if not name or name != Path(name).name or "\\" in name or "\0" in name or name.startswith(".") or len(name) > 200:
        raise NarrowError("unexpected_file", f"{name[:80]!r} is not a plain file name.")
    return name


def _clean(name: str | None) -> str:
    """A name as people may see it: one line without control characters, at most 100 characters, as a `Name` allows."""
    kept = "".join(c if c.isalnum() or c in " .+-_" else " " for c in unicodedata.normalize("NFC", name or ""))
    return " ".join(kept.split())[:100].strip().lstrip(" .+-")
