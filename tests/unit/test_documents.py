"""Datasets are read as they are, what is wrong is named by its row, and nothing that is sent costs more than its cap."""

import csv
import gzip
import json
import struct
import tracemalloc

import numpy as np
import psutil
import pyarrow as pa
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow.parquet import write_table

from narrow_engine import documents, parquet
from narrow_engine.documents import Position, Skipped, ending, read_answers, read_documents
from narrow_engine.errors import NarrowError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
PACKED = ("", ".gz", ".zst")
MEGABYTE = 2**20


def pack(body: bytes, name: str) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(body)
    return zstandard.compress(body) if name.endswith(".zst") else body


def write(path, texts, column="text"):
    """The texts in a column beside another, in the format that the name tells."""
    if path.suffix == ".parquet":
        write_table(pa.table({column: pa.array(texts, pa.string()), "other": range(len(texts))}), path, row_group_size=3)
        return
    rows = [{column: text, "other": number} for number, text in enumerate(texts)]
    plain = path.with_name("plain")
    with plain.open("w", encoding="utf-8", newline="") as file:
        if ".jsonl" in path.name:
            file.writelines(json.dumps(row, ensure_ascii=len(texts) % 2 == 0) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, [column, "other"], delimiter="\t" if ".tsv" in path.name else ",")
            writer.writeheader()
            writer.writerows(rows)
    path.write_bytes(pack(plain.read_bytes(), path.name))


@settings(max_examples=120, deadline=None)
@given(
    texts=st.lists(TEXT, max_size=20),
    form=st.sampled_from(["jsonl", "csv", "tsv"]),
    packed=st.sampled_from(PACKED),
    column=st.sampled_from(["text", "body, too"]),
)
def test_what_was_written_is_read(tmp_path_factory, texts, form, packed, column):
    path = tmp_path_factory.mktemp("d") / f"a.{form}{packed}"
    write(path, texts, column)
    assert list(read_documents(path, column)) == [text if text.strip() else "" for text in texts]


@settings(max_examples=3, deadline=None)
@given(texts=st.lists(TEXT, max_size=20))
def test_what_was_written_is_read_of_parquet(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("d") / "a.parquet"
    write(path, texts)
    assert list(read_documents(path)) == [text if text.strip() else "" for text in texts]


@pytest.mark.parametrize(
    "kind",
    [pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int8(), pa.string())],
    ids=lambda kind: str(kind)[:12],
)
def test_texts_of_parquet_may_be_stored_in_any_way(tmp_path, kind):
    table = pa.table({"a": pa.array(["é", "b", "é"]).cast(kind), "n": [1, 2, 3], "b": ["x", " ", "z"]})
    write_table(table, tmp_path / "a.parquet", compression="zstd", data_page_version="2.0")
    assert list(read_documents(tmp_path / "a.parquet", "a")) == ["é", "b", "é"]
    assert list(read_answers(tmp_path / "a.parquet", "a", "b")) == [("é", "x"), ("", ""), ("é", "z")]


def read(path, skip):
    """What comes of a file: its documents, or a sentence."""
    try:
        found: list[object] = list(read_documents(path, bad=Skipped() if skip else None))
    except NarrowError as error:
        found = [str(error)]
    assert all(isinstance(text, str) for text in found)


@settings(max_examples=300, deadline=None)
@given(
    body=st.one_of(
        st.binary(max_size=400),
        st.text('{}[]"\\,:text1e\n\r\t \ufeff\ud800', max_size=100).map(lambda text: text.encode(errors="surrogatepass")),
        st.binary(max_size=100).map(lambda rest: b"text,other\n" + rest),
    ),
    name=st.sampled_from([f"a.{form}{packed}" for form in ("jsonl", "csv", "tsv", "txt") for packed in PACKED]),
    packed=st.sampled_from(PACKED),
    skip=st.booleans(),
)
def test_any_bytes_give_documents_or_a_sentence(tmp_path_factory, body, name, packed, skip):
    path = tmp_path_factory.mktemp("d") / name
    path.write_bytes(pack(body, packed))
    read(path, skip)


@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_any_bytes_of_parquet_give_documents_or_a_sentence(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("d") / "a.parquet"
    write(path, ["some text"] * 9)
    body = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(body) - 1), min_size=1, max_size=4)):
        body[place] = data.draw(st.sampled_from([0, 127, 128, 255]))
    path.write_bytes(body[: data.draw(st.sampled_from([len(body), len(body) // 2]))])
    read(path, skip=True)


def test_plain_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
    text = "\n\n".join(f"paragraph {i} " + "word " * 100 for i in range(40))
    (tmp_path / "a.txt").write_text(text)
    found = list(read_documents(tmp_path / "a.txt"))
    assert len(found) > 3
    assert "".join(found) == text


GOOD = b'{"text": "fine"}\n'
DEEP = b'{"text": ' + b"[" * 50_000 + b"\n"
MANY = b'{"text": "a", "x": [' + b"[]," * 100_000 + b"1]}\n"
TABLE = b"text,n\nfine,1\n"


@pytest.mark.parametrize(
    ("name", "good", "bad", "code", "words"),
    [
        ("a.jsonl", GOOD, b"{broken\n", "bad_row", "line 2 of a.jsonl is not valid JSON"),
        ("a.jsonl", GOOD, b'["a"]\n', "bad_row", "line 2"),
        ("a.jsonl", GOOD, b'{"text": 3}\n', "bad_row", "not a text but int"),
        ("a.jsonl", GOOD, b'{"text": null}\n', "bad_row", "not a text but null"),
        ("a.jsonl", GOOD, b'{"text": NaN}\n', "bad_row", "not a text but float"),
        ("a.jsonl", GOOD, b'{"body": "x"}\n', "wrong_column", "'body'"),
        ("a.jsonl", GOOD, b'{"text": "\xff"}\n', "bad_encoding", "line 2"),
        ("a.jsonl", GOOD, b'{"text": "\\ud800"}\n', "bad_row", "surrogate"),
        ("a.jsonl", GOOD, DEEP, "bad_row", "line 2"),
        ("a.jsonl", GOOD, b'{"text": "a", "n": ' + b"9" * 10_000 + b"}\n", "bad_row", "line 2"),
        ("a.jsonl", GOOD, MANY, "bad_row", "line 2 of a.jsonl holds more than 100,000 values"),
        ("a.jsonl", GOOD, b'{"text": "' + b"a" * MEGABYTE + b'"}\n', "bad_row", "line 2 of a.jsonl is longer"),
        ("a.csv", TABLE, b"two\n", "bad_row", "line 3 of a.csv has 1 fields, and the header 2"),
        ("a.csv", TABLE, b"one,two,three\n", "bad_row", "line 3 of a.csv has 3 fields"),
        ("a.csv", TABLE, b'"a"b,1\n', "bad_row", "line 3 of a.csv is not valid CSV"),
        ("a.csv", TABLE, b"a\rb,1\n", "bad_row", "new-line character seen in unquoted field"),
        ("a.csv", TABLE, b'"a\n\xff\nb",1\n', "bad_encoding", "line 4 of a.csv is not UTF-8"),
        ("a.csv", TABLE, b"," * 100_001 + b"\n", "bad_row", "line 3 of a.csv holds more than 100,000 values"),
        ("a.csv", TABLE, b'"' + b"\n" * 200_000 + b'"' + b"," * 100_001 + b"\n", "bad_row", "more than 100,000 values"),
        ("a.csv", TABLE, b"a" * MEGABYTE + b",1\n", "bad_row", "line 3 of a.csv is longer"),
        ("a.tsv", b"text\tn\n\nfine\t1\n", b"one,two\n", "bad_row", "line 4 of a.tsv has 1 fields"),
        ("a.txt", b"fine\n", b"\xff\n", "bad_encoding", "line 2"),
        ("a.txt", b"fine\n", b"a" * MEGABYTE + b"\n", "bad_row", "line 2 of a.txt is longer"),
    ],
)
def test_a_bad_row_is_named_or_left_out(tmp_path, monkeypatch, name, good, bad, code, words):
    monkeypatch.setattr(documents, "LINE_LIMIT", MEGABYTE)
    path = tmp_path / name
    path.write_bytes(good + bad + good.splitlines(keepends=True)[-1])
    with pytest.raises(NarrowError, match=words) as raised:
        list(read_documents(path))
    assert raised.value.code == code
    skipped = Skipped()
    assert " ".join(read_documents(path, bad=skipped)).split() == ["fine", "fine"]
    assert (skipped.count, skipped.first) == (1, str(raised.value))


def test_a_quote_that_nobody_closes_costs_the_rows_it_swallows_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "LINE_LIMIT", 1000)
    rows = "".join(f"row {number},1\n" for number in range(300))
    (tmp_path / "a.csv").write_text(f'text,n\n"open,1\n{rows}')
    skipped = Skipped()
    found = list(read_documents(tmp_path / "a.csv", bad=skipped))
    assert (skipped.count, skipped.first) == (1, "line 2 of a.csv is longer than 0 MiB: split the document.")
    assert found == [f"row {number}" for number in range(300 - len(found), 300)]
    assert len(found) > 150
    (tmp_path / "a.csv").write_text('text,n\n"open,1\n')
    with pytest.raises(NarrowError, match=r"line 2 of a.csv is not valid CSV: unexpected end of data"):
        list(read_documents(tmp_path / "a.csv"))
    (tmp_path / "a.csv").write_text('text,n\nfine,1\n"open,1\nmore,1\nand more,1\n')
    with pytest.raises(NarrowError, match=r"line 3 of a.csv opens a quotation mark that a.csv closes nowhere"):
        list(read_documents(tmp_path / "a.csv", bad=skipped))


def test_a_bad_row_of_parquet_is_named_or_left_out(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [b"fine", None, b"\xff", b"a" * (documents.LINE_LIMIT + 1), b"fine"]
    write_table(pa.table({"text": pa.array(texts, pa.binary()).view(pa.string())}), path)
    with pytest.raises(NarrowError, match=r"column 'text' in row 2 of a.parquet is not a text but null"):
        list(read_documents(path))
    said = []
    assert list(read_documents(path, bad=said.append)) == ["fine", "fine"]
    assert [error.code for error in said] == ["bad_row", "bad_encoding", "bad_row"]
    assert "row 3 of a.parquet is not UTF-8" in str(said[1])
    assert "row 4 of a.parquet is longer" in str(said[2])


@pytest.mark.parametrize(
    ("table", "code", "words"),
    [
        (pa.table({"body": ["a"]}), "wrong_column", "has no column 'text' .it has 'body'."),
        (pa.table([["a"], ["b"]], names=["text", "text"]), "wrong_column", "has 2 columns 'text'"),
        (pa.table({"text": [{"a": "b"}]}), "bad_parquet", "holds no texts in its column 'text' but struct"),
    ],
)
def test_a_column_of_parquet_that_is_not_of_texts_is_refused(tmp_path, table, code, words):
    write_table(table, tmp_path / "a.parquet")
    with pytest.raises(NarrowError, match=words) as raised:
        list(read_documents(tmp_path / "a.parquet", bad=Skipped()))
    assert raised.value.code == code


@pytest.mark.parametrize("header", ["body,n", "text,text", 'text,"n', "text,\xff"])
def test_a_header_of_no_use_is_refused(tmp_path, header):
    (tmp_path / "a.csv").write_bytes(header.encode("latin-1") + b"\na,1\n")
    with pytest.raises(NarrowError, match=r"line 1 of a.csv"):
        list(read_documents(tmp_path / "a.csv", bad=Skipped()))


def test_the_last_of_a_key_that_comes_twice_counts(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": 1, "n": NaN, "m": -Infinity, "text": "last"}\n')
    assert list(read_documents(tmp_path / "a.jsonl")) == ["last"]


def test_a_long_text_may_hold_whatever_stands_for_structure_outside_of_it(tmp_path):
    text = '[{,"},\n\\"' * 50_000
    for name in ("a.jsonl", "a.csv"):
        write(tmp_path / name, [text])
        assert list(read_documents(tmp_path / name)) == [text]


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_a_torn_file_is_named_whatever_bad_rows_do(tmp_path, packed):
    path = tmp_path / f"a.jsonl{packed}"
    body = pack(b"".join(b'{"text": "fine %d"}\n' % number for number in range(20_000)), packed)
    for torn in (body[:-1], body[: len(body) // 2], body + b"garbage"):
        path.write_bytes(torn)
        skipped = Skipped()
        with pytest.raises(NarrowError, match=rf"a.jsonl{packed} breaks off after line \d") as raised:
            list(read_documents(path, bad=skipped))
        assert (raised.value.code, skipped.count) == ("bad_compression", 0)


def test_zstandard_comes_in_many_frames_and_not_with_a_huge_window(tmp_path):
    path = tmp_path / "a.txt.zst"
    aside = b"\x50\x2a\x4d\x18" + struct.pack("<I", 3) + b"abc"
    path.write_bytes(b"".join(aside + zstandard.compress(part) for part in (b"one ", b"two ", b"three")))
    assert list(read_documents(path)) == ["one two three"]
    huge = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(window_log=28)).compressobj()
    path.write_bytes(huge.compress(b"text") + huge.flush())
    with pytest.raises(NarrowError, match="too much memory"):
        list(read_documents(path))


def lines(unit: bytes, size: int, begin: bytes = b"", end: bytes = b"\n") -> bytes:
    return begin + unit * ((size - len(begin) - len(end)) // len(unit)) + end


def zeros(packed: str, size: int) -> bytes:
    """Zeros in plenty, in a few bytes."""
    if packed == ".gz":
        return gzip.compress(bytes(size), 9)
    packer = zstandard.ZstdCompressor(level=3).compressobj()
    return b"".join(packer.compress(bytes(MEGABYTE)) for _ in range(size // MEGABYTE)) + packer.flush()


LISTS = (b"[],", b'{"text": "a", "x": [', b"1]}\n")
OBJECTS = (b'{"":{}},', b'{"text": "a", "x": [', b"1]}\n")


@pytest.mark.parametrize(
    ("name", "make", "code"),
    [
        ("lists.jsonl", lambda: lines(LISTS[0], documents.LINE_LIMIT, *LISTS[1:]), "bad_row"),
        ("objects.jsonl", lambda: lines(OBJECTS[0], documents.LINE_LIMIT, *OBJECTS[1:]), "bad_row"),
        ("numbers.jsonl", lambda: lines(b"1e9,", documents.LINE_LIMIT, *LISTS[1:]), "bad_row"),
        ("quotes.jsonl", lambda: lines(b'\\"', documents.LINE_LIMIT, b'{"text": "', b"\n"), "bad_row"),
        ("fields.csv", lambda: b"text,n\n" + lines(b"ab,", documents.LINE_LIMIT), "bad_row"),
        ("header.csv", lambda: lines(b"ab,", documents.LINE_LIMIT), "bad_row"),
        ("rows.csv", lambda: b"text,n\n" + lines(b'"\n",' + b"a," * 30, MEGABYTE), "bad_row"),
        ("long.jsonl", lambda: b'{"text": "' + bytes(2 * documents.LINE_LIMIT), "bad_row"),
        ("zeros.txt.gz", lambda: zeros(".gz", 120 * MEGABYTE), "dataset_too_large"),
        ("zeros.txt.zst", lambda: zeros(".zst", 500 * MEGABYTE), "dataset_too_large"),
        ("zeros.csv.zst", lambda: zstandard.compress(b"text,n\n") + zeros(".zst", 500 * MEGABYTE), "dataset_too_large"),
        ("blank.jsonl.gz", lambda: gzip.compress(b"\n" * 3_000_000), "dataset_too_large"),
    ],
)
def test_a_bomb_costs_no_more_than_its_cap(tmp_path, monkeypatch, name, make, code):
    monkeypatch.setattr(documents, "TOTAL_LIMIT", 100 * MEGABYTE)
    monkeypatch.setattr(documents, "ROW_LIMIT", 20_000)
    path = tmp_path / name
    path.write_bytes(make())
    tracemalloc.start()
    try:
        with pytest.raises(NarrowError) as raised:
            # Where a row is bad this is told at once; the others go on past it, to their end.
            list(read_documents(path, bad=Skipped() if code == "dataset_too_large" else None))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert raised.value.code == code, raised.value
    assert peak < 8 * documents.LINE_LIMIT


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz", "a.parquet"])
def test_what_a_file_may_hold_grows_with_it(tmp_path, monkeypatch, name):
    """Its own bytes had to be sent, and a bomb's have not: here they are text that cannot be packed."""
    random = np.random.default_rng(0)
    texts = [random.bytes(3000).hex() for _ in range(100)]
    path = tmp_path / name
    if name == "a.txt":
        path.write_text("\n\n".join(texts))
    else:
        write(path, texts)
    monkeypatch.setattr(documents, "TOTAL_LIMIT", 1000)
    monkeypatch.setattr(documents, "ROW_LIMIT", 1)
    assert len(list(read_documents(path))) == 100
    for name, value, words in (("ROW_BYTES", 2**20, "more than 1 rows"), ("TOTAL_FACTOR", 0, "GiB of text")):
        with monkeypatch.context() as changed:
            changed.setattr(documents, name, value)
            with pytest.raises(NarrowError, match=words):
                list(read_documents(path))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv.gz", "a.jsonl.zst", "a.parquet"])
def test_a_reading_tells_where_in_the_file_it_is(tmp_path, name):
    random = np.random.default_rng(0)
    path = tmp_path / name
    texts = [random.bytes(3000).hex() for _ in range(200)]
    if name == "a.txt":
        path.write_text("\n\n".join(texts))
    else:
        write(path, texts)
    position = Position()
    places = [position.tell() for _ in read_documents(path, position=position)]
    size = path.stat().st_size
    assert places == sorted(places)
    assert 0 < places[0] < 0.4 * size
    assert abs(places[len(places) // 2] / size - 0.5) < 0.2
    assert places[-1] <= size == position.tell()


def test_a_bomb_in_parquet_costs_no_more_than_its_cap(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MEMORY_LIMIT", 420 * MEGABYTE)
    path = tmp_path / "a.parquet"
    # 6 GB in a kilobyte: one long text, and 3,000 times its number.
    write_table(pa.table({"text": pa.DictionaryArray.from_arrays([0] * 3000, ["a" * 2_000_000])}), path, compression="zstd")
    assert path.stat().st_size < 2000
    with pytest.raises(NarrowError, match="takes more than 420 MiB of memory to read"):
        list(read_documents(path))
    # One page of 100 MB.
    write_table(pa.table({"text": ["a" * 100_000_000]}), path, compression="zstd", use_dictionary=False)
    with pytest.raises(NarrowError, match="takes more than 420 MiB of memory to read"):
        list(read_documents(path, bad=Skipped()))
    monkeypatch.setattr(documents, "ROW_LIMIT", 1000)
    write_table(pa.table({"text": pa.nulls(1_000_000, pa.string())}), path)
    with pytest.raises(NarrowError, match="more than 1,000 rows"):
        list(read_documents(path, bad=Skipped()))
    monkeypatch.setattr(documents, "TOTAL_LIMIT", MEGABYTE)
    write_table(pa.table({"text": ["a" * 100_000] * 500}), path)
    with pytest.raises(NarrowError, match="more than 0 GiB of text"):
        list(read_documents(path, bad=Skipped()))


def test_who_reads_parquet_ends_with_the_reading_and_may_crash(tmp_path, monkeypatch):
    write(tmp_path / "a.parquet", ["text " * 1000] * 1000)
    texts = read_documents(tmp_path / "a.parquet")
    assert next(texts).startswith("text ")
    reads = [child for child in psutil.Process().children() if any("parquet.py" in word for word in child.cmdline())]
    assert len(reads) == 1
    texts.close()
    assert not reads[0].is_running()
    crash = tmp_path / "crash.py"
    monkeypatch.setattr(parquet, "__file__", str(crash))
    for does in ("os.write(1, bytes(4)); os.abort()", "os.write(1, b'\\x7f' * 4); time.sleep(200)"):
        crash.write_text(f"import os, time; {does}")
        with pytest.raises(NarrowError, match="what reads it crashed") as raised:
            list(read_documents(tmp_path / "a.parquet"))
        assert raised.value.code == "bad_parquet"


def test_parquet_without_pyarrow_is_a_sentence(tmp_path, monkeypatch):
    write(tmp_path / "a.parquet", ["a"])
    monkeypatch.setattr(documents, "find_spec", lambda name: None)
    with pytest.raises(NarrowError, match=r"pip install 'narrow\[parquet\]'"):
        list(read_documents(tmp_path / "a.parquet"))


@pytest.mark.parametrize("name", ["a.json", "a", "a.zst", "a.jsonl.xz", "a.parquet.gz"])
def test_an_unknown_ending_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"PAR1")
    with pytest.raises(NarrowError, match=r"\.jsonl, \.ndjson, \.csv, \.tsv, \.txt, \.text, \.md, "):
        list(read_documents(tmp_path / name))
    assert ending(name) == ""


def test_an_ending_tells_format_and_packing():
    assert [ending(name) for name in ("A.JSONL.GZ", "x.y.csv.zst", "b.Parquet")] == [".jsonl.gz", ".csv.zst", ".parquet"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.zst"])
def test_what_is_named_as_packed_and_is_not_is_told(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(bytes(range(128, 256)) * 20)
    with pytest.raises(NarrowError, match="neither gzip nor Zstandard"):
        list(read_documents(path, "text"))
    path.write_bytes(('{"text": "é"}\n' * 200).encode())
    assert len(list(read_documents(path, "text"))) == (200 if "jsonl" in name else 1)
