"""Runs a job as a process of its own on this machine: `python -m narrow_engine`, in its own session.

The process cannot outlive the worker (on Linux the kernel kills it with its parent), sees none of the service's
settings, and is ended together with everything that it started.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH")
_KEPT_PREFIXES = ("OMP_", "MKL_", "OPENBLAS_", "CUDA_", "NVIDIA_", "PYTORCH_")
_FIXED = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONUNBUFFERED": "1",
}


def start(spec: Path, folder: Path, shared: Path, after: int, processes: int = 1) -> subprocess.Popen[bytes]:
    """Starts the engine on a spec; what it prints goes to `folder`/stderr.log. `shared` is where jobs share stages, and `after`
    the number of the last event that is known of the run. With several `processes` it is torchrun, which starts them."""
    several = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m") if processes > 1 else ()
    environment = {k: v for k, v in os.environ.items() if k in _KEPT or k.startswith(_KEPT_PREFIXES)} | _FIXED
    if processes > 1:  # torchrun gives each a single thread, and the first does much of a run by itself
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    with (folder / "stderr.log").open("ab") as log:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", *several, "narrow_engine", str(spec), "--out", str(folder), "--quiet"),
                *("--shared", str(shared), "--events-after", str(after)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
            preexec_fn=die_with_parent(),
        )


def end(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Asks a process to end, and after `seconds` ends it and all of its group."""
    if process.poll() is None:
        process.terminate()
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    # The group as well: the process may have ended and left children.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def die_with_parent() -> Callable[[], None]:
    """What a new child does to be killed when its parent dies, even by kill -9 (PR_SET_PDEATHSIG; Linux only)."""
    parent = os.getpid()

    def ask() -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
            if os.getppid() != parent:  # it was killed before this was asked for
                os._exit(1)

    return ask
