"""Who teaches in distillation: a model beside the student, or what it said, written down before training began.

What a teacher says to a block depends on the block alone. So it can be computed once: for every epoch, for every point of a
sweep, and with no more memory than one pass of the teacher takes. Two things can be kept of each position. The hidden states
that its head reads give back the whole distribution, at two bytes a dimension; where training computes in bfloat16 they are
what it would have used anyway, to the last bit. The likeliest tokens and their log-probabilities, six bytes each, are less
where the model is wide, and biased: of the rest only the mass is known (`losses.Top`).

A model that teaches in the base's place is read in its own precision from the mapped file: where it is larger than the memory,
the system lets go of what has been used, and a pass costs a reading of the file.
"""

import json
import os
import time
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from narrow_engine.corpus import Blocks, Mixture
from narrow_engine.losses import Head, Told, Top, likeliest
from narrow_engine.models import head, hidden_states, size_in_memory
from narrow_engine.muon import training_dtype
from narrow_engine.run import write_json

PASS_TOKENS = 4096
"""Tokens of one pass of the teacher, at least a block: the weights of one that is not in memory are read once for so many."""
SAVE_SECONDS = 30.0
DONE = "done.json"
"""Where a run notes how many entries are written."""


class Teacher(Protocol):
    """Tells what the student should say. `bytes` is what its weights take of the memory while the student trains."""

    bytes: int

    def __call__(self, first: int, ids: Tensor) -> Told:
        """Of the blocks from number `first` on, whose tokens `ids` [rows, length] are, all positions in one row."""
        ...


class Live:
    """A model. `tokens` are its own numbers of the student's tokens, if they differ or it has more of them."""

    def __init__(self, model: PreTrainedModel, tokens: Tensor | None = None) -> None:
        self.model, self.tokens = model, None if tokens is None else tokens.to(model.device)
        self.bytes = size_in_memory(model)
        self.head = head(model)
        if self.tokens is not None:
            weight, count = self.head.weight.detach(), len(self.tokens)
            first = torch.equal(self.tokens, torch.arange(count, device=model.device))
            rows = weight[:count] if first else weight[self.tokens]
            self.head = Head(rows, self.head.softcap)
            self.bytes += 0 if first else rows.nbytes

    @torch.no_grad()
    def __call__(self, first: int, ids: Tensor) -> tuple[Tensor, Head]:
        low = training_dtype(self.model.device)
        own = ids if self.tokens is None else self.tokens[ids]
        with torch.autocast(self.model.device.type, low, enabled=low != torch.float32):
            return hidden_states(self.model, own).flatten(0, 1).to(low), self.head


class Cached:
    """What `write` wrote of a teacher, for the same blocks."""

    def __init__(self, folder: Path, blocks: Blocks | Mixture, device: torch.device) -> None:
        self.blocks, self.bytes = blocks, 0
        places = np.load(folder / "places.npy")
        self.entry = np.full(blocks.count, -1)
        self.entry[places] = np.arange(len(places))
        meta = json.loads((folder / "meta.json").read_text())
        self.arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in meta["arrays"]}
        self.device, self.low = device, training_dtype(device)
        self.head = Head(torch.empty(0), meta["softcap"])
        if "states" in self.arrays:
            self.head = Head(load_file(folder / "head.safetensors")["weight"].to(device), meta["softcap"])

    def __call__(self, first: int, ids: Tensor) -> Told:
        numbers = [self.entry[self.blocks.place(index)] for index in range(first, first + len(ids))]

        def read(name: str) -> Tensor:
            found = torch.from_numpy(self.arrays[name][numbers])
            return found.flatten(0, 1).to(self.device)

        if "states" in self.arrays:
            return read("states").view(torch.bfloat16).to(self.low), self.head
        return Top(read("tokens").long(), read("log_probability"))


def write(
    folder: Path,
    work: Path,
    teacher: Live,
    blocks: Blocks | Mixture,
    count: int,
    top: int | None,
    temperature: float,
    progress: Callable[[int, int], None],
) -> int:
    """Fills `folder` with what a teacher says to the first `count` blocks, and returns its bytes. Blocks that come again, as they
    must in later epochs, are there once.

    Its hidden states, or, if `top` says how many, its likeliest tokens at a temperature. It grows in `work`, where a run that
    was killed finds what it has.
    """
    places, first = _distinct(blocks, count, progress)
    length = blocks.length
    arrays: dict[str, tuple[int, Any]] = {"states": (teacher.head.weight.shape[1], np.uint16)}
    if top is not None:
        top = min(top, len(teacher.head.weight))
        arrays = {"tokens": (top, np.uint32), "log_probability": (top + 1, np.float16)}
    shapes = {name: ((len(first), length, width), dtype) for name, (width, dtype) in arrays.items()}
    done, open_arrays = _resume(work, shapes)
    rows, saved = max(1, PASS_TOKENS // length), time.monotonic()
    for at in range(done, len(first), rows):
        progress(at, len(first))
        ids = torch.cat([blocks.batch(index, 1) for index in first[at : at + rows]])[:, :-1].to(teacher.model.device)
        for name, values in _said(teacher, ids, top, temperature).items():
            open_arrays[name][at : at + len(ids)] = values.view(len(ids), length, -1).cpu().numpy()
        if time.monotonic() - saved > SAVE_SECONDS:
            _flush(work, open_arrays, at + len(ids))
            saved = time.monotonic()
    _flush(work, open_arrays, len(first))
    progress(len(first), len(first))
    if top is None:
        save_file({"weight": teacher.head.weight.detach().cpu().contiguous()}, folder / "head.safetensors")
    np.save(folder / "places.npy", places)
    write_json(folder / "meta.json", {"arrays": list(shapes), "softcap": teacher.head.softcap})
    # From here on there is nothing to go on from: a run that is killed now begins anew.
    (work / DONE).unlink()
    for name in shapes:
        (work / f"{name}.npy").rename(folder / f"{name}.npy")
    return sum(path.stat().st_size for path in folder.iterdir())


@torch.no_grad()
def _said(teacher: Live, ids: Tensor, top: int | None, temperature: float) -> dict[str, Tensor]:
    states, of_teacher = teacher(0, ids)
    if top is None:
        return {"states": states.bfloat16().view(torch.uint16)}
    found = likeliest(states, of_teacher, top, temperature)
    return {"tokens": found.tokens.to(torch.uint32), "log_probability": found.log_probability.half()}


def _distinct(
    blocks: Blocks | Mixture, count: int, progress: Callable[[int, int], None]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The places in the text that the first `count` blocks come from, and the number of the first block from each."""
    seen, places, numbers = bytearray(blocks.count), array("q"), array("q")
    for index in range(count):
        if index % 4096 == 0:
            progress(0, count)
        place = blocks.place(index)
        if not seen[place]:
            seen[place] = 1
            places.append(place)
            numbers.append(index)
            if len(places) == blocks.count:
                break
    return np.frombuffer(places, np.int64), np.frombuffer(numbers, np.int64)


def _resume(work: Path, shapes: Mapping[str, tuple[tuple[int, ...], Any]]) -> tuple[int, dict[str, NDArray[Any]]]:
    """Entries that are written already, and the open files."""
    files = {name: work / f"{name}.npy" for name in shapes}
    known = all(file.exists() for file in (work / DONE, *files.values()))
    done: int = json.loads((work / DONE).read_text()) if known else 0
    if not known:
        (work / DONE).unlink(missing_ok=True)
    arrays: dict[str, NDArray[Any]] = {}
    for name, (shape, dtype) in shapes.items():
        arrays[name] = np.lib.format.open_memmap(files[name], mode="r+" if known else "w+", dtype=dtype, shape=shape)
        # A mapped file has holes, and a disk that is full when one is filled kills the process: now it is only an error.
        with files[name].open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, files[name].stat().st_size)
    return done, arrays


def _flush(work: Path, arrays: dict[str, NDArray[Any]], done: int) -> None:
    for name, values in arrays.items():
        assert isinstance(values, np.memmap)
        values.flush()
        with (work / f"{name}.npy").open("rb") as file:
            os.fsync(file.fileno())
    write_json(work / DONE, done)
