"""Client of the Narrow service: narrow models from general ones.

import narrow_client
result = narrow_client.compress(base="./base", target="./python.jsonl", budget=0.5, out="./narrow-python")
result.report.skills["python"].retention.value
"""

from narrow_client._async import AsyncNarrow
from narrow_client._compress import Result, compress
from narrow_client._errors import (
    ApiError,
    Conflict,
    ConnectionFailed,
    DigestMismatch,
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
from narrow_client._render import report_view
from narrow_client._sync import Narrow

__all__ = [
    "ApiError",
    "AsyncNarrow",
    "Conflict",
    "ConnectionFailed",
    "DigestMismatch",
    "InvalidRequest",
    "JobCancelled",
    "JobFailed",
    "JobTimeout",
    "Narrow",
    "NarrowClientError",
    "NotAllowed",
    "NotFound",
    "Result",
    "ServerError",
    "TooManyRequests",
    "compress",
    "report_view",
]
