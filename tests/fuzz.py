"""Coverage-guided fuzzing of the parsers that are ours: `python tests/fuzz.py PARSER [-max_total_time=60 ...]`.

atheris (libFuzzer) changes bytes so that they reach new code. A parser must answer whatever comes with what it read or with a
sentence: every other exception is a fault, and so is one input that takes ten seconds or two GiB.
"""

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import atheris  # noqa: E402

with atheris.instrument_imports(include=["narrow_engine", "service"]):
    from narrow_engine import documents, families, model_files, sizing, spec
    from narrow_engine.errors import NarrowError
    from service import problems, uploads
    from service.api import artifacts
    from service.api import uploads as tus
    from service.problems import ApiError

import zstandard  # noqa: E402
from pydantic import ValidationError  # noqa: E402

FOLDER = Path(tempfile.mkdtemp())
CONFIG = (ROOT / "demo" / "base" / "config.json").read_bytes()
WEIGHTS = (ROOT / "demo" / "base" / "model.safetensors").open("rb").read(4096)
ROWS = b'{"text": "def f():\\n    pass", "n": 1}\n{"text": "x"}\n'
SPEC = b'{"base": {"model": "mdl_00000000000000000000000000"}, "target": {"dataset": "ds_00000000000000000000000000"},'


def _file(name: str, body: bytes) -> Path:
    path = FOLDER / name
    path.write_bytes(body)
    return path


def header(body: bytes) -> None:
    model_files.read_header(_file("model.safetensors", body))


def config(body: bytes) -> None:
    read = model_files.read_json(_file("config.json", body))
    if isinstance(read, dict):
        families.family_of(read)
        sizing.size_of(read, families.dimensions(read), 2)


def rows(body: bytes) -> None:
    for _ in documents.read_documents(_file("data.jsonl", body)):
        pass


def zipped_rows(body: bytes) -> None:
    for _ in documents.read_documents(_file("data.jsonl.gz", body)):
        pass


def zstandard_rows(body: bytes) -> None:
    for _ in documents.read_documents(_file("data.jsonl.zst", body)):
        pass


def table(body: bytes) -> None:
    for _ in documents.read_documents(_file("data.csv", body)):
        pass


def text(body: bytes) -> None:
    for _ in documents.read_documents(_file("data.txt", body)):
        pass


def job(body: bytes) -> None:
    try:
        spec.JobSpec.model_validate_json(body)
    except ValidationError as error:
        for fault in error.errors():
            problems._sentence({**fault, "loc": ("body", *fault["loc"])})


def name(body: bytes) -> None:
    given = body.decode("utf-8", "replace")
    uploads._clean(given)
    uploads.check_name(given)


def metadata(body: bytes) -> None:
    tus._metadata(body.decode("latin-1"))


def checksum(body: bytes) -> None:
    tus._checksum(body.decode("latin-1"))


def ranges(body: bytes) -> None:
    artifacts._understood(body.decode("latin-1"))


PARSERS: dict[str, tuple[Callable[[bytes], None], list[bytes]]] = {
    "header": (header, [WEIGHTS]),
    "config": (config, [CONFIG]),
    "rows": (rows, [ROWS]),
    "zipped_rows": (zipped_rows, [b"\x1f\x8b\x08" + bytes(20)]),
    "zstandard_rows": (zstandard_rows, [zstandard.compress(ROWS)]),
    "table": (table, [b'text,n\n"a ""quoted""\nline",1\nx,2\n']),
    "text": (text, [ROWS]),
    "job": (job, [SPEC + b'"budget": {"parameters": 0.5}}', json.dumps({"method": {"units": ["neuron"]}}).encode()]),
    "name": (name, [b"model.safetensors", "Modell größer".encode()]),
    "metadata": (metadata, [b"filename bW9kZWw=,sha256 YWJj"]),
    "checksum": (checksum, [b"sha256 YWJj", "md5 größer".encode()]),
    "ranges": (ranges, [b"bytes=0-100", b"bytes=-5"]),
}


def main() -> None:
    if sys.argv[1] == "--list":
        sys.stdout.write("\n".join(PARSERS) + "\n")
        return
    parse, seeds = PARSERS[sys.argv[1]]
    corpus = Path(tempfile.mkdtemp())
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)

    def one(body: bytes) -> None:
        with contextlib.suppress(NarrowError, ApiError):
            parse(body)

    atheris.Setup([sys.argv[0], *sys.argv[2:], "-timeout=10", "-rss_limit_mb=2048", "-max_len=65536", str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
