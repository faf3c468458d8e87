"""What it costs in loss to orthogonalise Muon's updates in blocks of rows.

    python bench/muon.py [--blocks 256 128 64 32] [--seeds 0 1] [--tokens 163840]

base-s (hidden size 256) with a quarter of its neurons, refitted and recovered on Python with the defaults. 256 rows are whole
matrices. A block of 32 is to a hidden size of 256 what one of 512, Muon's, is to 4,096.

Losses are nats a token on the validation split above the untouched base's: after the cut and the refit, whose training of layers
is Muon's as well, and after recovery from the same start for all. Each finished row is added to bench/results/muon.json.
"""

import argparse
import copy
import json
from pathlib import Path
from unittest import mock

import torch
from quality import BASE, LENGTH, TRAIN, VALIDATION, read, recover

from narrow_engine import corpus, importance, models, muon, reconstruct, skills, train
from narrow_engine.plan import make_plan
from narrow_engine.slice import slice_model
from narrow_engine.spec import Method

OUT = Path(__file__).resolve().parent / "results" / "muon.json"
KEEP, CALIBRATION, MEASURED = 256, 16_384, 16_384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", nargs="+", type=int, default=[256, 128, 64, 32])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--tokens", type=int, default=163_840)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = models.load_model(BASE)
    training = read(TRAIN["python"])
    validation = corpus.sample(read(VALIDATION["python"]), MEASURED, LENGTH, 0)
    untouched = skills.loss_of(base, validation, LENGTH)
    settings = train.settings_of(Method(recover={"tokens": options.tokens}))

    def above(model) -> float:
        return round(skills.loss_of(model, validation, LENGTH) - untouched, 4)

    for seed in options.seeds:
        blocks = corpus.Blocks(training.tokens, LENGTH, seed)
        found = importance.collect(base, blocks, CALIBRATION, False, lambda *_: None)
        scores = importance.CRITERIA["activation"](base, found, seed)
        plan = make_plan(models.config_dict(base), {"neuron": scores["neuron"]}, {"neuron": KEEP})
        start = slice_model(base, plan)
        reconstruct.refit(base, start, plan, blocks, CALIBRATION, lambda *_: None, passes=0)
        for block in options.blocks:
            with mock.patch.object(muon, "BLOCK", block):
                refitted, recovered = slice_model(base, plan), copy.deepcopy(start)
                reconstruct.refit(base, refitted, plan, blocks, CALIBRATION, lambda *_: None)
                recover(recovered, corpus.Blocks(training.tokens, LENGTH, seed + 2), settings, base)
            row = {"block": block, "seed": seed, "tokens": options.tokens, "cut": above(start)}
            row |= {"refitted": above(refitted), "recovered": above(recovered)}
            known = json.loads(OUT.read_text()) if OUT.exists() else []
            OUT.write_text(json.dumps([*known, row], indent=1) + "\n")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
