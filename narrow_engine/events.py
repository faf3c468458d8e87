"""What a run says about itself: typed events, numbered without gaps, appended to `events.jsonl`.

Nothing in the engine is silent: whatever was truncated, skipped, rounded or fell back is a `notice`, and every notice
is in the report as well. The file survives a kill: a torn last line is cut off and the numbering goes on after it.
"""

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

Kind = Literal["state", "started", "progress", "finished", "notice", "failed"]
KINDS: dict[Kind, str] = {
    "state": "The job has changed its status. Only a service tells it.",
    "started": "A phase begins.",
    "progress": "A phase goes on: at most twice a second.",
    "finished": "A phase has ended, or its work was there already.",
    "notice": "Something was truncated, skipped, rounded or fell back.",
    "failed": "The run has ended with an error.",
}
"""When each is told."""
_CODE = {"code": "Which, for programs."}
DATA: dict[Kind, dict[str, str]] = {
    "state": {
        "status": "What it is now.",
        "attempt": "How often it has been started, when it runs.",
        "code": "Why it failed, if it did, for programs.",
        "message": "The same as a sentence.",
    },
    "started": {},
    "progress": {
        "done": "Steps of the phase that are done; of `load`, bytes of the datasets' files, once for each reading.",
        "total": "All of its steps.",
        "tokens": "While it trains: tokens so far.",
        "loss": "The objective, mean since the event before.",
        "validation": "Next-token loss on held-out text, where it was measured.",
        "sparsity": "Share of neurons that are zero, under group lasso.",
        "seconds": "Since the training began.",
    },
    "finished": {"seconds": "That the phase took.", "reused": "Whether this run, or another one, had done it before."},
    "notice": _CODE,
    "failed": _CODE,
}
"""What an event's `data` holds, by kind."""


class Event(BaseModel):
    """One thing that happened in a run."""

    seq: int = Field(ge=1, description="1, 2, 3, ... without gaps.")
    time: datetime
    kind: Kind = Field(description="state: the job changed status; started, progress, finished: of a phase; notice; failed.")
    phase: str = Field(description="The stage of the run that it belongs to; empty outside any.")
    message: str = Field(description="For people; may be empty.")
    data: dict[str, Any] = Field(default={}, description="Figures, by kind: done, total, loss, tokens, seconds, code, ...")


Sink = Callable[[Kind, str, str, dict[str, Any]], None]
"""Takes kind, phase, message and data of an event; numbers, stamps and stores it."""


class EventLog:
    """An append-only file of events, one JSON object a line. Call it like a `Sink`. Numbers go on from the last in the file, or
    from `after` where that is more: a run that goes on in another folder has told things that are not in this one's file."""

    def __init__(self, path: Path, after: int = 0) -> None:
        self.path = path
        self.seq = after
        if path.exists():
            whole = path.read_bytes()
            whole = whole[: whole.rfind(b"\n") + 1]
            os.truncate(path, len(whole))
            if whole:
                self.seq = max(after, json.loads(whole.splitlines()[-1])["seq"])
        self._file = path.open("a", encoding="utf-8")

    def __call__(self, kind: Kind, phase: str, message: str, data: dict[str, Any]) -> None:
        self.seq += 1
        event = Event(seq=self.seq, time=datetime.now(UTC), kind=kind, phase=phase, message=message, data=data)
        self._file.write(event.model_dump_json() + "\n")
        self._file.flush()


def read_events(path: Path) -> list[Event]:
    """All whole events of a file; a torn last line is left out."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [Event.model_validate(json.loads(line)) for line in lines]
