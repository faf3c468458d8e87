"""Is this folder a model that Narrow can take? Answered from headers and config alone: no torch, no weight is read.

Model folders come from anyone. Only the files named here are ever opened; weights are safetensors and nothing else;
every tensor that the config implies must be in the headers with its shape, so that a config cannot ask for more memory
than the uploaded bytes already take.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from narrow_engine.errors import NarrowError
from narrow_engine.families import Dimensions, Family, dimensions, family_of, saved_names, saved_shapes
from narrow_engine.spec import Unit

HEADER_LIMIT = 16 * 2**20
HEADER_VALUES = 1_000_000
"""In the header of a file of weights, where a matrix takes eight."""
DEPTH_LIMIT = 32
DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
TOKENIZER_PARTS = ("model", "added_tokens", "normalizer", "pre_tokenizer")
"""What decides about the tokens of a text, but for those that frame it."""
INDEX = "model.safetensors.index.json"
_JSON_FILES = ("config.json", "generation_config.json", INDEX)
_LIMITS = {
    "tokenizer.json": (64 * 2**20, 4_000_000),
    **dict.fromkeys(("vocab.json", "added_tokens.json", INDEX), (16 * 2**20, 1_000_000)),
    "tokenizer_config.json": (4 * 2**20, 200_000),
    "config.json": (2**18, 10_000),
    "merges.txt": (64 * 2**20, 0),
}
_LIMIT = (2**20, 100_000)
"""Bytes and values of a file. A value takes many times its room in the file: an empty list, 3 bytes there, takes 75. Gemma 3 has
one of the largest vocabularies: 33 MB with its merges as pairs, about 1.8 million values, and more than a megabyte in
tokenizer_config.json. Configs are kept small since every list of models has them."""
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npz", ".h5", ".msgpack")
_BUFFERS = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")
"""Old checkpoints save these buffers; transformers computes them and ignores the saved ones."""


class ModelInfo(BaseModel):
    """What a model folder holds."""

    family: str
    config: dict[str, Any]
    parameters: int
    bytes: int
    dtype: str
    sha256: str
    units: list[Unit]


class Reading(BaseModel):
    """How a model reads text: a digest of each of TOKENIZER_PARTS, and how many tokens it knows."""

    parts: dict[str, str]
    tokens: int


class Tried(ModelInfo):
    """What a model folder holds that has been tried out, and how it reads."""

    reading: Reading


def accepted_name(name: str) -> bool:
    """Whether a file of this name belongs in a model folder. Names only: no separators, nothing hidden."""
    return name in _JSON_FILES or name in TOKENIZER_FILES or is_weights(name)


def refuse_name(name: str) -> NarrowError:
    """Why a file of this name is not accepted, as a sentence."""
    shown = name[:80]
    if name.lower().endswith(_PICKLES):
        return NarrowError(
            "unsafe_weights",
            f"{shown!r}: only safetensors weights are taken, since other formats can run code. Convert it.",
        )
    if name.lower().endswith(".py"):
        return NarrowError("remote_code", f"{shown!r}: models that bring code of their own are not taken.")
    return NarrowError(
        "unexpected_file",
        f"{shown!r} does not belong in a model folder: send config.json, model*.safetensors and the tokenizer's files.",
    )


def no_weights(names: Iterable[str]) -> NarrowError:
    """Why files that are called so are no model, if none of them is one of weights."""
    others = sorted(name for name in names if name.lower().endswith(_PICKLES))
    return refuse_name(others[0]) if others else NarrowError("missing_file", "model.safetensors is missing from the model.")


def is_weights(name: str) -> bool:
    return _WEIGHTS.fullmatch(name) is not None


def inspect_model(folder: Path) -> ModelInfo:
    """Checks a folder in the Hugging Face layout without loading it.

    Raises NarrowError: missing_file, unsafe_weights, remote_code, bad_config, unsupported_architecture,
    bad_safetensors, wrong_tensors.
    """
    config, family, dims = inspect_config(folder)
    weights = weight_files(folder)
    headers: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in weights:
        for name, entry in read_header(path).items():
            if name in headers:
                raise NarrowError("bad_safetensors", f"The tensor {name[:80]!r} is in two files.")
            headers[name] = entry
    if dims.layers > len(headers):
        raise NarrowError(
            "wrong_tensors", f"config.json asks for {dims.layers} layers, but the weights hold {len(headers)} tensors in all."
        )
    head = f"{family.head}.weight"
    expected = _compare(saved_shapes(config, dims), headers, saved_names(config, head) if dims.tied else ())

    files = [p for p in sorted(folder.iterdir()) if accepted_name(p.name) and p.is_file() and not p.is_symlink()]
    return ModelInfo(
        family=family.model_type,
        config=config,
        parameters=sum(math.prod(shape) for shape in expected.values()),
        bytes=sum(p.stat().st_size for p in weights),
        dtype=headers[next(iter(expected))][0],
        sha256=files_sha256(files),
        units=list(family.units),
    )


def inspect_config(folder: Path) -> tuple[dict[str, Any], Family, Dimensions]:
    """Checks all but the weights, which may not be there yet. Raises NarrowError."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise NarrowError("bad_config", "config.json is not a JSON object.")
    _check_small_files(folder)
    if config.get("quantization_config"):
        raise NarrowError("bad_config", "config.json says that the weights are quantized: bring the unquantized model.")
    family, dims = family_of(config), dimensions(config)
    if not (folder / "tokenizer.json").is_file():
        raise NarrowError("missing_file", "tokenizer.json is missing: save the tokenizer in the fast format beside the weights.")
    return config, family, dims


def _check_small_files(folder: Path) -> None:
    """What goes into the result as it came must be what its name says, and ask for no code."""
    for name in (*_JSON_FILES, *TOKENIZER_FILES):
        path = folder / name
        if not path.is_file():
            continue
        raw = _bounded(path)
        if name.endswith(".json") and name != "tokenizer.json":
            value = _parsed(raw, name)
            if isinstance(value, dict) and "auto_map" in value:
                raise NarrowError("remote_code", f"{name} has an 'auto_map': models that bring code of their own are not taken.")


def read_json(path: Path) -> Any:
    """A JSON file of a model. Raises NarrowError (missing_file, bad_config)."""
    if not path.is_file():
        raise NarrowError("missing_file", f"{path.name} is missing from the model.")
    return _parsed(_bounded(path), path.name)


def _bounded(path: Path) -> bytes:
    """The content of a small file, which can be parsed without harm. Raises NarrowError (bad_config)."""
    size, values = _LIMITS.get(path.name, _LIMIT)
    with path.open("rb") as file:
        raw = file.read(size + 1)
    if len(raw) > size:
        raise NarrowError("bad_config", f"{path.name} is larger than {size >> 10:,} KiB.")
    if path.name.endswith(".json") and _values(raw) > values:
        raise NarrowError("bad_config", f"{path.name} holds more than {values:,} values.")
    return raw


def _values(raw: bytes) -> int:
    """No fewer than there are in a text of JSON: what looks like one within a string is counted as well."""
    return sum(raw.count(mark) for mark in b"[{,")


def _parsed(raw: bytes, name: str) -> Any:
    try:
        value = json.loads(raw)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise NarrowError("bad_config", f"{name} is not valid JSON ({str(error)[:100]}).") from error
    level = [value] if _nested(value) else []
    for _ in range(DEPTH_LIMIT):
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item) if _nested(child)]
        if not level:
            return value
    raise NarrowError("bad_config", f"{name} is nested deeper than {DEPTH_LIMIT} levels.")


def check_teacher(
    base: dict[str, Any], teacher: dict[str, Any], readings: tuple[Reading, Reading], trimmed: bool, block_tokens: int
) -> None:
    """Refuses a teacher that does not read the base's tokens, or blocks of that length; given are configs, and how they read.

    Of a base whose vocabulary is `trimmed`, only what its tokenizer makes is left: spare rows do not count. Raises NarrowError
    (other_tokenizer, block_too_long).
    """
    apart = next((part for part in TOKENIZER_PARTS if readings[0].parts[part] != readings[1].parts[part]), None)
    rows, length = teacher["vocab_size"], dimensions(teacher).context
    if apart or rows < (readings[0].tokens if trimmed else base["vocab_size"]):
        what = f"{apart!r} of tokenizer.json" if apart else f"the size of the vocabulary ({rows:,}, the base has more)"
        raise NarrowError(
            "other_tokenizer",
            f"The teacher does not read the base's tokens: they differ in {what}. What it says to a text can only be learned "
            "token by token, so take a teacher of the base's own family, or leave 'teacher' out and the base teaches.",
        )
    if length < block_tokens:
        raise NarrowError("block_too_long", f"The teacher reads {length:,} tokens at most: set block_tokens to that or less.")


def reading(folder: Path) -> Reading:
    """How the model of a folder reads. Raises NarrowError (missing_file, bad_config)."""
    tokenizer = read_json(folder / "tokenizer.json")
    parts = {part: tokenizer.get(part) if isinstance(tokenizer, dict) else None for part in TOKENIZER_PARTS}
    ids: list[Any] = [-1]
    if isinstance(parts["added_tokens"], list):
        ids += [t.get("id") for t in parts["added_tokens"] if isinstance(t, dict)]
        parts["added_tokens"] = [[t.get("id"), t.get("content")] for t in parts["added_tokens"] if isinstance(t, dict)]
    if isinstance(parts["model"], dict):
        kind, vocabulary, merges = (parts["model"].get(key) for key in ("type", "vocab", "merges"))
        # A merge is written as a text or as a pair, by the version that saved it.
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in (merges if isinstance(merges, list) else [])]
        parts["model"] = [kind, vocabulary, pairs]
        ids += list(vocabulary.values()) if isinstance(vocabulary, dict) else []
        ids += range(len(vocabulary)) if isinstance(vocabulary, list) else []
    digests = {part: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest() for part, value in parts.items()}
    return Reading(parts=digests, tokens=1 + max(number for number in ids if isinstance(number, int)))


def _nested(value: Any) -> bool:
    return isinstance(value, dict | list)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, one or as its index says. Raises NarrowError (missing_file, ...)."""
    single = folder / "model.safetensors"
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        names = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not names or not all(isinstance(n, str) and _WEIGHTS.fullmatch(n) for n in names):
            raise NarrowError("bad_safetensors", f"{INDEX} does not map tensors to files named model-...safetensors.")
        paths = [folder / name for name in sorted(set(names))]
    elif single.is_file():
        paths = [single]
    else:
        raise no_weights(p.name for p in folder.iterdir())
    for path in paths:
        if not path.is_file():
            raise NarrowError("missing_file", f"{path.name} is named in {INDEX} but missing from the model.")
    return paths


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → (dtype, shape) of a safetensors file, checked byte for byte against the file's length.

    The layout: 8 bytes little-endian length of the header, the header as JSON, then the tensors without gap or overlap
    (https://huggingface.co/docs/safetensors, "Format"). Raises NarrowError (bad_safetensors).
    """

    def bad(why: str) -> NarrowError:
        return NarrowError("bad_safetensors", f"{path.name} is not a whole safetensors file: {why}.")

    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(HEADER_LIMIT, size - 8):
            raise bad("its header does not fit into it")
        raw = file.read(length)
    if _values(raw) > HEADER_VALUES:
        raise bad(f"its header holds more than {HEADER_VALUES:,} values")
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise bad("its header is not valid JSON") from error
    if not isinstance(header, dict):
        raise bad("its header is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise bad("its metadata are not texts by name")
    entries: dict[str, tuple[str, tuple[int, ...]]] = {}
    spans = []
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            numbers = [*shape, begin, end]
        except (TypeError, KeyError, ValueError) as error:
            raise bad(f"the entry of {name[:80]!r} lacks dtype, shape or data_offsets") from error
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise bad(f"{name[:80]!r} has the type {str(dtype)[:20]!r}; weights must be {', '.join(DTYPES)}")
        if not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
            raise bad(f"{name[:80]!r} has a size that is not a whole number")
        if end - begin != math.prod(shape) * DTYPES[dtype]:
            raise bad(f"{name[:80]!r} takes {end - begin} bytes where its shape {shape} needs another number")
        entries[name] = (dtype, tuple(shape))
        spans.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise bad(f"{name[:80]!r} overlaps its neighbour or leaves a gap")
        at = end
    if at != size - 8 - length:
        raise bad(f"its tensors take {at} bytes, but {size - 8 - length} follow the header (was the upload cut short?)")
    return entries


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _compare(
    wanted: Iterator[tuple[str, tuple[int, ...]]],
    found: dict[str, tuple[str, tuple[int, ...]]],
    spare: tuple[str, ...],
) -> dict[str, tuple[int, ...]]:
    """The wanted tensors, all of which are among the found; these hold no other but the spare ones (a tied head)."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, shape in wanted:
        if name not in found:
            raise NarrowError("wrong_tensors", f"The weights lack {name!r}, which config.json asks for.")
        if found[name][1] != shape:
            raise NarrowError(
                "wrong_tensors", f"{name!r} has shape {list(found[name][1])}, but config.json asks for {list(shape)}."
            )
        expected[name] = shape
    for name in found.keys() - expected.keys() - set(spare):
        if not name.endswith(_BUFFERS):
            raise NarrowError("wrong_tensors", f"The weights hold {name[:80]!r}, which config.json has no place for.")
    return expected


def files_sha256(files: list[Path]) -> str:
    """One digest over the names and contents of files."""
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            whole.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()
