"""How often the report's 95 % intervals hold the truth, on real documents.

    python bench/coverage.py [--domains python medical math] [--trials 2000]

The documents of a domain's training text, cut to stretches as skills are, are taken for the whole population: the base and a cut
of it are measured on all of them once, so the true retention, agreement and KL are known. Then samples of some documents are
drawn, as a skill's text is drawn from what there is, and the interval of each is looked at. `percentile` is the plain bootstrap,
for comparison. Between 93 and 97 of 100 is what is wanted.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from narrow_engine import corpus, importance, models, skills
from narrow_engine.families import dimensions
from narrow_engine.plan import make_plan
from narrow_engine.slice import slice_model

HERE = Path(__file__).resolve().parent
BASE = HERE.parent / "demo" / "base"
TEXT = {
    "python": HERE.parent / "demo" / "data" / "python.jsonl.gz",
    "medical": HERE / "data" / "medical.train.jsonl.gz",
    "math": HERE / "data" / "math.train.jsonl.gz",
}
LENGTH, STRETCH, POPULATION = 512, 1024, 1500
"""Tokens of a window, of a document at most, and documents of a domain at most."""
SIZES = (10, 20, 40, 64, 200)


def population(domain: str) -> list[skills.Measured]:
    """The base and a cut of it on all documents of a domain."""
    tokenizer = Tokenizer.from_file(str(BASE / "tokenizer.json"))
    whole = corpus.tokenize(TEXT[domain], "text", tokenizer, 0).documents
    begin = whole.offsets[:-1][:POPULATION]
    end = np.minimum(whole.offsets[1:][:POPULATION], begin + STRETCH + 1)
    documents = whole.take_spans(begin, end, whole.hashes[:POPULATION])
    base = models.load_model(BASE)
    config = models.config_dict(base)
    plan = make_plan(config, importance.random.draw(dimensions(config), 0), {"neuron": 768})
    return skills.measure(base, [slice_model(base, plan)], documents, LENGTH, lambda *_: None)


def percentile(sums: np.ndarray, tokens: np.ndarray, random: np.random.Generator) -> tuple[float, float]:
    drawn = random.integers(len(tokens), size=(skills.RESAMPLES, len(tokens)))
    low, high = np.quantile(sums[drawn].sum(1) / tokens[drawn].sum(1), [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--domains", nargs="+", default=list(TEXT), choices=TEXT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| domain | figure | documents | held by the interval | by percentiles |\n|---|---|---|---|---|")
    for domain in options.domains:
        base, cut = population(domain)
        for figure, sums in (("loss over the base's", cut.loss - base.loss), ("agreement", cut.agree), ("KL", cut.kl)):
            truth = sums.sum() / base.tokens.sum()
            for size in SIZES:
                random = np.random.default_rng(size)
                held = plain = 0
                for trial in range(options.trials):
                    drawn = random.choice(len(sums), size)
                    found = skills.interval(sums[drawn], base.tokens[drawn], trial)
                    held += found.low <= truth <= found.high
                    low, high = percentile(sums[drawn], base.tokens[drawn], random)
                    plain += low <= truth <= high
                print(
                    f"| {domain} | {figure} | {size} | {held / options.trials:.1%} | {plain / options.trials:.1%} |", flush=True
                )


if __name__ == "__main__":
    main()
