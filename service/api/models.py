"""Models: base models that were uploaded or fetched, and the results of jobs, which can be cut again."""

from typing import Annotated

from fastapi import APIRouter, Depends, File, Form, Request, UploadFile
from sqlmodel import col, select

from service.api.forms import only
from service.api.paging import Cursor, Limit, Sha256, page
from service.api.schemas import Model, Page
from service.api.sessions import Db, ReadDb
from service.db.tables import TERMINAL, JobRow, ModelRow
from service.problems import ApiError, not_found, responses
from service.uploads import as_model, forget, require_space, store_model

router = APIRouter(prefix="/models", tags=["models"])


FORM = only(("name",), many=("files", "uploads"))


@router.post("", status_code=201, responses=responses(404, 409, 413, 507), dependencies=[Depends(FORM)])
def upload_model(
    request: Request,
    session: Db,
    files: Annotated[list[UploadFile], File(description="config.json, model*.safetensors and the tokenizer's files.")] = [],  # noqa: B006
    uploads: Annotated[list[str], Form(description="Ids of uploads that are complete, for files that are large.")] = [],  # noqa: B006
    name: Annotated[str | None, Form(max_length=100)] = None,
) -> Model:
    """Upload a causal language model in the Hugging Face layout. It is checked against its config before it is kept."""
    settings = request.app.state.settings
    require_space(settings)
    return store_model(session, settings, request.app.state.storage, files, uploads, name)


@router.get("", responses=responses())
def list_models(session: ReadDb, cursor: Cursor = None, limit: Limit = 20, sha256: Sha256 = None) -> Page[Model]:
    """Models, newest first."""
    statement = select(ModelRow)
    if sha256:
        statement = statement.where(col(ModelRow.info)["sha256"].as_string() == sha256)
    return page(session, statement, ModelRow, cursor, limit, as_model)


@router.get("/{model_id}", responses=responses(404))
def get_model(model_id: str, session: ReadDb) -> Model:
    """One model, with its config."""
    row = session.get(ModelRow, model_id)
    if row is None:
        raise not_found("model", model_id)
    return as_model(row)


@router.delete("/{model_id}", status_code=204, responses=responses(404, 409, 507))
def delete_model(model_id: str, request: Request, session: Db) -> None:
    """Remove a model that no unfinished job needs."""
    row = session.get(ModelRow, model_id)
    if row is None:
        raise not_found("model", model_id)
    for job in session.exec(select(JobRow).where(col(JobRow.status).not_in(TERMINAL))):
        if model_id in [part["model"] for part in (job.spec["base"], job.spec.get("teacher")) if part]:
            raise ApiError(409, "model_in_use", f"The job {job.id} needs this model: cancel it or wait for it.")
    forget(session, request.app.state.storage, row)
