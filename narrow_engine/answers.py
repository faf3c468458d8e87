"""What models write to prompts, and how often that is the answer: a skill as its users meet it.

Decoding is greedy, so that a run can be repeated. Shares have Wilson's interval (1927), which holds near 0 and 1 too; whether
result and base differ is told by the prompts that only one of them answers (McNemar's test, exact).
"""

import math
import re
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList

from narrow_engine.corpus import Documents, among, text_hash
from narrow_engine.documents import Skipped, read_answers
from narrow_engine.earlier import Reader
from narrow_engine.report.model import Answers, Interval
from narrow_engine.spec import Answer, DatasetPath

BATCH = 16
FEW = 50
"""Prompts below which a share says little."""
Z = NormalDist().inv_cdf(0.975)


class Prompt(NamedTuple):
    text: str
    answer: str


def pick(data: DatasetPath, held_out: Documents, training: Documents | None) -> list[Prompt]:
    """The prompts of a dataset that are among what is measured on, and not in what is trained on, in the file's order."""
    assert data.answer is not None
    wanted = set(held_out.hashes.tolist())
    if training:
        wanted -= set(training.hashes[among(training.hashes, held_out.hashes)].tolist())
    found: list[Prompt] = []
    bad = Skipped() if data.bad_rows == "skip" else None  # which a notice told of when they were tokenized
    for prompt, answer in read_answers(data.path, data.column, data.answer.column, bad):
        if text_hash(prompt + answer) in wanted:
            found.append(Prompt(prompt, answer))
        if len(found) == data.answer.prompts:
            break
    return found


def encode(reader: Reader, text: str) -> list[int]:
    """A prompt's tokens, opened as documents are."""
    ids: list[int] = reader.tokenizer.encode(text).ids
    return ids if reader.start is None or ids[:1] == [reader.start] else [reader.start, *ids]


@torch.no_grad()
def write(
    model: PreTrainedModel, reader: Reader, prompts: Sequence[str], asked: Answer, progress: Callable[[int, int], None]
) -> list[str]:
    """What a model writes to each prompt, up to the first of `asked.stop`. `progress` is called with (done, total) prompts."""
    ids = [encode(reader, text) for text in prompts]
    written = [""] * len(prompts)
    # Prompts of like length go together.
    order = sorted(range(len(prompts)), key=lambda index: -len(ids[index]))
    for first in range(0, len(order), BATCH):
        progress(first, len(order))
        rows = order[first : first + BATCH]
        made = _generate(model, reader, [ids[row] for row in rows], asked, lambda: progress(first, len(order)))  # noqa: B023
        for row, tokens in zip(rows, made, strict=True):
            written[row] = _until(reader.tokenizer.decode(tokens.tolist()), asked.stop)
    progress(len(order), len(order))
    return written


def _generate(model: PreTrainedModel, reader: Reader, rows: list[list[int]], asked: Answer, check: Callable[[], None]) -> Tensor:
    """Greedy tokens after each row, [rows, up to asked.tokens]. Short rows are padded on the left and the pads masked."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device)
    ends = model.generation_config.eos_token_id if model.generation_config else None

    def stopped(made: Tensor, _: Tensor) -> Tensor:
        check()
        texts = reader.tokenizer.decode_batch(made[:, longest:].tolist())
        return torch.tensor([any(stop in text for stop in asked.stop) for text in texts], device=made.device)

    # All that a base's generation_config could change of the choice is set here.
    options = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_length=None,
        max_new_tokens=asked.tokens,
        min_new_tokens=None,
        eos_token_id=ends,
        pad_token_id=ends[0] if isinstance(ends, list) else ends if ends is not None else 0,
        use_cache=True,
    )
    criteria = StoppingCriteriaList([stopped])
    found: Tensor = model.generate(ids, attention_mask=mask, generation_config=options, stopping_criteria=criteria)
    return found[:, longest:]


def _until(text: str, stops: Sequence[str]) -> str:
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def right(written: str, answer: str, extract: str | None) -> bool:
    """Whether what was written is the answer; where an expression finds nothing in the answer, all of that is compared."""
    wanted = _extracted(answer, extract)
    found = _extracted(written, extract)
    return found is not None and found == (answer.strip() if wanted is None else wanted)


def _extracted(text: str, extract: str | None) -> str | None:
    """The last match of an expression that is not empty, or its first group; the whole text where there is no expression."""
    if extract is None:
        return text.strip()
    found = [match[min(1, match.re.groups)] for match in re.finditer(extract, text)]
    return next((value for value in reversed(found) if value), None)


def judge(base: list[bool], cut: list[bool], recovered: list[bool]) -> Answers:
    """What of the same prompts each model answers."""
    gained = sum(after and not before for before, after in zip(base, recovered, strict=True))
    lost = sum(before and not after for before, after in zip(base, recovered, strict=True))
    return Answers(
        prompts=len(base),
        base=share(base),
        cut=share(cut),
        recovered=share(recovered),
        gained=gained,
        lost=lost,
        note=_note(base, gained, lost),
    )


def share(right: list[bool]) -> Interval:
    """The share that is right, with Wilson's 95 % interval."""
    count, mean = len(right), sum(right) / len(right)
    middle = (mean + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(mean * (1 - mean) / count + Z**2 / (4 * count**2))
    return Interval(value=mean, low=max(0.0, min(mean, middle - half)), high=min(1.0, max(mean, middle + half)))


def _note(base: list[bool], gained: int, lost: int) -> str:
    if share(base).high < 0.1 and not gained:
        return "The base answers hardly any of these itself: there is nothing to keep or to lose."
    if len(base) < FEW:
        return f"Only {len(base)} prompts: too few to say much."
    if gained + lost and _chance(gained, lost) < 0.05:
        return ""
    return "The difference from the base is within the error of the measurement."


def _chance(gained: int, lost: int) -> float:
    """How likely so uneven a split is where either way is as likely: two-sided, exact."""
    count, fewer = gained + lost, min(gained, lost)
    return float(min(1.0, 2 * sum(math.comb(count, k) for k in range(fewer + 1)) / 2**count))
