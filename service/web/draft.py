"""What the form of a new job holds, as text that a person typed, and the spec that it means; and the way back, so that a job can
be the template of another."""

import json
import re
import secrets
from collections.abc import Mapping
from hashlib import sha256
from typing import Any, NamedTuple

from pydantic import BaseModel, Field, ValidationError

from narrow_engine.errors import NarrowError
from narrow_engine.spec import DEFAULTS, JobSpec, clear, first_of, sentence, wording
from service.api.schemas import FieldError
from service.problems import ApiError

BUDGETS = ("parameters", "bytes", "flops", "latency", "retention")
"""Kinds of budget that are one number. Shapes (`keep`) are for the JSON below the form."""

FIELDS = {
    ("base",): ("base", "The base model"),
    ("target",): ("target", "The target"),
    ("budget",): ("amount", "The amount"),
    ("method", "kind"): ("kind", "The method"),
    ("method", "recover", "tokens"): ("tokens", "The number of tokens to train on"),
    ("export",): ("export", "The choice of formats"),
}
"""Where parts of a spec are in the form: the name of the field, and what a person reads there."""
FIELD_OF = {
    "budget_too_small": "amount",
    "model_not_found": "base",
    "text_too_short": "target",
    "unit_not_supported": "more",
    "block_too_long": "more",
}
"""The same for what is found wrong later than by the spec itself, by its code."""


class Draft(BaseModel):
    """The fields of the form. Whatever is wrong with them is said when a spec is made of them, and nothing typed is lost."""

    base: str = ""
    target: str = ""
    budget: str = "parameters"
    amount: str = "0.5"
    kind: str = "prune"
    tokens: str = ""
    export: list[str] = []
    skill_name: list[str] = []
    skill_dataset: list[str] = []
    skill_role: list[str] = []
    more: str = ""
    once: str = Field(default_factory=lambda: secrets.token_hex(8), description="Of one showing of the form.")

    @property
    def skills(self) -> list[dict[str, str]]:
        rows = zip(self.skill_name, self.skill_dataset, self.skill_role, strict=False)
        return [{"name": name.strip(), "dataset": data, "role": role} for name, data, role in rows if name.strip() or data]

    def key(self, spec: JobSpec) -> str:
        """The Idempotency-Key: the button pressed twice makes one job, and a changed form another."""
        return f"{self.once[:40]}-{sha256(spec.model_dump_json().encode()).hexdigest()[:16]}"


class Fault(NamedTuple):
    """What is wrong with a form."""

    sentence: str
    field: str = ""
    """The id of the field where it is, if it is in one."""


def fault_of(error: ApiError | NarrowError, draft: Draft) -> Fault:
    if isinstance(error, ApiError) and error.errors:
        return Fault(str(error), error.errors[0].pointer.removeprefix("/"))
    if error.code == "dataset_not_found":
        ids = {draft.target: "target", **{row["dataset"]: f"skill_dataset-{n}" for n, row in enumerate(draft.skills)}}
        return Fault(str(error), next((field for known, field in ids.items() if known and known in str(error)), ""))
    return Fault(str(error), FIELD_OF.get(error.code, ""))


def spec_of(draft: Draft) -> JobSpec:
    """Raises ApiError, whose `errors` name the field of the form."""
    if not draft.base or not draft.target:
        missing = "base model" if not draft.base else "target dataset"
        raise _refusal("target" if draft.base else "base", f"There is no {missing} yet: pick one, or upload one.")
    for number, skill in enumerate(draft.skills):
        if not skill["name"]:
            raise _refusal(f"skill_name-{number}", f"Skill {number + 1} has no name: give it one, or pick no dataset for it.")
        if not skill["dataset"]:
            raise _refusal(
                f"skill_dataset-{number}", f"The skill {skill['name'][:40]!r} has no dataset: pick one, or empty its name."
            )
    given: dict[str, Any] = {"base": {"model": draft.base}, "target": {"dataset": draft.target}, "method": {"kind": draft.kind}}
    if draft.kind != "export":
        given["budget"] = {draft.budget: _number(draft.amount, "amount")}
        if draft.tokens.strip():
            given["method"]["recover"] = {"tokens": _number(draft.tokens, "tokens")}
    if draft.export:
        given["export"] = draft.export
    if draft.skills:
        given["skills"] = draft.skills
    more = _more(draft.more)
    try:
        return JobSpec.model_validate(_merged(given, more))
    except ValidationError as error:
        raise _misfit(first_of(error), more) from error


def _misfit(fault: Mapping[str, Any], more: dict[str, Any]) -> ApiError:
    """In the words of the form where the fault is in a field of it, and with its path where it is in the JSON below."""
    path = tuple(part for part in fault["loc"] if part != "[key]")
    if not path:
        return ApiError(422, "invalid_request", sentence("", wording(fault)))
    known = next((found for part, found in FIELDS.items() if path[: len(part)] == part), None)
    if len(path) == 3 and path[0] == "skills":
        known = f"skill_{path[2]}-{path[1]}", f"The {path[2]} of skill {path[1] + 1}"
    if known is None or _has(more, path):
        return _refusal("more", sentence(".".join(map(clear, path)), wording(fault)))
    return _refusal(known[0], sentence(known[1], wording(fault)))


def _has(options: Any, path: tuple[Any, ...]) -> bool:
    """Whether the JSON says anything at a path, or of something that it is in."""
    for part in path:
        if not isinstance(options, dict):
            return True
        if part not in options:
            return False
        options = options[part]
    return True


def _refusal(field: str, words: str) -> ApiError:
    return ApiError(422, "invalid_request", words, [FieldError(pointer=f"/{field}", detail=words)])


def draft_of(spec: JobSpec) -> Draft:
    """A form that means the same spec: what has no field there and is not as it is by default comes below it, as JSON."""
    rest = spec.model_dump(mode="json", exclude_defaults=True)
    method = rest.pop("method", {})
    draft = Draft(base=spec.base.model, target=spec.target.dataset, kind=method.pop("kind", "prune"), export=list(spec.export))
    method = _but(method, spec.method.model_dump(mode="json"), DEFAULTS[draft.kind])
    if draft.kind == "export":
        rest.pop("budget", None)
    else:
        draft.tokens = str(method.get("recover", {}).pop("tokens", ""))
        [(budget, amount)] = spec.budget.model_dump(exclude_none=True).items()
        if budget in BUDGETS:
            draft.budget, draft.amount = budget, f"{amount:.10g}"
            del rest["budget"]
    if not any(skill.answer for skill in spec.skills):
        draft.skill_name = [skill.name for skill in spec.skills]
        draft.skill_dataset = [skill.dataset for skill in spec.skills]
        draft.skill_role = [skill.role for skill in spec.skills]
        rest.pop("skills", None)
    del rest["base"]["model"], rest["target"]["dataset"]
    rest.pop("export", None)
    more = _filled({**rest, "method": method})
    draft.more = json.dumps(more, indent=1, ensure_ascii=False) if more else ""
    return draft


_GROUPED = re.compile(r"[1-9]\d{0,2}(,\d{3})+(\.\d*)?")
"""A comma may also be a decimal one. Between whole groups of three it is taken for what it is in English."""


def _number(text: str, field: str) -> float:
    typed = text.strip()
    if "," in typed and not _GROUPED.fullmatch(typed):
        detail = (
            f"{typed[:40]!r} can be read in two ways: write a fraction with a point, as 0.5, and a large number as 1,000,000."
        )
        raise _refusal(field, detail)
    try:
        return float(typed.replace(",", ""))
    except ValueError as error:
        name = {"amount": "the budget", "tokens": "the tokens to train on"}[field]
        raise _refusal(field, f"{text[:40]!r} is no number: give {name} as one.") from error


def _more(text: str) -> dict[str, Any]:
    """The options below the form."""
    try:
        found = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise _refusal("more", f"The advanced options are not JSON: {str(error)[:200]}.") from error
    if not isinstance(found, dict):
        raise _refusal("more", 'The advanced options are not a JSON object: write them as {"block_tokens": 256}.')
    return found


def _merged(given: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """`more` goes before what the form says. A budget is one thing, and not mixed with another."""
    made = dict(given)
    for name, value in more.items():
        both = isinstance(value, dict) and isinstance(made.get(name), dict) and name != "budget"
        made[name] = _merged(made[name], value) if both else value
    return made


def _but(said: dict[str, Any], full: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    """`said`, which leaves out what fields are by default, as a kind of method needs it, by which other values are usual."""
    for name, value in usual.items():
        if isinstance(value, dict):
            said[name] = _but(said.get(name, {}), full[name], value)
        elif full[name] == value:
            said.pop(name, None)
        else:
            said[name] = full[name]
    return said


def _filled(options: dict[str, Any]) -> dict[str, Any]:
    """Without objects that say nothing."""
    found = {name: _filled(value) if isinstance(value, dict) else value for name, value in options.items()}
    return {name: value for name, value in found.items() if value != {}}
