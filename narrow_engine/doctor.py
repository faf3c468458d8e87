"""What this machine can do, and what a job would need here: the engine's part of `narrow doctor`.

Facts are dicts by section, for people and programs alike; the end of a name (`_bytes`, `_seconds`, ...) says what its number
counts.
"""

import os
import platform
import shutil
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import torch
from pydantic import ValidationError

from narrow_engine import memory, processors, sandbox, train
from narrow_engine.errors import NarrowError
from narrow_engine.model_files import DTYPES, inspect_model
from narrow_engine.models import device
from narrow_engine.muon import training_dtype
from narrow_engine.sizing import SECONDS_PER_FLOP, plan_sizes
from narrow_engine.spec import Options, first_fault

Facts = dict[str, Any]
PACKAGES = ("narrow", "torch", "transformers", "tokenizers", "safetensors", "numpy")
RUNTIMES = {
    "onnx": "onnxruntime",
    "onnx, generating": "onnxruntime-genai",
    "gguf": "llama-cpp-python",
    "parquet files": "pyarrow",
    "tasks of lm-evaluation-harness": "lm-eval",
    "clusters": "ray",
}
"""What the engine does with packages that may be missing, or that others can do with its results."""
DRIVER = Path("/proc/driver/nvidia/version")
SIDES = {"cpu": 512, "cuda": 8192}
"""Of the matrices that are multiplied: large enough for the device to be busy, small enough for a type it is slow in."""
COPIED = 256 * 2**20
MEASURED_SECONDS = 0.25
"""That each measurement takes, about."""


def machine() -> dict[str, Facts]:
    """This machine, by section."""
    where = device()
    return {
        "machine": {
            "system": platform.platform(terse=True),
            "processor": _processor(),
            **_processors(),
            "threads": torch.get_num_threads(),
            **_memory(),
            "disk_free_bytes": shutil.disk_usage(_data()).free,
            "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
            **({"driver": DRIVER.read_text().splitlines()[0].removeprefix("NVRM version: ")} if DRIVER.is_file() else {}),
        },
        "packages": {name: _version(name) for name in PACKAGES},
        "runtimes": {use: _version(name) and f"{name} {_version(name)}" for use, name in RUNTIMES.items()},
        "speed": _speed(where),
        "sandbox": {"lacking": sandbox.lacking()},
    }


def job(base: Path, budget: dict[str, float] | None, recover_tokens: int | None) -> Facts:
    """What a job would need on this machine, and whether it is there. Raises click.UsageError."""
    method = {} if recover_tokens is None else {"recover": {"tokens": recover_tokens}}
    try:
        options = Options.model_validate({"budget": budget or {"parameters": 0.5}, "method": method})
        info = inspect_model(base)
        where = train.machine(device())
        sizes = plan_sizes(info.config, options, DTYPES[info.dtype], machine=where)
    except ValidationError as error:
        raise click.UsageError(first_fault(error)) from error
    except (NarrowError, OSError) as error:
        raise click.UsageError(f"{base}: {error}") from error
    return {
        "base": f"{base}, {info.family}, {info.parameters:,} parameters in {info.dtype}",
        "parameters": {"before": sizes.before.parameters, "after": sizes.after.parameters},
        "weights_bytes": sizes.after.bytes,
        "keep": dict(sizes.keep),
        "memory_bytes": sizes.memory_bytes,
        "memory_peak_in": max(sizes.memory, key=lambda stage: sizes.memory[stage]),
        "least_memory_bytes": sizes.least_memory_bytes,
        "memory_here_bytes": where.memory,
        "fits": not sizes.lacking,
        "estimated_seconds": round(sizes.seconds),
        "notes": [
            *sizes.notices,
            f"Time counts on {1 / SECONDS_PER_FLOP / 1e9:.0f} GFLOP/s in training: 'narrow doctor' measures this machine.",
            *([f"It does not fit. {sizes.lacking}"] if sizes.lacking else []),
        ],
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    told = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in told if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _processors() -> Facts:
    """How many there are, and how many this process may use: by its affinity, and by the quota of its container."""
    facts: Facts = {"processors": os.cpu_count() or 1}
    usable = processors.usable()
    return facts | ({"processors_usable": usable} if usable < facts["processors"] else {})


def _memory() -> Facts:
    cpu = torch.device("cpu")
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = memory.limit(cpu)
    return {"memory_bytes": physical, **({"memory_of_the_container_bytes": limit} if limit < physical else {})}


def _data() -> Path:
    """The service's data folder, or the nearest folder above it that is there."""
    data = Path(os.environ.get("NARROW_DATA", "narrow-data")).absolute()
    return next(path for path in (data, *data.parents) if path.exists())


def _gpu(index: int) -> str:
    found = torch.cuda.get_device_properties(index)
    return f"{found.name}, {found.total_memory / 1e9:.1f} GB, compute capability {found.major}.{found.minor}"


def _speed(where: torch.device) -> Facts:
    """How fast matrices are multiplied in each type of number, and memory is read and written."""
    facts: Facts = {"device": str(where)}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        facts[f"{_name(dtype)}_gflop_per_second"] = gigaflops(where, dtype)
    source = torch.ones(COPIED // 4, device=where)
    target = torch.empty_like(source)
    seconds = _best(where, lambda: target.copy_(source))
    return facts | {"memory_gb_per_second": round(2 * COPIED / seconds / 1e9, 1), "trains_in": _name(training_dtype(where))}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def gigaflops(where: torch.device, dtype: torch.dtype) -> float | None:
    """Of a large product of square matrices, the best of some; None where the device cannot do it in this type."""
    side = SIDES[where.type]
    try:
        a = torch.full((side, side), 0.5, device=where, dtype=dtype)
        seconds = _best(where, lambda: a @ a)
    except RuntimeError:
        return None  # not every type is there on every device
    return round(2 * side**3 / seconds / 1e9, 1)


def _best(where: torch.device, work: Callable[[], object]) -> float:
    """Seconds of the fastest try, which others on the machine have disturbed least."""
    tries: list[float] = []
    began = time.perf_counter()
    while len(tries) < 3 or time.perf_counter() - began < MEASURED_SECONDS:
        start = time.perf_counter()
        work()
        if where.type == "cuda":
            torch.cuda.synchronize(where)
        tries.append(time.perf_counter() - start)
    return min(tries)
