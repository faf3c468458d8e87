"""The embedded language model and its texts, for the experiments on it. Losses are nats a token on held-out text."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedModel

from narrow_engine import corpus, importance, models, skills, train
from narrow_engine.plan import Plan, Scores, make_plan, whole_plan
from narrow_engine.report.model import CurvePoint
from narrow_engine.slice import slice_model
from narrow_engine.spec import Criterion

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "demo" / "base"
TRAINING = ROOT / "demo" / "data" / "python.jsonl.gz"
HELD_OUT = {"python": ROOT / "bench" / "data" / "python.validation.jsonl.gz"} | {
    name: ROOT / "demo" / "data" / f"{name}.jsonl.gz" for name in ("c", "german", "medical", "math")
}
"""Python is what is wanted; the base knows all of them."""
LENGTH = 512


@cache
def base() -> PreTrainedModel:
    return models.load_model(BASE)


@cache
def documents(path: Path) -> corpus.Documents:
    tokenizer = Tokenizer.from_file(str(BASE / "tokenizer.json"))
    return corpus.tokenize(path, "text", tokenizer, 0).documents


def python(seed: int) -> corpus.Blocks:
    """Blocks of the text that is trained on."""
    return corpus.Blocks(documents(TRAINING).tokens, LENGTH, seed)


def copy(model: PreTrainedModel) -> PreTrainedModel:
    return slice_model(model, whole_plan(models.config_dict(model)))


def scores(model: PreTrainedModel, criterion: Criterion, tokens: int, seed: int) -> Scores:
    """Of the neurons and all other units, on Python text."""
    blocks = python(seed)
    gradients, grams = criterion in importance.NEEDS_GRADIENTS, criterion in importance.NEEDS_GRAMS
    found = importance.collect(model, blocks, tokens, gradients, lambda *_: None, grams=grams)
    return importance.CRITERIA[criterion](model, found, seed)


def plan(model: PreTrainedModel, found: Scores, neurons: int) -> Plan:
    return make_plan(models.config_dict(model), found, {"neuron": neurons})


def learn(model: PreTrainedModel, blocks: corpus.Blocks, settings: train.Settings, **options: Any) -> list[CurvePoint]:
    """Trains in place; `options` are `train.train`'s."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "phase": "experiment",
            "folder": Path(folder),
            "emit": lambda *_: None,
            "check": lambda: None,
            "validate": lambda _: 0.0,
        }
        return train.train(model, blocks, settings, **{**arguments, **options})


def loss(model: PreTrainedModel, text: corpus.Documents) -> float:
    return skills.loss_of(model, text, LENGTH)
