"""Datasets → tokens on disk, memory-mapped, in a deterministic order with an exact resume position.

A document is [start] + its tokens, where start is the model's BOS, or its EOS where it has none: what separated
documents in its pretraining. Training reads blocks of the concatenated documents. The order of the blocks is a function
of the seed and the step alone, so a run that was killed goes on with the very next block and nothing has to be saved.

The target is split by document into training and held-out. The split follows a hash of the text, so that a document
which occurs twice never stands on both sides.

A dataset may be larger than the memory. Its tokens go to a file as they come and are read from there, mapped; to split,
sample or leave out documents copies none of them (`Stretches`). What is in memory is two batches, some 160 MB, and at most
BYTES_A_DOCUMENT for each document.
"""

import hashlib
import os
import tempfile
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from narrow_engine.documents import Position, Skipped, nothing_left, read_documents
from narrow_engine.errors import Cancelled, NarrowError
from narrow_engine.events import Sink

STRETCHES = 64
"""Documents that a skill is measured on, at least, if it has them."""
BYTES_A_DOCUMENT = 120
"""Of memory while texts are split: where documents begin and end, in one reading or two, and what the choice takes."""
CHECKPOINT_SECONDS = 30.0

_BATCH = 2**21
"""Characters of a batch, or one document: many enough that each core has some, whatever the length of documents. A token takes
some 100 bytes until it is in the file."""
_ROW = 64
"""Characters that a document counts for, beside its own."""
_CHUNK = 2**20
"""Tokens, or documents, of what is done piece by piece."""
_ARRAYS: dict[str, Any] = {"tokens": np.uint32, "offsets": np.int64, "hashes": np.uint64}
"""Of documents, each in a file of its own while they come."""
_DONE = "done.npz"


class Stretches:
    """Stretches of tokens, end to end, without a copy of them: what a slice asks for is read then."""

    def __init__(self, source: NDArray[np.uint32], begin: NDArray[np.int64], end: NDArray[np.int64]) -> None:
        # What follows in the source is one.
        first = np.append(True, begin[1:] != end[:-1])[: len(begin)]
        self.source, self.begin = source, begin[first]
        self.offsets = np.append(0, np.cumsum(end[np.append(first[1:], True)[: len(end)]] - self.begin))

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def __getitem__(self, where: slice) -> NDArray[np.uint32]:
        at, end, _ = where.indices(len(self))
        pieces = []
        for number in range(int(np.searchsorted(self.offsets, at, side="right")) - 1, len(self.begin)):
            if at >= end:
                break
            size = min(end, int(self.offsets[number + 1])) - at
            begin = int(self.places(at))
            pieces.append(self.source[begin : begin + size])
            at += size
        return pieces[0] if len(pieces) == 1 else np.concatenate([self.source[:0], *pieces])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[np.uint32]:
        return np.asarray(self[:], dtype)

    def places(self, at: Any) -> Any:
        """Where in the source the tokens at some positions are."""
        number = np.searchsorted(self.offsets[1:-1], at, side="right")
        return self.begin[number] + (at - self.offsets[number])


@dataclass(frozen=True)
class Documents:
    """Tokenized documents: `tokens` end to end, document i at `tokens[offsets[i]:offsets[i + 1]]`, and a hash of each text."""

    tokens: NDArray[np.uint32] | Stretches
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
        """Some of the documents. Copies no tokens."""
        return self.take_spans(self.offsets[indices], self.offsets[indices + 1], self.hashes[indices])

    def take_spans(self, begin: NDArray[np.int64], end: NDArray[np.int64], hashes: NDArray[np.uint64]) -> "Documents":
        """Documents made of the tokens from `begin` to before `end`, each pair one, within a document. Copies no tokens."""
        offsets = np.append(0, np.cumsum(end - begin))
        if isinstance(self.tokens, Stretches):
            places = self.tokens.places(begin)
            return Documents(Stretches(self.tokens.source, places, places + (end - begin)), offsets, hashes)
        return Documents(Stretches(self.tokens, begin, end), offsets, hashes)

    def places(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where each begins, and before where it ends, in the tokens that all were taken from."""
        if isinstance(self.tokens, Stretches):
            begin = self.tokens.places(self.offsets[:-1])
            return begin, begin + self.lengths
        return self.offsets[:-1], self.offsets[1:]


class Tokenized(NamedTuple):
    """A dataset in tokens, and how often each token occurs."""

    documents: Documents
    counts: NDArray[np.int64]


def tokenize(
    path: Path,
    column: str,
    tokenizer: Tokenizer,
    start: int | None,
    *,
    answer: str | None = None,
    skip: bool = False,
    folder: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    emit: Sink = lambda *_: None,
) -> Tokenized:
    """Reads and tokenizes a dataset. Blank documents are left out, with a notice, and so are bad rows if they are to `skip`.

    The tokens go to files in `folder`, where a run that was killed goes on: what it has tokenized is read again, but not
    tokenized. Without one they are in a file that vanishes with what is returned. `progress` is called with (done, total) bytes
    of the file and may raise to stop. Raises NarrowError (empty_dataset, bad_tokenizer and those of `read_documents`).
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as scratch:  # mapped files outlive their names
            return tokenize(
                path,
                column,
                tokenizer,
                start,
                answer=answer,
                skip=skip,
                folder=Path(scratch, "tokens"),
                progress=progress,
                emit=emit,
            )
    if not folder.exists():
        # Until it is complete it is work of this machine: a service does not save what ends in .tmp.
        growing = folder.with_name(folder.name + ".tmp")
        _tokenize(growing, path, column, tokenizer, start, answer, skip, progress)
        growing.rename(folder)
    progress(path.stat().st_size, path.stat().st_size)
    with np.load(folder / _DONE) as done:
        told = {name: done[name] for name in ("blank", "skipped", "first", "counts")}
    if told["blank"]:
        emit("notice", "load", f"{told['blank']} blank documents of {path.name} were left out.", {"code": "blank_documents"})
    if told["skipped"]:
        message = f"Bad rows of {path.name} that were left out: {told['skipped']:,}. The first: {told['first']}"
        emit("notice", "load", message, {"code": "skipped_rows"})
    mapped = {name: np.asarray(np.memmap(folder / name, kind, "r")) for name, kind in _ARRAYS.items()}
    return Tokenized(Documents(**mapped), told["counts"])


class _Batch(NamedTuple):
    """Some documents, blank ones among them, and where in the file the reading was after them."""

    texts: list[str]
    position: int


def _tokenize(
    folder: Path,
    path: Path,
    column: str,
    tokenizer: Tokenizer,
    start: int | None,
    answer: str | None,
    skip: bool,
    progress: Callable[[int, int], None],
) -> None:
    """Fills a folder, or goes on filling it: a file for each of _ARRAYS, and _DONE, which tells how much of them counts."""
    folder.mkdir(parents=True, exist_ok=True)
    done = _restore(folder)
    files = {name: (folder / name).open("ab") for name in _ARRAYS}
    size, position, skipped = path.stat().st_size, Position(), Skipped()
    texts = iter(read_documents(path, column, answer, skipped if skip else None, position))
    blank = 0
    for number, text in enumerate(islice(texts, done.read)):
        blank += not text
        if number % 4096 == 0:
            progress(position.tell(), size)

    def save() -> None:
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
        temporary = folder / "done.tmp"
        with temporary.open("wb") as file:
            np.savez(file, **vars(done), blank=blank, skipped=skipped.count, first=skipped.first)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(folder / _DONE)

    saved = time.monotonic()
    for batch, encodings in _encoded(_batches(texts, position), tokenizer, path.name):
        filled = [text for text in batch.texts if text]
        tokens, ends = array("I"), array("q")
        for encoding in encodings:
            ids = encoding.ids
            if start is not None and ids[:1] != [start]:
                tokens.append(start)
            tokens.fromlist(ids)
            ends.append(done.tokens + len(tokens))
        for name, values in {"tokens": tokens, "offsets": ends, "hashes": array("Q", map(text_hash, filled))}.items():
            files[name].write(values)
        done.read += len(batch.texts)
        done.tokens += len(tokens)
        done.documents += len(filled)
        done.counts = _sum(done.counts, np.bincount(np.frombuffer(tokens, np.uint32)))
        blank += len(batch.texts) - len(filled)
        try:
            progress(batch.position, size)
        except Cancelled:
            save()
            raise
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            save()
            saved = time.monotonic()
    if not done.tokens:
        raise nothing_left(path.name, skipped)
    save()
    for file in files.values():
        file.close()


@dataclass
class _Progress:
    """What of a dataset is in the files: documents that were read, blank ones too, and what came of them."""

    read: int = 0
    documents: int = 0
    tokens: int = 0
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))


def _restore(folder: Path) -> _Progress:
    """How far an earlier run came. What it wrote after its checkpoint is cut off."""
    done = _Progress()
    if (folder / _DONE).exists():
        with np.load(folder / _DONE) as saved:
            done = _Progress(int(saved["read"]), int(saved["documents"]), int(saved["tokens"]), saved["counts"])
    sizes = {"tokens": done.tokens, "offsets": done.documents + 1, "hashes": done.documents}
    for name, kind in _ARRAYS.items():
        with (folder / name).open("ab") as file:
            file.truncate(sizes[name] * np.dtype(kind).itemsize)  # which makes the first offset, a zero, as well
    return done


def _batches(texts: Iterator[str], position: Position) -> Iterator[_Batch]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text) + _ROW
        if size >= _BATCH:
            yield _Batch(batch, position.tell())
            batch, size = [], 0
    if batch:
        yield _Batch(batch, position.tell())


def _encoded(batches: Iterator[_Batch], tokenizer: Tokenizer, name: str) -> Iterator[tuple[_Batch, list[Any]]]:
    """Batches with the tokens of their documents. While one is tokenized, the one before is written and the next is read."""
    with ThreadPoolExecutor(1) as pool:
        ahead: deque[tuple[_Batch, Future[list[Any]]]] = deque()
        while True:
            batch = next(batches, None)
            if batch is not None:
                # "fast" does not follow where in the text each token is, which takes it nearly half the time.
                ahead.append((batch, pool.submit(tokenizer.encode_batch_fast, [text for text in batch.texts if text])))
            if len(ahead) == 2 or (ahead and batch is None):
                first, future = ahead.popleft()
                try:
                    encodings = future.result()
                except Exception as error:  # tokenizers raises bare Exception
                    raise NarrowError("bad_tokenizer", f"The model's tokenizer fails on {name}: {str(error)[:200]}") from error
                yield first, encodings
            elif batch is None:
                return


def _sum(one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of two counts, of which one may know more tokens."""
    longer, shorter = (one, other) if len(one) >= len(other) else (other, one)
    return longer + np.pad(shorter, (0, len(longer) - len(shorter)))


def text_hash(text: str) -> int:
    """What tells whether two documents are the same: 64 bits."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def among(hashes: NDArray[np.uint64], few: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which of many hashes are among a few."""
    known = np.unique(few)
    found = [known[np.searchsorted(known[:-1], part)] == part for part in _parts(hashes)]
    return np.concatenate([np.zeros(0, bool), *found])


def _parts(values: Any) -> Iterator[Any]:
    return (values[at : at + _CHUNK] for at in range(0, len(values), _CHUNK))


def sample(documents: Documents, tokens: int, length: int, seed: int) -> Documents:
    """A stretch of each of as many documents as make up about `tokens`, drawn without replacement.

    A stretch is at most a STRETCHES-th of `tokens`, but at least `length`, and begins at a random multiple of `length`:
    many short stretches say more about a skill, and how sure that is, than a few whole documents.
    """
    random = np.random.default_rng(seed)
    longest = max(length, tokens // STRETCHES // length * length)
    begin, end, kept, total = [], [], [], 0
    for index in random.permutation(len(documents)).tolist():
        first, past = int(documents.offsets[index]), int(documents.offsets[index + 1])
        room = max(0, past - first - 1 - longest)
        at = first + int(random.integers(room // length + 1)) * length
        begin.append(at)
        end.append(min(past, at + longest + 1))
        kept.append(index)
        total += end[-1] - at
        if total >= tokens:
            break
    return documents.take_spans(np.array(begin), np.array(end), documents.hashes[kept])


def hold_out(documents: Documents, tokens: int, share: float, name: str, emit: Sink) -> tuple[Documents, Documents]:
    """Training and held-out documents of a skill; the latter hold at most `tokens`, and at most a share of all tokens.

    Texts are taken whole, in the order of their hashes, as far as they fit. Where a few long ones leave more than half of
    that room empty, the last part of the text is held out instead, wherever that cuts a document, with a notice.
    """
    wanted = max(1, min(tokens, int(share * len(documents.tokens))))
    room, chosen = wanted, np.zeros(len(documents), bool)
    lengths = documents.lengths
    shortest = lengths.min()
    for band in _by_hash(documents.hashes):
        texts, owner = np.unique(documents.hashes[band], return_inverse=True)
        held = np.zeros(len(texts), bool)
        for text, size in enumerate(np.bincount(owner, lengths[band]).astype(np.int64).tolist()):
            if size <= room:
                room -= size
                held[text] = True
        chosen[band] = held[owner]
        if room < shortest:
            break
    if 2 * room <= wanted:
        return documents.take(np.flatnonzero(~chosen)), documents.take(np.flatnonzero(chosen))
    emit(
        "notice",
        "load",
        f"{name} has too few documents to hold whole ones out: the last part of its text is measured on instead.",
        {"code": "held_out_tail"},
    )
    return _split(documents, len(documents.tokens) - wanted)


def _by_hash(hashes: NDArray[np.uint64]) -> Iterator[NDArray[np.int64]]:
    """The documents in groups, of some _CHUNK each, whose hashes ascend from group to group."""
    groups = len(hashes) // _CHUNK + 1
    width = 2**64 // groups + 1
    for group in range(groups):
        first, last = np.uint64(group * width), np.uint64(min((group + 1) * width, 2**64) - 1)
        yield np.flatnonzero((hashes >= first) & (hashes <= last))


def _split(documents: Documents, at: int) -> tuple[Documents, Documents]:
    """The first `at` tokens and the rest; a document that lies across stands in both, by its parts."""
    first = int(np.searchsorted(documents.offsets, at))  # documents that begin before `at`
    last = int(np.searchsorted(documents.offsets, at, side="right")) - 1  # the one that holds token `at`
    begin, end = documents.offsets[:-1], documents.offsets[1:]
    return (
        documents.take_spans(begin[:first], np.minimum(end[:first], at), documents.hashes[:first]),
        documents.take_spans(np.maximum(begin[last:], at), end[last:], documents.hashes[last:]),
    )


@dataclass(frozen=True)
class Reading:
    """The same texts as the base reads them and as the result will: one and the same where the vocabulary is not trimmed.

    `widths` says of every token of either vocabulary how much text it stands for.
    """

    base: Documents
    narrow: Documents
    widths: tuple[NDArray[np.int64], ...]

    def at(self, chosen: Documents, check: Callable[[], None] = lambda: None) -> tuple[Documents, Documents]:
        """Both readings of stretches that were taken from the base's. `check` is called now and then and may raise to stop.

        A stretch shrinks to where both have an end of a token, so that what is predicted, all but its first token, is the
        same text. Raises NarrowError (bad_tokenizer) where the two do not spell the same.
        """
        if self.narrow is self.base:
            return chosen, chosen
        sides = (self.base, self.narrow)
        first, past = chosen.places()
        owner = np.searchsorted(self.base.offsets[1:-1], first, side="right")
        found = np.empty((2, 2, len(chosen)), np.int64)
        """Where stretches begin and end, on both sides."""
        for group in self._groups(owner):
            check()
            documents, which = np.unique(owner[group], return_inverse=True)
            texts = [side.take(documents) for side in sides]
            # From places in the whole to places in these documents.
            moved = [(side.offsets[documents] - text.offsets[:-1])[which] for side, text in zip(sides, texts, strict=True)]
            common = self._common_ends(*texts)
            begin = np.searchsorted(common[0], first[group] - moved[0] + 1)
            end = np.maximum(begin, np.searchsorted(common[0], past[group] - moved[0], side="right") - 1)
            for side in (0, 1):
                found[side, 0, group] = common[side][begin] - 1 + moved[side]
                found[side, 1, group] = common[side][end] + moved[side]
        one, other = (side.take_spans(begin, end, chosen.hashes) for side, (begin, end) in zip(sides, found, strict=True))
        return one, other

    def _groups(self, owner: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """Stretches by their documents, which have some _CHUNK of tokens in each group."""
        order = np.argsort(owner, kind="stable")
        size = np.cumsum(self.base.lengths[owner[order]]) // _CHUNK
        cuts = [0, *(np.flatnonzero(np.diff(size)) + 1).tolist(), len(order)]
        return (order[a:b] for a, b in pairwise(cuts))

    def _common_ends(self, one: Documents, other: Documents) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Before which tokens of either the same text has been read, as of the same documents."""
        ends = [np.append(0, np.cumsum(w[text.tokens[:]])) for text, w in zip((one, other), self.widths, strict=True)]
        if not np.array_equal(ends[0][one.offsets], ends[1][other.offsets]):
            raise NarrowError(
                "bad_tokenizer",
                "The tokenizer with fewer tokens does not spell the text as the base's does: leave 'token' out of method.units.",
            )
        place = np.searchsorted(ends[1], ends[0])
        same = np.flatnonzero(ends[1][place] == ends[0])
        return same, place[same]


def save(documents: Documents, folder: Path, name: str, check: Callable[[], None] = lambda: None) -> None:
    """Writes documents as `load` reads them, piece by piece. `check` is called now and then and may raise to stop."""
    with (folder / f"{name}.tokens.npy").open("wb") as file:
        empty = np.lib.format.header_data_from_array_1_0(np.empty(0, np.uint32))
        np.lib.format.write_array_header_1_0(file, {**empty, "shape": (len(documents.tokens),)})
        for part in _parts(documents.tokens):
            check()
            file.write(part)
    np.savez(folder / f"{name}.documents.npz", offsets=documents.offsets, hashes=documents.hashes)


def load(folder: Path, name: str) -> Documents:
    """The documents that `save` wrote, with the tokens memory-mapped."""
    with np.load(folder / f"{name}.documents.npz") as meta:
        return Documents(np.load(folder / f"{name}.tokens.npy", mmap_mode="r"), meta["offsets"], meta["hashes"])


class Blocks:
    """Endless shuffled blocks of `length` + 1 tokens of a token stream.

    Each epoch cuts the stream at another offset, or all of them at that of the first where `again` asks for the same blocks.
    """

    def __init__(self, tokens: NDArray[np.uint32] | Stretches, length: int, seed: int, again: bool = False) -> None:
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
