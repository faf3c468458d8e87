"""How many processors and how much main memory this process may use. No torch: whoever starts a process that computes asks here
first."""

import os
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Of the container that this process is in: microseconds of processor time, and in how many."""
OLD_QUOTA = (Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us"))
"""The same where control groups are of version 1; -1 is none."""
CONTAINER = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""What the container that this process is in may have of the memory, in control groups of version 2 and 1."""


def memory() -> int:
    """Bytes of main memory: of the machine, or what the container may have of it."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    container = [path.read_text().strip() for path in CONTAINER if path.is_file()]
    return min([physical, *(int(most) for most in container if most.isdigit())])


def allowed() -> int:
    """Processors that this process may be put on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable() -> float:
    """As many of them as the quota of the container lets be busy at once."""
    files = [QUOTA] if QUOTA.is_file() else [path for path in OLD_QUOTA if path.is_file()]
    told = " ".join(path.read_text() for path in files).split()
    if len(told) < 2 or not told[0].isdigit():
        return allowed()
    return min(allowed(), int(told[0]) / int(told[1]))


def threads(processes: int = 1) -> int | None:
    """That each of some processes should compute with; None where the libraries choose well by themselves.

    They take a thread for each core that the process may be put on and know nothing of quotas: 64 threads that share the time of
    two processors wait for each other most of it.
    """
    most = usable()
    return None if processes == 1 and most >= allowed() else max(1, int(most) // processes)
