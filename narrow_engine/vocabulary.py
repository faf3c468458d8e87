"""Trimming a vocabulary to what one domain's text uses: which tokens stay, and the tokenizer's files with new numbers.

A tokenizer may use a token only if it can still reach it. Byte-level BPE (GPT-2, Llama 3, Qwen) builds a token by merging
neighbours, lowest rank first. No merge crosses the border of what becomes a token, so a token is built inside a word
just as it is built alone: to keep it is to keep what its own building passes through, and then every word whose tokens are
all kept is cut as before. Unigram takes the most likely way through the pieces; if that way is kept it is still the most
likely one, as long as an unknown character costs the same: its price hangs on the least likely piece, which therefore stays.

Whatever text comes, what the base could write can still be written: all single characters stay (in a byte-level
vocabulary these are the 256 bytes), or, where a tokenizer falls back to bytes (Llama 2, Gemma), the 256 byte pieces. So do
all added tokens and every token that a config names. No torch.
"""

import json
import math
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from narrow_engine.errors import NarrowError
from narrow_engine.model_files import TOKENIZER_FILES, read_json

LARGE, MULTIPLE = 32_768, 64
"""A vocabulary of this size is rounded up to whole tiles, as kernels like them; in a small one that would show."""

LONGEST = 512
"""Characters of a token, beyond which its building is not followed: it takes their square. No trained vocabulary has such."""

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "▁"
"""SentencePiece's sign for a space, which its decoders read before they put bytes together."""
_ODD = ("continuing_subword_prefix", "end_of_word_suffix", "dropout")
_LISTS = ("suppress_tokens", "begin_suppress_tokens")
_LISTS_OF_LISTS = ("bad_words_ids", "force_words_ids")
_REPLACED = ("vocab.json", "merges.txt")
"""Older forms of what tokenizer.json says; they are left out, since nothing that reads the latter needs them."""


def choose(tokenizer: Tokenizer, counts: NDArray[np.int64], named: set[int], room: int | None) -> list[int]:
    """The tokens to keep, by their number in the base, ascending.

    `counts` says how often the target's text has each token of the model; `named` are the tokens that its configs name.
    Without `room` all that occur are kept, so the target is cut as before; with it the most frequent that fit into `room`.
    What must stay is kept even if it is more than that. Raises NarrowError (tokenizer_not_trimmed).
    """
    raw = json.loads(tokenizer.to_str())
    _require_known(raw["model"])
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    ranks = {tuple(pair): rank for rank, pair in enumerate(raw["model"].get("merges", ()))}

    def needed(token: str) -> set[int]:
        return {vocabulary[part] for part in _built_from(token, ranks)}

    kept = named | set(tokenizer.get_added_tokens_decoder()) | {ids[at] for ids, at in _template(raw["post_processor"])}
    for token in _indispensable(raw, vocabulary):
        kept |= needed(token)
    tokens = sorted(vocabulary, key=lambda token: (-counts[vocabulary[token]], vocabulary[token]))
    if room is None:
        for token in tokens:
            if counts[vocabulary[token]]:
                kept |= needed(token)
        room = math.ceil(len(kept) / MULTIPLE) * MULTIPLE if len(counts) >= LARGE else len(kept)
    for token in tokens:
        if len(kept) >= room:
            break
        more = needed(token) - kept
        if len(kept) + len(more) <= room:
            kept |= more
    return sorted(kept)


def _require_known(model: dict[str, Any]) -> None:
    kind, odd = model["type"], [key for key in _ODD if model.get(key)]
    if kind == "BPE" and odd:
        kind = f"BPE with {odd[0]}"
    if kind not in ("BPE", "Unigram"):
        raise NarrowError(
            "tokenizer_not_trimmed",
            f"Tokenizers of type {kind} cannot be trimmed, only plain BPE and Unigram: leave 'token' out of method.units.",
        )


def _built_from(token: str, ranks: dict[tuple[str, str], int]) -> set[str]:
    """The token and all that it is merged from."""
    if len(token) > LONGEST:
        return {token}
    parts, passed = list(token), {token}
    while len(parts) > 1:
        at = min(range(len(parts) - 1), key=lambda i: ranks.get((parts[i], parts[i + 1]), math.inf))
        if (parts[at], parts[at + 1]) not in ranks:
            # Not built by merges: a piece of a Unigram, an added token, a word that is only looked up as a whole.
            return {token}
        passed |= {parts[at], parts[at + 1]}
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return passed


def _indispensable(raw: dict[str, Any], vocabulary: dict[str, int]) -> Iterable[str]:
    """Tokens without which some text that the base can write could not be written any more, or would cost another price."""
    model = raw["model"]
    if model["type"] == "Unigram":
        pieces: list[tuple[str, float]] = model["vocab"]
        yield min(pieces, key=lambda piece: piece[1])[0]
        if model["unk_id"] is not None:
            yield pieces[model["unk_id"]][0]
    elif model["unk_token"] in vocabulary:
        yield model["unk_token"]
    pieces_of_bytes = [token for token in vocabulary if _BYTE.fullmatch(token)] if model["byte_fallback"] else []
    yield from pieces_of_bytes
    unknown_is_known = model["type"] == "BPE" or model["unk_id"] is not None
    if len(pieces_of_bytes) == 256 and unknown_is_known and not _has_type(raw, "ByteLevel"):
        yield from {_SPACE} & vocabulary.keys()
        return
    for token in vocabulary:
        if len(token) == 1 or any(character not in vocabulary for character in token):
            yield token


def renumbered(tokenizer: Tokenizer, kept: list[int]) -> Tokenizer:
    """The tokenizer of the kept tokens, which are numbered from 0 in their old order.

    Raises NarrowError (bad_tokenizer) where the library would number them otherwise.
    """
    new = {old: number for number, old in enumerate(kept)}
    raw = json.loads(tokenizer.to_str())
    model = raw["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [piece for old, piece in enumerate(model["vocab"]) if old in new]
        model["unk_id"] = new.get(model["unk_id"])
    else:
        model["vocab"] = {token: new[old] for token, old in model["vocab"].items() if old in new}
        model["merges"] = [
            (a, b) for a, b in model["merges"] if a in model["vocab"] and b in model["vocab"] and a + b in model["vocab"]
        ]
    for added in raw["added_tokens"]:
        added["id"] = new[added["id"]]
    if raw["padding"]:
        raw["padding"]["pad_id"] = new.get(raw["padding"]["pad_id"], 0)
    for ids, at in _template(raw["post_processor"]):
        ids[at] = new[ids[at]]
    small = Tokenizer.from_str(json.dumps(raw))
    if small.get_vocab() != {token: new[old] for token, old in tokenizer.get_vocab().items() if old in new}:
        raise NarrowError(
            "bad_tokenizer",
            "The tokens of tokenizer.json are numbered with gaps or twice, so they cannot be numbered anew: leave 'token' out "
            "of method.units.",
        )
    return small


def write_files(source: Path, out: Path, kept: list[int]) -> None:
    """Writes the tokenizer's files of a model folder with the kept tokens only."""
    new = {old: number for number, old in enumerate(kept)}
    out.mkdir(parents=True)
    renumbered(Tokenizer.from_file(str(source / "tokenizer.json")), kept).save(str(out / "tokenizer.json"))
    for name in TOKENIZER_FILES:
        if name == "tokenizer.json" or name in _REPLACED or not (source / name).is_file():
            continue
        if not name.endswith(".json"):
            shutil.copyfile(source / name, out / name)
            continue
        content = read_json(source / name)
        if name == "added_tokens.json":
            content = {token: new[old] for token, old in content.items() if old in new}
        elif isinstance(content, dict):
            content |= renumber_config(content, kept)
            decoder = content.get("added_tokens_decoder")
            if isinstance(decoder, dict):
                content["added_tokens_decoder"] = {str(new[int(k)]): v for k, v in decoder.items() if int(k) in new}
        (out / name).write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def named_ids(*configs: dict[str, Any]) -> set[int]:
    """Every token that a config names by number, such as `eos_token_id`."""
    return {
        number
        for config in configs
        for key, value in config.items()
        if key.endswith("_token_id")
        for number in (value if isinstance(value, list) else [value])
        if isinstance(number, int) and not isinstance(number, bool)
    }


def renumber_config(config: dict[str, Any], kept: list[int]) -> dict[str, Any]:
    """What a config, generation config or tokenizer config says of tokens by number, for the `kept` ones by their new numbers.

    Lists lose the tokens that are gone.
    """
    new = {old: number for number, old in enumerate(kept)}
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key.endswith("_token_id") and isinstance(value, int) and value >= 0:
            changed[key] = new.get(value)
        elif isinstance(value, list) and (key.endswith("_token_id") or key in _LISTS):
            changed[key] = [new[old] for old in value if old in new]
        elif isinstance(value, list) and key in _LISTS_OF_LISTS:
            changed[key] = [[new[old] for old in words] for words in value if all(old in new for old in words)] or None
    return changed


def widths(tokenizer: Tokenizer, size: int) -> NDArray[np.int64]:
    """How much text each token stands for, [size]: equal sums of two tokenizers with one vocabulary are equal texts."""
    found = np.ones(size, np.int64)
    bytes_stand_for_text = json.loads(tokenizer.to_str())["model"].get("byte_fallback")
    for token, number in tokenizer.get_vocab().items():
        found[number] = 1 if bytes_stand_for_text and _BYTE.fullmatch(token) else len(token.encode())
    return found


def _has_type(part: Any, kind: str) -> bool:
    """Whether a component of this type is in a tokenizer.json, outside its model."""
    if isinstance(part, dict):
        return part.get("type") == kind or any(_has_type(value, kind) for key, value in part.items() if key != "model")
    return isinstance(part, list) and any(_has_type(value, kind) for value in part)


def _template(processor: dict[str, Any] | None) -> Iterable[tuple[list[Any], int]]:
    """Where a post-processor, or one within it, names a token by number: (list, index)."""
    if processor is None:
        return
    for special in processor.get("special_tokens", {}).values():
        yield from ((special["ids"], at) for at in range(len(special["ids"])))
    yield from ((processor[end], 1) for end in ("sep", "cls") if end in processor)
    for inner in processor.get("processors", ()):
        yield from _template(inner)
