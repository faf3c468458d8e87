"""How much memory there is, and how much this process has had at its peak."""

import ctypes
import gc
import resource
import sys
from pathlib import Path

import torch

from narrow_engine import processors

TIGHT = 0.6
"""Share of the memory from which on glibc must not keep what is freed: it keeps up to a third of what training takes."""
TRIM, MAP, SOON = -1, -3, 2**16  # glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, and bytes for both
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def limit(device: torch.device) -> int:
    """Bytes that the device has in all, or the container that this process is in, or that the process itself may have, as one
    that is shut in (`sandbox`). What others take of it is not looked at: the same job must do the same on the same machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    own, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return min(processors.memory(), sys.maxsize if own == resource.RLIM_INFINITY else own)


def counts_files() -> bool:
    """Whether what this process maps of files, to be changed by nobody else, is in what it may have."""
    return resource.getrlimit(resource.RLIMIT_DATA)[0] != resource.RLIM_INFINITY


def keep_within(taken: int, device: torch.device) -> None:
    """Where so many bytes are most of the memory there is, has glibc give back what is freed at once from now on, and not keep it
    for later, which is faster."""
    if device.type == "cpu" and taken > TIGHT * limit(device) and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for threshold in (TRIM, MAP):
            libc.mallopt(threshold, SOON)


def give_back(device: torch.device) -> None:
    """What was freed: glibc keeps it, hundreds of megabytes after tokenizing, and torch keeps a GPU's, nearly all that there is
    after training."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def begin(device: torch.device) -> int:
    """Forgets the peak so far, and returns what is left to exceed: where it cannot be forgotten, as in a process that is shut in
    (`sandbox`), all that it was. What was freed is given back first."""
    give_back(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return 0
    try:
        CLEAR.write_text("5")
    except OSError:
        return _highest() or 0
    return 0


def peak(device: torch.device, before: int) -> int | None:
    """The most bytes since `begin`, of main memory or of the GPU's; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    found = _highest()
    return found if found and found > before else None


def _highest() -> int | None:
    lines = STATUS.read_text().splitlines() if STATUS.is_file() else ()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
