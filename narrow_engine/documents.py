"""Reading a dataset: JSON Lines, CSV, TSV, Parquet or plain text, one document at a time. No torch.

The file may come from anyone: it is read as a stream with caps on the length of a row, on the values in it, on rows and on the
total, so that neither a gigabyte line nor a bomb costs more than the caps, and every refusal names the row. The last two caps
grow with the file, whose bytes somebody had to send. JSON Lines, CSV and plain text may be packed with gzip or Zstandard; Parquet
is decoded in a process of its own (`parquet`).

A bad row is one that says nothing of the others: it stops the reading, or is left out and counted, as the reader is told. A file
that is torn, too large or of another format always stops it.

JSON is read as most programs do: of a key that comes twice the last counts, and NaN and Infinity, which Python and pandas write,
are numbers, which no text can be.
"""

import codecs
import csv
import gzip
import io
import json
import re
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import count, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import zstandard

from narrow_engine import parquet, sandbox
from narrow_engine.errors import NarrowError

LINE_LIMIT = 16 * 2**20
"""Bytes of a line, of a row of a table and of a value of Parquet."""
VALUES_LIMIT = 100_000
"""Values in a row, which take many times their room in the file: 16 MiB of `[],` took 435 MB."""
ROW_LIMIT, ROW_BYTES = 50_000_000, 32
"""Rows or lines: so many, or one for so many bytes of the file if that is more. Empty ones take time as well, some 5 µs each, but
no room: gzip packs a billion in a megabyte."""
TOTAL_LIMIT, TOTAL_FACTOR = 8 * 2**30, 16
"""Bytes of text: so many, or so many for each of the file if that is more. Text is rarely packed to less than a tenth."""
MEMORY_LIMIT = 2 * 2**30
"""Address space of the process that reads Parquet; 330 MiB are its own. A page of 500 MB took 1.5 GB in all."""
PASSAGE = 2000
"""Plain text has no documents: it is cut at blank lines into passages of at least this many characters."""

_JSONL = (".jsonl", ".ndjson")
_TABLES = {".csv": ",", ".tsv": "\t"}
_PARQUET = ".parquet"
_TEXT = (".txt", ".text", ".md")
_PACKED = (".gz", ".zst")

# Strings, and what else a further value begins with. Possessive, so that nothing is kept to come back to.
_JSON_VALUES = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[{,]', re.DOTALL)
# Quotes quote only where a field begins, as `csv` has it.
_FIELDS = {delimiter: re.compile(rf'(?:^|{delimiter})(?:"(?:[^"]++|"")*+"?)?') for delimiter in _TABLES.values()}
csv.field_size_limit(LINE_LIMIT)


class BadRow(NarrowError):
    """One row is bad, and the next may be good."""


@dataclass
class Skipped:
    """Bad rows that were left out: how many, and what was wrong with the first."""

    count: int = 0
    first: str = ""

    def __call__(self, error: BadRow) -> None:
        self.first = self.first or str(error)
        self.count += 1


class Position:
    """Where in its file a reading is, in bytes: of what is packed, where the unpacking is; of Parquet, by its share of rows."""

    def __init__(self) -> None:
        self.tell: Callable[[], int] = lambda: 0


Row = dict[str, Any] | BadRow


def read_documents(
    path: Path,
    column: str = "text",
    answer: str | None = None,
    bad: Callable[[BadRow], None] | None = None,
    position: Position | None = None,
) -> Iterator[str]:
    """Yields the documents of a file, in order; a row whose text is blank yields an empty string.

    `path` ends in .jsonl, .ndjson, .csv, .tsv, .txt, .text or .md, and then perhaps .gz or .zst, or in .parquet. `column` names
    the text in each row, and `answer` what follows it, if anything; plain text is cut into passages at blank lines. A bad row
    is left out and handed to `bad`; without that it is raised. `position` follows the reading. Raises NarrowError
    (unknown_format, bad_row, wrong_column, bad_encoding, dataset_too_large, bad_compression, bad_parquet, missing_extra).
    """
    position = position or Position()
    if _format(path) in _TEXT and answer is None:
        yield from _passages(path, bad, position)
    else:
        for texts in _texts(path, [column] if answer is None else [column, answer], bad, position):
            yield "".join(texts) if all(texts) else ""


def read_answers(path: Path, column: str, answer: str, bad: Callable[[BadRow], None] | None = None) -> Iterator[tuple[str, str]]:
    """Yields prompts and their answers; two empty strings where either is blank. Otherwise like `read_documents`."""
    for prompt, written in _texts(path, [column, answer], bad, Position()):
        yield (prompt, written) if prompt and written else ("", "")


def nothing_left(name: str, skipped: Skipped) -> NarrowError:
    """The refusal of a file without a document."""
    if skipped.count:
        detail = f"{name} holds nothing but bad rows ({skipped.count:,}). The first: {skipped.first}"
    else:
        detail = f"{name} holds no text: bring at least one document."
    return NarrowError("empty_dataset", detail)


def ending(name: str) -> str:
    """What of a file's name tells how it is read, like ".jsonl.gz"; empty if nothing does."""
    lower = name.lower()
    packed = next((packed for packed in _PACKED if lower.endswith(packed)), "")
    known = (*_JSONL, *_TABLES, *_TEXT, *(() if packed else (_PARQUET,)))
    return next((found + packed for found in known if lower.endswith(found + packed)), "")


def _format(path: Path) -> str:
    """The ending without that of the packing."""
    found = ending(path.name)
    if not found:
        raise NarrowError(
            "unknown_format",
            f"{path.name} has no ending that tells its format: name it {', '.join((*_JSONL, *_TABLES, *_TEXT))}, with .gz or "
            ".zst behind it if packed, or .parquet.",
        )
    return found.removesuffix(".gz").removesuffix(".zst")


def _texts(path: Path, columns: list[str], bad: Callable[[BadRow], None] | None, position: Position) -> Iterator[list[str]]:
    """The texts in a row's columns, for each row."""
    for row, where in _rows(path, columns, position):
        try:
            if isinstance(row, BadRow):
                raise row
            texts = [_text(row, column, where) for column in columns]
        except BadRow as error:
            if bad is None:
                raise
            bad(error)
        else:
            yield texts


def _rows(path: Path, columns: list[str], position: Position) -> Iterator[tuple[Row, str]]:
    """Rows, and where they stand; of those that cannot be read, why."""
    form = _format(path)
    if form in _JSONL:
        return _json_rows(path, position)
    if form in _TABLES:
        return _table_rows(path, _TABLES[form], columns, position)
    if form == _PARQUET:
        return _parquet_rows(path, columns, position)
    raise NarrowError(
        "wrong_column",
        f"{path.name} is plain text, which has no column {columns[-1]!r}: prompts and their answers come as JSON Lines, CSV or "
        "Parquet.",
    )


def _text(row: dict[str, Any], column: str, where: str) -> str:
    if column not in row:
        raise BadRow("wrong_column", f"{where} has no column {column!r} ({_names(row)}): name the one that is meant.")
    text = row[column]
    if not isinstance(text, str):
        kind = "null" if text is None else type(text).__name__
        raise BadRow("bad_row", f"column {column!r} in {where} is not a text but {kind}.")
    if not text.strip():
        return ""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow("bad_row", f"{where} holds half a surrogate pair at character {error.start}.") from error
    return text


def _names(columns: Any) -> str:
    return "it has " + (", ".join(repr(str(name)[:40]) for name in islice(columns, 5)) or "none")


def _decoded(line: bytes, where: str, begins: bool = False) -> str:
    if len(line) > LINE_LIMIT:
        raise _too_long(where)
    try:
        return line.decode("utf-8-sig" if begins else "utf-8")
    except UnicodeDecodeError as error:
        raise BadRow("bad_encoding", f"{where} is not UTF-8 (byte {error.start}): save it as UTF-8.") from error


def _too_long(where: str) -> BadRow:
    return BadRow("bad_row", f"{where} is longer than {LINE_LIMIT >> 20} MiB: split the document.")


def _too_many(where: str) -> BadRow:
    return BadRow("bad_row", f"{where} holds more than {VALUES_LIMIT:,} values: leave out what is not text.")


def _size_check(path: Path) -> Callable[[int, int], None]:
    """Refuses (rows, bytes of text) that are more than the file may hold."""
    size = path.stat().st_size
    most_rows, most = max(ROW_LIMIT, size // ROW_BYTES), max(TOTAL_LIMIT, TOTAL_FACTOR * size)

    def check(rows: int, total: int) -> None:
        if rows > most_rows:
            raise NarrowError("dataset_too_large", f"{path.name} holds more than {most_rows:,} rows: use a part of it.")
        if total > most:
            raise NarrowError("dataset_too_large", f"{path.name} holds more than {most >> 30} GiB of text: use a part of it.")

    return check


def _lines(path: Path, position: Position) -> Iterator[tuple[int, bytes]]:
    """Numbered lines. Of one that is too long a byte more comes than may, and no more."""
    size, check_size = path.stat().st_size, _size_check(path)
    with path.open("rb") as raw:
        position.tell = raw.tell
        source = _unpacked(raw)
        if source is raw and path.suffix in _PACKED and not _begins_as_text(raw):
            raise NarrowError(
                "bad_compression", f"{path.name} is named as packed, but is neither gzip nor Zstandard: pack it anew."
            )
        number, total, within = 0, 0, False
        while True:
            try:
                line = source.readline(LINE_LIMIT + 1)
            except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
                raise NarrowError("bad_compression", f"{path.name} breaks off after line {number}: {error}.") from error
            if not line:
                position.tell = lambda: size
                return
            number, total = number + (not within), total + len(line)
            check_size(number, total)
            if not within:
                yield number, line
            within = not line.endswith(b"\n")


def _begins_as_text(raw: IO[bytes]) -> bool:
    """Whether a file that is not packed is UTF-8, as far as its first bytes tell."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(raw.read(1024))
    except UnicodeDecodeError:
        return False
    finally:
        raw.seek(0)
    return True


def _unpacked(raw: IO[bytes]) -> IO[bytes]:
    head = raw.read(4)
    raw.seek(0)
    if head.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    # A frame, or one to skip, with which some programs begin.
    if head == b"\x28\xb5\x2f\xfd" or (head[1:] == b"\x2a\x4d\x18" and head[0] >> 4 == 5):
        return io.BufferedReader(_Zstandard(raw))
    return raw


class _Zstandard(io.RawIOBase):
    """The content of a file in Zstandard, whose window, held in memory, may be of 128 MiB.

    zstandard's own reader takes a torn file for a whole one.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw, self._packed, self._content = raw, b"", memoryview(b"")
        self._frame: zstandard.ZstdDecompressionObj | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            # Few bytes at a time: what they stand for, up to 32 KiB each, comes at once.
            packed = self._packed or self._raw.read(512)
            if not packed:
                break
            frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._content = memoryview(frame.decompress(packed))
            self._frame, self._packed = (None, frame.unused_data) if frame.eof else (frame, b"")
        if not self._content and self._frame:
            raise EOFError("Zstandard file ended before the end of its last frame")
        size = min(len(buffer), len(self._content))
        buffer[:size], self._content = self._content[:size], self._content[size:]
        return size


def _json_rows(path: Path, position: Position) -> Iterator[tuple[Row, str]]:
    name = path.name  # which pathlib works out anew each time
    for number, line in _lines(path, position):
        where = f"line {number} of {name}"
        try:
            text = _decoded(line, where, number == 1)
            row: Row | None = _object(text, where) if text.strip() else None
        except BadRow as error:
            row = error
        if row is not None:
            yield row, where


def _object(line: str, where: str) -> dict[str, Any]:
    if len(line) > VALUES_LIMIT and _more_than_may(_JSON_VALUES, line):
        raise _too_many(where)
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "too deep or too large a number"
        raise BadRow("bad_row", f"{where} is not valid JSON: {reason}.") from error
    if not isinstance(row, dict):
        raise BadRow("bad_row", f'{where} is not a JSON object: each line must look like {{"text": ...}}.')
    return row


def _more_than_may(values: re.Pattern[str], line: str) -> bool:
    return next(islice(values.finditer(line), VALUES_LIMIT, None), None) is not None


def _table_rows(path: Path, delimiter: str, columns: list[str], position: Position) -> Iterator[tuple[Row, str]]:
    """By RFC 4180: the first row names the columns, and what is quoted may hold line breaks. Blank lines are no rows."""
    lines, name = _lines(path, position), path.name
    number, where = 0, ""
    size, values = 0, 0  # of the row so far
    damage: BadRow | None = None

    def next_line() -> str:
        nonlocal number, size, values, damage
        number, line = next(lines, (number, b""))
        within = size > 0
        size += len(line)
        if size > LINE_LIMIT:
            raise _too_long(where)
        try:
            text = _decoded(line, f"line {number} of {name}", number == 1)
        except BadRow as error:
            damage, text = error, line.decode(errors="replace")
        if size > VALUES_LIMIT:
            begun = _FIELDS[delimiter].finditer('"' + text if within else text)
            values += sum(1 for _ in islice(begun, VALUES_LIMIT + 2)) - within
            if values > VALUES_LIMIT:
                raise _too_many(where)
        return text

    # Whatever `next_line` raises, the reader goes on with the line after it.
    reader = csv.reader(iter(next_line, ""), delimiter=delimiter, strict=True)
    header: list[str] = []
    places: dict[str, int] = {}
    while True:
        where, size, values, damage = f"line {number + 1} of {name}", 0, 0, None
        problem: BadRow | None
        try:
            fields = next(reader, None)
            problem = damage
        except csv.Error as error:
            if "end of data" in str(error) and where != f"line {number} of {name}":
                # The rest of the file is in this row.
                raise NarrowError(
                    "bad_row", f"{where} opens a quotation mark that {name} closes nowhere: close it, or double it within a text."
                ) from error
            fields, problem = [], damage or BadRow("bad_row", f"{where} is not valid CSV: {str(error).split(' - ')[0]}.")
        except BadRow as error:
            fields, problem = [], error
        if fields is None:
            return
        if header and fields and len(fields) != len(header):
            problem = problem or BadRow("bad_row", f"{where} has {len(fields)} fields, and the header {len(header)}.")
        if problem and not header:
            raise problem
        if problem:
            yield problem, where
        elif fields and header:
            yield {column: fields[place] for column, place in places.items()}, where
        elif fields:
            header, places = fields, {column: _place(fields, column, where) for column in columns}


def _place(header: list[str], column: str, where: str) -> int:
    if header.count(column) > 1:
        raise NarrowError("wrong_column", f"{where} names {header.count(column)} columns {column!r}: rename all but one.")
    if column not in header:
        raise NarrowError("wrong_column", f"{where} names no column {column!r} ({_names(header)}): name the one that is meant.")
    return header.index(column)


def _parquet_rows(path: Path, columns: list[str], position: Position) -> Iterator[tuple[Row, str]]:
    if find_spec("pyarrow") is None:
        raise NarrowError("missing_extra", f"{path.name} takes pyarrow to read: pip install 'narrow[parquet]'.")
    process = subprocess.Popen(
        [
            *sandbox.before(read=[parquet.__file__, path.resolve()], hide=[str(path.resolve().parent)], memory=MEMORY_LIMIT),
            # -P: the modules beside it are not to be taken for others of their names.
            *(
                sys.executable,
                "-P",
                parquet.__file__,
                str(path.resolve()),
                json.dumps(columns),
                str(LINE_LIMIT),
                str(MEMORY_LIMIT),
                str(parquet.SECONDS + path.stat().st_size // parquet.RATE),
            ),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # Nothing of the service's settings, and memory that counts where it is limited.
        env={"ARROW_DEFAULT_MEMORY_POOL": "system"},
    )
    assert process.stdout is not None
    name, size, total = path.name, path.stat().st_size, 0
    check_size = _size_check(path)
    try:
        for number in count(0):
            where = f"row {number} of {name}"
            first = _take(process.stdout)
            if first.size == parquet.END:
                return
            if first.size == parquet.FAILED:
                code, sentence = (_take(process.stdout).body.decode() for _ in range(2))
                raise NarrowError(code, f"{name} {sentence}")
            if number == 0:
                rows = int.from_bytes(first.body[:8], "big")
                continue
            position.tell = partial(_share, size, number, rows)
            values = [first, *(_take(process.stdout) for _ in columns[1:])]
            total += sum(len(value.body) for value in values)
            check_size(number, total)
            try:
                row: Row = {column: _parquet_text(value, where) for column, value in zip(columns, values, strict=True)}
            except BadRow as error:
                row = error
            yield row, where
    except EOFError as error:
        raise NarrowError("bad_parquet", f"{name} cannot be read as Parquet: what reads it crashed or took too long.") from error
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


def _share(size: int, number: int, rows: int) -> int:
    """Of a file's bytes, at one of so many rows, as it says."""
    return min(size, size * number // max(1, rows))


class _Value(NamedTuple):
    size: int
    body: bytes


def _take(pipe: IO[bytes]) -> _Value:
    head = pipe.read(4)
    size = int.from_bytes(head, "big", signed=True)
    body = pipe.read(size) if 0 < size <= LINE_LIMIT else b""
    if len(head) < 4 or len(body) < size:
        raise EOFError
    return _Value(size, body)


def _parquet_text(value: _Value, where: str) -> str | None:
    if value.size == parquet.TOO_LONG:
        raise _too_long(where)
    return None if value.size == parquet.NULL else _decoded(value.body, where)


def _passages(path: Path, bad: Callable[[BadRow], None] | None, position: Position) -> Iterator[str]:
    passage: list[str] = []
    name, size = path.name, 0
    for number, line in _lines(path, position):
        try:
            text = _decoded(line, f"line {number} of {name}", number == 1)
        except BadRow as error:
            if bad is None:
                raise
            bad(error)
            continue
        passage.append(text)
        size += len(text)
        if size >= PASSAGE and not text.strip():
            yield "".join(passage)
            passage, size = [], 0
    if size:
        text = "".join(passage)
        yield text if text.strip() else ""
