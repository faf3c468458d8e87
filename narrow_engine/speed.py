"""Tokens per second, base and result in turn: machines drift, ratios of neighbours hold. The least time of all rounds counts:
what else the machine does can only add to it.

Formats are timed in a process for each model, which has nothing else in it, so that its memory is the model's.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from transformers import PreTrainedModel

import narrow_engine
from narrow_engine.errors import NarrowError
from narrow_engine.export.runtimes import runtime_of
from narrow_engine.report.model import Pace, Size, Speed
from narrow_engine.spec import Format

PREFILL, DECODE, ROUNDS = 256, 32, 10
SECONDS = 60.0
"""No further round begins after this time: a small base takes 3 s in all, a large one on a slow machine would take hours."""
ENOUGH = 0.9
"""Of the speed-up that the FLOPs predict."""


def measure_speed(
    form: Format, folders: tuple[Path | None, Path], sizes: tuple[Size, Size], context: int, check: Callable[[], None]
) -> Speed:
    """Prefill of PREFILL tokens and greedy decoding of DECODE more, batch 1, of base and result in one format, the best of up to
    ROUNDS. `check` is called between runs and may raise. Raises NarrowError (runtime_failed)."""
    shape = f"{max(1, min(PREFILL, context - DECODE))} {DECODE}"
    clocks = [None if folder is None else _Clock(form, folder) for folder in folders]
    try:
        times = _in_turn([clock.time for clock in clocks if clock], check, shape)
        paces = iter(
            Pace(
                prefill=int(shape.split()[0]) / min(prefill for prefill, _ in found),
                decode=DECODE / min(decode for _, decode in found),
                load=clock.load,
                memory=clock.end(),
            )
            for clock, found in zip([clock for clock in clocks if clock], times, strict=True)
        )
        base, narrow = None if clocks[0] is None else next(paces), next(paces)
    finally:
        for clock in clocks:
            if clock:
                clock.process.kill()
                clock.process.wait()
    predicted = sizes[0].flops_per_token / sizes[1].flops_per_token
    found = Speed(format=form, runtime=runtime_of(form), base=base, narrow=narrow, predicted=predicted)
    return found.model_copy(update={"bound": bound(found, sizes[1])})


def bound(speed: Speed, size: Size) -> str:
    """What takes the time of a result that is not as much faster than its base as it has less to compute; else empty.

    Of two models of one family, t = a + b · FLOPs: what does not shrink with the weights, a, follows from both times.
    """
    if speed.base is None or speed.predicted < 1.01:
        return ""
    told = []
    for name, before, after in (
        ("Reading a prompt", speed.base.prefill, speed.narrow.prefill),
        ("Writing", speed.base.decode, speed.narrow.decode),
    ):
        if after / before < ENOUGH * speed.predicted:
            ratio, slow, fast = speed.predicted, 1000 / before, 1000 / after
            fixed = min(fast, max(0.0, (ratio * fast - slow) / (ratio - 1)))
            told.append(
                f"{name} is {after / before:.2f} times as fast where the weights say {ratio:.2f}: of its {fast:.3g} ms a token, "
                f"{fixed:.3g} ms do not depend on how many there are"
            )
    if not told:
        return ""
    return f"{'. '.join(told)}. That is the calls of {size.layers} layers, attention over the past, and the program around them."


class _Clock:
    """A model in a process of its own."""

    def __init__(self, form: Format, folder: Path) -> None:
        self.form = form
        where = str(folder.resolve())
        command = [sys.executable, "-m", "narrow_engine.export.runtimes", form, where, str(torch.get_num_threads())]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=Path(narrow_engine.__file__).parents[1],  # where -m finds it
        )
        self.load: float = self._told()["load"]

    def time(self, shape: str) -> tuple[float, float]:
        self._stream(self.process.stdin).write(f"{shape}\n")
        self._stream(self.process.stdin).flush()
        found = self._told()
        return found["prefill"], found["decode"]

    def end(self) -> int:
        self._stream(self.process.stdin).close()
        return int(self._told()["memory"])

    def _told(self) -> dict[str, Any]:
        line = self._stream(self.process.stdout).readline()
        if not line:
            detail = f"{runtime_of(self.form)} ended while it ran the model in {self.form}, perhaps for want of memory."
            raise NarrowError("runtime_failed", detail)
        return json.loads(line)  # type: ignore[no-any-return]

    @staticmethod
    def _stream(stream: IO[str] | None) -> IO[str]:
        assert stream is not None
        return stream


def token_seconds(models: list[PreTrainedModel], check: Callable[[], None]) -> list[float]:
    """Seconds of one decoded token of each model, timed in turn. `check` is called between runs and may raise."""
    times = _in_turn([_torch(model) for model in models], check)
    return [min(decode for _, decode in found) / DECODE for found in times]


def _in_turn(
    runners: Sequence[Callable[..., tuple[float, float]]], check: Callable[[], None], *given: Any
) -> list[list[tuple[float, float]]]:
    """Seconds of prefill and of decoding of each runner, in up to ROUNDS rounds after one that warms up."""
    times: list[list[tuple[float, float]]] = [[] for _ in runners]
    started = time.monotonic()
    for number in range(ROUNDS + 1):
        if number > 1 and time.monotonic() - started > SECONDS:
            break
        for runner, found in zip(runners, times, strict=True):
            check()
            taken = runner(*given)
            if number:
                found.append(taken)
    return times


def _torch(model: PreTrainedModel) -> Callable[[], tuple[float, float]]:
    ids = torch.arange(1, PREFILL + 1, device=model.device)[None] % model.config.vocab_size

    @torch.no_grad()
    def run() -> tuple[float, float]:
        started = time.perf_counter()
        out = model(input_ids=ids, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        token.item()
        middle = time.perf_counter()
        for _ in range(DECODE):
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            token.item()
        return middle - started, time.perf_counter() - middle

    return run
