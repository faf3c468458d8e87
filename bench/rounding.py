"""What training in bfloat16, with no float32 copies, costs in loss.

    python bench/rounding.py [--arms float32 stochastic nearest] [--seeds 0 1 2] [--tokens 163840]

base-s with a quarter of its neurons, refitted by least squares, recovers on Python with the defaults (Muon, mixed, temperature
2, batches of 2,048). `float32` is the plain way; `stochastic` has weights, gradients and optimizer states in bfloat16 as training
has them where memory is short (`narrow_engine/rounding.py`); `nearest` is the same rounded to the nearest number. All compute
their products in float32, as training does where those of bfloat16 are slow: what differs is what is kept between the steps.

Losses are nats a token on the validation split above the untouched base's. Each finished arm is added to
bench/results/rounding.json.
"""

import argparse
import copy
import json
from pathlib import Path
from unittest import mock

import torch
from quality import BASE, LENGTH, TRAIN, VALIDATION, read, recover

from narrow_engine import corpus, footprint, importance, models, reconstruct, rounding, skills, train
from narrow_engine.plan import make_plan
from narrow_engine.slice import slice_model
from narrow_engine.spec import Method

OUT = Path(__file__).resolve().parent / "results" / "rounding.json"
KEEP, CALIBRATION, MEASURED = 256, 8192, 16_384
WAYS = {
    "float32": footprint.Way(),
    "stochastic": footprint.Way(bfloat16=True),
    "nearest": footprint.Way(bfloat16=True),
}


def cut(base, training, seed: int):
    """The model that recovery starts from."""
    blocks = corpus.Blocks(training.tokens, LENGTH, seed)
    found = importance.collect(base, blocks, CALIBRATION, False, lambda *_: None)
    scores = importance.CRITERIA["activation"](base, found, seed)
    plan = make_plan(models.config_dict(base), {"neuron": scores["neuron"]}, {"neuron": KEEP})
    small = slice_model(base, plan)
    reconstruct.refit(base, small, plan, blocks, CALIBRATION, lambda *_: None, passes=0)
    return small


def trained(name: str, seed: int, tokens: int, small, base, training) -> list[float]:
    settings = train.settings_of(Method(recover={"tokens": tokens}))
    blocks = corpus.Blocks(training.tokens, LENGTH, seed + 2)
    to_bfloat16 = torch.Tensor.bfloat16 if name == "nearest" else rounding.stochastically
    with (
        mock.patch.object(footprint, "choose", return_value=WAYS[name]),
        mock.patch.object(rounding, "stochastically", to_bfloat16),
    ):
        return recover(small, blocks, settings, base)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=163_840)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = models.load_model(BASE)
    training = read(TRAIN["python"])
    validation = corpus.sample(read(VALIDATION["python"]), MEASURED, LENGTH, 0)
    untouched = skills.loss_of(base, validation, LENGTH)
    for seed in options.seeds:
        start = cut(base, training, seed)
        before = skills.loss_of(start, validation, LENGTH) - untouched
        for name in options.arms:
            small = copy.deepcopy(start)
            taken = trained(name, seed, options.tokens, small, base, training)
            after = skills.loss_of(small, validation, LENGTH) - untouched
            row = {"arm": name, "seed": seed, "tokens": options.tokens, "before": round(before, 4), "after": round(after, 4)}
            known = json.loads(OUT.read_text()) if OUT.exists() else []
            OUT.write_text(json.dumps([*known, row], indent=1) + "\n")
            print(json.dumps({**row, "seconds": taken}), flush=True)


if __name__ == "__main__":
    main()
