"""Retention and its interval, the split of documents, and what they are measured on."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import tiny_model

from narrow_engine import corpus, skills


def some_documents(lengths, seed=0):
    random = np.random.default_rng(seed)
    tokens = random.integers(0, 320, sum(lengths)).astype(np.uint32)
    hashes = random.integers(0, 2**63, len(lengths)).astype(np.uint64)
    return corpus.Documents(tokens, np.cumsum([0, *lengths]), hashes)


def quiet(*_):
    return None


def test_losses_are_those_of_each_document_alone():
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    found = some_documents([5, 40, 17, 2, 1])
    base, second = skills.measure(model, [other], found, 16, quiet)
    assert base.tokens.tolist() == [4, 39, 16, 1, 0]
    for number in range(4):
        document = torch.from_numpy(found[number].astype(np.int64))
        total, kl, agree = 0.0, 0.0, 0
        for at in range(0, len(document) - 1, 16):
            window = document[at : at + 17]
            with torch.no_grad():
                a, b = (m(window[None, :-1]).logits[0].log_softmax(-1) for m in (model, other))
            total -= b.gather(1, window[1:, None]).sum().item()
            kl += (a.exp() * (a - b)).sum().item()
            agree += int((a.argmax(-1) == b.argmax(-1)).sum())
        assert second.loss[number] == pytest.approx(total, rel=1e-4)
        assert second.kl[number] == pytest.approx(kl, rel=1e-3)
        assert second.agree[number] == agree
    assert base.kl.sum() == pytest.approx(0, abs=1e-3)


def test_retention_is_the_ratio_of_perplexities():
    tokens = np.full(20, 10.0)
    base = skills.Measured(tokens, np.full(20, 20.0), tokens * 0, tokens)
    other = skills.Measured(tokens, np.full(20, 25.0), tokens * 0, tokens)
    kept = skills.retention(base, other, 0)
    assert kept.value == pytest.approx(math.exp(2.0 - 2.5))
    assert kept.low == pytest.approx(kept.value) == kept.high


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """1,000 samples of documents of a known population, of very unlike lengths: 93 to 97 of 100 intervals hold the true value."""
    random = np.random.default_rng(0)
    hits = 0
    for trial in range(1000):
        tokens = np.clip(random.lognormal(5.5, 1, 40), 2, 1024).round()
        difference = -0.2 + 0.1 * random.standard_normal(40)
        base = skills.Measured(tokens, tokens * 2.0, tokens, tokens)
        other = skills.Measured(tokens, tokens * (2.0 - difference), tokens, tokens)
        kept = skills.retention(base, other, trial)
        hits += kept.low <= math.exp(-0.2) <= kept.high
    assert 930 <= hits <= 970


def test_an_interval_of_next_to_nothing_is_no_error():
    for sums, tokens in (([3.0], [2.0]), ([3.0, 0.0], [2.0, 0.0]), ([3.0, 6.0], [2.0, 4.0]), ([0.0] * 30, [2.0] * 30)):
        found = skills.interval(np.array(sums), np.array(tokens), 0)
        assert found.low == pytest.approx(found.value) == pytest.approx(found.high)
    few = skills.interval(np.array([1.0, 9.0]), np.array([10.0, 10.0]), 0)
    assert few.low < few.value == 0.5 < few.high


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40), wanted=st.integers(1, 500), copies=st.integers(0, 3))
@example(lengths=[48, 1, 2], wanted=4, copies=0)
def test_the_split_loses_nothing_and_keeps_texts_on_one_side(lengths, wanted, copies):
    found = some_documents(lengths)
    hashes = found.hashes.copy()
    hashes[:copies] = hashes[0]
    found = corpus.Documents(found.tokens, found.offsets, hashes)
    told = []
    training, held_out = corpus.hold_out(found, wanted, 0.1, "The target", lambda *event: told.append(event[3]["code"]))
    room = max(1, min(wanted, len(found.tokens) // 10))
    assert room / 2 <= len(held_out.tokens) <= room
    assert sorted([*training.tokens[:], *held_out.tokens[:]]) == sorted(found.tokens)
    for side in (training, held_out):
        assert len(side.offsets) == len(side.hashes) + 1
        assert (side.lengths > 0).all()
        assert side.offsets[-1] == len(side.tokens)
    if not told:
        assert not set(training.hashes.tolist()) & set(held_out.hashes.tolist())


def test_a_few_long_documents_give_their_tail_and_say_so():
    for lengths in ([1000], [500, 500], [900, 90, 10]):
        told: list[str] = []
        training, held_out = corpus.hold_out(
            some_documents(lengths), 10_000, 0.1, "The target", lambda *event, told=told: told.append(event[3]["code"])
        )
        assert (len(training.tokens), len(held_out.tokens)) == (900, 100)
        assert told == ([] if lengths == [900, 90, 10] else ["held_out_tail"])


def test_a_sample_takes_stretches_of_many_documents():
    found = some_documents([5000] * 100)
    taken = corpus.sample(found, 6400, 64, 0)
    assert len(taken) > 40
    assert taken.lengths.max() <= 101
    assert len(taken.tokens) >= 6400
    again = corpus.sample(found, 6400, 64, 0)
    assert np.array_equal(taken.tokens, again.tokens)


def test_notes_say_what_to_doubt():
    sure = skills.Interval(value=1.1, low=1.05, high=1.2)
    assert "proves little" in skills.note("keep", sure, 50)
    assert "too few" in skills.note("keep", sure, 3)
    assert "trained alike, it has 1.200 (1.100 – 1.300)" in skills.note(
        "keep", sure, 50, 1.0, skills.Interval(value=1.2, low=1.1, high=1.3)
    )
    assert "Still largely there" in skills.note("forget", sure, 50)
    assert "within the error" in skills.note("watch", skills.Interval(value=0.99, low=0.97, high=1.01), 50)
    lost = skills.Interval(value=0.4, low=0.3, high=0.45)
    assert skills.note("watch", lost, 50) == ""
    assert "of little use" in skills.note("keep", lost, 50)
    assert skills.note("watch", lost, 50, 1.5) == "Without the trimmed tokens its text takes 1.50 times as many."
    assert "proves little" in skills.note("keep", sure, 50, 1.5)


def test_losses_in_other_tokens_are_counted_by_the_bases(tmp_path):
    """A text of 10 tokens of the base, 20 nats, takes 16 tokens under another vocabulary, 24 nats: exp(2.0 − 2.4)."""
    base = skills.Measured(np.full(20, 10.0), np.full(20, 20.0), np.zeros(20), np.full(20, 10.0))
    base.save(tmp_path / "base.npz")
    other = skills.Measured(np.full(20, 16.0), np.full(20, 24.0), np.zeros(20), np.full(20, 16.0))
    first = skills.Measured.load(tmp_path / "base.npz")
    counted = other.per(first)
    assert skills.fit(counted, 0).loss == pytest.approx(2.4)
    kept = skills.retention(first, counted, 0)
    assert kept.value == pytest.approx(math.exp(-0.4)) == pytest.approx(kept.low)
