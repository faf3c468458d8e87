"""What cuts the tokens that recovery needs: every idea as an arm, measured against the defaults and the uncut base.

    python bench/recovery_study.py ARM ... [--domains python medical] [--seeds 0] [--tokens 327680]

Cuts base-s from 1,024 to 256 neurons in every layer, as bench/quality.py does, and recovers. An arm is what it does
differently from DEFAULT: see ARMS. Choices were made on the first half of the validation documents (`choose`, seed 0,
Python and medical); `report` is the second half, `quality` what bench/quality.py measures. Mathematics was not looked at
before the end. Losses are nats a token above the untouched base's.

Each finished arm is a row of bench/out/recovery_study.json and is not run again; prepared models are kept beside it.
"""

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from narrow_engine import corpus, importance, models, reconstruct, skills
from narrow_engine.losses import objective
from narrow_engine.models import head, hidden_states, layers
from narrow_engine.muon import Muon, training_dtype
from narrow_engine.plan import make_plan
from narrow_engine.slice import slice_model

HERE = Path(__file__).resolve().parent
BASE = HERE.parent / "demo" / "base"
DATA = HERE / "data"
TRAIN = {
    "python": HERE.parent / "demo" / "data" / "python.jsonl.gz",
    "medical": DATA / "medical.train.jsonl.gz",
    "math": DATA / "math.train.jsonl.gz",
}
VALIDATION = {
    "python": DATA / "python.validation.jsonl.gz",
    "medical": DATA / "medical.validation.jsonl.gz",
    "math": HERE.parent / "demo" / "data" / "math.jsonl.gz",
}
KEEP, LENGTH, MEASURED = 256, 512, 32_768
OUT = HERE / "out"

DEFAULT: dict[str, Any] = {
    # What recovery starts from.
    "cut": True,
    "source": "base",  # what is scored, cut and refitted towards: "base" or the corrected base
    "calibration": 65_536,
    "passes": 0,  # of layer-wise training after the least-squares refit
    "local_rate": 2e-3,  # unused without passes
    # Recovery.
    "tokens": 1.0,  # share of --tokens
    "skip": 0.0,  # and the share that is passed over before
    "batch": 4096,
    "rate": 2e-3,
    "rest": 1.0,  # AdamW's rate (embeddings, head, norms) ÷ Muon's
    "momentum": 0.95,
    "schedule": "linear",
    "warm": 0.02,
    "share": (0.5, 0.5),  # weight of the KL at the start and at the end
    "temperature": 1.0,
    "teacher": "base",  # or "corrected" (trained before), "online" (trained beside)
    "corrected": 1.0,  # share of --tokens that the corrected base was trained on
    "streams": 0.0,  # weight of the distance to the teacher's residual streams
    "streams_until": 1.0,
    "average": 0.0,  # decay of an average of the weights
}
PREPARE = ("cut", "source", "calibration", "passes", "local_rate")

LOCAL = {"passes": 4, "local_rate": 0.025}
ARMS: dict[str, dict[str, Any]] = {
    "default": {},
    "base": {"cut": False, "share": (0.0, 0.0)},
    # What else the time of the layers' training could be spent on.
    "batch 2048": {"batch": 2048},
    "batch 2048, 1.4 times the tokens": {"batch": 2048, "tokens": 1.4},
    # Layer-wise training before.
    "local": LOCAL,
    "local, rate 0.05": LOCAL | {"local_rate": 0.05},
    "local, 2 passes": LOCAL | {"passes": 2},
    "local, 8 passes": LOCAL | {"passes": 8},
    "local, 131k": LOCAL | {"calibration": 131_072, "passes": 2},
    # And then: who teaches.
    "local, next token": LOCAL | {"share": (0.0, 0.0)},
    "local, distill": LOCAL | {"share": (1.0, 1.0)},
    "local, share 0.25": LOCAL | {"share": (0.25, 0.25)},
    "local, share 1 to 0": LOCAL | {"share": (1.0, 0.0)},
    "local, batch 2048, share 0.75": LOCAL | {"share": (0.75, 0.75), "batch": 2048},
    "local, batch 2048, share 1 to 0": LOCAL | {"share": (1.0, 0.0), "batch": 2048},
    "local, batch 2048, share 0 to 1": LOCAL | {"share": (0.0, 1.0), "batch": 2048},
    "local, batch 2048, corrected": LOCAL | {"teacher": "corrected", "batch": 2048},
    "local, batch 2048, corrected first": LOCAL | {"teacher": "corrected", "source": "corrected", "batch": 2048},
    "local, batch 2048, corrected on other blocks": LOCAL
    | {"teacher": "corrected", "corrected": 0.5, "tokens": 0.5, "skip": 0.5, "batch": 2048},
    "local, online": LOCAL | {"teacher": "online"},
    "local, corrected": LOCAL | {"teacher": "corrected"},
    "local, corrected first": LOCAL | {"teacher": "corrected", "source": "corrected"},
    "local, corrected half": LOCAL | {"teacher": "corrected", "source": "corrected", "corrected": 0.5, "tokens": 0.5},
    # Rates, batches.
    "local, recovery at 1e-3": LOCAL | {"rate": 1e-3},
    "local, recovery at 4e-3": LOCAL | {"rate": 4e-3},
    "local, batch 2048": LOCAL | {"batch": 2048},
    "local, batch 1024": LOCAL | {"batch": 1024},
    "local, batch 1024, 1e-3": LOCAL | {"batch": 1024, "rate": 1e-3},
    "local, batch 2048, online": LOCAL | {"batch": 2048, "teacher": "online"},
    "local, batch 2048, momentum 0.9": LOCAL | {"batch": 2048, "momentum": 0.9},
    "local, batch 2048, rest 0.5": LOCAL | {"batch": 2048, "rest": 0.5},
    "base, batch 2048": {"cut": False, "share": (0.0, 0.0), "batch": 2048},
    "local, momentum 0.9": LOCAL | {"momentum": 0.9},
    "local, batch 2048, rest 2": LOCAL | {"batch": 2048, "rest": 2.0},
    "local, rest 0.5": LOCAL | {"rest": 0.5},
    "local, rest 2": LOCAL | {"rest": 2.0},
    "local, streams": LOCAL | {"streams": 1.0},
}


def read(path: Path) -> corpus.Documents:
    tokenizer = Tokenizer.from_file(str(BASE / "tokenizer.json"))
    return corpus.tokenize(path, "text", tokenizer, 0).documents


def halves(documents: corpus.Documents) -> tuple[corpus.Documents, corpus.Documents]:
    """The first documents, up to half of the tokens, and the others."""
    at = int(np.searchsorted(documents.offsets, documents.offsets[-1] / 2))
    return documents.take(np.arange(at)), documents.take(np.arange(at, len(documents)))


def prepare(base, source, training, seed: int, arm: dict[str, Any]):
    """Score, cut, refit: the model that recovery starts from."""
    blocks = corpus.Blocks(training.tokens, LENGTH, seed)
    if not arm["cut"]:
        return slice_model(base, make_plan(models.config_dict(base), {}, {}))
    found = importance.collect(source, blocks, arm["calibration"], False, lambda *_: None)
    scores = importance.CRITERIA["reconstruction"](source, found, seed)
    plan = make_plan(models.config_dict(source), scores, {"neuron": KEEP})
    small = slice_model(source, plan)
    reconstruct.refit(
        source, small, plan, blocks, arm["calibration"], lambda *_: None, passes=arm["passes"], rate=arm["local_rate"]
    )
    return small


class Optimizer:
    """Muon for the layers' matrices and AdamW for the rest, with the rates, momentum and schedule of an arm."""

    def __init__(self, model, arm: dict[str, Any], steps: int) -> None:
        self.model, self.arm, self.steps = model, arm, steps
        matrices, rest = [], []
        for name, parameter in model.named_parameters():
            (matrices if name.startswith("model.layers.") and parameter.ndim == 2 else rest).append(parameter)
        self.muon = Muon(matrices, lr=arm["rate"], momentum=arm["momentum"])
        self.adamw = torch.optim.AdamW(rest, lr=arm["rate"] * arm["rest"], betas=(0.9, 0.95), weight_decay=0.0)

    def step(self, step: int) -> None:
        left, warm = 1 - step / self.steps, max(1, round(self.arm["warm"] * self.steps))
        shape = {"linear": left, "constant": 1.0, "wsd": min(1.0, left / 0.4), "square": left**0.5, "late": left**2}
        rate = self.arm["rate"] * min(1.0, (step + 1) / warm) * shape[self.arm["schedule"]]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, factor in ((self.muon, 1.0), (self.adamw, self.arm["rest"])):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


class Streams:
    """The outputs of a model's layers in its last pass."""

    def __init__(self, model) -> None:
        self.found: list[torch.Tensor] = []
        for layer in layers(model):
            layer.register_forward_hook(lambda _, args, out: self.found.append(out[0] if isinstance(out, tuple) else out))

    def take(self) -> list[torch.Tensor]:
        found, self.found = self.found, []
        return found


def recover(model, teacher, training, seed: int, arm: dict[str, Any], tokens: int) -> None:
    """narrow_engine.train's loop, with what the arms vary."""
    blocks = corpus.Blocks(training.tokens, LENGTH, seed + 1)
    rows = arm["batch"] // LENGTH
    steps = round(tokens * arm["tokens"]) // arm["batch"]
    own = Optimizer(model, arm, steps)
    online = None
    if arm["teacher"] == "online":
        teacher = copy.deepcopy(teacher)
        online = Optimizer(teacher, DEFAULT, steps)
    watched = (Streams(teacher), Streams(model)) if arm["streams"] else None
    average = {name: p.detach().clone() for name, p in model.named_parameters()} if arm["average"] else {}
    low = training_dtype(model.device)
    for step in range(steps):
        done = step / steps
        batch = blocks.batch(round(tokens * arm["skip"]) // LENGTH + step * rows, rows)
        ids, targets = batch[:, :-1], batch[:, 1:].flatten()
        first, last = arm["share"]
        share = first + (last - first) * done
        base, fit = None, torch.zeros(())
        with torch.autocast("cpu", low, enabled=low != torch.float32):
            if share:
                with torch.set_grad_enabled(online is not None):
                    told = hidden_states(teacher, ids).flatten(0, 1).to(low)
                base = (told.detach(), head(teacher))
            hidden = hidden_states(model, ids).flatten(0, 1).to(low)
        if watched:
            pairs = list(zip(*(w.take() for w in watched), strict=True))
            if done < arm["streams_until"]:
                fit = sum((a.float() - b.float()).square().mean() / a.float().square().mean() for a, b in pairs) / len(pairs)
        loss = objective(hidden, head(model), targets, base, share, arm["temperature"]).total + arm["streams"] * fit
        loss.backward()
        own.step(step)
        if online is not None:
            objective(told, head(teacher), targets).total.backward()
            online.step(step)
        for name, parameter in model.named_parameters() if average else ():
            average[name].lerp_(parameter.detach(), 1 - min(arm["average"], (step + 1) / (step + 10)))
    if average:
        model.load_state_dict(average, strict=False)
    model.eval()


class Study:
    """The models and texts of one domain and seed, made when first asked for and kept."""

    def __init__(self, domain: str, seed: int, tokens: int, part: str) -> None:
        self.domain, self.seed, self.tokens = domain, seed, tokens
        self.training = read(TRAIN[domain])
        whole = read(VALIDATION[domain])
        first, second = halves(whole)
        self.parts = {"choose": corpus.sample(first, MEASURED, LENGTH, 0)}
        if part == "report":  # the second half, and what bench/quality.py measures
            self.parts = {"report": second, "quality": corpus.sample(whole, 65_536, LENGTH, 0)}
        self.base = models.load_model(BASE)
        self.untouched = {k: skills.loss_of(self.base, v, LENGTH) for k, v in self.parts.items()}

    def gaps(self, model) -> dict[str, float]:
        return {k: round(skills.loss_of(model, v, LENGTH) - self.untouched[k], 4) for k, v in self.parts.items()}

    def kept(self, name: str, make, like):
        """A model from its file, or made and written; and the wall and processor seconds that making took."""
        path = OUT / "models" / f"{self.domain}-{self.seed}-{name}.safetensors"
        times = path.with_suffix(".json")
        if not times.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            started = time.monotonic(), time.process_time()
            model = make()
            times.write_text(json.dumps([round(time.monotonic() - started[0], 1), round(time.process_time() - started[1], 1)]))
            save_file({k: v.contiguous() for k, v in model.named_parameters()}, path)
        model = slice_model(self.base, make_plan(models.config_dict(self.base), like, {"neuron": KEEP} if like else {}))
        model.load_state_dict(load_file(path), strict=False)
        model.tie_weights()
        return model, json.loads(times.read_text())

    def corrected(self, arm: dict[str, Any]):
        """The base trained on the same tokens, next token."""
        tokens = round(arm["corrected"] * self.tokens)

        def make():
            model = slice_model(self.base, make_plan(models.config_dict(self.base), {}, {}))
            recover(model, None, self.training, self.seed, DEFAULT | {"share": (0.0, 0.0)}, tokens)
            return model

        return self.kept(f"corrected-{tokens}", make, {})

    def run(self, arm: dict[str, Any]) -> dict[str, Any]:
        spent = []
        teacher = self.base
        if "corrected" in (arm["teacher"], arm["source"]):
            teacher, seconds = self.corrected(arm)
            spent.append(seconds)
        source = teacher if arm["source"] == "corrected" else self.base
        if arm["teacher"] == "base":
            teacher = self.base
        name = "-".join(str(arm[k]) for k in PREPARE) + (f"-{arm['corrected']}-{self.tokens}" if source is not self.base else "")
        uniform = {"neuron": torch.zeros(6, 1024)} if arm["cut"] else {}
        model, seconds = self.kept(name, lambda: prepare(self.base, source, self.training, self.seed, arm), uniform)
        spent.append(seconds)
        before = self.gaps(model) if arm["cut"] else dict.fromkeys(self.parts, 0.0)
        started = time.monotonic(), time.process_time()
        recover(model, teacher, self.training, self.seed, arm, self.tokens)
        training = [round(time.monotonic() - started[0], 1), round(time.process_time() - started[1], 1)]
        return {"before": before, "final": self.gaps(model), "prepare_seconds": spent, "seconds": training}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arms", nargs="+", choices=ARMS)
    parser.add_argument("--domains", nargs="+", default=["python", "medical"], choices=TRAIN)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--tokens", type=int, default=327_680)
    parser.add_argument("--part", default="choose", choices=["choose", "report"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    OUT.mkdir(exist_ok=True)
    path = OUT / "recovery_study.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    for domain in options.domains:
        for seed in options.seeds:
            study = None
            for name in options.arms:
                key = {"domain": domain, "seed": seed, "arm": name, "tokens": options.tokens, "part": options.part}
                if any(all(row.get(k) == v for k, v in key.items()) for row in rows):
                    continue
                study = study or Study(domain, seed, options.tokens, options.part)
                rows.append(key | study.run(DEFAULT | ARMS[name]))
                path.write_text(json.dumps(rows, indent=1))
                print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
