"""What the form of a new job holds, as text that a person typed, and the spec that it means; and the way back, so that a job can
be the template of another."""

import json
import secrets
from hashlib import sha256
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from narrow_engine.spec import DEFAULTS, JobSpec, first_fault
from service.problems import ApiError

BUDGETS = ("parameters", "bytes", "flops", "latency", "retention")
"""Kinds of budget that are one number. Shapes (`keep`) are for the JSON below the form."""


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


def spec_of(draft: Draft) -> JobSpec:
    """Raises ApiError, with the sentence that the API has for the same spec."""
    if not draft.base or not draft.target:
        missing = "base model" if not draft.base else "target dataset"
        raise ApiError(422, "invalid_request", f"There is no {missing} yet: pick one, or upload one.")
    given: dict[str, Any] = {"base": {"model": draft.base}, "target": {"dataset": draft.target}, "method": {"kind": draft.kind}}
    if draft.kind != "export":
        given["budget"] = {draft.budget: _number(draft.amount, "the budget")}
        if draft.tokens.strip():
            given["method"]["recover"] = {"tokens": _number(draft.tokens, "the tokens to train on")}
    if draft.export:
        given["export"] = draft.export
    if draft.skills:
        given["skills"] = draft.skills
    try:
        return JobSpec.model_validate(_merged(given, _more(draft.more)))
    except ValidationError as error:
        raise ApiError(422, "invalid_request", first_fault(error)) from error


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


def _number(text: str, name: str) -> float:
    try:
        return float(text.replace(",", "").replace("_", ""))
    except ValueError as error:
        raise ApiError(422, "invalid_request", f"{text[:40]!r} is no number: give {name} as one.") from error


def _more(text: str) -> dict[str, Any]:
    """The options below the form."""
    try:
        found = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise ApiError(422, "invalid_request", f"The advanced options are not JSON: {str(error)[:200]}.") from error
    if not isinstance(found, dict):
        raise ApiError(422, "invalid_request", 'The advanced options are not a JSON object: write them as {"block_tokens": 256}.')
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
