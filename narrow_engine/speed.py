"""Tokens per second, base and result in turn in one process: machines drift, ratios of neighbours hold."""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from narrow_engine.export.onnx import Decoder, open_session
from narrow_engine.report.model import Speed

PREFILL, DECODE, ROUNDS = 256, 32, 5
SECONDS = 60.0
"""No further round begins after this time: a small base takes 3 s in all, a large one on a slow machine would take hours."""


def measure_speed(base: PreTrainedModel, narrow: PreTrainedModel, onnx_folders: tuple[Path, Path] | None = None) -> list[Speed]:
    """Prefill of PREFILL tokens and greedy decoding of DECODE more, batch 1, in float32: medians of up to ROUNDS.

    `onnx_folders` are exports of base and result; without them only torch is measured. Exporting the base for the
    comparison costs two seconds a layer, which is more than a run should spend on one figure.
    """
    runners = {"torch": (_torch(base), _torch(narrow))}
    if onnx_folders is not None:
        runners["onnxruntime"] = (_onnx(onnx_folders[0]), _onnx(onnx_folders[1]))
    found = []
    for runtime, pair in runners.items():
        times = _in_turn(pair, ROUNDS)
        (prefill_base, decode_base), (prefill_narrow, decode_narrow) = (
            (PREFILL / statistics.median(t[0] for t in side), DECODE / statistics.median(t[1] for t in side)) for side in times
        )
        found.append(
            Speed.model_validate(
                {
                    "runtime": runtime,
                    "prefill_base": prefill_base,
                    "prefill_narrow": prefill_narrow,
                    "decode_base": decode_base,
                    "decode_narrow": decode_narrow,
                }
            )
        )
    return found


def token_seconds(models: list[PreTrainedModel], check: Callable[[], None]) -> list[float]:
    """Seconds of one decoded token of each model, timed in turn: the least of several runs, since what else the machine does
    can only add to it. `check` is called between runs and may raise."""
    times = _in_turn([_torch(model) for model in models], 2 * ROUNDS, check)
    return [min(decode for _, decode in found) / DECODE for found in times]


def _in_turn(
    runners: Sequence[Callable[[], tuple[float, float]]], rounds: int, check: Callable[[], None] = lambda: None
) -> list[list[tuple[float, float]]]:
    """Seconds of prefill and of decoding of each runner, in up to `rounds` rounds after one that warms up."""
    times: list[list[tuple[float, float]]] = [[] for _ in runners]
    started = time.monotonic()
    for number in range(rounds + 1):
        if number > 1 and time.monotonic() - started > SECONDS:
            break
        for runner, found in zip(runners, times, strict=True):
            check()
            taken = runner()
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


def _onnx(folder: Path) -> Callable[[], tuple[float, float]]:
    session = open_session(folder / "model.onnx")
    vocabulary = session.get_outputs()[0].shape[2]
    ids = np.arange(1, PREFILL + 1)[None] % vocabulary

    def run() -> tuple[float, float]:
        decoder = Decoder(session)
        started = time.perf_counter()
        token = decoder.step(ids)[:, -1:].argmax(-1)
        middle = time.perf_counter()
        for _ in range(DECODE):
            token = decoder.step(token)[:, -1:].argmax(-1)
        return middle - started, time.perf_counter() - middle

    return run
