"""Ways of being taught in recovery, each against a live base, the mean of KL and next token, and temperature 1.

    python -m bench.teaching [--domains python medical] [--seeds 0] [--arms ...]

Cuts base-s to a quarter of its neurons and recovers on 163,840 tokens. Losses are nats a token on the target's held-out text,
minus the base's; `recover` and `teach` are seconds of wall on one thread. Each finished arm is a row of
bench/results/teaching.json and is not run again; the table is made of them. Temperature 2 became the default by it.
"""

import argparse
import itertools
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from experiments.frontier.run import DEMO, MEASURED, OUT, TEXT, TOKENS
from narrow_engine import pipeline
from narrow_engine.report.model import Report
from narrow_engine.spec import CompressionSpec

RESULTS = Path(__file__).resolve().parent / "results" / "teaching.json"
ARMS: dict[str, dict[str, Any]] = {
    "temperature 1": {},
    "next token alone": {"objective": "next_token"},
    "divergence alone": {"objective": "distill"},
    "cache of hidden states": {"cache": "hidden"},
    "cache of 8 tokens": {"cache": "top", "top": 8},
    "cache of 64 tokens": {"cache": "top", "top": 64},
    "cache of 256 tokens": {"cache": "top", "top": 256},
    "temperature 0.5": {"temperature": 0.5},
    "temperature 2": {"temperature": 2.0},
    "temperature 3": {"temperature": 3.0},
    "temperature 4": {"temperature": 4.0},
    "reverse KL": {"divergence": "reverse_kl"},
    "Jensen-Shannon": {"divergence": "js"},
    "skewed KL": {"divergence": "skew_kl"},
    "skewed reverse KL": {"divergence": "skew_reverse_kl"},
    "own samples, a quarter": {"on_policy": 0.25},
    "matching streams": {"match": {"hidden": 1.0}},
    "matching attention": {"match": {"attention": 1.0}},
    "corrected teacher": {"correction": {"tokens": TOKENS}},
}


def spec(domain: str, seed: int, arm: str) -> CompressionSpec:
    return CompressionSpec.model_validate(
        {
            "base": {"path": DEMO / "base"},
            "target": {"path": TEXT[domain]},
            "target_name": domain,
            "method": {"units": ["neuron"], "recover": {"tokens": TOKENS, "temperature": 1.0, **ARMS[arm]}},
            "budget": {"keep": {"neuron": 0.25}},
            "export": ["safetensors"],
            "controls": [],
            "skill_tokens": MEASURED,
            "seed": seed,
        }
    )


def run(domain: str, seed: int, arm: str) -> dict[str, Any]:
    """One arm. All arms of a domain and seed go through one folder, where only the recovery is done anew."""
    folder = OUT.parent / "teaching" / f"{domain}-{seed}"
    pipeline.run(spec(domain, seed, arm), folder, lambda *_: None)
    report = Report.model_validate_json((folder / "result" / "report.json").read_bytes())
    skill, seconds = report.skills[domain], report.provenance.seconds
    size = sum(path.stat().st_size for path in (folder / "teach").glob("*")) if "teach" in seconds else 0
    return {
        "domain": domain,
        "seed": seed,
        "arm": arm,
        "cut": round(skill.cut.loss - skill.base.loss, 4),
        "loss": round(skill.recovered.loss - skill.base.loss, 4),
        "recover": seconds["recover"],
        "teach": seconds.get("teach", 0.0) + seconds.get("correct", 0.0),
        "bytes": size,
        "tokens": report.provenance.recovery_tokens,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The arms as Markdown, means over the seeds that are in the rows."""
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    lines = [
        f"| arm | {' | '.join(domains)} | recovery, s | before it, s | cache, bytes a token |",
        "|---" * (4 + len(domains)) + "|",
    ]
    for arm in [arm for arm in ARMS if any(row["arm"] == arm for row in rows)]:
        mine = [row for row in rows if row["arm"] == arm]
        losses = [[row["loss"] for row in mine if row["domain"] == domain] for domain in domains]
        told = [f"{fmean(found):+.3f}" if found else "" for found in losses]
        size = fmean(row["bytes"] / row["tokens"] for row in mine)
        lines.append(
            f"| {arm} | {' | '.join(told)} | {fmean(r['recover'] for r in mine):.0f} | {fmean(r['teach'] for r in mine):.0f} | "
            f"{f'{size:,.0f}' if size else ''} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--domains", nargs="+", default=["python", "medical"], choices=TEXT)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for domain, seed, arm in itertools.product(options.domains, options.seeds, options.arms):
        if any((row["domain"], row["seed"], row["arm"]) == (domain, seed, arm) for row in rows):
            continue
        rows.append(run(domain, seed, arm))
        RESULTS.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
        print(json.dumps(rows[-1]), flush=True)
    print(table([row for row in rows if row["seed"] in options.seeds]))


if __name__ == "__main__":
    main()
