"""Datasets: the text of a domain, as JSON Lines, CSV, TSV, Parquet or plain text."""

from typing import Annotated

from fastapi import APIRouter, Depends, File, Form, Request, UploadFile
from sqlmodel import col, select

from narrow_engine.spec import BadRows
from service.api.forms import only
from service.api.paging import Cursor, Limit, Sha256, page
from service.api.schemas import Dataset, Page
from service.api.sessions import Db, ReadDb
from service.db.tables import TERMINAL, DatasetRow, JobRow
from service.problems import ApiError, not_found, responses
from service.uploads import as_dataset, forget, require_space, store_dataset

router = APIRouter(prefix="/datasets", tags=["datasets"])


FORM = only(("file", "upload", "name", "column", "bad_rows"))


@router.post("", status_code=201, responses=responses(404, 409, 413, 507), dependencies=[Depends(FORM)])
def upload_dataset(
    request: Request,
    session: Db,
    file: Annotated[
        UploadFile | None, File(description=".jsonl, .ndjson, .csv, .tsv, .txt, .text or .md, also .gz or .zst; .parquet")
    ] = None,
    upload: Annotated[str | None, Form(description="Instead, the id of an upload that is complete.")] = None,
    name: Annotated[str | None, Form(max_length=100)] = None,
    column: Annotated[str, Form(min_length=1, max_length=200, description="The field of the text in each row.")] = "text",
    bad_rows: Annotated[
        BadRows, Form(description="What a bad row does: refuse the dataset, or be left out and counted.")
    ] = "stop",
) -> Dataset:
    """Upload a dataset. Every row is read before it is kept, and a bad one is named by its line."""
    settings = request.app.state.settings
    require_space(settings)
    return store_dataset(session, settings, request.app.state.storage, file, upload, name, column, bad_rows)


@router.get("", responses=responses())
def list_datasets(session: ReadDb, cursor: Cursor = None, limit: Limit = 20, sha256: Sha256 = None) -> Page[Dataset]:
    """Datasets, newest first."""
    statement = select(DatasetRow)
    if sha256:
        statement = statement.where(DatasetRow.sha256 == sha256)
    return page(session, statement, DatasetRow, cursor, limit, as_dataset)


@router.get("/{dataset_id}", responses=responses(404))
def get_dataset(dataset_id: str, session: ReadDb) -> Dataset:
    """One dataset, with its first documents."""
    row = session.get(DatasetRow, dataset_id)
    if row is None:
        raise not_found("dataset", dataset_id)
    return as_dataset(row)


@router.delete("/{dataset_id}", status_code=204, responses=responses(404, 409, 507))
def delete_dataset(dataset_id: str, request: Request, session: Db) -> None:
    """Remove a dataset that no unfinished job needs. Reports on it stay."""
    row = session.get(DatasetRow, dataset_id)
    if row is None:
        raise not_found("dataset", dataset_id)
    for job in session.exec(select(JobRow).where(col(JobRow.status).not_in(TERMINAL))):
        parts = [job.spec["target"], job.spec.get("broad"), *job.spec["skills"]]
        if dataset_id in [part["dataset"] for part in parts if part]:
            raise ApiError(409, "dataset_in_use", f"The job {job.id} needs this dataset: cancel it or wait for it.")
    forget(session, request.app.state.storage, row)
