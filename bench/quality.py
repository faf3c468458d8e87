"""How much of a skill is left when three quarters of the MLP neurons are gone: this engine against the paper's recipe.

    python bench/quality.py [--domains python medical math] [--seeds 0 1 2] [--keep 256] [--arms ...] [--tokens 327680]

Cuts base-s from 1,024 neurons in every layer to `--keep`, 256 if nothing else is asked for. Arms, each with the same
training tokens:
    narrow         reconstruction score, refit, mixed objective at temperature 2, Muon (the defaults)
    temperature 1  the same at temperature 1, which was the default before
    lasso          group lasso for a quarter of the tokens, then the cut, the refit and the defaults' recovery
    paper          attribution score, no refit, next token, AdamW at a constant 5e-5 (arXiv 2505.15811; slicing computes what
                   its masks compute)
    paper tuned    the same with the best of several peak rates and linear decay, chosen on a quarter of the tokens, seed 0
    base           the uncut base trained on the same tokens, next token: narrow data improve any model

Losses are nats a token on the validation split, minus the untouched base's; `others` is the same for skills that the domain
is not. Times are seconds of wall and of processor: other work on the machine moves the second less. Each finished arm is kept in
bench/out/quality.json and not run again; the table is printed from it, and bench/results/quality.json is the one behind the
README.
"""

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer

from narrow_engine import corpus, importance, models, reconstruct, skills, train
from narrow_engine.plan import make_plan, whole_plan
from narrow_engine.regularize import GroupLasso
from narrow_engine.slice import slice_model
from narrow_engine.spec import GroupLasso as GroupLassoOptions
from narrow_engine.spec import Method, Recover
from narrow_engine.teacher import Live

HERE = Path(__file__).resolve().parent
BASE = HERE.parent / "demo" / "base"
TRAIN = {
    "python": HERE.parent / "demo" / "data" / "python.jsonl.gz",
    "medical": HERE / "data" / "medical.train.jsonl.gz",
    "math": HERE / "data" / "math.train.jsonl.gz",
}
VALIDATION = {name: HERE / "data" / f"{name}.validation.jsonl.gz" for name in ("python", "medical")} | {
    name: HERE.parent / "demo" / "data" / f"{name}.jsonl.gz" for name in ("c", "german", "math")
}
LENGTH, CALIBRATION, MEASURED, OTHERS = 512, 65_536, 65_536, 16_384
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
LASSO = 0.25
"""Share of the tokens that are trained on under the penalty."""
ARMS = ("narrow", "temperature 1", "lasso", "paper", "paper tuned", "base")
DEFAULT_ARMS = ("narrow", "paper", "paper tuned", "base")


def read(path: Path) -> corpus.Documents:
    tokenizer = Tokenizer.from_file(str(BASE / "tokenizer.json"))
    return corpus.tokenize(path, "text", tokenizer, 0).documents


def clock() -> tuple[float, float]:
    return time.monotonic(), time.process_time()


def since(started: tuple[float, float]) -> list[float]:
    """Wall and processor seconds."""
    return [round(now - then, 1) for now, then in zip(clock(), started, strict=True)]


def recover(model, blocks, settings, teacher=None, after_step=None) -> list[float]:
    """Trains in place, returns what it took."""
    started = clock()
    with tempfile.TemporaryDirectory() as folder:
        train.train(
            model,
            blocks,
            settings,
            phase="bench",
            folder=Path(folder),
            emit=lambda *_: None,
            check=lambda: None,
            validate=lambda m: 0.0,
            teacher=teacher and Live(teacher),
            after_step=after_step,
        )
    model.eval()
    return since(started)


def cut(base, training, seed, keep, criterion, refit=False, lasso_tokens=0):
    """The model that recovery starts from, and what it took."""
    started = clock()
    blocks = corpus.Blocks(training.tokens, LENGTH, seed)
    gradients = criterion in importance.NEEDS_GRADIENTS
    found = importance.collect(base, blocks, CALIBRATION, gradients, lambda *_: None)
    scores = importance.CRITERIA[criterion](base, found, seed)
    source = base
    if lasso_tokens:
        source = slice_model(base, whole_plan(models.config_dict(base)))
        settings = train.Settings(lasso_tokens, 2048, "next_token", learning_rate=GroupLassoOptions().learning_rate)
        trained = corpus.Blocks(training.tokens, LENGTH, seed + 2)
        steps = train.shape(settings, trained)[1]
        groups = GroupLasso(models.along(source, "width"), scores["neuron"].sqrt(), 1 - keep / scores["neuron"].shape[1], steps)
        recover(source, trained, settings, after_step=groups)
        scores = {"neuron": groups.norms()}
    plan = make_plan(models.config_dict(base), scores, {"neuron": keep})
    small = slice_model(source, plan)
    if refit:
        reconstruct.refit(base, small, plan, blocks, CALIBRATION, lambda *_: None)
    return small, since(started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--domains", nargs="+", default=list(TRAIN), choices=TRAIN)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--keep", nargs="+", type=int, default=[256])
    parser.add_argument("--arms", nargs="+", default=DEFAULT_ARMS, choices=ARMS)
    parser.add_argument("--tokens", type=int, default=327_680)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "out" / "quality.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.parent.mkdir(exist_ok=True)
    rows = json.loads(options.out.read_text()) if options.out.exists() else []

    def known(**key) -> dict | None:
        return next((r for r in rows if all(r.get(k) == v for k, v in key.items())), None)

    def keep(**row) -> None:
        rows.append(row)
        options.out.write_text(json.dumps(rows, indent=1))
        print(json.dumps(row), flush=True)

    texts = {name: read(path) for name, path in VALIDATION.items()}
    for domain, kept in itertools.product(options.domains, options.keep):
        training = read(TRAIN[domain])
        base = models.load_model(BASE)
        held_out = {name: corpus.sample(text, MEASURED if name == domain else OTHERS, LENGTH, 0) for name, text in texts.items()}
        untouched = {name: skills.loss_of(base, text, LENGTH) for name, text in held_out.items()}

        def gap(model, name=domain, held_out=held_out, untouched=untouched) -> float:
            return round(skills.loss_of(model, held_out[name], LENGTH) - untouched[name], 4)

        paper = train.Settings(options.tokens, 4096, "next_token", 1.0, "adamw", 5e-5, "constant")
        for rate in RATES if "paper tuned" in options.arms else ():
            key = {"domain": domain, "keep": kept, "arm": "tuning", "rate": rate, "tokens": options.tokens // 4}
            if not known(**key):
                small, _ = cut(base, training, 0, kept, "attribution")
                settings = train.Settings(options.tokens // 4, 4096, "next_token", 1.0, "adamw", rate, "linear")
                seconds = recover(small, corpus.Blocks(training.tokens, LENGTH, 1), settings)
                keep(**key, final=gap(small), seconds=seconds)
            tuned = min((r for r in rows if all(r.get(k) == key[k] for k in ("domain", "keep", "arm", "tokens"))), key=final)

        for seed, arm in itertools.product(options.seeds, options.arms):
            key = {"domain": domain, "keep": None if arm == "base" else kept, "seed": seed, "arm": arm, "tokens": options.tokens}
            if known(**key):
                continue
            prepared = [0.0, 0.0]
            if arm == "base":
                model = slice_model(base, whole_plan(models.config_dict(base)))
                settings, teacher = train.Settings(options.tokens, 4096, "next_token", 1.0, "muon"), None
            elif arm in ("narrow", "temperature 1", "lasso"):
                regularized = int(LASSO * options.tokens) if arm == "lasso" else 0
                model, prepared = cut(base, training, seed, kept, "reconstruction", True, regularized)
                temperature = 1.0 if arm == "temperature 1" else 2.0
                recovery = Recover(tokens=options.tokens - regularized, temperature=temperature)
                settings, teacher = train.settings_of(Method(recover=recovery)), base
            else:
                model, prepared = cut(base, training, seed, kept, "attribution")
                settings, teacher = paper, None
                if arm == "paper tuned":
                    settings = train.Settings(options.tokens, 4096, "next_token", 1.0, "adamw", tuned["rate"], "linear")
            before = gap(model)
            seconds = recover(model, corpus.Blocks(training.tokens, LENGTH, seed + 1), settings, teacher)
            keep(
                **key,
                base=round(untouched[domain], 4),
                before=before,
                final=gap(model),
                others={name: gap(model, name) for name in texts if name != domain},
                prepare_seconds=prepared,
                seconds=seconds,
                rate=settings.learning_rate,
            )
    print(table(rows, options.tokens))


def final(row: dict) -> float:
    return row["final"]


def table(rows: list[dict], tokens: int) -> str:
    """Mean and range over seeds, as Markdown."""
    lines = [
        f"| domain | neurons | arm | before training | after {tokens:,} tokens | other skills, after | prepare, s (CPU) "
        "| train, s (CPU) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    done = [r for r in rows if r["tokens"] == tokens and r["arm"] in ARMS]
    for domain, kept, arm in dict.fromkeys((r["domain"], r["keep"], r["arm"]) for r in done):
        found = [r for r in done if (r["domain"], r["keep"], r["arm"]) == (domain, kept, arm)]

        def spread(values: list[float]) -> str:
            return f"{sum(values) / len(values):+.3f} ({min(values):+.3f} … {max(values):+.3f})"

        def mean(field: str, found=found) -> str:
            wall, cpu = (sum(r[field][i] for r in found) / len(found) for i in (0, 1))
            return f"{wall:.0f} ({cpu:.0f})"

        others = [sum(r["others"].values()) / len(r["others"]) for r in found if "others" in r]
        losses = [spread([r[field] for r in found]) for field in ("before", "final")]
        seconds = [mean(field) for field in ("prepare_seconds", "seconds")]
        cells = [domain, str(kept or "all"), arm, *losses, spread(others) if others else "", *seconds]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
