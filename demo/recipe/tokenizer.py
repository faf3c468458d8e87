"""Trains the byte-level BPE tokenizer: python demo/recipe/tokenizer.py CORPORA OUT"""

import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from narrow_engine.documents import read_documents

VOCABULARY, CHARACTERS = 8192, 3_000_000


def sample(corpora: Path) -> Iterator[str]:
    """The first few million characters of every domain."""
    for path in sorted(corpora.glob("*/train.jsonl.gz")):
        taken = 0
        for text in read_documents(path):
            yield text
            taken += len(text)
            if taken > CHARACTERS:
                break


def main(corpora: Path, out: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(sample(corpora), trainer)
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, bos_token=end, pad_token=end, model_max_length=1024
    ).save_pretrained(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
