"""How well models do on a skill: loss, agreement, KL to the base, and retention with its interval.

Retention is base perplexity ÷ compressed perplexity, exp(base loss − compressed loss). Where the vocabulary is trimmed, the
base reads a text in its own tokens and the cut model in those that it has left: the nats of the same documents are compared,
and all are counted by the base's tokens.

Tokens of one document depend on each other, so intervals come from resampling whole documents, base and compressed together:
what both find hard cancels. They are studentised (the bootstrap-t; Efron and Tibshirani 1993, chapter 12): where a few
documents are very unlike the rest, percentiles of the resampled means are too narrow. `bench/coverage.py` has how often they
hold the truth.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from narrow_engine.corpus import Documents, batches, windows
from narrow_engine.footprint import MEASURED
from narrow_engine.losses import statistics
from narrow_engine.models import head, hidden_states
from narrow_engine.report.model import Fit, Interval

RESAMPLES = 2000
FEW_DOCUMENTS = 20
"""Fewer than that give intervals that hold the truth in less than 93 of 100 cases."""
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447)
"""97.5 % points of Student's t with 1, 2, ... degrees of freedom: so few documents cannot be resampled."""


@dataclass(frozen=True)
class Measured:
    """Sums over each document's predicted tokens, [documents] each; losses and KL in nats."""

    tokens: NDArray[np.float64]
    loss: NDArray[np.float64]
    kl: NDArray[np.float64]
    agree: NDArray[np.float64]

    def mean_loss(self) -> float:
        return float(self.loss.sum() / self.tokens.sum())

    def per(self, other: "Measured") -> "Measured":
        """The same losses of the same texts, counted by the tokens of another segmentation."""
        return replace(self, tokens=other.tokens)

    def save(self, path: Path) -> None:
        np.savez(path, tokens=self.tokens, loss=self.loss, kl=self.kl, agree=self.agree)

    @staticmethod
    def load(path: Path) -> "Measured":
        with np.load(path) as arrays:
            return Measured(**arrays)


@torch.no_grad()
def measure(
    base: PreTrainedModel,
    others: list[PreTrainedModel],
    documents: Documents,
    length: int,
    progress: Callable[[int, int], None],
) -> list[Measured]:
    """The base and then each of `others` on the same windows of up to `length` tokens.

    `progress` is called with (done, total) windows and may raise to stop.
    """
    rows = windows(documents, length)
    totals = np.zeros((1 + len(others), 4, len(documents)))
    done = 0
    for batch in batches(rows, MEASURED):
        progress(done, len(rows))
        longest = len(batch[0][1]) - 1
        ids = np.zeros((len(batch), longest), np.int64)
        targets = np.full((len(batch), longest), -1, np.int64)
        for row, (_, tokens) in enumerate(batch):
            ids[row, : len(tokens) - 1], targets[row, : len(tokens) - 1] = tokens[:-1], tokens[1:]
        inputs = torch.from_numpy(ids).to(base.device)
        real = torch.from_numpy(targets >= 0).to(base.device)
        wanted = torch.from_numpy(targets).to(base.device)[real]
        states = [(hidden_states(model, inputs)[real], head(model)) for model in (base, *others)]
        owner = np.repeat([index for index, _ in batch], [len(tokens) - 1 for _, tokens in batch])
        for model, found in enumerate(statistics(states[0], states[1:], wanted)):
            values = (torch.ones_like(found.loss), found.loss, found.kl, found.agree)
            for field, value in enumerate(values):
                np.add.at(totals[model, field], owner, value.double().cpu().numpy())
        done += len(batch)
    progress(len(rows), len(rows))
    return [Measured(*model) for model in totals]


@torch.no_grad()
def loss_of(model: PreTrainedModel, documents: Documents, length: int) -> float:
    """Mean next-token loss of one model, in nats."""
    return measure(model, [], documents, length, lambda done, total: None)[0].mean_loss()


def fit(measured: Measured, seed: int) -> Fit:
    loss = interval(measured.loss, measured.tokens, seed)
    return Fit(loss=loss.value, low=loss.low, high=loss.high, perplexity=math.exp(min(loss.value, 700)))


def retention(base: Measured, other: Measured, seed: int) -> Interval:
    """Retention of `other` with its 95 % interval over documents."""
    found = interval(base.loss - other.loss, base.tokens, seed)
    return Interval(value=math.exp(found.value), low=math.exp(found.low), high=math.exp(min(found.high, 700)))


def interval(sums: NDArray[np.float64], tokens: NDArray[np.float64], seed: int) -> Interval:
    """The mean over tokens of what was summed over each document's, [documents] both, with its 95 % interval over documents.

    A document alone has no interval: both ends are the mean.
    """
    sums, tokens = sums[tokens > 0], tokens[tokens > 0]
    count = len(tokens)
    mean = float(sums.sum() / tokens.sum())
    if count < 2:
        return Interval(value=mean, low=mean, high=mean)
    error = float(_error(sums, tokens, mean))
    if count <= len(STUDENT) + 1:
        return Interval(value=mean, low=mean - STUDENT[count - 2] * error, high=mean + STUDENT[count - 2] * error)
    drawn = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    means = sums[drawn].sum(1) / tokens[drawn].sum(1)
    errors = _error(sums[drawn], tokens[drawn], means[:, None])
    # A resample of one document, over and over, has no error and says nothing.
    shifts = (means - mean)[errors > 0] / errors[errors > 0]
    low, high = np.quantile(shifts, [0.025, 0.975]) if len(shifts) else (0.0, 0.0)
    return Interval(value=mean, low=mean - float(high) * error, high=mean - float(low) * error)


def _error(sums: NDArray[np.float64], tokens: NDArray[np.float64], mean: Any) -> NDArray[np.float64]:
    """Standard error of a ratio of sums, by linearisation; over the last axis."""
    count = sums.shape[-1]
    found: NDArray[np.float64] = np.sqrt(count / (count - 1) * ((sums - mean * tokens) ** 2).sum(-1)) / tokens.sum(-1)
    return found


def note(role: str, kept: Interval, documents: int, longer: float = 1.0, trained: Interval | None = None) -> str:
    """What a reader of a row should keep in mind; empty if nothing.

    The text takes `longer` times the base's tokens; `trained` is the retention of the uncut base after the same training.
    """
    doubt = _doubt(role, kept, documents, trained)
    if longer == 1:
        return doubt
    return f"{doubt} Without the trimmed tokens its text takes {longer:.2f} times as many.".lstrip()


def _doubt(role: str, kept: Interval, documents: int, trained: Interval | None) -> str:
    if documents < FEW_DOCUMENTS:
        return f"Only {documents} document{'s' if documents > 1 else ''}: too few for the interval to mean much."
    if role == "keep" and kept.high < 0.5:
        return "Over twice the base's perplexity: of little use. Raise the budget or train longer (method.recover.tokens)."
    if role == "forget" and kept.high > 0.5:
        return "Still largely there: cutting for the target did not remove it."
    if kept.low > 1:
        alike = f": trained alike, it has {trained.value:.3f} ({trained.low:.3f} – {trained.high:.3f})" if trained else ""
        return f"Above 1 proves little: training on narrow text improves any model on it, the uncut base too{alike}."
    if kept.high > 1:
        return "The difference from the base is within the error of the measurement."
    return ""
