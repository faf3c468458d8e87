"""Forms with files are held to the rules of JSON: what is not known, or is there twice, is refused and not passed over."""

from collections.abc import Awaitable, Callable

from fastapi import Request

from narrow_engine.spec import clear
from service.api.schemas import FieldError
from service.problems import ApiError


def only(single: tuple[str, ...], many: tuple[str, ...] = ()) -> Callable[[Request], Awaitable[None]]:
    """A dependency of a route whose form has these fields."""

    async def check(request: Request) -> None:
        form = await request.form()  # FastAPI has read it before
        for name in form:
            if name not in (*single, *many):
                raise _refusal(name, f"there is no field {clear(name)!r} here: it takes {', '.join((*many, *single))}")
            if name in single and len(form.getlist(name)) > 1:
                raise _refusal(name, "is there more than once: send it once")

    return check


def _refusal(name: str, words: str) -> ApiError:
    told = f"{name} {words}." if words.startswith("is ") else f"The form: {words}."
    return ApiError(422, "invalid_request", told, [FieldError(pointer=f"/{clear(name)}", detail=words)])
