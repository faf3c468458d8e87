"""`compress`: the whole job in one call. Uploads what is local, follows the job, downloads what came out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from narrow_client._errors import JobCancelled, JobFailed, NarrowClientError
from narrow_client._render import ProgressDisplay
from narrow_client._sync import Narrow
from narrow_client.models import Event, Job, Report


@dataclass(frozen=True)
class Result:
    """What came out, on this machine."""

    job: Job
    report: Report
    model_path: Path
    """Loads with AutoModelForCausalLM.from_pretrained."""
    onnx_path: Path | None
    report_path: Path


def compress(
    base: str | Path,
    target: str | Path,
    budget: float | Mapping[str, Any] = 0.5,
    out: str | Path = "narrow-out",
    *,
    skills: Mapping[str, tuple[str | Path, str]] | None = None,
    method: Mapping[str, Any] | None = None,
    export: Sequence[str] = ("safetensors", "onnx"),
    column: str = "text",
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    client: Narrow | None = None,
    progress: bool | Callable[[Event], None] = True,
) -> Result:
    """Compresses `base` (a model folder or `mdl_...`) to the domain of `target` (a file or `ds_...`).

    `budget` is the share of parameters to keep (0.5), their number (4_000_000), or the API's own form
    ({"keep": {"neuron": 0.25}}). `skills` maps names to (file or id, role), with the roles keep, forget and watch.
    `method` and `options` are merged into the job spec as they are. Results lie in `out`: model/, onnx/, report.json,
    report.html, plan.json. `progress` prints to the terminal, or takes a function of each event.

    Raises JobFailed, JobCancelled, ApiError, ConnectionFailed. Ctrl-C cancels the job.
    """
    own = client is None
    client = client or Narrow()
    out = Path(out)
    try:
        spec = {
            "base": {"model": model_id(client, base)},
            "target": {"dataset": dataset_id(client, target, column)},
            "skills": [
                {"name": name, "dataset": dataset_id(client, data, column), "role": role}
                for name, (data, role) in (skills or {}).items()
            ],
            "budget": dict(budget) if isinstance(budget, Mapping) else {"parameters": budget},
            "method": dict(method or {}),
            "export": list(export),
            "seed": seed,
            **(options or {}),
        }
        job = client.jobs.create(spec)
        try:
            _follow(client, job, progress)
            job = client.jobs.wait(job.id)
        except KeyboardInterrupt:
            client.jobs.cancel(job.id)
            raise
        if job.status == "failed":
            raise JobFailed(job)
        if job.status == "cancelled":
            raise JobCancelled(job)
        client.jobs.download(job.id, out)
        return Result(
            job=job,
            report=client.jobs.report(job.id),
            model_path=out / "model",
            onnx_path=out / "onnx" / "model.onnx" if "onnx" in spec["export"] else None,
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
            for event in client.jobs.events(job.id):
                display(event)


def model_id(client: Narrow, base: str | Path) -> str:
    path = Path(base)
    if path.is_dir():
        return client.models.upload(path).id
    if str(base).startswith("mdl_"):
        return str(base)
    raise NarrowClientError(f"There is no model folder at {base}, and it is not an id (mdl_...) either.")


def dataset_id(client: Narrow, data: str | Path, column: str) -> str:
    path = Path(data)
    if path.is_file():
        return client.datasets.upload(path, column=column).id
    if str(data).startswith("ds_"):
        return str(data)
    raise NarrowClientError(f"There is no file at {data}, and it is not an id (ds_...) either.")
