"""What the generated models have in common."""

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict

SECRET = ("key", "secret", "token")


class Resource(BaseModel):
    """Something of the API's. A notebook shows those that have a short form; what is secret is in no `repr`."""

    # Most of a start would go into validators of which a call needs one or two.
    model_config = ConfigDict(defer_build=True)

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        return [(name, "***" if name in SECRET and value else value) for name, value in super().__repr_args__()]

    def _repr_html_(self) -> str | None:
        from narrow_client._notebook import html_of

        return html_of(self)
