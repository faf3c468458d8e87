"""Datasets are read as they are, and what is wrong is named by its line."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrow_engine import documents
from narrow_engine.documents import read_documents
from narrow_engine.errors import NarrowError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(TEXT, max_size=20), zipped=st.booleans(), column=st.sampled_from(["text", "body"]))
def test_what_was_written_is_read(tmp_path_factory, texts, zipped, column):
    path = tmp_path_factory.mktemp("d") / ("a.jsonl.gz" if zipped else "a.jsonl")
    body = "".join(json.dumps({column: text, "other": 1}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(body) if zipped else body)
    assert list(read_documents(path, column)) == [text if text.strip() else "" for text in texts]


@settings(max_examples=80, deadline=None)
@given(body=st.binary(max_size=400), name=st.sampled_from(["a.jsonl", "a.jsonl.gz", "a.txt", "a.txt.gz"]))
def test_any_bytes_give_documents_or_a_sentence(tmp_path_factory, body, name):
    path = tmp_path_factory.mktemp("d") / name
    path.write_bytes(body)
    try:
        found: list[object] = list(read_documents(path))
    except NarrowError as error:
        found = [str(error)]
    assert all(isinstance(text, str) for text in found)


def test_plain_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
    text = "\n\n".join(f"paragraph {i} " + "word " * 100 for i in range(40))
    (tmp_path / "a.txt").write_text(text)
    found = list(read_documents(tmp_path / "a.txt"))
    assert len(found) > 3
    assert "".join(found) == text


GOOD = b'{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        (GOOD + b"{broken\n", "bad_row", "line 2"),
        (GOOD + b'["a"]\n', "bad_row", "line 2"),
        (GOOD + b'{"text": 3}\n', "bad_row", "not a text but int"),
        (GOOD + b'{"body": "x"}\n', "wrong_column", "'body'"),
        (GOOD + b'{"text": "\xff"}\n', "bad_encoding", "line 2"),
        (GOOD + b'{"text": "\\ud800"}\n', "bad_row", "surrogate"),
        (GOOD + b'{"text": ' + b"[" * 100_000 + b"\n", "bad_row", "line 2"),
        (GOOD + b'{"text": "a", "n": ' + b"9" * 10_000 + b"}\n", "bad_row", "line 2"),
    ],
)
def test_a_bad_row_is_named(tmp_path, body, code, words):
    (tmp_path / "a.jsonl").write_bytes(body)
    with pytest.raises(NarrowError, match=words) as raised:
        list(read_documents(tmp_path / "a.jsonl"))
    assert raised.value.code == code


def test_a_torn_gzip_file_is_named(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(GOOD * 5000)[:-40])
    with pytest.raises(NarrowError, match="not a whole gzip") as raised:
        list(read_documents(tmp_path / "a.jsonl.gz"))
    assert raised.value.code == "bad_gzip"


def test_a_long_line_and_a_bomb_cost_no_more_than_their_cap(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "TOTAL_LIMIT", 2**20)
    (tmp_path / "bomb.txt.gz").write_bytes(gzip.compress((b"a" * 99 + b"\n") * 50_000))
    with pytest.raises(NarrowError) as raised:
        list(read_documents(tmp_path / "bomb.txt.gz"))
    assert raised.value.code == "dataset_too_large"
    (tmp_path / "line.jsonl").write_bytes(b'{"text": "' + b"a" * (documents.LINE_LIMIT + 10) + b'"}')
    with pytest.raises(NarrowError, match="line 1") as raised:
        list(read_documents(tmp_path / "line.jsonl"))
    assert raised.value.code == "bad_row"


def test_an_unknown_ending_is_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(NarrowError, match=r"\.jsonl or \.txt"):
        list(read_documents(tmp_path / "a.parquet"))
