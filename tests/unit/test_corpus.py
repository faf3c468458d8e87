"""Datasets become tokens in a file, by any number of starts; nothing of them is in memory; and blocks come in their order."""

import gzip
import json
import os
import resource
import signal
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import CONTEXT
from tiny import documents as texts_of
from tiny import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers

from narrow_engine import corpus, stages
from narrow_engine.corpus import Blocks, Documents, Mixture
from narrow_engine.errors import Cancelled, NarrowError
from narrow_engine.run import Run
from narrow_engine.spec import CompressionSpec

NARROW, BROAD = (np.arange(first, first + 5000, dtype=np.uint32) for first in (0, 10_000))
SHARES = st.floats(0, 1)


@given(start=SHARES, end=SHARES, until=SHARES, count=st.integers(1, 400))
def test_the_broad_share_is_that_of_the_curriculum(start, end, until, count):
    mixture = Mixture(Blocks(NARROW, 8, 3), Blocks(BROAD, 8, 3), start, end, until * count)
    blocks = mixture.batch(0, count)
    broad = blocks[:, 0].numpy() >= 10_000
    shares = [start + (end - start) * min(1.0, (i + 0.5) / (until * count)) if until else end for i in range(count)]
    assert abs(broad.sum() - sum(shares)) <= 1.5
    # Up to any point, too, and in the order of each text's own.
    assert np.abs(np.cumsum(broad) - np.cumsum(shares)).max() <= 1.5
    for text, found in ((NARROW, blocks[~broad]), (BROAD, blocks[broad])):
        if len(found):
            assert (found == Blocks(text, 8, 3).batch(0, len(found))).all()
    half = count // 2
    assert (mixture.batch(half, count - half) == blocks[half:]).all()


def test_narrow_only_and_broad_only_are_the_ends():
    for share, text in ((0.0, NARROW), (1.0, BROAD)):
        mixture = Mixture(Blocks(NARROW, 8, 3), Blocks(BROAD, 8, 3), share, share, 50)
        assert (mixture.batch(0, 100) == Blocks(text, 8, 3).batch(0, 100)).all()


def write_rows(path, rows):
    """Rows in the format that the name tells, with blank ones and bad ones between them."""
    if path.suffix == ".parquet":
        from pyarrow import table
        from pyarrow.parquet import write_table

        write_table(table({"text": rows}), path, row_group_size=50)
        return path
    if ".jsonl" in path.name:
        lines = [json.dumps({"text": text}) + "\n" + "{broken\n" * (number % 5 == 0) for number, text in enumerate(rows)]
    elif ".csv" in path.name:
        lines = ["text,n\n"] + ['"' + text.replace('"', '""') + f'",{number}\n' for number, text in enumerate(rows)]
    else:
        lines = [text + "\n\n" for text in rows]
    body = "".join(lines).encode()
    path.write_bytes(gzip.compress(body) if path.suffix == ".gz" else body)
    return path


def tokenized(path, tokenizer_file, folder, **options):
    return corpus.tokenize(path, "text", Tokenizer.from_file(str(tokenizer_file)), 0, skip=True, folder=folder, **options)


def tokenize_and_die(path, tokenizer_file, folder):
    """Ends by its own hand at the third call of `progress`: something is written then that no checkpoint tells of."""
    calls = 0

    def progress(done, total):
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    corpus._BATCH, corpus.CHECKPOINT_SECONDS = 10_000, 0
    tokenized(path, tokenizer_file, folder, progress=progress)


def contents(folder):
    """Of all files; of the record of what is done, without the times in it that a zip has."""
    with np.load(folder / "done.npz") as done:
        told = {name: done[name].tolist() for name in done.files}
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "done.npz"}, told


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.txt", "a.parquet"])
def test_who_is_killed_while_tokenizing_goes_on_to_the_same_bytes(tmp_path, tokenizer_file, name):
    rows = [*texts_of(count=30), "  ", *texts_of("german", 12), ""]
    path = write_rows(tmp_path / name, rows)
    found = tokenized(path, tokenizer_file, tmp_path / "whole")
    starts = 0
    while not (tmp_path / "again").exists():
        process = CONTEXT.Process(target=tokenize_and_die, args=(path, tokenizer_file, tmp_path / "again"))
        process.start()
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL)
        starts += 1
        assert starts < 30
    assert starts > 3
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")
    assert found.counts.sum() == len(found.documents.tokens)
    encoded = Tokenizer.from_file(str(tokenizer_file)).encode_batch([text for text in rows if text.strip()])
    if name != "a.txt":
        assert [found.documents[i].tolist() for i in range(len(found.documents))] == [[0, *one.ids] for one in encoded]


def test_a_cancelled_reading_keeps_what_it_has(tmp_path, tokenizer_file, monkeypatch):
    monkeypatch.setattr(corpus, "_BATCH", 20_000)
    path = write_rows(tmp_path / "a.jsonl", texts_of(count=60))
    told, stop = [], 3

    def progress(done, total):
        assert total == path.stat().st_size
        told.append(done)
        if len(told) == stop:
            raise Cancelled

    with pytest.raises(Cancelled):
        tokenized(path, tokenizer_file, tmp_path / "cancelled", progress=progress)
    assert 0 < told[0] < told[1] < told[2] < path.stat().st_size
    with np.load(tmp_path / "cancelled.tmp" / "done.npz") as done:
        read = int(done["read"])
    assert read > 0
    stop = None
    encoded = []
    really = corpus._encoded

    def watched(batches, *rest):
        for batch, encodings in really(batches, *rest):
            encoded.extend(batch.texts)
            yield batch, encodings

    monkeypatch.setattr(corpus, "_encoded", watched)
    found = tokenized(path, tokenizer_file, tmp_path / "cancelled", progress=progress)
    assert len(encoded) == 60 - read
    assert len(found.documents) == 60
    assert told[-1] == path.stat().st_size


def test_a_dataset_without_a_text_or_with_one_that_the_tokenizer_fails_on_is_a_sentence(tmp_path, tokenizer_file):
    (tmp_path / "a.jsonl").write_text('{"text": " "}\n{broken\n')
    with pytest.raises(NarrowError, match=r"a\.jsonl holds nothing but bad rows \(1\)"):
        tokenized(tmp_path / "a.jsonl", tokenizer_file, tmp_path / "out")
    (tmp_path / "b.jsonl").write_text('{"text": "c"}\n')
    raw = json.loads(tokenizer_file.read_text())
    del raw["model"]["vocab"]["c"]
    raw["model"]["unk_token"] = "nowhere"
    raw["model"]["merges"] = []
    broken = tmp_path / "tokenizer.json"
    broken.write_text(json.dumps(raw))
    with pytest.raises(NarrowError, match=r"tokenizer fails on b\.jsonl"):
        tokenized(tmp_path / "b.jsonl", broken, tmp_path / "other")


@given(data=st.data())
def test_stretches_are_what_they_were_cut_from(data):
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=12))
    source = np.arange(100, 100 + sum(lengths), dtype=np.uint32)
    whole = Documents(source, np.cumsum([0, *lengths]), np.arange(len(lengths), dtype=np.uint64))
    found, known = whole, [whole[i].tolist() for i in range(len(whole))]
    for _ in range(data.draw(st.integers(1, 3))):
        chosen = data.draw(st.lists(st.integers(0, len(found) - 1), max_size=8)) if len(found) else []
        found, known = found.take(np.array(chosen, np.int64)), [known[i] for i in chosen]
    flat = [token for tokens in known for token in tokens]
    assert [found[i].tolist() for i in range(len(found))] == known
    assert np.asarray(found.tokens).tolist() == flat
    begin, end = found.places()
    assert [source[a:b].tolist() for a, b in zip(begin, end, strict=True)] == known
    a, b = sorted(data.draw(st.lists(st.integers(0, len(flat)), min_size=2, max_size=2)))
    assert found.tokens[a:b].tolist() == flat[a:b]


def mapped(folder, documents, length):
    """Documents of zeros, as large as wanted, in a file that takes no room."""
    folder.mkdir()
    with (folder / "tokens").open("wb") as file:
        file.truncate(4 * documents * length)
    hashes = np.random.default_rng(0).integers(0, 2**63, documents).astype(np.uint64)
    offsets = np.arange(0, documents * length + 1, length)
    return Documents(np.asarray(np.memmap(folder / "tokens", np.uint32, "r")), offsets, hashes)


def test_to_split_a_dataset_takes_memory_for_its_documents_and_not_for_its_tokens(tmp_path):
    count, length = 100_000, 300
    base, narrow = (mapped(tmp_path / name, count, length) for name in ("base", "narrow"))
    widths = (np.ones(1, np.int64),) * 2
    for reading in (corpus.Reading(base, base, ()), corpus.Reading(base, narrow, widths)):
        tracemalloc.start()
        try:
            training, held_out = corpus.hold_out(base, 10**6, 0.1, "The target", lambda *_: None)
            corpus.save(reading.at(training)[1], tmp_path, "training")
            corpus.save(reading.at(corpus.sample(held_out, 10_000, 64, 0))[1], tmp_path, "sample")
            rest = base.take(np.flatnonzero(~corpus.among(base.hashes, held_out.hashes)))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert len(rest) == len(training)
        assert len(corpus.load(tmp_path, "training").tokens) == len(training.tokens) > 28 * 10**6
        # What is done piece by piece takes some 60 MB; the tokens have 120.
        assert peak < corpus.BYTES_A_DOCUMENT * count + 60 * 2**20


def load_with_little(spec, folder, bound):
    """The first stage of a run, in a process that may take so many bytes more than it has."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now = 1024 * int(status["VmData"].split()[0])
    resource.setrlimit(resource.RLIMIT_DATA, (now + bound, now + bound))
    (folder / "load.tmp").mkdir(parents=True)
    stages.load(Run(spec, folder, lambda *_: None), folder / "load.tmp")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits what a process maps for itself")
def test_a_run_loads_a_dataset_of_four_times_its_memory(tmp_path):
    """Limited is what a process takes for itself: of what is mapped from files the system can let go."""
    bound, target, base = 128 * 2**20, tmp_path / "words.jsonl", tmp_path / "base"
    tiny_model("llama").save_pretrained(base)
    words = [f"word{number}" for number in range(300)]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate([*words, "<unk>"])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(base / "tokenizer.json"))
    random = np.random.default_rng(0)
    page = " ".join(np.array(words)[random.integers(0, len(words), 3000)])
    with target.open("w") as file:
        while file.tell() < 4 * bound:
            at = int(random.integers(len(page)))
            file.write(json.dumps({"text": f"{page[at:]} {page[:at]} {file.tell()}"}) + "\n")
    spec = CompressionSpec.model_validate(
        {"base": {"path": base}, "target": {"path": target}, "budget": {"parameters": 0.9}, "skill_tokens": 4096}
    )
    process = CONTEXT.Process(target=load_with_little, args=(spec, tmp_path / "run", bound))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert len(corpus.load(tmp_path / "run" / "load.tmp", "training").tokens) > 4 * bound / 9
