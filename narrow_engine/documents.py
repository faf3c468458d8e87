"""Reading a dataset: JSON Lines or plain text, gzipped or not, one document at a time. No torch.

The file may come from anyone: it is read as a stream with a cap on the length of a line and on the total, so that
neither a gigabyte line nor a gzip bomb costs more than the cap, and every refusal names the line.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from narrow_engine.errors import NarrowError

LINE_LIMIT = 16 * 2**20
TOTAL_LIMIT = 8 * 2**30
PASSAGE = 2000
"""Plain text has no documents: it is cut at blank lines into passages of at least this many characters."""

_JSONL = (".jsonl", ".ndjson")
_TEXT = (".txt", ".text", ".md")


def read_documents(path: Path, column: str = "text", answer: str | None = None) -> Iterator[str]:
    """Yields the documents of a file, in order; a row whose text is blank yields an empty string.

    `path` ends in .jsonl, .ndjson, .txt, .text or .md, and then perhaps .gz. In JSON Lines each row is an object and
    `column` names the text in it, and `answer` what follows it, if anything; plain text is cut into passages at blank lines.
    Raises NarrowError (unknown_format, bad_row, wrong_column, bad_encoding, dataset_too_large, bad_gzip).
    """
    plain = path.name.lower().removesuffix(".gz")
    if plain.endswith(_JSONL) and answer is None:
        for row, where in _rows(path):
            yield _text(row, column, where)
    elif plain.endswith(_JSONL):
        yield from (prompt + written for prompt, written in read_answers(path, column, answer or ""))
    elif plain.endswith(_TEXT) and answer is not None:
        raise NarrowError(
            "wrong_column",
            f"{path.name} is plain text, which has no column {answer!r}: prompts and their answers come as JSON Lines.",
        )
    elif plain.endswith(_TEXT):
        yield from _passages(path)
    else:
        raise NarrowError(
            "unknown_format",
            f"{path.name} has no ending that tells its format: name it .jsonl or .txt, with .gz behind it if gzipped.",
        )


def read_answers(path: Path, column: str, answer: str) -> Iterator[tuple[str, str]]:
    """Yields prompts and their answers from JSON Lines; two empty strings where either is blank. Raises like `read_documents`."""
    for row, where in _rows(path):
        prompt, written = _text(row, column, where), _text(row, answer, where)
        yield (prompt, written) if prompt and written else ("", "")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    total = 0
    with path.open("rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        source: IO[bytes] = gzip.GzipFile(fileobj=raw) if zipped else raw  # type: ignore[assignment]
        number = 0
        while True:
            try:
                line = source.readline(LINE_LIMIT + 1)
            except (OSError, EOFError, zlib.error) as error:
                raise NarrowError(
                    "bad_gzip", f"{path.name} breaks off after line {number}: it is not a whole gzip file ({error})."
                ) from error
            if not line:
                return
            number += 1
            total += len(line)
            if len(line) > LINE_LIMIT:
                raise NarrowError(
                    "bad_row",
                    f"line {number} of {path.name} is longer than {LINE_LIMIT >> 20} MiB: split the document.",
                )
            if total > TOTAL_LIMIT:
                raise NarrowError(
                    "dataset_too_large",
                    f"{path.name} holds more than {TOTAL_LIMIT >> 30} GiB of text: use a part of it.",
                )
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise NarrowError(
                    "bad_encoding", f"line {number} of {path.name} is not UTF-8 (byte {error.start}): save it as UTF-8."
                ) from error


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of a file in JSON Lines, and where they stand."""
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"line {number} of {path.name}"
        try:
            row: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "too deep or too large a number"
            raise NarrowError("bad_row", f"{where} is not valid JSON: {reason}.") from error
        if not isinstance(row, dict):
            raise NarrowError("bad_row", f'{where} is not a JSON object: each line must look like {{"text": ...}}.')
        yield row, where


def _text(row: dict[str, Any], column: str, where: str) -> str:
    if column not in row:
        names = ", ".join(repr(str(name)[:40]) for name in list(row)[:5]) or "none"
        raise NarrowError("wrong_column", f"{where} has no column {column!r} (it has {names}): name the one that is meant.")
    text = row[column]
    if not isinstance(text, str):
        raise NarrowError("bad_row", f"column {column!r} in {where} is not a text but {type(text).__name__}.")
    if not text.strip():
        return ""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise NarrowError("bad_row", f"{where} holds half a surrogate pair at character {error.start}.") from error
    return text


def _passages(path: Path) -> Iterator[str]:
    passage: list[str] = []
    size = 0
    for _, line in _lines(path):
        passage.append(line)
        size += len(line)
        if size >= PASSAGE and not line.strip():
            yield "".join(passage)
            passage, size = [], 0
    if size:
        text = "".join(passage)
        yield text if text.strip() else ""
