"""What users send: moved to a folder of its own, checked there by the engine's torch-free readers, and only then renamed.

The body has been spooled to disk by the time this runs, within the route's size limit. A refused upload leaves nothing.
"""

import hashlib
import os
import shutil
import threading
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from fastapi import UploadFile
from pydantic import TypeAdapter, ValidationError
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, select

from narrow_engine.documents import Skipped, ending, nothing_left, read_documents
from narrow_engine.errors import NarrowError
from narrow_engine.model_files import accepted_name, refuse_name
from narrow_engine.spec import NOT_A_NAME, BadRows, Name
from service import quotas
from service.api.schemas import Dataset, FieldError, Model, Page, Source
from service.db.tables import DatasetRow, ModelRow, UploadRow, new_id, now
from service.problems import ApiError, not_found
from service.runners import local
from service.settings import Settings
from service.storage import Storage

PREVIEW_DOCUMENTS, PREVIEW_CHARACTERS = 3, 300
NAME_BYTES = 200
_NAME: TypeAdapter[str] = TypeAdapter(Name)
_READING = threading.BoundedSemaphore(4)
"""Datasets that are read at a time, each of which may take a core and, as Parquet, 2 GiB."""


def as_model(row: ModelRow) -> Model:
    fields = {k: row.info[k] for k in ("family", "parameters", "bytes", "sha256", "units", "config")}
    source = Source(hub=row.hub, commit=row.hub_commit) if row.hub and row.hub_commit else None
    return Model(id=row.id, name=row.name, job=row.job_id, source=source, created_at=row.created_at, **fields)


def as_dataset(row: DatasetRow) -> Dataset:
    return Dataset.model_validate({**row.model_dump(), "column": row.text_column, "format": row.file.removeprefix("data")})


def store_model(
    session: Session, settings: Settings, storage: Storage, files: Sequence[UploadFile], uploads: Sequence[str], name: str | None
) -> Model:
    """Keeps a model that was uploaded as its files, in the form or before. Raises NarrowError for what is wrong with it."""
    _require_name(name)
    complete = [_complete(session, storage, upload) for upload in uploads]
    names = [*(check_name(file.filename or "") for file in files), *(upload.name for upload in complete)]
    for given in names:
        if not accepted_name(given):
            raise refuse_name(given)
    if len(set(names)) != len(names):
        raise NarrowError("unexpected_file", "Two of the files have the same name: send each once.")
    sent = sum(file.size or 0 for file in files)
    with _folder(session, settings, storage, "models", "mdl", sent) as (identifier, folder):
        for file, given in zip(files, names, strict=False):
            _write(_sent(file), folder / given)
        for upload in complete:
            _assemble(storage, upload, folder / upload.name)
        row = _look_at(identifier, folder, name)
        session.add(row)
        _use_up(session, complete)
    _tidy(session, storage, complete)
    return as_model(row)


def store_fetched(
    session: Session, settings: Settings, storage: Storage, folder: Path, source: Source, name: str | None
) -> Model | None:
    """Keeps a model that was fetched into a folder on the data disk, as if it had been uploaded. None if another request was
    faster. Raises NarrowError."""
    size = sum(path.stat().st_size for path in folder.iterdir())
    try:
        with _folder(session, settings, storage, "models", "mdl", size) as (identifier, place):
            for path in folder.iterdir():
                path.rename(place / path.name)
            row = _look_at(identifier, place, name or source.hub.partition("/")[2])
            row.hub, row.hub_commit = source.hub, source.commit
            session.add(row)
    except IntegrityError:
        session.rollback()
        storage.forget(f"models/{identifier}")
        storage.sure(f"models/{identifier}")
        return None
    return as_model(row)


def fetched_before(session: Session, source: Source) -> Model | None:
    """The tenant's model of a commit, if it is there. Leaves no transaction open."""
    wanted = select(ModelRow).where(ModelRow.hub == source.hub, ModelRow.hub_commit == source.commit)
    row = session.exec(wanted).first()
    session.rollback()
    return as_model(row) if row else None


def require_room(session: Session, settings: Settings, size: int) -> None:
    """Refuses a model of so many bytes that could not be kept, before anything of it is fetched. Leaves no transaction open."""
    if size > settings.max_model_bytes:
        detail = f"The files of the model have {size:,} bytes, and this server takes {settings.max_model_bytes:,} at most."
        raise ApiError(413, "too_large", detail)
    require_space(settings, size)
    quotas.require(session, settings, size=size)
    session.rollback()


def _look_at(identifier: str, folder: Path, name: str | None) -> ModelRow:
    """The row of a model, once its files have passed every check. Raises NarrowError."""
    info = local.try_model(folder)
    try:
        row = ModelRow(
            id=identifier,
            name=_clean(name) or f"{info.family} model",
            info=info.model_dump(mode="json"),
            stored=sum(path.stat().st_size for path in folder.iterdir()),
            created_at=now(),
        )
        # What cannot be said must not be kept: every list that it is on could not be said either.
        Page[Model](data=[as_model(row)]).model_dump_json()
    except ValueError as error:
        detail = "config.json holds half a surrogate pair or is nested too deep: save it with another program."
        raise NarrowError("bad_config", detail) from error
    return row


def store_dataset(
    session: Session,
    settings: Settings,
    storage: Storage,
    file: UploadFile | None,
    upload: str | None,
    name: str | None,
    column: str,
    bad_rows: BadRows,
) -> Dataset:
    """Keeps a dataset that came in the form or before, read through once: every row is checked before a job can meet it."""
    _require_name(name)
    if (file is None) == (upload is None):
        raise ApiError(422, "invalid_request", "Send the dataset as 'file', or name with 'upload' one that is complete.")
    complete = [_complete(session, storage, upload)] if upload else []
    for before in complete:
        if before.bytes > settings.max_dataset_bytes:
            detail = f"The file has {before.bytes:,} bytes, and the server takes {settings.max_dataset_bytes:,} of a dataset."
            raise ApiError(413, "too_large", detail)
        require_space(settings, before.bytes)  # for the file that is made of its pieces
    given = complete[0].name if complete else check_name((file and file.filename) or "")
    known = ending(given)
    # Without an ending that is known the name stays, for the sentence that says so.
    stored = f"data{known}" if known else given
    sent = (file and file.size) or 0
    with _folder(session, settings, storage, "datasets", "ds", sent) as (identifier, folder):
        path = folder / stored
        sha256 = _assemble(storage, complete[0], path) if complete else _write(_sent(file), path)  # type: ignore[arg-type]
        documents, size, skipped = 0, 0, Skipped()
        preview: list[str] = []
        try:
            with _READING:
                for text in read_documents(path, column, bad=skipped if bad_rows == "skip" else None):
                    if not text:
                        continue
                    documents, size = documents + 1, size + len(text.encode())
                    if len(preview) < PREVIEW_DOCUMENTS:
                        preview.append(text if len(text) <= PREVIEW_CHARACTERS else f"{text[:PREVIEW_CHARACTERS]}…")
        except NarrowError as error:
            raise NarrowError(error.code, str(error).replace(stored, given)) from error
        skipped.first = skipped.first.replace(stored, given)
        if not documents:
            raise nothing_left(given, skipped)
        row = DatasetRow(
            id=identifier,
            name=_clean(name) or _clean(given[: len(given) - len(known)]) or "dataset",
            file=stored,
            text_column=column,
            documents=documents,
            bytes=size,
            stored=path.stat().st_size,
            sha256=sha256,
            preview=preview,
            bad_rows=bad_rows,
            skipped=skipped.count,
            skipped_reason=skipped.first or None,
            created_at=now(),
        )
        answer = as_dataset(row)
        session.add(row)
        _use_up(session, complete)
    _tidy(session, storage, complete)
    return answer


def piece_key(upload_id: str, offset: int) -> str:
    return f"uploads/{upload_id}/{offset:015d}"


def offset_of(storage: Storage, upload_id: str) -> int:
    """How many bytes of an upload have come, without a gap."""
    return sum(size for _, size in _pieces(storage, upload_id))


def _pieces(storage: Storage, upload_id: str) -> list[tuple[str, int]]:
    """Keys and sizes of an upload's pieces. Of two that overlap, as two clients at once may send them, the first counts."""
    found, end = [], 0
    for stored in storage.below(f"uploads/{upload_id}/"):
        if int(stored.key.rpartition("/")[2]) == end:
            found.append((stored.key, stored.bytes))
            end += stored.bytes
    return found


def find_upload(session: Session, upload_id: str) -> UploadRow:
    row = session.get(UploadRow, upload_id)
    if row is None:
        raise not_found("upload", upload_id)
    return row


def _complete(session: Session, storage: Storage, upload_id: str) -> UploadRow:
    row = find_upload(session, upload_id)
    offset = offset_of(storage, upload_id)
    if offset != row.bytes:
        detail = f"Of {row.name} {offset:,} bytes of {row.bytes:,} have come: send the rest to /uploads/{upload_id}."
        raise ApiError(409, "upload_incomplete", detail)
    return row


def _assemble(storage: Storage, row: UploadRow, path: Path) -> str:
    chunks = (chunk for key, size in _pieces(storage, row.id) for chunk in storage.read(key, 0, size))
    sha256 = _write(chunks, path)
    if row.sha256 not in (None, sha256):
        detail = f"{row.name} has another SHA-256 than was announced with it: upload it again."
        raise NarrowError("wrong_digest", detail)
    return sha256


def _use_up(session: Session, complete: Sequence[UploadRow]) -> None:
    """With the commit of what was made of them, uploads are expired: if nobody tidies them now, the janitor does."""
    for row in complete:
        row.expires_at = now()
        session.add(row)


def _tidy(session: Session, storage: Storage, complete: Sequence[UploadRow]) -> None:
    for row in complete:
        storage.forget(f"uploads/{row.id}")
        session.delete(row)
    session.commit()


def forget(session: Session, storage: Storage, row: ModelRow | DatasetRow) -> None:
    """Removes a model or dataset: first its row, then its files."""
    key = f"{row.__tablename__}s/{row.id}"
    with suppress(OSError):  # a full disk must not keep anybody from making room
        storage.doubt(key)
    session.delete(row)
    session.commit()
    storage.forget(key)
    storage.sure(key)


def require_space(settings: Settings, size: int = 0) -> None:
    """Refuses work when the disk is nearly full, or would be, while there is still room for what runs."""
    if shutil.disk_usage(settings.data).free - size < settings.min_free_bytes:
        raise ApiError(507, "disk_full", "The server's disk is nearly full: delete models, datasets or jobs, or try later.")


@contextmanager
def _folder(
    session: Session, settings: Settings, storage: Storage, kind: str, prefix: str, size: int
) -> Iterator[tuple[str, Path]]:
    """A temporary folder that is kept when the block ends well, and vanishes when it does not. Commits.

    `size` is what the tenant's quota must have room for, before and after: what is done in between takes minutes, for which no
    transaction may be open. On SQLite a worker could not renew its lease meanwhile.
    """
    quotas.require(session, settings, size=size)
    session.expunge_all()
    session.rollback()
    identifier = new_id(prefix)
    key, temporary = f"{kind}/{identifier}", storage.root / kind / f".{identifier}"
    temporary.mkdir()
    try:
        yield identifier, temporary
        storage.doubt(key)
        storage.keep(temporary, key)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    # If one of these fails the mark stays: nobody knows whether the row is there, and the janitor will look.
    with session.no_autoflush:
        quotas.require(session, settings, size=size)
    session.commit()
    storage.sure(key)


def _sent(file: UploadFile) -> Iterator[bytes]:
    while chunk := file.file.read(2**20):
        yield chunk


def _write(chunks: Iterable[bytes], path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("xb") as out:
        for chunk in chunks:
            digest.update(chunk)
            out.write(chunk)
        out.flush()
        os.fsync(out.fileno())
    return digest.hexdigest()


def check_name(name: str) -> str:
    """The name, if it is one of a plain file. Raises NarrowError."""
    if not name or name != Path(name).name or "\\" in name or "\0" in name or name.startswith("."):
        raise NarrowError("unexpected_file", f"{name[:80]!r} is not a plain file name.")
    if len(name.encode()) > NAME_BYTES:
        detail = f"The file name {name[:40]!r}... is longer than {NAME_BYTES} bytes in UTF-8: shorten it."
        raise NarrowError("unexpected_file", detail)
    return name


def _require_name(name: str | None) -> None:
    """Refuses a name that was given and cannot be kept as it is. One that is made of a file's is cleaned instead."""
    if name and name.strip() and _clean(name) != " ".join(unicodedata.normalize("NFC", name).split()):
        raise ApiError(
            422, "invalid_request", f"The name {name[:40]!r} {NOT_A_NAME}.", [FieldError(pointer="/name", detail=NOT_A_NAME)]
        )


def _clean(name: str | None) -> str:
    """What is left of a name when everything that a `Name` does not allow is taken out; perhaps nothing."""
    kept = "".join(c if _is_name(f"x{c}") else " " for c in unicodedata.normalize("NFC", name or ""))
    return " ".join(kept.split()).lstrip(" .+-")[:100].rstrip()


def _is_name(text: str) -> bool:
    # By the engine's own pattern: what Python calls a letter or a digit is not what pydantic calls one.
    try:
        _NAME.validate_python(text)
    except ValidationError:
        return False
    return True
