"""`compress`: the whole job in one call. Uploads what is local, follows the job, downloads what came out."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from narrow_client import _calls
from narrow_client._async import AsyncNarrow
from narrow_client._errors import (
    Conflict,
    ConnectionFailed,
    InvalidArgument,
    JobCancelled,
    JobFailed,
    NarrowClientError,
    ServerError,
)
from narrow_client._files import check_out, folder_of
from narrow_client._notebook import display_here, html_of
from narrow_client._render import Display
from narrow_client._sync import Narrow
from narrow_client.models import Event, Job, Report

Skill = str | Path | tuple[str | Path, str] | tuple[str | Path, str, Mapping[str, Any]]
"""Its file or id, which is only watched; or that and its role; where its text is prompts, also how they are answered, as in the
API."""
ROLES: tuple[_calls.SkillRole, ...] = get_args(_calls.SkillRole)
OnInterrupt = bool | Callable[[Job], bool]
Input = tuple[Literal["hub", "model", "dataset"], str]
"""Something without an id: where it is, on the service's hub or here."""
CANCEL_SECONDS = 10.0
"""That a task which was cancelled takes at most to cancel its job."""


@dataclass(frozen=True, repr=False)
class Result:
    """What came out, on this machine."""

    job: Job
    report: Report
    model_path: Path
    """Loads with AutoModelForCausalLM.from_pretrained."""
    paths: Mapping[str, Path]
    """The folders of all formats: `paths["onnx-int4"]`, ..., of which `narrow run-model` runs any."""
    report_path: Path

    def __repr__(self) -> str:
        before, after = (f"{size.parameters:,}" for size in (self.report.before, self.report.after))
        kept = ", ".join(f"{name} {skill.retention.value:.2f}" for name, skill in self.report.skills.items())
        return f"Result({self.job.id}: {before} to {after} parameters; retention: {kept}; model_path={str(self.model_path)!r})"

    def _repr_html_(self) -> str:
        return html_of(self.report) or ""


@dataclass(frozen=True)
class Wanted:
    """A job, with files and folders where the API takes ids. The arguments of `compress`, which says what they are."""

    base: str | Path
    target: str | Path
    budget: float | Mapping[str, Any] | None = None
    skills: Mapping[str, Skill] | None = None
    method: Mapping[str, Any] | None = None
    export: str | Iterable[str] = ("safetensors", "onnx")
    column: str = "text"
    answer: Mapping[str, Any] | None = None
    seed: int = 0
    options: Mapping[str, Any] | None = None
    broad: str | Path | None = None
    teacher: str | Path | None = None
    bad_rows: _calls.BadRows = "stop"

    def inputs(self) -> list[Input]:
        """What has no id yet, each once. Raises InvalidArgument if any of it is not there: before the first is uploaded."""
        self._check()
        models = [self.base, *([self.teacher] if self.teacher else [])]
        data = [self.target, *(place for _, place, *_ in self._skills()), *([self.broad] if self.broad else [])]
        found = [*map(model_input, models), *map(data_input, data)]
        return list(dict.fromkeys(item for item in found if item))

    def spec(self, ids: Mapping[Input, str]) -> dict[str, Any]:
        """The job spec, with the `ids` of the inputs."""

        def model(item: str | Path) -> dict[str, str]:
            found = model_input(item)
            return {"model": ids[found] if found else str(item)}

        def dataset(item: str | Path, answer: Mapping[str, Any] | None = None) -> dict[str, Any]:
            found = data_input(item)
            return {"dataset": ids[found] if found else str(item), **({"answer": dict(answer)} if answer else {})}

        return {
            "base": model(self.base),
            "target": dataset(self.target, self.answer),
            "skills": [{"name": name, "role": role, **dataset(place, told)} for name, place, role, told in self._skills()],
            **self._budget(),
            "method": dict(self.method or {}),
            "export": [self.export] if isinstance(self.export, str) else list(self.export),
            "seed": self.seed,
            **({"broad": dataset(self.broad)} if self.broad else {}),
            **({"teacher": model(self.teacher)} if self.teacher else {}),
            **(self.options or {}),
        }

    def _check(self) -> None:
        """Raises InvalidArgument for what is of the wrong type."""
        for name, example in (
            ("skills", '{"german": "german.jsonl"}'),
            ("method", '{"kind": "prune"}'),
            ("options", '{"seed": 1}'),
        ):
            _check_mapping(name, getattr(self, name), example)
        _check_mapping("answer", self.answer, '{"column": "answer"}')
        if not isinstance(self.budget, Mapping) and self.budget is not None and not _calls.is_number(self.budget):
            raise InvalidArgument(
                f'budget is a share like 0.5, a number of parameters, or a dict like {{"flops": 0.5}}, and not {self.budget!r}.'
            )
        if not isinstance(self.export, Iterable):
            raise InvalidArgument(f"export is the name of a format, or a list of them, and not {_calls.article(self.export)}.")

    def _skills(self) -> list[tuple[str, str | Path, str, Mapping[str, Any] | None]]:
        """Name, place, role and answer of each. Raises InvalidArgument."""
        return [(name, *_parts(name, skill)) for name, skill in (self.skills or {}).items()]

    def _budget(self) -> dict[str, Any]:
        if self.budget is None and (self.method or {}).get("kind") == "export":
            return {}
        asked = 0.5 if self.budget is None else self.budget
        return {"budget": dict(asked) if isinstance(asked, Mapping) else {"parameters": asked}}


def compress(
    base: str | Path,
    target: str | Path,
    budget: float | Mapping[str, Any] | None = None,
    out: str | Path = "narrow-out",
    *,
    skills: Mapping[str, Skill] | None = None,
    method: Mapping[str, Any] | None = None,
    export: str | Iterable[str] = ("safetensors", "onnx"),
    column: str = "text",
    answer: Mapping[str, Any] | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    broad: str | Path | None = None,
    teacher: str | Path | None = None,
    bad_rows: _calls.BadRows = "stop",
    client: Narrow | None = None,
    progress: bool | Callable[[Event], None] = True,
    cancel_on_interrupt: OnInterrupt = True,
) -> Result:
    """Compresses a model to the domain of a text: uploads what is local, waits for the job, downloads what came out.

    Args:
        base: A model folder, an id (`mdl_...`), or `hub:OWNER/NAME@REVISION`, which the service fetches if it has a hub;
            NARROW_HUB_TOKEN is sent along.
        target: The domain: a file of text (JSON Lines, CSV, TSV, Parquet, plain text) or an id (`ds_...`).
        budget: Share of the parameters to keep (0.5), their number (4_000_000), or the API's own form
            ({"keep": {"neuron": 0.25}}). By default half; of what is only exported (`method={"kind": "export"}`), all.
        out: The folder for the results: model/, onnx/, report.json, report.html, plan.json.
        skills: What else is measured: names to (file or id, role), with the roles keep, forget and watch; a file or an id alone
            is watched.
        method: Merged into the spec's `method`: {"recover": {"tokens": 160_000}}, ...
        export: A format or several, beside which model/ is there always.
        column: The text in each row of the files.
        answer: Where rows hold prompts in `column` and answers beside them: where the target's are, and how what models write
            is judged ({"column": "answer"}). For a skill it is a third item beside its role.
        seed: Of everything that is random.
        options: Merged into the spec as they are: {"block_tokens": 256}, ...
        broad: The text of a curriculum, as `target`.
        teacher: A model that teaches in the base's place, as `base`.
        bad_rows: "stop": a bad row refuses its file. "skip": it is left out and counted.
        client: Of the service; by default one of NARROW_URL and NARROW_API_KEY.
        progress: Whether to show how far it is: as bars in a terminal and in a notebook, as lines in a log. Or a function that
            takes each event.
        cancel_on_interrupt: Whether Ctrl-C (KeyboardInterrupt) while the job runs cancels it, or a function that is asked with
            the job; else the job goes on. A connection that is lost never cancels it.

    Returns:
        The report, and where the files are.

    Raises:
        InvalidArgument: A file or folder is not there, or an argument is of the wrong type. Nothing was sent.
        InvalidRequest: The service does not take a file or the spec; the sentence says why.
        JobFailed: The job failed; `error.job.error` says why.
        JobCancelled: Somebody cancelled it.
        ConnectionFailed: The service was away for more than a minute; the job goes on.
        KeyboardInterrupt: Its text says what becomes of the job.

    Examples:
        >>> result = narrow_client.compress(base, target, budget=0.85, out=out, method=quick, options=small)
        >>> result.report.skills["python"].retention.value > 0
        True
        >>> sorted(path.name for path in result.model_path.glob("*.safetensors"))
        ['model.safetensors']
    """
    own = client is None
    client = client or Narrow()
    out = _calls.a_path("out", out)
    wanted = Wanted(base, target, budget, skills, method, export, column, answer, seed, options, broad, teacher, bad_rows)
    try:
        check_out(out)
        spec, key = upload_spec(client, wanted), secrets.token_hex(16)
        try:
            job = client.jobs.create(spec, key)
        except KeyboardInterrupt:
            # Sent again with its key, what may have been made answers with its id.
            raise KeyboardInterrupt(
                unseen(lambda: interrupted(client, client.jobs.create(spec, key), cancel_on_interrupt))
            ) from None
        try:
            with display_here(progress) as show:
                _begin(show, job)
                for event in client.jobs.events(job.id):
                    show(event)
            job = client.jobs.wait(job.id)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(interrupted(client, job, cancel_on_interrupt)) from None
        except (ConnectionFailed, ServerError) as error:
            _add(error, f"The job {job.id} goes on: 'narrow watch {job.id}' follows it, and in the end {_fetch(job, out)}.")
            raise
        _check_end(job)
        try:
            client.jobs.download(job.id, out)
            report = client.jobs.report(job.id)
        except (ConnectionFailed, ServerError) as error:
            _add(error, f"The job {job.id} has succeeded: {_fetch(job, out)}.")
            raise
        except OSError as error:
            raise _unwritten(error, job, out) from error
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"the job {job.id} has succeeded: {_fetch(job, out)}") from None
        return _result(job, report, spec, out)
    finally:
        if own:
            client.close()


async def compress_async(
    base: str | Path,
    target: str | Path,
    budget: float | Mapping[str, Any] | None = None,
    out: str | Path = "narrow-out",
    *,
    skills: Mapping[str, Skill] | None = None,
    method: Mapping[str, Any] | None = None,
    export: str | Iterable[str] = ("safetensors", "onnx"),
    column: str = "text",
    answer: Mapping[str, Any] | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    broad: str | Path | None = None,
    teacher: str | Path | None = None,
    bad_rows: _calls.BadRows = "stop",
    client: AsyncNarrow | None = None,
    progress: bool | Callable[[Event], None] = True,
    cancel_on_interrupt: OnInterrupt = True,
) -> Result:
    """As `compress`, for asyncio.

    Args:
        base: This and all that follows but for the two below as in `compress`.
        client: Of the service; by default one of NARROW_URL and NARROW_API_KEY.
        cancel_on_interrupt: Whether the job is cancelled when the task is, as `asyncio.run` does at Ctrl-C, `asyncio.timeout`
            when the time is over, and a TaskGroup when another task fails. Or a function that is asked with the job.

    Returns:
        The report, and where the files are.

    Raises:
        CancelledError: The task was cancelled; a note of the error says what becomes of the job.
        NarrowClientError: As `compress`.

    Examples:
        >>> result = await narrow_client.compress_async(base, target, budget=0.85, out=out, method=quick, options=small)
        >>> result.job.status
        'succeeded'
    """
    own = client is None
    client = client or AsyncNarrow()
    out = _calls.a_path("out", out)
    wanted = Wanted(base, target, budget, skills, method, export, column, answer, seed, options, broad, teacher, bad_rows)
    try:
        check_out(out)
        spec, key = await upload_spec_async(client, wanted), secrets.token_hex(16)
        try:
            job = await client.jobs.create(spec, key)
        except asyncio.CancelledError as error:
            error.add_note(await _interrupted_async(client, lambda: client.jobs.create(spec, key), cancel_on_interrupt))
            raise
        try:
            with display_here(progress) as show:
                _begin(show, job)
                async for event in client.jobs.events(job.id):
                    show(event)
            job = await client.jobs.wait(job.id)
        except asyncio.CancelledError as error:
            error.add_note(await _interrupted_async(client, lambda: client.jobs.get(job.id), cancel_on_interrupt))
            raise
        except (ConnectionFailed, ServerError) as error:
            _add(error, f"The job {job.id} goes on: 'narrow watch {job.id}' follows it, and in the end {_fetch(job, out)}.")
            raise
        _check_end(job)
        try:
            await client.jobs.download(job.id, out)
            report = await client.jobs.report(job.id)
        except (ConnectionFailed, ServerError) as error:
            _add(error, f"The job {job.id} has succeeded: {_fetch(job, out)}.")
            raise
        except OSError as error:
            raise _unwritten(error, job, out) from error
        return _result(job, report, spec, out)
    finally:
        if own:
            await client.close()


def upload_spec(client: Narrow, wanted: Wanted) -> dict[str, Any]:
    """The job spec, for which everything local is uploaded, once all of it has been found."""
    ids: dict[Input, str] = {}
    for kind, place in wanted.inputs():
        if kind == "hub":
            ids[kind, place] = client.models.fetch(*_hub(place)).id
        elif kind == "model":
            ids[kind, place] = client.models.upload(place).id
        else:
            ids[kind, place] = client.datasets.upload(place, column=wanted.column, bad_rows=wanted.bad_rows).id
    return wanted.spec(ids)


async def upload_spec_async(client: AsyncNarrow, wanted: Wanted) -> dict[str, Any]:
    ids: dict[Input, str] = {}
    for kind, place in wanted.inputs():
        if kind == "hub":
            ids[kind, place] = (await client.models.fetch(*_hub(place))).id
        elif kind == "model":
            ids[kind, place] = (await client.models.upload(place)).id
        else:
            ids[kind, place] = (await client.datasets.upload(place, column=wanted.column, bad_rows=wanted.bad_rows)).id
    return wanted.spec(ids)


def _check_mapping(name: str, value: object, example: str) -> None:
    if value is not None and not isinstance(value, Mapping):
        raise InvalidArgument(f"{name} is a dict like {example}, and not {_calls.article(value)}.")


def _parts(name: str, skill: Any) -> tuple[str | Path, str, Mapping[str, Any] | None]:
    if isinstance(skill, str | Path):
        return skill, "watch", None
    parts = tuple(skill) if isinstance(skill, tuple | list) else ()
    if len(parts) not in (2, 3) or not isinstance(parts[0], str | Path):
        raise InvalidArgument(f"The skill {name!r} is a file or an id, or (file or id, role), and not {skill!r}.")
    if parts[1] not in ROLES:
        raise InvalidArgument(f"The skill {name!r} has the role {parts[1]!r}, and the roles are {', '.join(ROLES)}.")
    told = parts[2] if len(parts) > 2 else None
    _check_mapping(f"The answer of the skill {name!r}", told, '{"column": "answer"}')
    return parts[0], parts[1], told


def model_input(model: str | Path) -> Input | None:
    """Where a model is that has no id; None if it has one. Raises InvalidArgument if it is neither."""
    _calls.a_path("A model's folder or id", model)
    text = str(model)
    if text.startswith("hub:"):
        _hub(text)
        return "hub", text
    if Path(model).is_dir():
        return "model", text
    if not _calls.is_id("model", text):
        raise InvalidArgument(f"There is no model folder at {text!r}, and it is not an id (mdl_...) either.")
    return None


def data_input(data: str | Path) -> Input | None:
    """As `model_input`, of a file of text."""
    _calls.a_path("A file of text, or its id,", data)
    text = str(data)
    if Path(data).is_file():
        return "dataset", text
    if not _calls.is_id("dataset", text):
        raise InvalidArgument(f"There is no file at {text!r}, and it is not an id (ds_...) either.")
    return None


def _hub(text: str) -> tuple[str, str]:
    found = _calls.hub_model(text)
    if not found:
        raise InvalidArgument(f"{text!r} does not look like hub:OWNER/NAME or hub:OWNER/NAME@REVISION.")
    return found


def _begin(show: Display, job: Job) -> None:
    show.say(f"job {job.id}: 'narrow watch {job.id}' follows it from anywhere", job.created_at)


def _check_end(job: Job) -> None:
    if job.status == "failed":
        raise JobFailed(job)
    if job.status == "cancelled":
        raise JobCancelled(job)


def _result(job: Job, report: Report, spec: Mapping[str, Any], out: Path) -> Result:
    return Result(
        job=job,
        report=report,
        model_path=out / "model",
        paths={form: out / folder_of(form) for form in dict.fromkeys(("safetensors", *spec["export"]))},
        report_path=out / "report.html",
    )


def _fetch(job: Job, out: Path) -> str:
    return f"'narrow download {job.id} --out {out}' fetches what came out"


def _unwritten(error: OSError, job: Job, out: Path) -> NarrowClientError:
    return NarrowClientError(f"{out} cannot be written: {error}. The job {job.id} has succeeded: {_fetch(job, out)}.")


def _add(error: NarrowClientError, sentence: str) -> None:
    error.args = (f"{error} {sentence}",)


def unseen(decide: Callable[[], str]) -> str:
    """For a Ctrl-C that came before the id did."""
    try:
        return decide()
    except NarrowClientError as error:
        return _maybe_queued(error)


def _maybe_queued(error: Exception) -> str:
    return f"it may have been queued, and 'narrow jobs' shows whether it was. {error}"


def interrupted(client: Narrow, job: Job, cancel: OnInterrupt) -> str:
    """Cancels the job, if that is wanted, and says what becomes of it. Another Ctrl-C leaves it."""
    try:
        if not (cancel(job) if callable(cancel) else cancel):
            return left(job)
        client.jobs.cancel(job.id)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(left(job)) from None
    except NarrowClientError as error:
        return _not_cancelled(job, error)
    return f"the job {job.id} was cancelled"


async def _interrupted_async(client: AsyncNarrow, find: Callable[[], Awaitable[Job]], cancel: OnInterrupt) -> str:
    """The same in a task that was cancelled, which must not take long."""
    job: Job | None = None
    try:
        async with asyncio.timeout(CANCEL_SECONDS):
            job = await find()
            if not (cancel(job) if callable(cancel) else cancel):
                return left(job)
            await client.jobs.cancel(job.id)
    except (NarrowClientError, TimeoutError) as error:
        return _not_cancelled(job, error) if job else _maybe_queued(error)
    return f"the job {job.id} was cancelled"


def left(job: Job) -> str:
    return f"the job {job.id} goes on: 'narrow watch {job.id}' follows it, 'narrow cancel {job.id}' ends it"


def _not_cancelled(job: Job, error: Exception) -> str:
    if isinstance(error, Conflict):
        return f"the job {job.id} had ended already: 'narrow show {job.id}' says how"
    return f"the job {job.id} was not cancelled, so try 'narrow cancel {job.id}'. {error}"
