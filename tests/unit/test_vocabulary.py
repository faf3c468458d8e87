"""A trimmed vocabulary cuts the target's text as before, writes any text that the base could, and has no number wrong."""

import json
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import documents
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from narrow_engine import corpus, vocabulary
from narrow_engine.errors import NarrowError

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TARGET = documents(count=25)
OTHER = documents("german", 12)


def byte_level():
    """As GPT-2 has it; the end of text is in the model's vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TARGET + OTHER, trainer)
    return tokenizer


def llama3():
    """Converted from tiktoken: a merge for every way to split a token, whole words are looked up first, BOS by a template."""
    raw = json.loads(byte_level().to_str())
    old = [token for token in raw["model"]["vocab"] if token != "<|end|>"]
    # A word that merges lead elsewhere, so that only the look-up finds it.
    tokens = {token: number for number, token in enumerate([*old, "Ġimportret"])}
    splits = [(tokens[t], t[:at], t[at:]) for t in tokens for at in range(1, len(t)) if t[:at] in tokens and t[at:] in tokens]
    raw["model"] |= {"vocab": tokens, "merges": [(a, b) for _, a, b in sorted(splits)], "ignore_merges": True}
    raw["added_tokens"] = []
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    tokenizer.add_special_tokens(["<|begin|>", "<|end|>"])
    template = processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return tokenizer


def sentencepiece():
    """As Llama 2 and Gemma have it: characters, and bytes for those that are unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=["<unk>", "<s>", "</s>", *BYTES], show_progress=False, max_token_length=12
    )
    tokenizer.train_from_iterator([line for text in TARGET + OTHER for line in text.split("\n")], trainer)
    return _without_added_bytes(tokenizer)


def unigram(fallback=True):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "</s>", *(BYTES if fallback else ())]
    trainer = trainers.UnigramTrainer(vocab_size=1000, unk_token="<unk>", special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([word for text in TARGET + OTHER for word in text.split("\n")], trainer)
    raw = json.loads(tokenizer.to_str())
    # The unknown piece stands last, so that its number changes.
    pieces = raw["model"]["vocab"]
    raw["model"] |= {"byte_fallback": fallback, "vocab": [*pieces[1:], pieces[0]], "unk_id": len(pieces) - 1}
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Metaspace()])
    return _without_added_bytes(tokenizer)


def _without_added_bytes(tokenizer):
    """Byte pieces are ordinary entries; the trainers only take them as special tokens."""
    raw = json.loads(tokenizer.to_str())
    raw["added_tokens"] = [added for added in raw["added_tokens"] if added["content"] not in BYTES]
    return Tokenizer.from_str(json.dumps(raw))


KINDS = {
    "byte_level": byte_level,
    "llama3": llama3,
    "sentencepiece": sentencepiece,
    "unigram": unigram,
    "unigram_without_bytes": lambda: unigram(fallback=False),
}


@cache
def made(kind):
    return KINDS[kind]()


def count(tokenizer):
    encoded = tokenizer.encode_batch(TARGET)
    return np.bincount([number for one in encoded for number in one.ids], minlength=tokenizer.get_vocab_size())


@cache
def trimmed(kind, room=None):
    tokenizer = made(kind)
    kept = vocabulary.choose(tokenizer, count(tokenizer), set(), room)
    return vocabulary.renumbered(tokenizer, kept), kept


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_that_was_counted_is_cut_as_before(kind):
    tokenizer, (small, kept) = made(kind), trimmed(kind)
    assert len(kept) < 0.9 * tokenizer.get_vocab_size(), "the vocabulary holds German, which the target does not use"
    assert kept == sorted(set(kept))
    for before, after in zip(tokenizer.encode_batch(TARGET), small.encode_batch(TARGET), strict=True):
        assert [kept[number] for number in after.ids] == before.ids
    assert {token: kept[number] for token, number in small.get_vocab().items()}.items() <= tokenizer.get_vocab().items()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(
    text=st.text(max_size=30) | st.sampled_from(OTHER).map(lambda text: text[:200]) | st.sampled_from(["import", " importret"])
)
def test_any_text_that_the_base_can_write_can_still_be_written(kind, text):
    def again(tokenizer):
        return tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)

    written = again(made(kind))
    assert again(trimmed(kind)[0]) == written
    assert again(trimmed(kind, 1)[0]) == written, "the smallest vocabulary is whole too"
    if kind in ("byte_level", "llama3"):
        assert written == text


@pytest.mark.parametrize("kind", KINDS)
def test_a_room_is_filled_with_the_most_frequent(kind):
    least, needed = len(trimmed(kind, 1)[1]), len(trimmed(kind)[1])
    for room in (least + 17, needed, needed + 13):
        assert len(trimmed(kind, room)[1]) == room
    assert trimmed(kind, needed)[1] == trimmed(kind)[1]
    frequent, kept = count(made(kind)), trimmed(kind, least + 40)[1]
    chosen = np.setdiff1d(kept, trimmed(kind, 1)[1])
    assert np.median(frequent[chosen]) > 3 * np.median(np.delete(frequent, kept))


@pytest.mark.parametrize("room", [None, 400])
def test_what_merges_could_build_they_still_build(room):
    small, _ = trimmed("byte_level", room)
    assert [token for token in small.get_vocab() if token != "<|end|>" and len(small.model.tokenize(token)) > 1] == []


def test_the_price_of_an_unknown_character_stays():
    """Without the least likely piece `a` would become unknown, at 10 below the next: less than what `ab` and `c` cost."""
    pieces = [("<unk>", 0.0), ("ab", -12.0), ("c", -12.0), ("a", -50.0), ("bc", -1.0), *((byte, 0.0) for byte in BYTES)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    assert tokenizer.encode("abc").tokens == ["ab", "c"]
    counts = np.bincount(tokenizer.encode("abc").ids + tokenizer.encode("bc").ids, minlength=len(pieces))
    small = vocabulary.renumbered(tokenizer, vocabulary.choose(tokenizer, counts, set(), None))
    assert small.encode("abc").tokens == ["ab", "c"]


def test_specials_are_all_there_and_in_the_template():
    tokenizer, (small, kept) = made("llama3"), trimmed("llama3")
    begin = small.token_to_id("<|begin|>")
    assert small.encode("import").ids[0] == begin
    assert kept[begin] == tokenizer.token_to_id("<|begin|>")
    assert small.decode(small.encode("a<|end|>b").ids) == tokenizer.decode(tokenizer.encode("a<|end|>b").ids) == "ab"


def test_merges_written_in_the_old_way_are_the_same(tmp_path):
    raw = json.loads(made("byte_level").to_str())
    raw["model"]["merges"] = [" ".join(pair) for pair in raw["model"]["merges"]]
    old = Tokenizer.from_str(json.dumps(raw))
    assert vocabulary.choose(old, count(old), set(), None) == trimmed("byte_level")[1]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (models.WordPiece({"[UNK]": 0, "a": 1}), "WordPiece"),
        (models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), "WordLevel"),
        (models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>"), "BPE with end_of_word_suffix"),
        (models.BPE({"a": 0}, [], dropout=0.5), "BPE with dropout"),
    ],
)
def test_what_cannot_be_trimmed_is_said(model, words):
    tokenizer = Tokenizer(model)
    with pytest.raises(NarrowError, match=f"{words} cannot be trimmed") as raised:
        vocabulary.choose(tokenizer, np.ones(2, np.int64), set(), None)
    assert raised.value.code == "tokenizer_not_trimmed"


def test_numbers_with_gaps_are_refused():
    """The library numbers added tokens behind the others; a kept number between them that nothing has shifts them."""
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 3}, []))
    tokenizer.add_special_tokens(["<s>"])
    assert tokenizer.token_to_id("<s>") == 2
    with pytest.raises(NarrowError, match="numbered with gaps"):
        vocabulary.renumbered(tokenizer, [0, 2, 3])


def test_large_vocabularies_are_rounded_up(monkeypatch):
    monkeypatch.setattr(vocabulary, "LARGE", 100)
    tokenizer = made("byte_level")
    kept = vocabulary.choose(tokenizer, count(tokenizer), set(), None)
    assert len(kept) % 64 == 0
    assert 0 <= len(kept) - len(trimmed("byte_level")[1]) < 64
    assert set(kept) >= set(trimmed("byte_level")[1])


def test_configs_name_tokens_by_their_new_numbers():
    config = {
        "bos_token_id": 7,
        "eos_token_id": [7, 9, 8],
        "pad_token_id": -1,
        "forced_eos_token_id": None,
        "suppress_tokens": [3, 9],
        "bad_words_ids": [[9, 7], [3]],
        "hidden_size": 7,
    }
    assert vocabulary.named_ids(config) == {7, 8, 9, -1}
    assert vocabulary.renumber_config(config, [0, 7, 8, 9]) == {
        "bos_token_id": 1,
        "eos_token_id": [1, 3, 2],
        "suppress_tokens": [3],
        "bad_words_ids": [[3, 1]],
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_load_in_stock_transformers(kind, tmp_path):
    tokenizer, source = made(kind), tmp_path / "source"
    source.mkdir()
    end = tokenizer.token_to_id("<|end|>" if "<|end|>" in tokenizer.get_vocab() else "</s>")
    tokenizer.enable_padding(pad_id=end, pad_token=tokenizer.id_to_token(end))
    tokenizer.save(str(source / "tokenizer.json"))
    tokenizer.no_padding()
    decoder = {str(end): {"content": tokenizer.id_to_token(end), "special": True}}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.id_to_token(end),
        "added_tokens_decoder": decoder,
    }
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "special_tokens_map.json").write_text(json.dumps({"eos_token": tokenizer.id_to_token(end)}))
    (source / "added_tokens.json").write_text(json.dumps({tokenizer.id_to_token(end): end}))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "vocab.json").write_text(json.dumps(tokenizer.get_vocab()))
    (source / "merges.txt").write_text("a b")
    small, kept = trimmed(kind)
    vocabulary.write_files(source, tmp_path / "out", kept)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in source.iterdir()} - {"vocab.json", "merges.txt"}
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(loaded) == len(kept)
    assert kept[loaded.eos_token_id] == end
    assert kept[json.loads((tmp_path / "out" / "added_tokens.json").read_text())[tokenizer.id_to_token(end)]] == end
    written = {name: json.loads((tmp_path / "out" / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json")}
    assert kept[written["tokenizer.json"]["padding"]["pad_id"]] == end
    assert [kept[int(number)] for number in written["tokenizer_config.json"]["added_tokens_decoder"]] == [end]
    for text in (*TARGET[:5], *OTHER[:3]):
        assert loaded.encode(text) == small.encode(text).ids


@pytest.mark.parametrize("kind", KINDS)
def test_stretches_of_both_readings_are_the_same_text(kind):
    """German under the vocabulary of Python: every stretch is cut where both have a token's end."""
    tokenizer, (small, kept) = made(kind), trimmed(kind)
    sides = []
    for reader in (tokenizer, small):
        encoded = [encoding.ids for encoding in reader.encode_batch(OTHER)]
        offsets = np.cumsum([0, *map(len, encoded)])
        sides.append(corpus.Documents(np.concatenate(encoded).astype(np.uint32), offsets, np.arange(len(OTHER), dtype=np.uint64)))
    widths = (vocabulary.widths(tokenizer, tokenizer.get_vocab_size()), vocabulary.widths(small, len(kept)))
    texts = corpus.Reading(*sides, widths)
    assert len(sides[1].tokens) > 1.2 * len(sides[0].tokens)
    drawn = corpus.sample(sides[0], 1000, 8, 0)
    first, second = texts.at(drawn)
    assert len(first) == len(second) == len(drawn)
    assert len(first.tokens) > 0.8 * len(drawn.tokens)
    for one, other in zip((first[i] for i in range(len(first))), (second[i] for i in range(len(second))), strict=True):
        assert tokenizer.decode(one[1:].tolist()) == small.decode(other[1:].tolist())
        assert len(one) >= 1
        assert len(other) >= 1
    whole = texts.at(sides[0])
    assert np.array_equal(whole[0].tokens, sides[0].tokens)
    assert np.array_equal(whole[1].tokens, sides[1].tokens)


def test_two_tokenizers_that_spell_differently_are_refused():
    one = corpus.Documents(np.array([0, 1], np.uint32), np.array([0, 2]), np.zeros(1, np.uint64))
    texts = corpus.Reading(one, corpus.Documents(one.tokens, one.offsets, one.hashes), (np.array([1, 2]), np.array([1, 3])))
    with pytest.raises(NarrowError, match="does not spell the text"):
        texts.at(one)


def test_added_tokens_that_normalise_stay():
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<tool>", normalized=True)])
    kept = vocabulary.choose(tokenizer, np.bincount([0], minlength=tokenizer.get_vocab_size()), set(), 1)
    small = vocabulary.renumbered(tokenizer, kept)
    assert small.encode("x<tool>y").tokens == ["x", "<tool>", "y"]
