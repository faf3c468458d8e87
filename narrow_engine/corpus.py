"""Datasets → tokens on disk, memory-mapped, in a deterministic order with an exact resume position.

A document is [start] + its tokens, where start is the model's BOS, or its EOS where it has none: what separated
documents in its pretraining. Training reads blocks of the concatenated documents. The order of the blocks is a function
of the seed and the step alone, so a run that was killed goes on with the very next block and nothing has to be saved.

The target is split by document into training and held-out. The split follows a hash of the text, so that a document
which occurs twice never stands on both sides.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from narrow_engine.documents import Skipped, nothing_left, read_documents
from narrow_engine.errors import NarrowError
from narrow_engine.events import Sink

STRETCHES = 64
"""Documents that a skill is measured on, at least, if it has them."""

_BATCH = 256


@dataclass(frozen=True)
class Documents:
    """Tokenized documents: `tokens` end to end, document i at `tokens[offsets[i]:offsets[i + 1]]`, and a hash of each text."""

    tokens: NDArray[np.uint32]
    offsets: NDArray[np.int64]
    hashes: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> NDArray[np.uint32]:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    def take(self, indices: NDArray[np.int64]) -> "Documents":
        chosen = [self[i] for i in indices]
        tokens = np.concatenate(chosen) if chosen else np.empty(0, np.uint32)
        return Documents(tokens, np.cumsum([0, *map(len, chosen)], dtype=np.int64), self.hashes[indices])

    def places(self) -> "Documents":
        """The same documents with each token's place in `tokens` instead of the token; what is cut from them can be `read`."""
        return Documents(np.arange(len(self.tokens), dtype=np.uint32), self.offsets, self.hashes)

    def read(self, places: "Documents") -> "Documents":
        """The tokens at places."""
        return Documents(self.tokens[places.tokens], places.offsets, places.hashes)

    def take_spans(self, begin: NDArray[np.int64], end: NDArray[np.int64], hashes: NDArray[np.uint64]) -> "Documents":
        """Documents made of the tokens from `begin` to before `end`, each pair one."""
        pieces = [self.tokens[a:b] for a, b in zip(begin, end, strict=True)]
        return Documents(np.concatenate(pieces), np.cumsum([0, *(end - begin)], dtype=np.int64), hashes)


def tokenize(
    path: Path,
    column: str,
    tokenizer: Tokenizer,
    start: int | None,
    check: Callable[[], None],
    emit: Sink,
    answer: str | None = None,
    skip: bool = False,
) -> Documents:
    """Reads and tokenizes a dataset. Blank documents are left out, with a notice, and so are bad rows if they are to `skip`.

    `check` is called between batches and may raise to stop. Raises NarrowError (empty_dataset, bad_tokenizer and
    those of `read_documents`).
    """
    pieces: list[NDArray[np.uint32]] = []
    hashes: list[int] = []
    blank, skipped = 0, Skipped()
    texts = iter(read_documents(path, column, answer, skipped if skip else None))
    while batch := list(islice(texts, _BATCH)):
        check()
        filled = [text for text in batch if text]
        blank += len(batch) - len(filled)
        try:
            encodings = tokenizer.encode_batch(filled)
        except Exception as error:  # tokenizers raises bare Exception
            raise NarrowError("bad_tokenizer", f"The model's tokenizer fails on {path.name}: {str(error)[:200]}") from error
        for text, encoding in zip(filled, encodings, strict=True):
            ids = encoding.ids if start is None or encoding.ids[:1] == [start] else [start, *encoding.ids]
            pieces.append(np.array(ids, np.uint32))
            hashes.append(text_hash(text))
    if blank:
        emit("notice", "load", f"{blank} blank documents of {path.name} were left out.", {"code": "blank_documents"})
    if not pieces:
        raise nothing_left(path.name, skipped)
    if skipped.count:
        message = f"{skipped.count:,} bad rows of {path.name} were left out. The first: {skipped.first}"
        emit("notice", "load", message, {"code": "skipped_rows"})
    return Documents(np.concatenate(pieces), np.cumsum([0, *map(len, pieces)], dtype=np.int64), np.array(hashes, np.uint64))


def text_hash(text: str) -> int:
    """What tells whether two documents are the same: 64 bits."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def sample(documents: Documents, tokens: int, length: int, seed: int) -> Documents:
    """A stretch of each of as many documents as make up about `tokens`, drawn without replacement.

    A stretch is at most a STRETCHES-th of `tokens`, but at least `length`, and begins at a random multiple of `length`:
    many short stretches say more about a skill, and how sure that is, than a few whole documents.
    """
    random = np.random.default_rng(seed)
    longest = max(length, tokens // STRETCHES // length * length)
    pieces, kept, total = [], [], 0
    for index in random.permutation(len(documents)):
        document = documents[index]
        room = max(0, len(document) - 1 - longest)
        at = int(random.integers(room // length + 1)) * length
        pieces.append(document[at : at + longest + 1])
        kept.append(index)
        total += len(pieces[-1])
        if total >= tokens:
            break
    return Documents(
        np.concatenate(pieces),
        np.cumsum([0, *map(len, pieces)], dtype=np.int64),
        documents.hashes[np.array(kept, np.int64)],
    )


def hold_out(documents: Documents, tokens: int, share: float, name: str, emit: Sink) -> tuple[Documents, Documents]:
    """Training and held-out documents of a skill; the latter hold at most `tokens`, and at most a share of all tokens.

    Texts are taken whole, in the order of their hashes, as far as they fit. Where a few long ones leave more than half of
    that room empty, the last part of the text is held out instead, wherever that cuts a document, with a notice.
    """
    wanted = max(1, min(tokens, int(share * len(documents.tokens))))
    texts, owner = np.unique(documents.hashes, return_inverse=True)
    room, held = wanted, np.zeros(len(texts), bool)
    for text, size in enumerate(np.bincount(owner, documents.lengths).astype(np.int64).tolist()):
        if size <= room:
            room -= size
            held[text] = True
    if 2 * room <= wanted:
        chosen = held[owner]
        return documents.take(np.flatnonzero(~chosen)), documents.take(np.flatnonzero(chosen))
    emit(
        "notice",
        "load",
        f"{name} has too few documents to hold whole ones out: the last part of its text is measured on instead.",
        {"code": "held_out_tail"},
    )
    return _split(documents, len(documents.tokens) - wanted)


def _split(documents: Documents, at: int) -> tuple[Documents, Documents]:
    """The first `at` tokens and the rest; a document that lies across stands in both, by its parts."""
    first = int(np.searchsorted(documents.offsets, at))  # documents that begin before `at`
    last = int(np.searchsorted(documents.offsets, at, side="right")) - 1  # the one that holds token `at`
    return (
        Documents(documents.tokens[:at], np.append(documents.offsets[:first], at), documents.hashes[:first]),
        Documents(documents.tokens[at:], np.append(0, documents.offsets[last + 1 :] - at), documents.hashes[last:]),
    )


@dataclass(frozen=True)
class Reading:
    """The same texts as the base reads them and as the result will: one and the same where the vocabulary is not trimmed.

    `widths` says of every token of either vocabulary how much text it stands for.
    """

    base: Documents
    narrow: Documents
    widths: tuple[NDArray[np.int64], ...]

    def at(self, places: Documents) -> tuple[Documents, Documents]:
        """Both readings of stretches of the texts, given by their places in the base's.

        A stretch shrinks to where both have an end of a token, so that what is predicted, all but its first token, is the
        same text. Raises NarrowError (bad_tokenizer) where the two do not spell the same.
        """
        if self.narrow is self.base:
            return (self.base.read(places),) * 2
        sides = (self.base, self.narrow)
        ends = [np.append(0, np.cumsum(width[side.tokens])) for side, width in zip(sides, self.widths, strict=True)]
        if not np.array_equal(ends[0][self.base.offsets], ends[1][self.narrow.offsets]):
            raise NarrowError(
                "bad_tokenizer",
                "The tokenizer with fewer tokens does not spell the text as the base's does: leave 'token' out of method.units.",
            )
        _, *common = np.intersect1d(ends[0], ends[1], return_indices=True)
        first, last = places.tokens[places.offsets[:-1]], places.tokens[places.offsets[1:] - 1]
        begin = np.searchsorted(common[0], first.astype(np.int64) + 1)
        end = np.searchsorted(common[0], last.astype(np.int64) + 1, side="right") - 1
        end = np.maximum(begin, end)
        one, other = (
            side.take_spans(found[begin] - 1, found[end], places.hashes) for side, found in zip(sides, common, strict=True)
        )
        return one, other


def save(documents: Documents, folder: Path, name: str) -> None:
    np.save(folder / f"{name}.tokens.npy", documents.tokens)
    np.savez(folder / f"{name}.documents.npz", offsets=documents.offsets, hashes=documents.hashes)


def load(folder: Path, name: str) -> Documents:
    """The documents that `save` wrote, with the tokens memory-mapped."""
    with np.load(folder / f"{name}.documents.npz") as meta:
        return Documents(np.load(folder / f"{name}.tokens.npy", mmap_mode="r"), meta["offsets"], meta["hashes"])


class Blocks:
    """Endless shuffled blocks of `length` + 1 tokens of a token stream.

    Each epoch cuts the stream at another offset, or all of them at that of the first where `again` asks for the same blocks.
    """

    def __init__(self, tokens: NDArray[np.uint32], length: int, seed: int, again: bool = False) -> None:
        self.count = (len(tokens) - 1 - length) // length
        """Blocks in an epoch. One block's length is kept free for the offset."""
        if self.count < 1:
            raise NarrowError(
                "text_too_short",
                f"There are {len(tokens)} tokens to train on, and a block takes {length}: bring at least "
                f"{2 * length + 1} tokens or lower block_tokens.",
            )
        self.tokens, self.length, self.seed, self.again = tokens, length, seed, again
        self._epoch = -1

    def batch(self, first: int, rows: int) -> torch.Tensor:
        """Blocks number `first` to `first + rows` of the endless sequence. Shape [rows, length + 1], int64."""
        return torch.from_numpy(np.stack([self._block(index) for index in range(first, first + rows)]))

    def place(self, index: int) -> int:
        """Where in the epoch's cut of the stream a block is, from 0 to before `count`."""
        epoch, position = divmod(index, self.count)
        if self._epoch != epoch:
            self._order, offset = self._shuffled(epoch)
            self._offset = self._shuffled(0)[1] if self.again else offset
            self._epoch = epoch
        return int(self._order[position])

    def _block(self, index: int) -> NDArray[np.int64]:
        place = self.place(index)
        at = self._offset + place * self.length
        return self.tokens[at : at + self.length + 1].astype(np.int64)

    def _shuffled(self, epoch: int) -> tuple[NDArray[np.int64], int]:
        random = np.random.default_rng([self.seed, epoch])
        return random.permutation(self.count), int(random.integers(self.length))


class Mixture:
    """Blocks of two texts, of which the share of the second goes from `start` to `end` over the first `until` blocks.

    Which block is whose is a function of its number alone, as the order within each text is.
    """

    def __init__(self, narrow: Blocks, broad: Blocks, start: float, end: float, until: float) -> None:
        self.narrow, self.broad, self.length = narrow, broad, narrow.length
        self.count = narrow.count + broad.count
        self.start, self.end, self.until = start, end, until

    def broad_before(self, index: int) -> int:
        """How many of the blocks before a number are broad: the integral of the share, rounded."""
        falling = min(float(index), self.until)
        way = falling / self.until if self.until else 0.0
        return round(self.start * falling + (self.end - self.start) * way * falling / 2 + self.end * (index - falling))

    def batch(self, first: int, rows: int) -> torch.Tensor:
        """Like `Blocks.batch`."""
        return torch.cat([self._block(index) for index in range(first, first + rows)])

    def place(self, index: int) -> int:
        """Like `Blocks.place`; those of the broad text follow those of the narrow."""
        text, number = self._which(index)
        return text.place(number) + (self.narrow.count if text is self.broad else 0)

    def _block(self, index: int) -> torch.Tensor:
        text, number = self._which(index)
        return text.batch(number, 1)

    def _which(self, index: int) -> tuple[Blocks, int]:
        """Whose a block is, and its number there."""
        before = self.broad_before(index)
        broad = self.broad_before(index + 1) > before
        return (self.broad, before) if broad else (self.narrow, index - before)


def windows(documents: Documents, length: int) -> list[tuple[int, NDArray[np.int64]]]:
    """Documents cut into windows of up to `length` + 1 tokens: (document, tokens). Each token but a document's first
    is predicted once, from the tokens before it in its window."""
    return [
        (index, np.asarray(document[at : at + length + 1], np.int64))
        for index, document in enumerate(documents[i] for i in range(len(documents)))
        for at in range(0, max(1, len(document) - 1), length)
        if len(document) > 1
    ]


def batches(rows: Iterable[tuple[int, NDArray[np.int64]]], tokens: int) -> list[list[tuple[int, NDArray[np.int64]]]]:
    """Windows of like length together, up to `tokens` with padding in a batch."""
    out: list[list[tuple[int, NDArray[np.int64]]]] = []
    for row in sorted(rows, key=lambda row: -len(row[1])):
        if out and len(out[-1][0][1]) * (len(out[-1]) + 1) <= tokens:
            out[-1].append(row)
        else:
            out.append([row])
    return out
