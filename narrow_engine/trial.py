"""Tries the files of a model out: `python -m narrow_engine.trial FOLDER`, in a process that may be killed.

First what the files say (`model_files`), which takes parsing up to a hundred megabytes of a stranger's JSON: for seconds the
interpreter of a server would do nothing else. Then what can only be found out by running on a stranger's file: that the tokenizer
reads a text in sensible time and memory and makes tokens that the model has, and that no weight is NaN or infinite.

Prints a line of JSON once the files are in order, another, a `Tried`, once the tokenizer has passed, and last what is wrong,
`{"code", "message"}` or null. Without torch, since whoever uploads waits for its start.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from narrow_engine.errors import NarrowError
from narrow_engine.model_files import Tried, inspect_model, reading

AROUND, EXPANSION = 1000, 4
"""Tokens that a tokenizer may put around a text, and make of each of its bytes: one would be many."""
TEXTS = (
    "def area(radius: float) -> float:\n    return 3.14159 * radius**2  # m²\n\n",
    "Über die Brücke — 橋を渡って, через мост 🌉 1234567890\t\r\n",
    # What regular expressions and merges that go wrong take longest for.
    *(20_000 * letter for letter in "a .1\n"),
    10_000 * "ab",
    5_000 * "a1 ",
)
CHUNK = 2**24
_EXPONENT = {"F64": ("<u8", 0x7FF << 52), "F32": ("<u4", 0xFF << 23), "F16": ("<u2", 0x1F << 10), "BF16": ("<u2", 0xFF << 7)}
"""Of a type: its bits as a whole number, and those that are all set in NaN and infinity and in no other (IEEE 754)."""


def read_tokenizer(folder: Path, size: int) -> Tokenizer:
    """The tokenizer of a model that knows so many tokens, without a length of its own. Raises NarrowError (bad_tokenizer)."""
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except BaseException as error:  # tokenizers raises bare Exception, and what panics in it is not even that
        raise NarrowError("bad_tokenizer", f"tokenizer.json cannot be read: {_line(error)}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= size:
        raise NarrowError("bad_tokenizer", f"The tokenizer knows token {highest}, but the model has only {size}.")
    return tokenizer


def try_tokenizer(tokenizer: Tokenizer) -> None:
    """Has it read texts. Raises NarrowError (bad_tokenizer)."""
    try:
        around = len(tokenizer.encode("").ids)
        if around > AROUND:
            raise NarrowError("bad_tokenizer", f"tokenizer.json puts {around:,} tokens around every text.")
        for text in TEXTS:
            ids, size = tokenizer.encode(text).ids, len(text.encode())
            if len(ids) > EXPANSION * size + around:
                raise NarrowError("bad_tokenizer", f"tokenizer.json makes {len(ids):,} tokens of {size:,} bytes of text.")
            tokenizer.decode(ids)
    except NarrowError:
        raise
    except BaseException as error:
        raise NarrowError("bad_tokenizer", f"tokenizer.json fails on a text: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def broken_weight(path: Path) -> str | None:
    """The name of a tensor of a safetensors file that holds NaN or infinity."""
    with path.open("rb") as file:
        header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start = file.tell()
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            kind, exponent = _EXPONENT[entry["dtype"]]
            begin, end = entry["data_offsets"]
            file.seek(start + begin)
            left = end - begin
            while left:
                bits = np.frombuffer(file.read(min(CHUNK, left)), kind)
                if ((bits & np.array(exponent, bits.dtype)) == exponent).any():
                    return name
                left -= bits.nbytes
    return None


def main() -> None:
    folder = Path(sys.argv[1])
    found = None
    try:
        info = inspect_model(folder)
        _say("true")
        try_tokenizer(read_tokenizer(folder, info.config["vocab_size"]))
        _say(Tried(**info.model_dump(), reading=reading(folder)).model_dump_json())
        for path in sorted(folder.glob("model*.safetensors")):
            if broken := broken_weight(path):
                message = f"The weights of {broken[:80]!r} hold NaN or infinity: the model is broken."
                raise NarrowError("non_finite_weights", message)
    except NarrowError as error:
        found = {"code": error.code, "message": str(error).encode(errors="replace").decode()}
    _say(json.dumps(found))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
