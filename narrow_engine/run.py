"""What a run carries from stage to stage: its spec, its folder, its voice, and whether it should stop."""

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from narrow_engine.errors import Cancelled
from narrow_engine.events import Kind, Sink
from narrow_engine.report.model import Notice
from narrow_engine.spec import CompressionSpec

PROGRESS_SECONDS = 0.5


@dataclass
class Run:
    """One run: what to do, where, and how to tell. Stages get it as their only context."""

    spec: CompressionSpec
    folder: Path
    sink: Sink
    stop: threading.Event = field(default_factory=threading.Event)
    notices: list[Notice] = field(default_factory=list)
    models: dict[str, PreTrainedModel] = field(default_factory=dict)
    """Models by the name of the stage that made them, kept in memory for the stages after it."""
    mesh: DeviceMesh | None = None
    """The processes that train together, if there is more than this one."""
    told: float = 0.0

    def emit(self, kind: Kind, phase: str, message: str, data: dict[str, Any]) -> None:
        """A `Sink` that keeps notices for the report."""
        if kind == "notice":
            self.notices.append(Notice(phase=phase, code=data.get("code", "notice"), message=message))
        self.sink(kind, phase, message, data)

    def check(self) -> None:
        """Raises Cancelled if the run was asked to stop."""
        if self.stop.is_set():
            raise Cancelled

    def progress(self, phase: str, of: str = "") -> Callable[[int, int], None]:
        """A callback (done, total) that tells, at most twice a second, and stops the run if it was asked to. `of` says what is
        counted, if not steps."""

        def tell(done: int, total: int) -> None:
            self.check()
            if done == total or time.monotonic() - self.told > PROGRESS_SECONDS:
                self.told = time.monotonic()
                self.sink("progress", phase, of, {"done": done, "total": total})

        return tell

    def out(self, stage: str) -> Path:
        """The finished folder of a stage."""
        return self.folder / stage

    def work(self, stage: str) -> Path:
        """A stage's own scratch folder, which outlives a kill: checkpoints."""
        path = self.folder / "work" / stage
        path.mkdir(parents=True, exist_ok=True)
        return path

    def record(self, stage: str) -> Path:
        return self.folder / "stages" / f"{stage}.json"


def write_json(path: Path, value: Any) -> None:
    """Writes a file so that it is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
