"""What models write to prompts: batches against one at a time, expressions, shares and their intervals."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import FAMILIES, tiny_model
from tokenizers import Tokenizer

from narrow_engine import answers, corpus
from narrow_engine.documents import read_answers, read_documents
from narrow_engine.earlier import Reader
from narrow_engine.errors import NarrowError
from narrow_engine.models import greedy
from narrow_engine.spec import Answer, DatasetPath


@pytest.fixture(scope="module")
def reader(tokenizer_file):
    return Reader(Tokenizer.from_file(str(tokenizer_file)), 0, 320)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_in_a_batch_get_what_each_gets_alone(family, reader):
    model = tiny_model(family)
    # None of what a base's generation_config says may change the choice.
    model.generation_config.repetition_penalty = 3.0
    model.generation_config.do_sample = True
    model.generation_config.max_length = 5
    prompts = ["def f(x):\n    return x", "import os", "class A:\n    def __init__(self, name):\n        self.name = name\n\nx ="]
    # A token that ends the text and a mark that ends the answer are cut off here as they are there.
    found = answers.write(model, reader, prompts, Answer(tokens=12, stop=["\n"]), lambda *_: None)
    for prompt, text in zip(prompts, found, strict=True):
        alone = greedy(model, torch.tensor([answers.encode(reader, prompt)]), 12)
        alone = alone[: alone.index(0)] if 0 in alone else alone
        assert text == reader.tokenizer.decode(alone).partition("\n")[0]


def test_writing_ends_where_all_have_come_to_a_stop(reader):
    model = tiny_model("llama")
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    long = answers.write(model, reader, ["a", "b"], Answer(tokens=64, stop=["\0\0"]), lambda *_: None)
    letters = [text[0] for text in long if text]
    seen.clear()
    found = answers.write(model, reader, ["a", "b"], Answer(tokens=64, stop=letters), lambda *_: None)
    assert found == ["", ""]
    assert len(seen) < 8


@pytest.mark.parametrize(
    ("written", "answer", "extract", "same"),
    [
        (" Paris ", "Paris\n", None, True),
        ("Paris.", "Paris", None, False),
        ("so it is #### 72", "6 * 12 = 72\n#### 72", r"#### (-?[\d,.]+)", True),
        ("#### 7, no, #### 72", "#### 72", r"#### (-?[\d,.]+)", True),
        ("it is 72", "#### 72", r"#### (-?[\d,.]+)", False),
        ("the answer is 72", "72", r"is (\d+)", True),
        ("yes", "no", r"yes|no", False),
        ("I say yes", "yes", r"yes|no", True),
        ("", "x", r"(x)?", False),
    ],
)
def test_what_counts_as_right(written, answer, extract, same):
    assert answers.right(written, answer, extract) is same


@given(st.integers(1, 400).flatmap(lambda count: st.tuples(st.just(count), st.integers(0, count))))
def test_shares_lie_in_their_interval(drawn):
    count, good = drawn
    found = answers.share([True] * good + [False] * (count - good))
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.high - found.low > 0.5 / (count + 4), "none and all are no certainty"


def test_the_interval_is_wilsons_and_covers():
    found = answers.share([True] * 7 + [False] * 13)
    assert (found.low, found.high) == pytest.approx((0.1812, 0.5671), abs=1e-4)  # Newcombe 1998, by its equation 3
    random = np.random.default_rng(0)
    held = [(interval := answers.share((random.random(100) < 0.9).tolist())).low <= 0.9 <= interval.high for _ in range(500)]
    assert 0.92 <= np.mean(held) <= 0.98


def test_differences_are_told_apart_from_noise():
    base = [True] * 60 + [False] * 40
    worse = [True] * 40 + [False] * 60
    assert answers.judge(base, worse, worse).note == ""
    shuffled = [True] * 57 + [False] * 3 + [True] * 2 + [False] * 38
    found = answers.judge(base, worse, shuffled)
    assert (found.gained, found.lost) == (2, 3)
    assert "within the error" in found.note
    assert "too few" in answers.judge(base[:30], base[:30], base[:30]).note
    assert "hardly any" in answers.judge([False] * 80, [False] * 80, [False] * 80).note
    assert answers._chance(0, 6) == pytest.approx(2 / 64)
    assert answers._chance(3, 3) == 1
    assert math.isclose(answers._chance(1, 9), 22 / 1024)


def test_rows_are_prompts_with_their_answers(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": "1 + 1 =", "a": " 2"}\n{"q": "blank:", "a": " "}\n{"q": "2 + 2 =", "a": " 4"}\n')
    assert list(read_answers(path, "q", "a")) == [("1 + 1 =", " 2"), ("", ""), ("2 + 2 =", " 4")]
    assert list(read_documents(path, "q", "a")) == ["1 + 1 = 2", "", "2 + 2 = 4"]
    with pytest.raises(NarrowError, match="no column 'b'"):
        list(read_documents(path, "q", "b"))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(NarrowError, match="plain text, which has no column"):
        list(read_documents(tmp_path / "a.txt", "q", "a"))


def test_only_held_out_rows_are_asked(tmp_path, reader):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "{n} + 1 =", "answer": " {n + 1}"}}\n' for n in range(40)))
    data = DatasetPath(path=path, answer=Answer(prompts=5))
    found = corpus.tokenize(path, "text", reader.tokenizer, 0, answer="answer").documents
    held = found.take(np.arange(20, 40))
    # One document stands on both sides, as where the last part of a text is held out.
    training = found.take(np.arange(0, 22))
    assert [int(p.answer) for p in answers.pick(data, held, training)] == [23, 24, 25, 26, 27]
    assert [int(p.answer) for p in answers.pick(data, held, None)] == [21, 22, 23, 24, 25]
    assert answers.pick(data, held.take(np.arange(0, 2)), training) == []
