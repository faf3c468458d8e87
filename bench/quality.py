"""How much of a skill is left when three quarters of the MLP neurons are gone: this engine against the paper's recipe.

    python bench/quality.py [--domains python medical] [--seeds 0 1 2] [--tokens 327680] [--threads 1]

Cuts base-s from 1,024 to 256 neurons in every layer. Arms, each with the same training tokens:
    narrow       reconstruction score, least-squares refit, mixed objective, Muon (the defaults)
    paper        attribution score, no refit, next token, AdamW at a constant 5e-5 (arXiv 2505.15811; slicing computes what
                 its masks compute)
    paper tuned  the same with the best of several peak rates and linear decay, chosen on a quarter of the tokens, seed 0
    base         the uncut base trained on the same tokens, next token: narrow data improve any model

Losses are nats a token on the validation split, minus the untouched base's. Times are seconds of wall and of processor:
other work on the machine moves the first and not the second. Each finished arm is kept in bench/out/quality.json and not
run again; the table is printed from it, and bench/results/quality.json is the one behind the README.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer

from narrow_engine import corpus, importance, models, reconstruct, skills, train
from narrow_engine.plan import make_plan
from narrow_engine.slice import slice_model

HERE = Path(__file__).resolve().parent
BASE = HERE.parent / "demo" / "base"
TRAIN = {
    "python": HERE.parent / "demo" / "data" / "python.jsonl.gz",
    "medical": HERE / "data" / "medical.train.jsonl.gz",
}
KEEP, LENGTH, CALIBRATION, MEASURED = 256, 512, 65_536, 65_536
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
ARMS = ("narrow", "paper", "paper tuned", "base")


def read(path: Path) -> corpus.Documents:
    tokenizer = Tokenizer.from_file(str(BASE / "tokenizer.json"))
    return corpus.tokenize(path, "text", tokenizer, 0, lambda: None, lambda *_: None)


def clock() -> tuple[float, float]:
    return time.monotonic(), time.process_time()


def since(started: tuple[float, float]) -> list[float]:
    """Wall and processor seconds."""
    return [round(now - then, 1) for now, then in zip(clock(), started, strict=True)]


def recover(model, blocks, settings, teacher=None) -> list[float]:
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
            teacher=teacher,
        )
    model.eval()
    return since(started)


def cut(base, training, seed, criterion, refit):
    started = clock()
    blocks = corpus.Blocks(training.tokens, LENGTH, seed)
    gradients = criterion in importance.NEEDS_GRADIENTS
    found = importance.collect(base, blocks, CALIBRATION, gradients, lambda *_: None)
    scores = importance.CRITERIA[criterion](base, found, seed)
    plan = make_plan(models.config_dict(base), scores, {"neuron": KEEP})
    small = slice_model(base, plan)
    if refit:
        reconstruct.refit(base, small, plan, blocks, CALIBRATION, lambda *_: None)
    return small, since(started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--domains", nargs="+", default=["python", "medical"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
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

    for domain in options.domains:
        training = read(TRAIN[domain])
        held_out = corpus.sample(read(HERE / "data" / f"{domain}.validation.jsonl.gz"), MEASURED, LENGTH, 0)
        base = models.load_model(BASE)
        untouched = skills.loss_of(base, held_out, LENGTH)

        def gap(model, held_out=held_out, untouched=untouched) -> float:
            return round(skills.loss_of(model, held_out, LENGTH) - untouched, 4)

        paper = train.Settings(options.tokens, 4096, "next_token", 1.0, "adamw", 5e-5, "constant")
        for rate in RATES if "paper tuned" in options.arms else ():
            key = {"domain": domain, "arm": "tuning", "rate": rate, "tokens": options.tokens // 4}
            if not known(**key):
                small, _ = cut(base, training, 0, "attribution", False)
                settings = train.Settings(options.tokens // 4, 4096, "next_token", 1.0, "adamw", rate, "linear")
                seconds = recover(small, corpus.Blocks(training.tokens, LENGTH, 1), settings)
                keep(**key, final=gap(small), seconds=seconds)
            tuned = min((r for r in rows if r["domain"] == domain and r["arm"] == "tuning"), key=lambda r: r["final"])["rate"]

        for seed in options.seeds:
            for arm in options.arms:
                key = {"domain": domain, "seed": seed, "arm": arm, "tokens": options.tokens}
                if known(**key):
                    continue
                prepared = [0.0, 0.0]
                if arm == "base":
                    model = slice_model(base, make_plan(models.config_dict(base), {}, {}))
                    settings, teacher = train.Settings(options.tokens, 4096, "next_token", 1.0, "muon"), None
                elif arm == "narrow":
                    model, prepared = cut(base, training, seed, "reconstruction", True)
                    settings, teacher = train.Settings(options.tokens, 2048, "mixed", 1.0, "muon"), base
                else:
                    model, prepared = cut(base, training, seed, "attribution", False)
                    settings, teacher = paper, None
                    if arm == "paper tuned":
                        settings = train.Settings(options.tokens, 4096, "next_token", 1.0, "adamw", tuned, "linear")
                before = gap(model)
                seconds = recover(model, corpus.Blocks(training.tokens, LENGTH, seed + 1), settings, teacher)
                keep(
                    **key,
                    base=round(untouched, 4),
                    before=before,
                    final=gap(model),
                    prepare_seconds=prepared,
                    seconds=seconds,
                    rate=settings.learning_rate,
                )
    print(table(rows, options.tokens))


def table(rows: list[dict], tokens: int) -> str:
    """Mean and range over seeds, as Markdown."""
    lines = [
        f"| domain | arm | before training | after {tokens:,} tokens | prepare, s (CPU) | train, s (CPU) |",
        "|---|---|---|---|---|---|",
    ]
    for domain in dict.fromkeys(r["domain"] for r in rows):
        for arm in ARMS:
            found = [r for r in rows if r["domain"] == domain and r["arm"] == arm and r["tokens"] == tokens]
            if found:

                def spread(field: str, found=found) -> str:
                    values = [r[field] for r in found]
                    return f"{sum(values) / len(values):+.3f} ({min(values):+.3f} … {max(values):+.3f})"

                def mean(field: str, found=found) -> str:
                    wall, cpu = (sum(r[field][i] for r in found) / len(found) for i in (0, 1))
                    return f"{wall:.0f} ({cpu:.0f})"

                seconds = f"{mean('prepare_seconds')} | {mean('seconds')}"
                lines.append(f"| {domain} | {arm} | {spread('before')} | {spread('final')} | {seconds} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
