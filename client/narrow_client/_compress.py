"""`compress`: the whole job in one call. Uploads what is local, follows the job, downloads what came out."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from narrow_client import _calls
from narrow_client._errors import Conflict, ConnectionFailed, JobCancelled, JobFailed, NarrowClientError, ServerError
from narrow_client._files import check_out, folder_of
from narrow_client._render import ProgressDisplay
from narrow_client._sync import Narrow
from narrow_client.models import Event, Job, Report

Skill = tuple[str | Path, str] | tuple[str | Path, str, Mapping[str, Any]]
"""Its file or id and its role; where its text is prompts, also how they are answered, as in the API."""


@dataclass(frozen=True)
class Result:
    """What came out, on this machine."""

    job: Job
    report: Report
    model_path: Path
    """Loads with AutoModelForCausalLM.from_pretrained."""
    paths: Mapping[str, Path]
    """The folders of all formats: `paths["onnx-int4"]`, ..., of which `narrow run-model` runs any."""
    report_path: Path


def compress(
    base: str | Path,
    target: str | Path,
    budget: float | Mapping[str, Any] | None = None,
    out: str | Path = "narrow-out",
    *,
    skills: Mapping[str, Skill] | None = None,
    method: Mapping[str, Any] | None = None,
    export: Sequence[str] = ("safetensors", "onnx"),
    column: str = "text",
    answer: Mapping[str, Any] | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    broad: str | Path | None = None,
    teacher: str | Path | None = None,
    bad_rows: _calls.BadRows = "stop",
    client: Narrow | None = None,
    progress: bool | Callable[[Event], None] = True,
) -> Result:
    """Compresses `base` (a model folder or `mdl_...`) to the domain of `target` (a file or `ds_...`).

    `base` may also be `hub:OWNER/NAME@REVISION`, which the service fetches if it has a hub; NARROW_HUB_TOKEN is sent along.
    `budget` is the share of parameters to keep (0.5), their number (4_000_000), or the API's own form
    ({"keep": {"neuron": 0.25}}); by default half of them, or of what is only exported (`method={"kind": "export"}`), all.
    `export` are formats. `skills` maps names to (file or id, role), with the roles keep, forget and watch.
    Where rows hold prompts in `column` and their answers beside them, `answer` says where the target's are and how to judge
    what models write, as the API does ({"column": "answer"}); for a skill it is a third item beside its role.
    `method` and `options` are merged into the job spec as they are; `broad` is the text of a curriculum (file or id),
    `teacher` a model that teaches in the base's place (as `base`). A bad row of a file refuses it, or with `bad_rows="skip"`
    is left out and counted.
    Results lie in `out`: model/, onnx/, report.json, report.html, plan.json. `progress` prints to the
    terminal, or takes a function of each event.

    Raises JobFailed, JobCancelled, ApiError, ConnectionFailed. Ctrl-C cancels the job; a lost connection does not.
    """
    own = client is None
    client = client or Narrow()
    out = Path(out)
    try:
        check_out(out)
        spec = upload_spec(
            client, base, target, budget, skills, method, export, column, answer, seed, options, broad, teacher, bad_rows
        )
        key = secrets.token_hex(16)
        try:
            job = client.jobs.create(spec, key)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(cancel_unseen(lambda: _cancel(client, client.jobs.create(spec, key)))) from None
        fetch = f"'narrow download {job.id} --out {out}' fetches what came out"
        try:
            _follow(client, job, progress)
            job = client.jobs.wait(job.id)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_cancel(client, job)) from None
        except (ConnectionFailed, ServerError) as error:
            error.args = (f"{error} The job {job.id} goes on: 'narrow watch {job.id}' follows it, and in the end {fetch}.",)
            raise
        if job.status == "failed":
            raise JobFailed(job)
        if job.status == "cancelled":
            raise JobCancelled(job)
        try:
            client.jobs.download(job.id, out)
            report = client.jobs.report(job.id)
        except (ConnectionFailed, ServerError) as error:
            error.args = (f"{error} The job {job.id} has succeeded: {fetch}.",)
            raise
        except OSError as error:
            raise NarrowClientError(f"{out} cannot be written: {error}. The job {job.id} has succeeded: {fetch}.") from error
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"the job {job.id} has succeeded: {fetch}") from None
        return Result(
            job=job,
            report=report,
            model_path=out / "model",
            paths={form: out / folder_of(form) for form in dict.fromkeys(("safetensors", *spec["export"]))},
            report_path=out / "report.html",
        )
    finally:
        if own:
            client.close()


def _follow(client: Narrow, job: Job, progress: bool | Callable[[Event], None]) -> None:
    if callable(progress):
        for event in client.jobs.events(job.id):
            progress(event)
    elif progress:
        with ProgressDisplay() as display:
            display.say(f"job {job.id}: 'narrow watch {job.id}' follows it from anywhere", job.created_at)
            for event in client.jobs.events(job.id):
                display(event)


def cancel_unseen(cancel: Callable[[], str]) -> str:
    """For a Ctrl-C that came before the id did: sent again with its key, what was made answers with it, and is cancelled."""
    try:
        return cancel()
    except NarrowClientError as error:
        return f"it may have been queued, and 'narrow jobs' shows whether it was. {error}"


def _cancel(client: Narrow, job: Job) -> str:
    """Cancels the job and says how that went."""
    try:
        client.jobs.cancel(job.id)
    except Conflict:
        return f"the job {job.id} had ended already: 'narrow show {job.id}' says how"
    except NarrowClientError as error:
        return f"the job {job.id} was not cancelled, so try 'narrow cancel {job.id}'. {error}"
    return f"the job {job.id} was cancelled"


def upload_spec(
    client: Narrow,
    base: str | Path,
    target: str | Path,
    budget: float | Mapping[str, Any] | None,
    skills: Mapping[str, Skill] | None,
    method: Mapping[str, Any] | None,
    export: Sequence[str],
    column: str,
    answer: Mapping[str, Any] | None,
    seed: int,
    options: Mapping[str, Any] | None = None,
    broad: str | Path | None = None,
    teacher: str | Path | None = None,
    bad_rows: _calls.BadRows = "stop",
) -> dict[str, Any]:
    """The job spec, for which everything local is uploaded, once all of it has been found."""
    for model in (base, *([teacher] if teacher else [])):
        check_model(model)
    for data in (target, *(skill[0] for skill in (skills or {}).values()), *([broad] if broad else [])):
        check_data(data)

    def dataset(data: str | Path) -> str:
        return client.datasets.upload(data, column=column, bad_rows=bad_rows).id if Path(data).is_file() else str(data)

    return {
        "base": {"model": _model_id(client, base)},
        "target": {"dataset": dataset(target), **({"answer": dict(answer)} if answer else {})},
        "skills": [
            {"name": name, "dataset": dataset(skill[0]), "role": skill[1]}
            | ({"answer": dict(skill[2])} if len(skill) > 2 else {})
            for name, skill in (skills or {}).items()
        ],
        **_budget(budget, method or {}),
        "method": dict(method or {}),
        "export": list(export),
        "seed": seed,
        **({"broad": {"dataset": dataset(broad)}} if broad else {}),
        **({"teacher": {"model": _model_id(client, teacher)}} if teacher else {}),
        **(options or {}),
    }


def _budget(budget: float | Mapping[str, Any] | None, method: Mapping[str, Any]) -> dict[str, Any]:
    if budget is None and method.get("kind") == "export":
        return {}
    return {"budget": dict(budget) if isinstance(budget, Mapping) else {"parameters": 0.5 if budget is None else budget}}


def _model_id(client: Narrow, model: str | Path) -> str:
    if hub := _calls.hub_model(str(model)):
        return client.models.fetch(*hub).id
    return client.models.upload(model).id if Path(model).is_dir() else str(model)


def check_model(base: str | Path) -> None:
    if str(base).startswith("hub:"):
        if not _calls.hub_model(str(base)):
            raise NarrowClientError(f"{str(base)!r} does not look like hub:OWNER/NAME or hub:OWNER/NAME@REVISION.")
    elif not Path(base).is_dir() and not _calls.is_id("model", str(base)):
        raise NarrowClientError(f"There is no model folder at {str(base)!r}, and it is not an id (mdl_...) either.")


def check_data(data: str | Path) -> None:
    if not Path(data).is_file() and not _calls.is_id("dataset", str(data)):
        raise NarrowClientError(f"There is no file at {str(data)!r}, and it is not an id (ds_...) either.")
