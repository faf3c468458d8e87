"""What can go wrong, in one tree.

NarrowClientError
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
"""

import httpx
from pydantic import ValidationError

from narrow_client.models import FieldError, Job, Problem


class NarrowClientError(Exception):
    """Base of every error of this package. `str(error)` is a sentence."""


class ConnectionFailed(NarrowClientError):
    """The service was not reached."""


class ApiError(NarrowClientError):
    """The service answered with a problem."""

    def __init__(self, status: int, code: str, detail: str, errors: list[FieldError], request_id: str) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail, self.errors, self.request_id = status, code, detail, errors, request_id


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


class JobCancelled(NarrowClientError):
    """The job was cancelled."""

    def __init__(self, job: Job) -> None:
        super().__init__(f"The job {job.id} was cancelled.")
        self.job = job


class JobTimeout(NarrowClientError):
    """The job was not finished in time; it goes on."""


class DigestMismatch(NarrowClientError):
    """A downloaded file is not the one that was announced."""


def not_narrow(url: httpx.URL) -> NarrowClientError:
    """The error of an answer that cannot be read: something else listens there, or another version."""
    place = f"{url.scheme}://{url.netloc.decode('ascii')}"
    return NarrowClientError(f"{place} does not answer like a Narrow service: is NARROW_URL right?")


def from_response(response: httpx.Response) -> ApiError:
    """The error of an answer of status 400 or more, whose body has been read."""
    status = response.status_code
    other = ServerError if status >= 500 else InvalidRequest
    kind = {401: NotAllowed, 403: NotAllowed, 404: NotFound, 409: Conflict, 429: TooManyRequests}.get(status, other)
    try:
        problem = Problem.model_validate_json(response.content)
        return kind(status, problem.code, problem.detail, problem.errors or [], problem.request_id)
    except ValidationError:
        # A proxy in between, or no Narrow service at all.
        return kind(status, f"http_{status}", f"{response.request.url.host} answered with HTTP {status}.", [], "")
