"""Files that somebody sends who means ill, made when they are asked for: none of them is stored."""

import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import zstandard
from pyarrow.parquet import write_table

Files = list[tuple[str, bytes]]


@dataclass(frozen=True)
class Hostile:
    """What is sent to /models or /datasets, and what the refusal must say."""

    name: str
    files: Files
    code: str
    words: str


class Payload:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        import os

        return os.system, ("touch /tmp/narrow-was-here",)


def header(entries: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def zipped(**contents: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, body in contents.items():
            archive.writestr(name, body)
    return out.getvalue()


def tarred() -> bytes:
    """With a link to the password file, and a name that leads out."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        link = tarfile.TarInfo("model.safetensors")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        outside = tarfile.TarInfo("../../config.json")
        outside.size = 2
        archive.addfile(outside, io.BytesIO(b"{}"))
    return out.getvalue()


def parquet(values: list[Any], times: int = 1) -> bytes:
    """A column `text`. With `times` each value is in the file once and stands for so many rows."""
    column = pyarrow.array(values)
    if times > 1:
        column = pyarrow.DictionaryArray.from_arrays(pyarrow.array(list(range(len(values))) * times, pyarrow.int32()), column)
    out = io.BytesIO()
    write_table(pyarrow.table({"text": column}), out)
    return out.getvalue()


def models(good: Path) -> Iterator[Hostile]:
    """Each is the good model with one thing wrong."""
    whole = {path.name: path.read_bytes() for path in sorted(good.iterdir())}
    config, tokenizer = json.loads(whole["config.json"]), json.loads(whole["tokenizer.json"])
    weights = whole["model.safetensors"]
    size = int.from_bytes(weights[:8], "little")
    entries, data = json.loads(weights[8 : 8 + size]), weights[8 + size :]
    first, second, *_ = (name for name in entries if name != "__metadata__")

    def but(name: str, code: str, words: str, remove: str = "", **changed: bytes) -> Hostile:
        files = {**whole, **{key.replace("__", "."): body for key, body in changed.items()}}
        files.pop(remove, None)
        return Hostile(name, list(files.items()), code, words)

    def beside(name: str, code: str, words: str, other: str, body: bytes = b"x") -> Hostile:
        return Hostile(name, [*whole.items(), (other, body)], code, words)

    def with_config(name: str, code: str, words: str, **changes: Any) -> Hostile:
        return but(name, code, words, config__json=json.dumps({**config, **changes}).encode())

    def with_entry(name: str, words: str, tensor: str = first, **changes: Any) -> Hostile:
        altered = {**entries, tensor: {**entries[tensor], **changes}}
        return but(name, "bad_safetensors", words, model__safetensors=header(altered, data))

    def with_tokenizer(name: str, words: str, **changes: Any) -> Hostile:
        return but(name, "bad_tokenizer", words, tokenizer__json=json.dumps({**tokenizer, **changes}).encode())

    def with_weights(name: str, words: str, body: bytes, code: str = "bad_safetensors") -> Hostile:
        return but(name, code, words, model__safetensors=body)

    pickled = pickle.dumps(Payload())
    for name in ("pytorch_model.bin", "model.pt", "model.PTH", "weights.ckpt", "weights.npz", "tf_model.h5", "optimizer.pkl"):
        yield beside(f"pickle as {name}", "unsafe_weights", "can run code", name, pickled)
    yield but("pickle without weights", "unsafe_weights", "can run code", "model.safetensors", pytorch_model__bin=pickled)
    yield with_weights("pickle that is called safetensors", "header does not fit", pickled)
    yield with_weights("torch's zip of a pickle that is called safetensors", "header", zipped(data__pkl=pickled))
    yield beside("code", "remote_code", "code of their own", "modeling_llama.py", b"import os; os.system('id')")
    yield with_config("code by name in the config", "remote_code", "auto_map", auto_map={"AutoModel": "modeling.Model"})
    yield but(
        *("code by name in the tokenizer's config", "remote_code", "auto_map"),
        tokenizer_config__json=b'{"auto_map": {"AutoTokenizer": ["x.Tokenizer", null]}}',
    )
    for name in (
        "../config.json",
        "/etc/passwd",
        "..\\..\\config.json",
        ".config.json",
        "a/../model.safetensors",
        "config.json\0.txt",
    ):
        yield beside(f"file called {name!r}", "unexpected_file", "plain file name|does not belong", name)
    for name in (
        "CONFIG.JSON",
        "cоnfig.json",
        "ｃonfig.json",
        "config.json ",
        "config.json\u202e",
        "model.safetensors.gz",
        "x" * 250,
    ):
        yield beside(f"file called {name[:30]!r}", "unexpected_file", "does not belong|longer than", name)
    yield beside("two files of a name", "unexpected_file", "same name", "config.json", b"{}")
    yield beside(
        "zip bomb", "unexpected_file", "does not belong", "model.zip", zipped(**{f"{n}": bytes(2**24) for n in range(8)})
    )
    yield beside("tar with links and names that lead out", "unexpected_file", "does not belong", "model.tar.gz", tarred())
    yield beside("ONNX with data elsewhere", "unexpected_file", "does not belong", "model.onnx", b"location: ../../etc/passwd")

    yield with_weights("header of 2^63 bytes", "header does not fit", header(b"{}", length=2**63))
    yield with_weights("header of a terabyte", "header does not fit", header(b"{}", length=2**40))
    yield with_weights("header longer than the file", "header does not fit", header(b"{}", length=3))
    yield with_weights("empty weights", "header does not fit", b"")
    yield with_weights("header that is no JSON", "not valid JSON", header(b"{nothing}"))
    yield with_weights("header a million levels deep", "not valid JSON", header(b"[" * 10**6))
    yield with_weights("header that is a list", "not an object", header(b"[]"))
    yield with_weights("header with a tensor twice", "not valid JSON", header(b'{"a": 1, "a": 2}'))
    yield with_weights("tensor that is cut short", "cut short", weights[:-100])
    yield with_weights("bytes behind the tensors", "cut short", weights + b"MZ" * 50)
    yield with_entry(
        "tensor over another", "overlaps", second, data_offsets=entries[first]["data_offsets"], shape=entries[first]["shape"]
    )
    yield with_entry("tensor of negative place", "not a whole number", data_offsets=[-4, 0])
    yield with_entry("tensor whose size overflows", "not a whole number|takes", shape=[2**62, 2**62])
    yield with_entry("tensor of half a row", "not a whole number", shape=[0.5, 2])
    yield with_entry("tensor of true rows", "not a whole number", shape=[True, 2])
    yield with_entry("tensor of an unknown type", "weights must be", dtype="I64")
    yield with_entry("tensor without a type", "lacks dtype|has the type", dtype=None)
    yield with_weights("metadata that are no texts", "metadata", header({**entries, "__metadata__": {"a": [1]}}, data))
    less = {name: entry for name, entry in entries.items() if name == first}
    body = data[slice(*entries[first]["data_offsets"])]
    alone = {first: {**less[first], "data_offsets": [0, len(body)]}}
    yield with_weights("weights that lack tensors", "lack|asks for", header(alone, body), "wrong_tensors")
    more = {**entries, "extra": {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}}
    yield with_weights("weights with a tensor too many", "no place for", header(more, data + bytes(4)), "wrong_tensors")
    for name, value in (("NaN", float("nan")), ("infinity", float("inf"))):
        broken = bytearray(data)
        broken[len(data) // 2 : len(data) // 2 + 4] = struct.pack("<f", value)
        yield with_weights(f"weights with {name}", "NaN or infinity", header(entries, bytes(broken)), "non_finite_weights")

    yield with_config("config that asks for terabytes", "wrong_tensors", "has shape", hidden_size=2**20, vocab_size=2**24)
    yield with_config("config of a billion layers", "bad_config", "num_hidden_layers", num_hidden_layers=10**9)
    yield with_config("config of more layers than tensors", "wrong_tensors", "asks for 4096 layers", num_hidden_layers=4096)
    yield with_config("config of no known family", "unsupported_architecture", "nobody", model_type="nobody")
    yield with_config("config of a quantized model", "bad_config", "quantized", quantization_config={"bits": 4})
    yield with_config("config with a negative size", "bad_config", "hidden_size", hidden_size=-64)
    yield with_config("config with a text for a size", "bad_config", "hidden_size", hidden_size="64")
    yield with_config("config with a surrogate", "bad_config", "surrogate|not valid JSON", _name_or_path="\ud800")
    yield but("config that is a list", "bad_config", "not a JSON object", config__json=b"[]")
    yield but(
        "config a thousand levels deep", "bad_config", "nested|not valid", config__json=b'{"a":' * 1000 + b"1" + b"}" * 1000
    )
    yield but("config that is no JSON", "bad_config", "not valid JSON", config__json=b"\xff\xfe{}")

    def wide(words: str, file: str, size: int) -> Hostile:
        body = b"[" + b"[]," * (size // 3) + b"[]]"
        return but(f"{file} of {size:,} bytes of lists", "bad_config", words, **{file.replace(".", "__"): body})

    yield wide("is larger than", "special_tokens_map.json", 63 * 2**20)
    yield wide("is larger than", "config.json", 2**20)
    yield wide("is larger than", "chat_template.jinja", 2**20)
    for file in ("special_tokens_map.json", "generation_config.json"):
        yield wide("holds more than", file, 900_000)
    for file in ("vocab.json", "added_tokens.json", "model.safetensors.index.json"):
        yield wide("holds more than", file, 15 * 2**20)
    yield wide("holds more than", "config.json", 200_000)
    yield wide("holds more than", "tokenizer_config.json", 3 * 2**20)
    yield wide("holds more than", "tokenizer.json", 63 * 2**20)
    yield with_weights("header of 15 MiB of lists", "holds more than", header(b'{"a": [' + b"[]," * (5 * 2**20) + b"[]]}"))
    yield but("no config", "missing_file", "config.json", "config.json")
    yield but("no tokenizer", "missing_file", "tokenizer.json", "tokenizer.json")
    for name, target in (("outside", "../../../etc/passwd"), ("to a pickle", "pytorch_model.bin")):
        index = json.dumps({"weight_map": {first: target}}).encode()
        yield but(f"index that points {name}", "bad_safetensors", "does not map", model__safetensors__index__json=index)
    index = json.dumps({"weight_map": {first: "model-00001-of-00002.safetensors"}}).encode()
    yield but("index that names a file that is not there", "missing_file", "missing", model__safetensors__index__json=index)

    yield but("tokenizer that is no JSON", "bad_tokenizer", "cannot be read", tokenizer__json=b"\x80\x04K\x01.")
    yield but("tokenizer a million levels deep", "bad_tokenizer", "cannot be read", tokenizer__json=b"[" * 10**6)
    yield with_tokenizer(
        *("tokenizer that multiplies text", "tokens of"),
        normalizer={"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 50_000},
    )
    yield with_tokenizer(
        *("tokenizer that multiplies text without end", "takes too long|too much memory|tokens of"),
        normalizer={
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": 1000 * "a"}] * 12,
        },
    )
    yield with_tokenizer(
        "tokenizer that puts a book before every text", "tokens", normalizer={"type": "Prepend", "prepend": "x" * 10**6}
    )
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    yield with_tokenizer(
        *("tokenizer with tokens that the model lacks", "the model has only"),
        added_tokens=[*tokenizer["added_tokens"], *({"id": 320 + n, "content": f"<{n}>", **added} for n in range(100_000))],
    )


def datasets() -> Iterator[Hostile]:
    row = b'{"text": "def f(): pass"}\n'

    def one(name: str, body: bytes, code: str, words: str, file: str = "data.jsonl") -> Hostile:
        return Hostile(name, [(file, body)], code, words)

    yield one("nothing", b"", "empty_dataset", "holds no text")
    yield one("blank lines", b"\n \n\t\n" * 100, "empty_dataset", "holds no text")
    yield one("blank texts", b'{"text": "  "}\n' * 100, "empty_dataset", "holds no text")
    yield one("bytes that are no UTF-8", row * 3 + b'{"text": "\xff"}\n', "bad_encoding", "line 4")
    yield one("UTF-16", '{"text": "x"}\n'.encode("utf-16"), "bad_encoding", "line 1")
    yield one("half a surrogate pair", row + b'{"text": "\\ud800"}\n', "bad_row", "line 2")
    yield one("a line of 20 MB", row + b'{"text": "' + b"x" * 20_000_000 + b'"}\n', "bad_row", "line 2 .* longer")
    yield one("a row a million levels deep", row + b'{"text": ' + b"[" * 10**6 + b"\n", "bad_row", "line 2")
    yield one("a number of a million digits", row + b'{"text": ' + b"9" * 10**6 + b"}\n", "bad_row", "line 2")
    yield one("a row that is no object", row * 2 + b'["text"]\n', "bad_row", "line 3")
    yield one("a row that is cut short", row * 2 + b'{"text": "x\n', "bad_row", "line 3")
    yield one("a text that is a number", row * 2 + b'{"text": 5}\n', "bad_row", "line 3 .* int")
    yield one("a text that is a list", row * 2 + b'{"text": ["a"]}\n', "bad_row", "line 3 .* list")
    yield one("columns that change", row * 2 + b'{"content": "x"}\n', "wrong_column", "line 3 .* 'content'")
    yield one("gzip that is cut short", gzip.compress(row * 10_000)[:-20], "bad_compression", "breaks off", "data.jsonl.gz")
    yield one("gzip of garbage", b"\x1f\x8b" + bytes(100), "bad_compression", "breaks off", "data.jsonl.gz")
    yield one("gzip bomb in a line", gzip.compress(bytes(2**28)), "bad_row", "longer", "data.jsonl.gz")
    yield one("gzip within gzip", gzip.compress(gzip.compress(row * 1000)), "bad_encoding|bad_row", "line 1", "data.jsonl.gz")
    packed = zstandard.compress(row * 10_000)
    yield one("Zstandard that is cut short", packed[:-5], "bad_compression", "breaks off", "data.jsonl.zst")
    yield one("Zstandard bomb in a line", zstandard.compress(bytes(2**28)), "bad_row", "longer", "data.jsonl.zst")
    wide = zstandard.ZstdCompressionParameters(window_log=31, compression_level=1)
    body = zstandard.ZstdCompressor(compression_params=wide).compressobj().compress(bytes(2**20))
    yield one("Zstandard with a window of 2 GiB", body + bytes(100), "bad_compression", "breaks off", "data.jsonl.zst")
    yield one("CSV without its column", b"a,b\n1,2\n", "wrong_column", "'text'", "data.csv")
    yield one("CSV with two columns of a name", b"text,text\n1,2\n", "wrong_column", "rename", "data.csv")
    yield one("CSV with a field too many", b"text,n\nx,1\ny,2,3\n", "bad_row", "line 3 .* 3 fields", "data.csv")
    yield one("CSV with a quote that never ends", b'text,n\nx,1\n"' + b"y\n" * 100_000, "bad_row", "line 3", "data.csv")
    yield one("CSV of a row with a million fields", b"text\n" + b"," * 10**6 + b"\n", "bad_row", "line 2", "data.csv")
    yield one("CSV that is no UTF-8", b"text\nx\n\xff\xfe\n", "bad_encoding", "line 3", "data.csv")
    yield one("Parquet that is none", b"PAR1" + bytes(100) + b"PAR1", "bad_parquet", "Parquet", "data.parquet")
    yield one("Parquet with a footer of 4 GiB", b"PAR1" + b"\xff" * 8 + b"PAR1", "bad_parquet", "Parquet", "data.parquet")
    yield one("Parquet that is cut short", parquet(["x"] * 1000)[:-50], "bad_parquet", "Parquet", "data.parquet")
    yield one("Parquet of numbers", parquet([1, 2, 3]), "bad_parquet", "no texts", "data.parquet")
    yield one("Parquet of lists", parquet([["a"], ["b"]]), "bad_parquet", "no texts", "data.parquet")
    yield one("Parquet with nothing in a row", parquet(["x", None]), "bad_row", "row 2 .* null", "data.parquet")
    yield one("zip", zipped(data=row), "unknown_format", "ending", "data.zip")
    yield one("a program", b"\x7fELF" + bytes(1000), "bad_encoding|bad_row|unknown_format", ".", "data.exe")
    yield one("pickle", pickle.dumps(Payload()), "unknown_format", "ending", "data.pkl")
    for name in ("../../data.jsonl", "/etc/cron.d/data.jsonl", "..\\data.jsonl", ".jsonl", "x" * 300 + ".jsonl"):
        yield one(f"file called {name[:30]!r}", row, "unexpected_file", "plain file name|longer than", name)


def bomb() -> Hostile:
    """A few kilobytes that stand for 16 GB of text, of which 8 are read."""
    body = parquet(["x" * 2**23], 2000)
    return Hostile("Parquet bomb", [("data.parquet", body)], "dataset_too_large|bad_parquet", "more than")
