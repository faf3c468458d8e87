"""What can go wrong, in one tree.

NarrowClientError
├── InvalidArgument       what was asked for cannot be right; nothing was sent (also a ValueError)
├── ConnectionFailed      the service was not reached, or fell silent, after all retries
├── ApiError              the service said no; has the problem's fields
│   ├── InvalidRequest    400, 413, 415, 422: something in what was sent
│   ├── NotAllowed        401, 403: no API key that counts, or one whose role or quota is not enough
│   ├── NotFound          404
│   ├── Conflict          409: not in this state
│   ├── TooManyRequests   429, after all retries
│   └── ServerError       5xx, after all retries
├── JobFailed             the job ended as failed; `job.error` says why
├── JobCancelled          the job was cancelled
├── JobTimeout            `wait` took longer than it was allowed to; the job goes on
└── DigestMismatch        a download is not what the service announced, twice

Every one says in a sentence what was wrong and what to do (`str(error)`). None holds an API key, nor does its `repr`.
"""

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx
from pydantic import ValidationError

from narrow_client.models import FieldError, Health, Job, Problem


class NarrowClientError(Exception):
    """Base of every error of this package. `str(error)` is a sentence."""


class InvalidArgument(NarrowClientError, ValueError):
    """What was asked for cannot be right: no such file, no id, no URL. Nothing was sent."""


class ConnectionFailed(NarrowClientError):
    """The service was not reached, or fell silent, after all retries."""


class ApiError(NarrowClientError):
    """The service answered with a problem.

    Attributes:
        status: HTTP status.
        code: What was wrong, for programs: `model_not_found`, `quota_used_up`, ...
        detail: What was wrong, where, and what to do, for people.
        errors: Where in the request, if several things were wrong.
        request_id: Under which the service has it in its log.
        retry_after: Seconds after which the service asked to be asked again, if it did.
    """

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        errors: list[FieldError],
        request_id: str,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail = status, code, detail
        self.errors, self.request_id, self.retry_after = errors, request_id, retry_after

    def __repr__(self) -> str:
        return f"{type(self).__name__}(status={self.status}, code={self.code!r}, request_id={self.request_id!r}): {self}"

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross processes: what the constructor takes is not what an exception pickles by itself.
        return type(self), (self.status, self.code, self.detail, self.errors, self.request_id, self.retry_after)


class InvalidRequest(ApiError):
    """Something in the request is wrong; `errors` says where."""


class NotAllowed(ApiError):
    """No API key that counts, or one that may not do this, or a quota that is used up."""


class TooManyRequests(ApiError):
    """More requests than the key may send, also after waiting for as long as the service asked for."""


class NotFound(ApiError):
    """There is no such thing."""


class Conflict(ApiError):
    """The thing is not in a state for this."""


class ServerError(ApiError):
    """The service failed."""


class JobFailed(NarrowClientError):
    """The job ended as failed."""

    def __init__(self, job: Job) -> None:
        super().__init__(job.error.message if job.error else "The job failed.")
        self.job = job

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.job,)


class JobCancelled(NarrowClientError):
    """The job was cancelled."""

    def __init__(self, job: Job) -> None:
        super().__init__(f"The job {job.id} was cancelled.")
        self.job = job

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.job,)


class JobTimeout(NarrowClientError):
    """The job was not finished in time; it goes on."""


class DigestMismatch(NarrowClientError):
    """A downloaded file is not the one that was announced."""


def not_narrow(url: httpx.URL) -> NarrowClientError:
    """The error of an answer that cannot be read: something else listens there, or another version."""
    place = f"{url.scheme}://{url.netloc.decode('ascii')}"
    return NarrowClientError(f"{place} does not answer like a Narrow service: is NARROW_URL right?")


def not_ready(health: Health) -> ServerError:
    """The error of a service that says what keeps it from taking work."""
    why = "; ".join(f"{name}: {told}" for name, told in (health.checks or {}).items() if told != "ok")
    return ServerError(503, "not_ready", f"The service cannot take work: {why}.", [], "")


def from_response(response: httpx.Response) -> ApiError:
    """The error of an answer of status 400 or more, whose body has been read."""
    status = response.status_code
    other = ServerError if status >= 500 else InvalidRequest
    kind = {401: NotAllowed, 403: NotAllowed, 404: NotFound, 409: Conflict, 429: TooManyRequests}.get(status, other)
    wait = retry_after(response)
    try:
        problem = Problem.model_validate_json(response.content)
        return kind(status, problem.code, problem.detail, problem.errors or [], problem.request_id, wait)
    except ValidationError:
        # A proxy in between, or no Narrow service at all.
        detail = f"{response.request.url.host} answered with HTTP {status}."
        return kind(status, f"http_{status}", detail, [], response.headers.get("x-request-id", ""), wait)


def retry_after(response: httpx.Response) -> float | None:
    """Seconds that an answer asks to wait, by its Retry-After, which is a number or a date."""
    asked = response.headers.get("retry-after", "")
    try:
        return max(0.0, float(asked)) if asked and asked[0].isdigit() and asked.isascii() else _until(asked)
    except ValueError:
        return None


def _until(date: str) -> float | None:
    at = parsedate_to_datetime(date) if date else None
    return max(0.0, (at - datetime.now(UTC)).total_seconds()) if at and at.tzinfo else None
