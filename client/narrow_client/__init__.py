"""Client of the Narrow service: narrow models from general ones.

    import narrow_client

    result = narrow_client.compress(base="./base", target="./python.jsonl", budget=0.5, out="./narrow-python")
    result.report.skills["python"].retention.value

`compress` and `compress_async` do all of it in one call. `Narrow` and `AsyncNarrow` are clients with the single steps. What they
return are the pydantic models of `narrow_client.models`, which are made from the service's contract. All errors are
`NarrowClientError`s; those that the service answers with are `ApiError`s.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from narrow_client._async import AsyncNarrow
    from narrow_client._compress import Result, compress, compress_async
    from narrow_client._errors import (
        ApiError,
        Conflict,
        ConnectionFailed,
        DigestMismatch,
        InvalidArgument,
        InvalidRequest,
        JobCancelled,
        JobFailed,
        JobTimeout,
        NarrowClientError,
        NotAllowed,
        NotFound,
        ServerError,
        TooManyRequests,
    )
    from narrow_client._pages import AsyncPages, Pages
    from narrow_client._render import report_view
    from narrow_client._sync import Narrow

__all__ = [
    "ApiError",
    "AsyncNarrow",
    "AsyncPages",
    "Conflict",
    "ConnectionFailed",
    "DigestMismatch",
    "InvalidArgument",
    "InvalidRequest",
    "JobCancelled",
    "JobFailed",
    "JobTimeout",
    "Narrow",
    "NarrowClientError",
    "NotAllowed",
    "NotFound",
    "Pages",
    "Result",
    "ServerError",
    "TooManyRequests",
    "compress",
    "compress_async",
    "report_view",
]

_HOMES = {
    "_async": ("AsyncNarrow",),
    "_compress": ("Result", "compress", "compress_async"),
    "_pages": ("AsyncPages", "Pages"),
    "_render": ("report_view",),
    "_sync": ("Narrow",),
}


def __getattr__(name: str) -> object:
    """Loads what is asked for: the command line's help and completion need nothing of it, and all of it takes half a second."""
    if name == "models":
        return import_module("narrow_client.models")
    if name not in __all__:
        raise AttributeError(f"module 'narrow_client' has no attribute {name!r}")
    home = next((home for home, names in _HOMES.items() if name in names), "_errors")
    found: object = getattr(import_module(f"narrow_client.{home}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*__all__, "models"])
