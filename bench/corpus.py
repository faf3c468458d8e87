"""How fast a dataset becomes tokens, and what it takes of memory: `python bench/corpus.py`; --megabytes 100 for that size alone.

The text is the demo's Python, again and again, with random numbers at every eighth line, so that words are not all known; the
tokenizer is the demo base's. Each measurement is a process of its own. Memory is what the process takes for itself (RssAnon)
above what it had before: of mapped files the system can let go.

    reads     rows and hashes of texts alone, as any tokenizing needs them
    plain     256 rows at a time, all tokens kept in a list and concatenated: how it was done before
    narrow    `corpus.tokenize`, into a file
    split     what follows, of the same tokens: held-out text chosen, training text written
"""

import argparse
import gzip
import json
import multiprocessing
import os
import random
import sys
import tempfile
import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from tokenizers import Tokenizer  # noqa: E402

from narrow_engine import corpus  # noqa: E402
from narrow_engine.documents import read_documents  # noqa: E402

DEMO = HERE.parent / "demo"
RESULTS = HERE / "results" / "corpus.json"


def write_text(path: Path, size: int) -> None:
    with gzip.open(DEMO / "data" / "python.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"].split("\n") for line in file]
    numbers = random.Random(0)
    with path.open("w", encoding="utf-8") as out:
        while True:
            for lines in texts:
                mixed = [line if at % 8 else f"{line} {numbers.randrange(10**6)}" for at, line in enumerate(lines)]
                out.write(json.dumps({"text": "\n".join(mixed)}) + "\n")
                if out.tell() >= size:
                    return


def reads(path: Path, folder: Path) -> int:
    for text in read_documents(path):
        corpus.text_hash(text)
    return 0


def plain(path: Path, folder: Path) -> int:
    texts, pieces, reader = read_documents(path), [], tokenizer()
    while batch := list(islice(texts, 256)):
        pieces += [np.array(encoding.ids, np.uint32) for encoding in reader.encode_batch(batch)]
    return len(np.concatenate(pieces))


def narrow(path: Path, folder: Path) -> int:
    return len(corpus.tokenize(path, "text", tokenizer(), None, folder=folder / "tokens").documents.tokens)


def split(path: Path, folder: Path) -> int:
    documents = corpus.tokenize(path, "text", tokenizer(), None, folder=folder / "tokens").documents
    training, _ = corpus.hold_out(documents, 2**20, 0.1, "The target", lambda *_: None)
    corpus.save(training, folder, "training")
    return len(documents.tokens)


def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO / "base" / "tokenizer.json"))


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def measure(name: str, path: Path, folder: Path, found: multiprocessing.Queue) -> None:
    ended, peak, before = threading.Event(), 0, anonymous()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.02):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began, used = time.perf_counter(), os.times()
    tokens = globals()[name](path, folder)
    seconds, now = time.perf_counter() - began, os.times()
    ended.set()
    watcher.join()
    cpu = now.user + now.system - used.user - used.system
    found.put({"seconds": seconds, "cpu_seconds": cpu, "tokens": tokens, "peak_bytes": max(0, peak - before)})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, nargs="*", default=[100, 1000])
    parser.add_argument("--parts", nargs="*", default=["reads", "plain", "narrow", "split"])
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    processes = multiprocessing.get_context("spawn")
    for size in options.megabytes:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            path = folder / "text.jsonl"
            write_text(path, size * 10**6)
            for name in options.parts:
                found = processes.Queue()
                process = processes.Process(target=measure, args=(name, path, folder, found))
                process.start()
                row = found.get()
                process.join()
                row["megabytes"] = path.stat().st_size / 1e6
                results.setdefault(str(size), {})[name] = row
                RESULTS.write_text(json.dumps({**results, "cpus": os.cpu_count()}, indent=1) + "\n")
                pace, peak = row["megabytes"] / row["seconds"], row["peak_bytes"] / 1e6
                speed = f"{pace:8.2f} MB/s {row['tokens'] / row['seconds']:12,.0f} tokens/s"
                print(f"{size:6,} MB  {name:6} {speed}  CPU {row['cpu_seconds']:8.1f} s  peak {peak:7,.0f} MB", flush=True)


if __name__ == "__main__":
    main()
