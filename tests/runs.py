"""`narrow run` and its kin as real processes, forked from one that has imported torch: doing so takes six seconds each time."""

import multiprocessing
import os
import sys
import tempfile
import time
from importlib.metadata import entry_points
from pathlib import Path

from narrow_engine.events import read_events

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["narrow_engine.pipeline", "narrow_engine.reproduce", "transformers", "runs"])


class Run:
    """A command of `narrow`, in a session of its own; what subprocess.Popen has, as far as the tests ask for it."""

    def __init__(self, name: str, *arguments: object) -> None:
        handle, self._told = tempfile.mkstemp(prefix="narrow-run-")
        os.close(handle)
        words = [str(argument) for argument in arguments]
        self._process = CONTEXT.Process(target=_main, args=(name, words, self._told, dict(os.environ)))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float = 240) -> int:
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"it has not ended in {timeout} s"
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout or 240)
        return Path(self._told).read_text(), ""

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def terminate(self) -> None:
        self._process.terminate()


def _main(name: str, arguments: list[str], told: str, environment: dict[str, str]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    out = os.open(told, os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    command = next(entry.load() for entry in entry_points(group="narrow.commands") if entry.name == name)
    command.main(arguments, prog_name=f"narrow {name}")


def wait_for(out, condition, process):
    """Until an event of the run that `process` is at fulfils the condition."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if any(condition(event) for event in read_events(out / "events.jsonl")):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError("it did not come so far")
