"""Every call of the API as data: what to send and how to read the answer. Sync and async clients send the same ones."""

import hashlib
import json
import math
import os
import re
import secrets
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeGuard, TypeVar
from urllib.parse import quote

import httpx
from pydantic import ValidationError

from narrow_client._errors import InvalidArgument, NarrowClientError, from_response, not_narrow
from narrow_client.models import (
    Dataset,
    Event,
    Frontier,
    Health,
    Job,
    Model,
    PageArtifact,
    PageDataset,
    PageJob,
    PageKey,
    PageModel,
    PageSweep,
    PageUpload,
    Plan,
    Report,
    SecretKey,
    SweepPoints,
    Upload,
    Usage,
)

T = TypeVar("T")
Result = TypeVar("Result", covariant=True)
BadRows = Literal["stop", "skip"]
Status = Literal["queued", "running", "pausing", "paused", "cancelling", "succeeded", "failed", "cancelled"]
Role = Literal["read", "write", "admin"]
SkillRole = Literal["keep", "forget", "watch"]

PREFIXES = {"job": "job_", "sweep": "swp_", "model": "mdl_", "dataset": "ds_", "upload": "upl_", "key": "key_"}
LARGE = 64 * 2**20
"""Files of so many bytes are sent in pieces of so many: after a break no more than one is sent again."""
ANSWER_SECONDS = 60.0
"""Without a byte of an answer, after which a call counts as lost. It is never a limit of the whole call."""
WORK_SECONDS = 600.0
"""The same where the service reads all of a file, or looks at many specs, before it answers."""
READ_RATE = 2**23
"""Bytes a second that a service reads of a dataset at the least: for a large one that is more."""
FETCH_SECONDS = 4000.0
"""The same for a model from the hub: longer than a service, by default, takes to fetch one."""
PAGE = 100
"""Items that lists ask for at a time, at most; the service gives no more."""

MODEL_FILES = (
    *("config.json", "generation_config.json", "model.safetensors.index.json", "chat_template.jinja"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
)


WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


@dataclass(frozen=True)
class Call(Generic[Result]):
    """One request. `safe`: sending it twice does no more than sending it once, so it may be retried."""

    method: str
    path: str
    read: Callable[[httpx.Response], Result]
    params: Mapping[str, Any] = field(default_factory=dict[str, Any])
    json: Any = None
    content: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    files: tuple[tuple[str, Path], ...] = ()
    form: Mapping[str, Any] = field(default_factory=dict[str, Any])
    safe: bool = True
    patience: float = ANSWER_SECONDS
    answers: tuple[int, ...] = ()
    """Statuses above 400 that are an answer, and no failure that another try could mend."""


def is_id(kind: str, text: str) -> bool:
    """Whether `text` looks like an id: job_..., swp_..., mdl_..., ds_..."""
    return isinstance(text, str) and re.fullmatch(PREFIXES[kind] + "[0-9A-Za-z]+", text) is not None


def article(value: object) -> str:
    """What kind of thing somebody gave: "an int"."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite number; to Python, True is one too."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_seconds(name: str, value: float | None, zero: bool = False) -> None:
    """Raises InvalidArgument. `zero`: whether it may be none at all."""
    if value is not None and not (is_number(value) and (value > 0 or (zero and value == 0))):
        raise InvalidArgument(
            f"{name} is a number of seconds {'of 0 or more' if zero else 'above 0'}, or None, and not {value!r}."
        )


def a_path(name: str, value: object) -> Path:
    """Raises InvalidArgument if it is none, whether or not something is there."""
    if not isinstance(value, str | os.PathLike):
        raise InvalidArgument(f"{name} is a path, and not {article(value)}.")
    return Path(value)


def spec_of(spec: object) -> dict[str, Any]:
    """What is sent of a spec. Raises InvalidArgument if it is no JSON object."""
    if not isinstance(spec, Mapping):
        raise InvalidArgument(f"A spec is a dict, as the API takes it, and not {article(spec)}.")
    try:
        return json.loads(json.dumps(dict(spec), allow_nan=False))  # type: ignore[no-any-return]
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"The spec holds what JSON cannot: {error}.") from error


def path_of(kind: str, identifier: str, *rest: str) -> str:
    """The path of a thing, or of what is below it. Only an id gets into a URL: `../models` would ask for another thing."""
    if not is_id(kind, identifier):
        example = f"{PREFIXES[kind]}01h455vb4pex5vsknk084sn02q"
        raise InvalidArgument(f"{identifier!r} is not the id of a {kind}, which looks like {example}.")
    return "/".join(["", f"{kind}s", identifier, *(quote(part) for part in rest)])


def create_job(spec: Mapping[str, Any], idempotency_key: str | None = None) -> Call[Job]:
    # The key makes a retry safe: the service answers with the job that the first try made.
    headers = {"Idempotency-Key": idempotency_key or secrets.token_hex(16)}
    return Call("POST", "/jobs", _as(Job), json=spec_of(spec), headers=headers, patience=WORK_SECONDS)


def list_jobs(cursor: str | None, limit: int, status: Status | None, sweep: str | None) -> Call[PageJob]:
    return Call("GET", "/jobs", _as(PageJob), params=_given(cursor=cursor, status=status, sweep=sweep, limit=limit))


def get_job(job_id: str) -> Call[Job]:
    return Call("GET", path_of("job", job_id), _as(Job))


def cancel_job(job_id: str) -> Call[Job]:
    return Call("POST", path_of("job", job_id, "cancel"), _as(Job))


def pause_job(job_id: str) -> Call[Job]:
    return Call("POST", path_of("job", job_id, "pause"), _as(Job))


def resume_job(job_id: str) -> Call[Job]:
    return Call("POST", path_of("job", job_id, "resume"), _as(Job))


def delete_job(job_id: str) -> Call[None]:
    return Call("DELETE", path_of("job", job_id), _nothing)


def get_report(job_id: str) -> Call[Report]:
    return Call("GET", path_of("job", job_id, "report"), _as(Report), headers={"Accept": "application/json"})


def list_artifacts(job_id: str) -> Call[PageArtifact]:
    return Call("GET", path_of("job", job_id, "artifacts"), _as(PageArtifact))


def create_sweep(spec: Mapping[str, Any], idempotency_key: str | None = None) -> Call[SweepPoints]:
    headers = {"Idempotency-Key": idempotency_key or secrets.token_hex(16)}
    return Call("POST", "/sweeps", _as(SweepPoints), json=spec_of(spec), headers=headers, patience=WORK_SECONDS)


def list_sweeps(cursor: str | None, limit: int) -> Call[PageSweep]:
    return Call("GET", "/sweeps", _as(PageSweep), params=_given(cursor=cursor, limit=limit))


def get_sweep(sweep_id: str) -> Call[SweepPoints]:
    return Call("GET", path_of("sweep", sweep_id), _as(SweepPoints))


def cancel_sweep(sweep_id: str) -> Call[SweepPoints]:
    return Call("POST", path_of("sweep", sweep_id, "cancel"), _as(SweepPoints))


def delete_sweep(sweep_id: str) -> Call[None]:
    return Call("DELETE", path_of("sweep", sweep_id), _nothing)


def create_key(name: str, role: Role, expires_in_days: float | None) -> Call[SecretKey]:
    body = _given(name=name, role=role, expires_in_days=expires_in_days)
    return Call("POST", "/keys", _as(SecretKey), json=body, safe=False)


def list_keys(cursor: str | None, limit: int) -> Call[PageKey]:
    return Call("GET", "/keys", _as(PageKey), params=_given(cursor=cursor, limit=limit))


def renew_key(key_id: str, overlap_hours: float) -> Call[SecretKey]:
    return Call("POST", path_of("key", key_id, "renew"), _as(SecretKey), json={"overlap_hours": overlap_hours}, safe=False)


def revoke_key(key_id: str) -> Call[None]:
    return Call("DELETE", path_of("key", key_id), _nothing)


def get_frontier(sweep_id: str) -> Call[Frontier]:
    return Call("GET", path_of("sweep", sweep_id, "frontier"), _as(Frontier), headers={"Accept": "application/json"})


def get_frontier_page(sweep_id: str) -> Call[str]:
    return Call("GET", path_of("sweep", sweep_id, "frontier"), _page, headers={"Accept": "text/html"})


def create_plan(spec: Mapping[str, Any]) -> Call[Plan]:
    return Call("POST", "/plans", _as(Plan), json=spec_of(spec), patience=WORK_SECONDS)


def create_upload(name: str, size: int, sha256: str) -> Call[Upload]:
    told = ",".join(f"{key} {b64encode(value.encode()).decode()}" for key, value in (("filename", name), ("sha256", sha256)))
    headers = {"Upload-Length": str(size), "Upload-Metadata": told, "Tus-Resumable": "1.0.0"}
    # Sent twice it makes a second one, of which nothing comes and which expires.
    return Call("POST", "/uploads", _as(Upload), headers=headers)


def list_uploads(cursor: str | None, limit: int) -> Call[PageUpload]:
    return Call("GET", "/uploads", _as(PageUpload), params=_given(cursor=cursor, limit=limit))


def get_upload(upload_id: str) -> Call[Upload]:
    return Call("GET", path_of("upload", upload_id), _as(Upload))


def send_piece(upload_id: str, offset: int, piece: bytes) -> Call[None]:
    checksum = b64encode(hashlib.sha256(piece).digest()).decode()
    headers = {
        "Upload-Offset": str(offset),
        "Upload-Checksum": f"sha256 {checksum}",
        "Content-Type": "application/offset+octet-stream",
        "Tus-Resumable": "1.0.0",
    }
    return Call(
        "PATCH", path_of("upload", upload_id), _nothing, content=piece, headers=headers, safe=False, patience=WORK_SECONDS
    )


def model_folder(folder: object) -> Path:
    """Raises InvalidArgument if it is none."""
    found = a_path("A model's folder", folder)
    if not found.is_dir():
        raise InvalidArgument(f"There is no model folder at {str(found)!r}.")
    if not (found / "config.json").is_file():
        raise InvalidArgument(
            f"There is no config.json in {str(found)!r}, so it is no model folder. Text is uploaded as a file, each by itself."
        )
    return found


def data_file(path: object) -> Path:
    """Raises InvalidArgument if it is none."""
    found = a_path("A file of text", path)
    if not found.is_file():
        raise InvalidArgument(f"There is no file at {str(found)!r}.")
    return found


def model_files(folder: Path) -> list[Path]:
    """What belongs to a model, of a folder in the Hugging Face layout."""
    return [p for p in sorted(folder.iterdir()) if p.is_file() and (p.name in MODEL_FILES or WEIGHTS.fullmatch(p.name))]


@dataclass(frozen=True)
class LocalFile:
    """One that is to be uploaded."""

    path: Path
    bytes: int
    sha256: str

    @property
    def large(self) -> bool:
        """Whether it goes up in pieces."""
        return self.bytes >= LARGE


def describe(*paths: Path) -> list[LocalFile]:
    return [LocalFile(path, path.stat().st_size, file_sha256(path)) for path in paths]


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_name(folder: Path, name: str | None) -> str | None:
    """What it is to be called. A folder may be called what no model can be."""
    return name or re.sub(r"[^\w.+-]+", " ", folder.resolve().name).strip(" .+-")[:100] or None


def model_sha256(files: list[LocalFile]) -> str:
    """As the service has it of a model that consists of these."""
    return hashlib.sha256("".join(f"{file.path.name}\0{file.sha256}\n" for file in files).encode()).hexdigest()


def same_dataset(known: Dataset, file: LocalFile, name: str | None, column: str, bad_rows: BadRows) -> bool:
    """Whether a dataset of the same bytes is what would come of an upload."""
    called = file.path.name
    read_alike = called.lower().endswith(known.format) and (known.column, known.bad_rows) == (column, bad_rows)
    return read_alike and same_name(known.name, name or called[: -len(known.format)])


def same_name(kept: str, given: str) -> bool:
    """Whether the service may have made one of the other: it leaves out what no name can hold."""
    return re.findall(r"\w+", kept) == re.findall(r"\w+", given)


def upload_model(files: list[LocalFile], uploads: list[str], name: str | None) -> Call[Model]:
    """With the ids of `uploads` in the place of its large files."""
    small = tuple(("files", file.path) for file in files if not file.large)
    form = _given(name=name, uploads=uploads or None)
    return Call("POST", "/models", _as(Model), files=small, form=form, safe=False, patience=WORK_SECONDS)


def hub_model(text: str) -> tuple[str, str] | None:
    """Name and revision of what is written hub:OWNER/NAME@REVISION, or None if that is something else."""
    found = re.fullmatch(r"hub:([^\s@/]+/[^\s@/]+)(?:@(\S+))?", text)
    return (found[1], found[2] or "main") if found else None


def fetch_model(hub: str, revision: str, name: str | None, token: str | None) -> Call[Model]:
    body = _given(hub=hub, revision=revision, name=name, token=token or os.environ.get("NARROW_HUB_TOKEN"))
    # Sent again it is answered with what the first one has made, or is making.
    return Call("POST", "/fetches", _as(Model), json=body, patience=FETCH_SECONDS)


def list_models(cursor: str | None, limit: int, sha256: str | None) -> Call[PageModel]:
    return Call("GET", "/models", _as(PageModel), params=_given(cursor=cursor, limit=limit, sha256=sha256))


def get_model(model_id: str) -> Call[Model]:
    return Call("GET", path_of("model", model_id), _as(Model))


def delete_model(model_id: str) -> Call[None]:
    return Call("DELETE", path_of("model", model_id), _nothing)


def upload_dataset(file: LocalFile, upload: str | None, name: str | None, column: str, bad_rows: BadRows) -> Call[Dataset]:
    files = () if upload else (("file", file.path),)
    form = _given(name=name, column=column, bad_rows=bad_rows, upload=upload)
    patience = WORK_SECONDS + file.bytes / READ_RATE
    return Call("POST", "/datasets", _as(Dataset), files=files, form=form, safe=False, patience=patience)


def list_datasets(cursor: str | None, limit: int, sha256: str | None) -> Call[PageDataset]:
    return Call("GET", "/datasets", _as(PageDataset), params=_given(cursor=cursor, limit=limit, sha256=sha256))


def get_dataset(dataset_id: str) -> Call[Dataset]:
    return Call("GET", path_of("dataset", dataset_id), _as(Dataset))


def delete_dataset(dataset_id: str) -> Call[None]:
    return Call("DELETE", path_of("dataset", dataset_id), _nothing)


def get_usage() -> Call[Usage]:
    return Call("GET", "/usage", _as(Usage))


def ready() -> Call[Health]:
    return Call("GET", "/readyz", _health, answers=(503,))


def _as(kind: type[T]) -> Callable[[httpx.Response], T]:
    def read(response: httpx.Response) -> T:
        try:
            return kind.model_validate_json(response.content)  # type: ignore[attr-defined, no-any-return]
        except ValidationError as error:
            raise not_narrow(response.request.url) from error

    return read


def _health(response: httpx.Response) -> Health:
    try:
        return Health.model_validate_json(response.content)
    except ValidationError as error:
        # A proxy whose service is away says 503 too.
        raise (from_response(response) if response.status_code >= 400 else not_narrow(response.request.url)) from error


def _page(response: httpx.Response) -> str:
    if not response.headers.get("content-type", "").startswith("text/html"):
        raise not_narrow(response.request.url)
    return response.text


def _nothing(response: httpx.Response) -> None:
    return None


def _given(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def read_event(data: str) -> Event:
    try:
        return Event.model_validate_json(data)
    except ValidationError as error:
        detail = "The service sent an event that this client cannot read: are both of the same version?"
        raise NarrowClientError(detail) from error
