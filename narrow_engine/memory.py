"""How much memory there is, and how much this process has had at its peak."""

import os
from pathlib import Path

import torch

CONTAINER = Path("/sys/fs/cgroup/memory.max")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def limit(device: torch.device) -> int:
    """Bytes that the device has in all, or the container that this process is in. What others take of it is not looked at:
    the same job must do the same on the same machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    told = CONTAINER.read_text().strip() if CONTAINER.is_file() else "max"
    return min(physical, int(told)) if told.isdigit() else physical


def begin(device: torch.device) -> int:
    """Forgets the peak so far, and returns what is left to exceed: where it cannot be forgotten, as in a process that is shut in
    (`sandbox`), all that it was."""
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
