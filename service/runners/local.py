"""Runs a job as a process of its own on this machine: `python -m narrow_engine`, in its own session.

The process cannot outlive the worker (on Linux the kernel kills it with its parent), sees none of the service's settings, is shut
in before it begins (`sandbox`), and is ended together with everything that it started.
"""

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

import narrow_engine
from narrow_engine import processors, sandbox
from narrow_engine.errors import NarrowError
from narrow_engine.model_files import Tried
from service.settings import Settings
from service.told import Failure

_KEPT = ("PATH", "LANG", "LC_ALL", "VIRTUAL_ENV", "LD_LIBRARY_PATH")
_KEPT_PREFIXES = ("OMP_", "MKL_", "OPENBLAS_", "CUDA_", "NVIDIA_", "NCCL_", "PYTORCH_")
_FIXED = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONUNBUFFERED": "1",
}
_ENGINE = Path(narrow_engine.__file__).resolve().parent
FILE_PER_MODEL = 8
"""A checkpoint of a model in bfloat16 holds its weights and two moments of each in float32; and a little room."""
FILES, THREADS = 4096, 16_384
"""Open files of a job's process; processes and threads of the user that it is, if that is not root."""
PROCESSES = 64
"""Of a job, for each that it is to have. It has one, and now and then a few that read or check something."""
KEPT_FILES = 100_000
"""Files of a job while it runs. It has some hundred."""
LEFT_SECONDS = 10.0
"""For how long what a job left behind is ended: something that starts others as fast could go on for ever."""
TRIAL_BYTES, TRIAL_SECONDS, TRIAL_RATE = 2 * 2**30, 30.0, 50e6
"""What trying a model out may take: memory, seconds, and one more for so many bytes of it, as a slow disk reads."""
TRIAL_SAYS = 4 * 2**20
"""Bytes, at most, of which most are the config."""
_TRIALS = threading.BoundedSemaphore(2)
"""How many at a time: they are the only thing that the server itself spends a core on."""

log = logging.getLogger("narrow.local")


def start(
    settings: Settings,
    spec: Path,
    inputs: Iterable[Path],
    folder: Path,
    shared: Path,
    after: int,
    processes: int = 1,
    memory: int | None = None,
) -> subprocess.Popen[bytes]:
    """Starts the engine on a spec; what it prints goes to `folder`/stderr.log.

    It can read `inputs`, and write in `folder` and in `shared`, where jobs of a tenant share stages; both are in the tenant's
    folder. `after` is the number of the last event that is known of the run, `memory` in bytes. With several `processes` it is
    torchrun, which starts them.
    """
    # Not on the shelf: what libraries keep in HOME, and run from there, would go from one job to the next.
    scratch, home = folder / "scratch.tmp", folder / "home.tmp"
    for made in (scratch, home, shared):
        made.mkdir(parents=True, exist_ok=True)
    several = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m") if processes > 1 else ()
    environment = {k: v for k, v in os.environ.items() if k in _KEPT or k.startswith(_KEPT_PREFIXES)} | _FIXED
    environment |= {"TMPDIR": str(scratch), "HOME": str(scratch)}
    if processes > 1:  # torchrun gives each a single thread, and the first does much of a run by itself
        environment.setdefault("OMP_NUM_THREADS", str(processors.threads(processes)))
    shut_in = sandbox.before(
        **_shown(inputs),
        write=[str(folder), str(shared)],
        together=str(shared.parent),
        hide=[str(settings.data.resolve())],
        memory=memory_of(settings, memory),
        file=FILE_PER_MODEL * settings.max_model_bytes,
        files=FILES,
        processes=THREADS,
        network=processes > 1,
        require=settings.sandbox == "require",
    )
    with (folder / "stderr.log").open("ab") as log:
        return subprocess.Popen(
            [
                *shut_in,
                *(sys.executable, "-m", *several, "narrow_engine", str(spec), "--out", str(folder), "--quiet"),
                *("--shared", str(shared), "--events-after", str(after)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            # Where `-m` finds the engine that the service itself has, whatever lies about where the service was started.
            cwd=_ENGINE.parent,
            start_new_session=True,
        )


def try_model(folder: Path) -> Tried:
    """Has the engine look at the files of a model and try them out. Raises NarrowError (those of `inspect_model`, bad_tokenizer,
    non_finite_weights), also where a file keeps it busy for ever or takes its memory."""
    folder = folder.resolve()
    shut_in = sandbox.before(**_shown([folder]), hide=[str(folder.parent)], memory=TRIAL_BYTES, files=FILES, processes=THREADS)
    size = sum(path.stat().st_size for path in folder.iterdir())
    with _TRIALS:
        process = subprocess.Popen(
            [*shut_in, sys.executable, "-m", "narrow_engine.trial", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"TOKENIZERS_PARALLELISM": "false"},
            cwd=_ENGINE.parent,
            start_new_session=True,
        )
        end_in_time = threading.Timer(TRIAL_SECONDS + size / TRIAL_RATE, os.killpg, (process.pid, signal.SIGKILL))
        end_in_time.start()
        assert process.stdout is not None
        with process.stdout:
            told = process.stdout.read(TRIAL_SAYS).splitlines()
        process.wait()
        end_in_time.cancel()
    if not told:
        raise NarrowError(
            "bad_config", "The files take too long or too much memory to read: save the model with another program."
        )
    try:
        if process.returncode == 0 and told[-1] != b"null":
            fault = Failure.model_validate_json(told[-1])
            raise NarrowError(fault.code, fault.message)
        tried = Tried.model_validate_json(told[1])
    except (ValidationError, IndexError) as error:
        detail = "tokenizer.json takes too long, too much memory, or crashes what reads it, on a page of text."
        raise NarrowError("bad_tokenizer", detail) from error
    if process.returncode:
        # The tokenizer has passed. Weights are read once more before a job uses them, so a slow disk refuses nobody.
        log.warning("the weights of a model could not be looked at: status %d", process.returncode)
    return tried


def _shown(inputs: Iterable[Path]) -> dict[str, Any]:
    """Of a process's limits: that it reads the engine's code and `inputs`."""
    # Beside a checkout's code lie others' files, perhaps the service's data: of these only the names, for `import`.
    return {"read": [_ENGINE, *_ENGINE.parent.glob("narrow*-info"), *inputs], "list": [str(_ENGINE.parent)]}


def memory_of(settings: Settings, asked: int | None) -> int:
    """Bytes that each process of a job may have."""
    return min(asked or sys.maxsize, settings.max_job_memory or processors.memory())


class Kept(NamedTuple):
    """What is in a folder."""

    bytes: int
    files: int


def kept(folder: Path) -> Kept:
    """What the files of a folder take on the disk; where there are more than a job may have, not all are counted."""
    size, files, seen = 0, 0, set()
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                found = (Path(place) / name).lstat()
                if found.st_ino not in seen:
                    seen.add(found.st_ino)
                    size, files = size + 512 * found.st_blocks, files + 1
        if files > KEPT_FILES:
            break
    return Kept(size, files)


def taken(process: subprocess.Popen[bytes]) -> tuple[int, int]:
    """Bytes of memory that a process and all that it started take for themselves, and how many they are; 0 where that is not
    Linux. What several share is counted once for each."""
    size, found = 0, [process.pid, *_below(process.pid)]
    for pid in found:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith(("RssAnon:", "RssShmem:", "VmSwap:")):
                    size += 1024 * int(line.split()[1])
    return size, len(found)


def end(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Asks a process to end, and after `seconds` ends it and everything that it started."""
    if process.poll() is None:
        process.terminate()
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    # The group as well: the process may have ended and left children.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + LEFT_SECONDS
    while adopts and (left := _below(os.getpid())) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


adopts = False


def adopt() -> None:
    """For a process that runs one job at a time and has no other children: what a job's processes leave behind becomes its own
    (PR_SET_CHILD_SUBREAPER; Linux only), and `end` ends that too, also what began a session to get away, as torchrun does."""
    global adopts
    if sys.platform == "linux":
        adopts = ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0


def _below(pid: int) -> list[int]:
    """The processes that one has started, and they, and so on, but for those that have ended."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir() if sys.platform == "linux" else ():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    parents.setdefault(int(parent), []).append(int(entry.name))
    found = list(parents.get(pid, []))
    for child in found:
        found += parents.get(child, [])
    return found
