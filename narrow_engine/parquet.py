"""The texts of a Parquet file, read by a process of its own: `python parquet.py FILE COLUMNS LONGEST MEMORY SECONDS`.

What decodes Parquet is a large library in C++ that takes a page at once, however large, and all that a file says of its sizes
may be a lie: kilobytes can stand for terabytes. So nothing is believed. This process is shut in (`sandbox`), has MEMORY bytes
and SECONDS of a processor, and may crash: who started it (`documents`) sees that and says so. It needs nothing else of Narrow,
so that it starts quickly.

COLUMNS are a list in JSON. On stdout is how many rows the file says that it has (8 bytes), and then their values, row by row. Of
each comes its length (4 bytes, signed) and so many bytes, which should be UTF-8. A negative length stands for itself: NULL;
TOO_LONG, more than LONGEST bytes; after the last row END; or FAILED and two more values, a code and a sentence.
"""

import json
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

NULL, TOO_LONG, END, FAILED = -1, -2, -3, -4
SECONDS, RATE = 900, 2**22
"""Of a processor, and one more for so many bytes of the file. 8 GiB of long texts took 50, and 50 million rows 150."""
_ROWS = 64
"""Decoded at once: few, since each may be as long as LONGEST."""


class _Refused(Exception):
    """With a code and a sentence."""


def main(path: str, columns: list[str], longest: int, memory: int, seconds: int) -> None:
    try:
        _limit(memory, seconds)
        for row in _rows(path, columns):
            _say(*(TOO_LONG if value is not None and len(value) > longest else value for value in row))
        _say(END)
    except MemoryError:
        _say(FAILED, "bad_parquet", f"takes more than {memory >> 20:,} MiB of memory to read: write it with smaller pages.")
    except _Refused as error:
        _say(FAILED, *error.args)
    except Exception as error:  # of which pyarrow has many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        _say(FAILED, "bad_parquet", f"cannot be read as Parquet: {reason}")
    sys.stdout.flush()


def _limit(memory: int, seconds: int) -> None:
    for kind, limit in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory)):
        with suppress(ValueError, OSError):  # a lower one holds already, or there is none of this kind, as on macOS
            resource.setrlimit(kind, (limit, limit))


def _rows(path: str, columns: list[str]) -> Iterator[tuple[bytes | None, ...]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    # Page after page from the file: by default whole columns of a row group are fetched.
    file = ParquetFile(path, pre_buffer=False, buffer_size=2**16)
    for column in columns:
        _check(pyarrow, file.schema_arrow, column)
    _say(file.metadata.num_rows.to_bytes(8, "big", signed=True))
    for batch in file.iter_batches(_ROWS, columns=columns, use_threads=False):
        yield from zip(*(_as_bytes(pyarrow, batch.column(column)) for column in columns), strict=True)


def _check(pyarrow: Any, schema: Any, column: str) -> None:
    """Refuses a column that is not there, is there twice, or is not of texts."""
    found = schema.get_all_field_indices(column)
    if not found:
        names = ", ".join(repr(name[:40]) for name in schema.names[:5]) or "none"
        raise _Refused("wrong_column", f"has no column {column!r} (it has {names}): name the one that is meant.")
    if len(found) > 1:
        raise _Refused("wrong_column", f"has {len(found)} columns {column!r}: rename all but one.")
    types, kind = pyarrow.types, schema.field(found[0]).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    texts = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    if not any(is_kind(kind) for is_kind in texts):
        raise _Refused("bad_parquet", f"holds no texts in its column {column!r} but {str(kind)[:60]}: write it as strings.")


def _as_bytes(pyarrow: Any, column: Any) -> list[bytes | None]:
    """Since nothing has checked that texts are UTF-8."""
    plain = column.dictionary_decode() if pyarrow.types.is_dictionary(column.type) else column
    return plain.cast(pyarrow.large_binary()).to_pylist()  # type: ignore[no-any-return]


def _say(*values: bytes | str | int | None) -> None:
    for value in values:
        body = value.encode(errors="replace") if isinstance(value, str) else value
        size = NULL if body is None else body if isinstance(body, int) else len(body)
        sys.stdout.buffer.write(size.to_bytes(4, "big", signed=True))
        if isinstance(body, bytes):
            sys.stdout.buffer.write(body)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), *map(int, sys.argv[3:]))
