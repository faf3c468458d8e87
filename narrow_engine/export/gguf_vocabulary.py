"""The tokenizer of a folder as a GGUF file's metadata, so that llama.cpp cuts text into the same tokens.

llama.cpp reads no tokenizer.json: it has tokenizers of its own, three of which serve language models, and a name for each way
of splitting text beforehand. What a tokenizer.json says is recognised here, part by part, and a part that is not known is
refused: a tokenizer that is nearly the same makes a model that is quietly worse.

    gpt2    byte-level BPE with merges; `tokenizer.ggml.pre` names the split
    llama   SentencePiece's BPE, without merges: the neighbours are joined whose joint piece has the best score
    t5      Unigram
"""

import base64
import json
import re
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Tokenizer

from narrow_engine.errors import NarrowError
from narrow_engine.model_files import read_json

SPACE = "▁"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{{0}}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{{0}}|"
    r"{1}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)

Step = tuple[str, Any]
SPLITS: dict[tuple[tuple[Step, ...], bool], str] = {
    ((("bytes", True),), False): "gpt-2",
    ((("split", _GPT2), ("bytes", False)), False): "gpt-2",
    ((("digits", True), ("bytes", True)), False): "smollm",
    ((("split", _WORDS + r"\p{N}{1,3}" + _REST), ("bytes", False)), True): "llama-bpe",
    ((("split", _WORDS + r"\p{N}{1,3}" + _REST), ("bytes", False)), False): "dbrx",
    ((("split", _WORDS + r"\p{N}" + _REST), ("bytes", False)), False): "qwen2",
    ((("split", _CASED.replace("{0}", f"{_CONTRACTIONS}?").replace("{1}", r"\p{N}{1,3}")), ("bytes", False)), False): "gpt-4o",
    ((("split", _CASED.replace("{0}", "").replace("{1}", r"\p{N}")), ("bytes", False)), True): "tekken",
    ((("split", r"\p{N}{1,3}"), ("split", "[一-龥぀-ゟ゠-ヿ]+"), ("split", _DEEPSEEK), ("bytes", False)), False): "deepseek-v3",
}
"""How a byte-level tokenizer splits text, and whether words that are tokens are left whole (`ignore_merges`), to llama.cpp's
name for just that. Where it has many names for one way, the one that also takes `clean_up_tokenization_spaces` as false, or the
oldest. From llama.cpp's src/llama-vocab.cpp."""


def add_vocabulary(writer: gguf.GGUFWriter, folder: Path, size: int) -> list[str]:
    """Writes the tokenizer and the chat template of a model folder whose embedding has `size` rows.

    Returns a sentence for each text that llama.cpp may cut otherwise. Raises NarrowError (gguf_unsupported).
    """
    raw = read_json(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = raw["model"]
    odd = next((key for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout") if model.get(key)), None)
    if odd:
        raise _refuse(f"the tokenizer is a BPE with {odd}")
    steps = _steps(raw["pre_tokenizer"])
    if model["type"] == "Unigram":
        notes, scores = _unigram(writer, raw, steps), dict(model["vocab"])
    elif model["type"] == "BPE" and any(kind == "bytes" for kind, _ in steps):
        notes, scores = _byte_level(writer, raw, steps), {}
    elif model["type"] == "BPE" and model.get("byte_fallback"):
        notes, scores = _sentencepiece(writer, raw, steps)
    else:
        raise _refuse(f"the tokenizer is a {model['type']} that works neither on bytes nor like SentencePiece")
    _add_tokens(writer, raw, tokenizer, size, scores)
    notes += _add_special(writer, folder, tokenizer)
    loose = [token["content"] for token in raw["added_tokens"] if token["lstrip"] or token["rstrip"] or token["single_word"]]
    if loose:
        notes.append(f"llama.cpp leaves spaces around special tokens alone, the tokenizer takes them in at {loose[0]!r}.")
    return notes


def _refuse(why: str) -> NarrowError:
    return NarrowError(
        "gguf_unsupported", f"llama.cpp would cut text into other tokens, since {why}: leave 'gguf' out of export."
    )


def _steps(part: dict[str, Any] | None) -> list[Step]:
    """A pre-tokenizer as a flat list. Raises NarrowError (gguf_unsupported)."""
    if part is None:
        return []
    kind = part["type"]
    if kind == "Sequence":
        return [step for inner in part["pretokenizers"] for step in _steps(inner)]
    if kind == "Split":
        pattern = part["pattern"].get("Regex", part["pattern"])
        # Both keep every match of a pattern that leaves nothing out. Some files have line ends themselves, some escaped.
        if isinstance(pattern, str) and (part["behavior"], part["invert"]) in (("Isolated", False), ("Removed", True)):
            return [("split", pattern.replace("\r", r"\r").replace("\n", r"\n"))]
        return [("split", (json.dumps(pattern), part["behavior"], part["invert"]))]
    if kind == "ByteLevel":
        return [("bytes", part["use_regex"])] + ([("space", None)] if part["add_prefix_space"] else [])
    if kind == "Digits":
        return [("digits", part["individual_digits"])]
    if kind == "Metaspace":
        scheme = part.get("prepend_scheme", "always" if part.get("add_prefix_space", True) else "never")
        return [("metaspace", (part["replacement"], scheme, part.get("split", True)))]
    raise _refuse(f"it knows no pre-tokenizer {kind}")


def _normalizers(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A normalizer as a flat list."""
    if part is None:
        return []
    return [step for inner in part["normalizers"] for step in _normalizers(inner)] if part["type"] == "Sequence" else [part]


def _byte_level(writer: gguf.GGUFWriter, raw: dict[str, Any], steps: list[Step]) -> list[str]:
    """BPE over bytes. Raises NarrowError (gguf_unsupported)."""
    name = SPLITS.get((tuple(steps), bool(raw["model"].get("ignore_merges"))))
    if name is None:
        shown = ", ".join(f"{kind} {value}" for kind, value in steps)
        raise _refuse(f"it knows no name for how the tokenizer splits text ({shown[:200]})")
    notes = []
    for normalizer in _normalizers(raw["normalizer"]):
        if normalizer["type"] != "NFC":
            raise _refuse(f"it has no normalizer {normalizer['type']}")
        notes.append("llama.cpp does not compose characters (NFC): text with accents apart from their letters is cut otherwise.")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in raw["model"]["merges"]]
    writer.add_token_merges([f"{a} {b}" for a, b in merges])
    return notes


def _sentencepiece(writer: gguf.GGUFWriter, raw: dict[str, Any], steps: list[Step]) -> tuple[list[str], dict[str, float]]:
    """BPE with spaces as ▁ and bytes for what has no piece; returns notes and scores. Raises NarrowError (gguf_unsupported).

    A merge's rank becomes its piece's score. That is the same order if the merges of one piece follow each other and every
    pair whose joint text is a piece is a merge, as in every tokenizer that was converted from SentencePiece.
    """
    vocabulary: dict[str, int] = raw["model"]["vocab"]
    pairs = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in raw["model"]["merges"]]
    known, scores, last = set(pairs), dict[str, float](), ""
    for rank, (a, b) in enumerate(pairs):
        if a + b != last and a + b in scores:
            raise _refuse("its merges are not in the order of their pieces")
        last = a + b
        scores.setdefault(last, -float(rank))
    added = {token["content"] for token in raw["added_tokens"]}
    for piece in vocabulary.keys() - added:
        for at in range(1, len(piece) if not _BYTE.fullmatch(piece) else 0):
            a, b = piece[:at], piece[at:]
            if a in vocabulary and b in vocabulary and (a, b) not in known:
                raise _refuse(f"{a!r} and {b!r} are not joined though {piece!r} is a token")
    if sum(1 for piece in vocabulary if _BYTE.fullmatch(piece)) != 256:
        raise _refuse("its tokens for single bytes are not complete")
    prefix, notes = _prefix(raw, steps, scores)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_add_space_prefix(prefix)
    return notes, scores


def _prefix(raw: dict[str, Any], steps: list[Step], pieces: Iterable[str]) -> tuple[bool, list[str]]:
    """Whether a space is put before a text whose spaces become ▁. Raises NarrowError (gguf_unsupported)."""
    prefix, replaced, notes = False, False, list[str]()
    for normalizer in _normalizers(raw["normalizer"]):
        if normalizer == {"type": "Prepend", "prepend": SPACE}:
            prefix = True
        elif normalizer == {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}:
            replaced = True
        else:
            raise _refuse(f"it has no normalizer {normalizer['type']}")
    for kind, value in steps:
        if kind == "metaspace" and value[0] == SPACE:
            scheme, split = value[1:]
            replaced, prefix = True, prefix or scheme != "never"
            if split and any(SPACE in piece[1:] for piece in pieces):
                raise _refuse("it joins pieces across spaces")
            if scheme != "never":
                notes.append("llama.cpp puts a space before a text that begins with one too, and after special tokens.")
        elif not (replaced and kind == "split" and value[0] == json.dumps({"String": " "})):
            # Gemma splits at spaces, of which there are none left.
            raise _refuse(f"it does not split text so ({kind} {value})")
    if not replaced:
        raise _refuse(f"its spaces do not become {SPACE!r}")
    return prefix, notes


def _unigram(writer: gguf.GGUFWriter, raw: dict[str, Any], steps: list[Step]) -> list[str]:
    """The most likely pieces. Raises NarrowError (gguf_unsupported)."""
    if raw["model"].get("byte_fallback"):
        raise _refuse("its Unigram has no bytes for what is in no piece")
    precompiled = [n for n in _normalizers(raw["normalizer"]) if n["type"] == "Precompiled"]
    others = [n for n in _normalizers(raw["normalizer"]) if n["type"] != "Precompiled"]
    prefix, notes = _prefix(
        {"normalizer": {"type": "Sequence", "normalizers": others}}, steps, [piece for piece, _ in raw["model"]["vocab"]]
    )
    writer.add_tokenizer_model("t5")
    writer.add_tokenizer_pre("default")
    writer.add_add_space_prefix(prefix)
    writer.add_remove_extra_whitespaces(False)
    notes.append("Where two ways through a text are equally likely, llama.cpp may take the one that the tokenizer does not.")
    for normalizer in precompiled:
        writer.add_precompiled_charsmap(base64.b64decode(normalizer["precompiled_charsmap"]))
    return notes


def _add_tokens(writer: gguf.GGUFWriter, raw: dict[str, Any], tokenizer: Tokenizer, size: int, scores: dict[str, float]) -> None:
    """Every token with its kind; rows of the embedding that no token has get a name of their own."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if max(vocabulary.values()) >= size:
        raise _refuse(f"it has tokens up to {max(vocabulary.values())}, and the embedding {size} rows")
    texts, kinds = [""] * size, [gguf.TokenType.UNUSED] * size
    for token, number in vocabulary.items():
        byte = scores and raw["model"].get("byte_fallback") and _BYTE.fullmatch(token)
        texts[number], kinds[number] = token, gguf.TokenType.BYTE if byte else gguf.TokenType.NORMAL
    for token in raw["added_tokens"]:
        kinds[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    unknown = raw["model"].get("unk_token") or raw["model"].get("unk_id")
    unknown = vocabulary.get(unknown) if isinstance(unknown, str) else unknown
    if unknown is not None:
        writer.add_unk_token_id(unknown)
        if scores:
            kinds[unknown] = gguf.TokenType.UNKNOWN
    spare = (name for number in count() if (name := f"[PAD{number}]") not in vocabulary)
    texts = [next(spare) if kind == gguf.TokenType.UNUSED else text for text, kind in zip(texts, kinds, strict=True)]
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    if scores:
        writer.add_token_scores([float(scores.get(text, 0.0)) for text in texts])


def _add_special(writer: gguf.GGUFWriter, folder: Path, tokenizer: Tokenizer) -> list[str]:
    """Begin and end of a text, whether they are added to it, padding, and the chat template."""
    notes: list[str] = []
    configs = [
        read_json(folder / name) if (folder / name).is_file() else {}
        for name in ("tokenizer_config.json", "generation_config.json", "config.json")
    ]

    def ids(which: str) -> list[int]:
        """By the tokenizer's config, then all that the model's configs name."""
        named = configs[0].get(f"{which}_token")
        text = named.get("content") if isinstance(named, dict) else named
        first = tokenizer.token_to_id(text) if isinstance(text, str) else None
        found = [first] if first is not None else []
        for config in configs[1:]:
            value = config.get(f"{which}_token_id")
            found += value if isinstance(value, list) else [value]
        return [number for number in dict.fromkeys(found) if isinstance(number, int) and number >= 0]

    bos, eos, pad = ids("bos"), ids("eos"), ids("pad")
    framed: list[int] = tokenizer.encode("").ids
    before, after = _frame(tokenizer, framed)
    if len(before) > 1 or len(after) > 1:
        notes.append(
            f"llama.cpp adds one token before and after a text at most, the tokenizer {len(framed)}: write "
            f"{' '.join(str(tokenizer.id_to_token(number)) for number in framed)!r} into the prompt yourself."
        )
        before = after = []
    bos, eos = (before or bos)[:1], after + [number for number in eos if number not in after]
    if bos:
        writer.add_bos_token_id(bos[0])
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(bool(after))
    if eos:
        writer.add_eos_token_id(eos[0])
    else:
        notes.append("The model names no token that ends a text: llama.cpp takes one by its number, and ends there.")
    if len(eos) > 1:
        # llama.cpp stops at the end of a text and at the end of a turn.
        writer.add_eot_token_id(eos[1])
    if len(eos) > 2:
        notes.append(f"llama.cpp is told two tokens that end a text, the model has {len(eos)}.")
    if pad:
        writer.add_pad_token_id(pad[0])
    template = configs[0].get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if template:
        writer.add_chat_template(template)
    return notes


def _frame(tokenizer: Tokenizer, framed: list[int]) -> tuple[list[int], list[int]]:
    """The tokens that are put before and after every text."""
    if not framed:
        return [], []
    text = "a"
    inside, whole = tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.encode(text).ids
    before = next(n for n in range(len(whole) + 1) if whole[n : n + len(inside)] == inside)
    return whole[:before], whole[before + len(inside) :]
