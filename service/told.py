"""What a job's process has written, read as if somebody had taken it over: it reads strangers' files.

All of it is bounded before it is parsed, and checked before it comes into the database, where every list that it is on shows it.
"""

import json
import os
import re
import stat
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, Field, ValidationError

from narrow_engine.events import Event
from narrow_engine.model_files import accepted_name
from narrow_engine.report.frontier import outcome
from narrow_engine.report.model import Report
from service.api.schemas import Phase

LINE_BYTES = 2**18
"""Of an event."""
EVENTS_BYTES = 2**28
"""Of all events. A week of two lines a second, which is the most that the engine writes, has 160 MB."""
FILES, NAME_BYTES = 1000, 300
"""Of a result: their number, and what each is called with its folders."""
FAILURE_BYTES, REPORT_BYTES, OUTCOME_BYTES = 2**16, 2**24, 2**18
MESSAGE = 2000
LARGEST = 10**18
"""Numbers that are shown or drawn are smaller."""

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


class Unfit(Exception):
    """What was written is nothing that the engine writes. `str(error)` is a sentence."""


def clean(text: str) -> str:
    """What of a sentence can be kept and shown."""
    return _CONTROLS.sub("\ufffd", text[:MESSAGE])


Message = Annotated[str, AfterValidator(clean)]


class Failure(BaseModel):
    """Why the engine has ended."""

    code: str = Field(pattern="^[a-z_]{1,40}$")
    message: Message


class _Event(Event):
    seq: int = Field(ge=1, lt=2**31)
    time: AwareDatetime
    kind: Literal["started", "progress", "finished", "notice", "failed"]  # a change of status is the service's to tell
    phase: Phase
    message: Message


def event(line: bytes) -> Event:
    """A line of events.jsonl. Raises Unfit."""
    if len(line) > LINE_BYTES:
        raise Unfit(f"an event has more than {LINE_BYTES >> 10} KiB")
    try:
        # Postgres keeps no NUL in a text. What else a backslash more before it makes of this is still a text.
        found = _Event.model_validate_json(line.replace(b"\\u0000", b"\\ufffd"))
        json.dumps(found.data, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise Unfit(f"an event is not as the engine writes them: {_why(error)}") from error
    if not 2000 <= found.time.year <= 2200:
        raise Unfit(f"an event is of the year {found.time.year}")
    return found


def whole_lines(read: bytes) -> bytes:
    """What of it ends in a line's end. Raises Unfit where none will come."""
    whole = read[: read.rfind(b"\n") + 1]
    if not whole and len(read) > LINE_BYTES:
        raise Unfit(f"an event has more than {LINE_BYTES >> 10} KiB")
    return whole


def progress(item: Event) -> dict[str, Any] | None:
    """How far a phase is, if the event says it in numbers."""
    done, total = item.data.get("done", 0), item.data.get("total", 0)
    if all(type(number) is int and 0 <= number < LARGEST for number in (done, total)):
        return {"done": done, "total": total, "message": item.message}
    return None


def failure(path: Path) -> Failure | None:
    """What the engine says was wrong; None if it says nothing that can be understood."""
    try:
        with opened(path) as file:
            return Failure.model_validate_json(file.read(FAILURE_BYTES))
    except (FileNotFoundError, ValidationError, Unfit):
        return None


def files(result: Path, most_bytes: int) -> list[Path]:
    """The files of a result. Raises Unfit."""
    found, total = [], 0
    for folder, folders, names in os.walk(result, onerror=_fail):
        for name in (*folders, *names):
            path = Path(folder, name)
            shown, status = path.relative_to(result).as_posix(), path.lstat()
            if len(os.fsencode(shown)) > NAME_BYTES or not shown.isprintable():
                raise Unfit(f"a file of the result has a name that cannot be told, or of more than {NAME_BYTES} bytes")
            if not (stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode)):
                raise Unfit(f"{shown} of the result is no file")
            if stat.S_ISREG(status.st_mode):
                found.append(path)
                total += status.st_size
        if len(found) > FILES or len(folders) > FILES:
            raise Unfit(f"the result has more than {FILES:,} files")
        if total > most_bytes:
            raise Unfit(f"the result has {total:,} bytes, and may have {most_bytes:,}")
    return sorted(found)


def model_files(folder: Path) -> list[Path]:
    """What of a result's model belongs to one. Raises Unfit."""
    if not folder.is_dir() or folder.is_symlink():
        raise Unfit("the result has no model")
    found = [path for path in sorted(folder.iterdir()) if accepted_name(path.name)]
    for path in found:
        opened(path).close()
    return found


def outcome_of(path: Path) -> dict[str, Any]:
    """What a frontier needs of report.json. Raises Unfit."""
    try:
        with opened(path) as file:
            raw = file.read(REPORT_BYTES + 1)
        if len(raw) > REPORT_BYTES:
            raise Unfit(f"its report.json has more than {REPORT_BYTES >> 20} MiB")
        found = outcome(Report.model_validate_json(raw))
        made = found.model_dump(mode="json")
        text = json.dumps(made, allow_nan=False)
        if len(text) > OUTCOME_BYTES or not all(abs(number) < LARGEST for number in _numbers(made)):
            raise Unfit("the figures of its report.json are too many or too large")
        return made
    except (ValueError, LookupError, RecursionError, FileNotFoundError) as error:
        raise Unfit(f"its report.json is not as the engine writes it: {_why(error)}") from error


def opened(path: Path) -> BinaryIO:
    """A plain file, open to read; whatever else has its name is not followed or waited for. Raises Unfit, FileNotFoundError."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Unfit(f"{path.name} cannot be opened: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise Unfit(f"{path.name} is no file")
    return os.fdopen(number, "rb")


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict | list):
        return [number for part in (value.values() if isinstance(value, dict) else value) for number in _numbers(part)]
    return [value] if isinstance(value, int | float) else []


def _fail(error: OSError) -> None:
    raise Unfit(f"the result cannot be read: {error.strerror}") from error


def _why(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        return f"{'.'.join(str(part) for part in first['loc'])[:80]}: {first['msg'][:200]}"
    return type(error).__name__
