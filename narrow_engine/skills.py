"""How well models do on a skill: loss, agreement, KL to the base, and retention with its interval.

Retention is base perplexity ÷ compressed perplexity, exp(base loss − compressed loss). Where the vocabulary is trimmed, the
base reads a text in its own tokens and the cut model in those that it has left: the nats of the same documents are compared,
and all are counted by the base's tokens. Tokens of one document depend on
each other, so the interval comes from resampling whole documents (Efron's percentile bootstrap), base and compressed
together: what both find hard cancels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from narrow_engine.corpus import Documents, batches, windows
from narrow_engine.losses import statistics
from narrow_engine.models import head, hidden_states
from narrow_engine.report.model import Fit, Interval

RESAMPLES = 2000
FEW_DOCUMENTS = 10
BATCH_TOKENS = 4096


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
    for batch in batches(rows, BATCH_TOKENS):
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


def fit(measured: Measured) -> Fit:
    loss = measured.mean_loss()
    return Fit(loss=loss, perplexity=math.exp(min(loss, 700)))


def retention(base: Measured, other: Measured, seed: int) -> Interval:
    """Retention of `other` with its 95 % interval over documents."""
    random = np.random.default_rng(seed)
    drawn = random.integers(len(base.tokens), size=(RESAMPLES, len(base.tokens)))
    tokens = base.tokens[drawn].sum(1)
    difference = (base.loss - other.loss)[drawn].sum(1) / np.maximum(tokens, 1)
    low, high = np.quantile(np.exp(difference[tokens > 0]), [0.025, 0.975])
    return Interval(value=math.exp(base.mean_loss() - other.mean_loss()), low=float(low), high=float(high))


def note(role: str, kept: Interval, documents: int, longer: float = 1.0) -> str:
    """What a reader of a row should keep in mind; empty if nothing. The text takes `longer` times the base's tokens."""
    doubt = _doubt(role, kept, documents)
    if longer == 1:
        return doubt
    return f"{doubt} Without the trimmed tokens its text takes {longer:.2f} times as many.".lstrip()


def _doubt(role: str, kept: Interval, documents: int) -> str:
    if documents < FEW_DOCUMENTS:
        return f"Only {documents} document{'s' if documents > 1 else ''}: too few for the interval to mean much."
    if role == "keep" and kept.high < 0.5:
        return "Over twice the base's perplexity: of little use. Raise the budget or train longer (method.recover.tokens)."
    if role == "keep" and kept.low > 1:
        return "Above 1 proves little: training on narrow text improves any model on it, the uncut base too."
    if role == "forget" and kept.high > 0.5:
        return "Still largely there: cutting for the target did not remove it."
    return ""
