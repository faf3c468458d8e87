"""What a job of real size takes, stage by stage: seconds, peak memory, tokens a second and the share of the device's limit.

    python bench/real_sizes.py [--shapes tiny 1B-4 1B 8B] [--recover-tokens 2097152] [--batch-tokens 131072] [--processes 1]

Bases of the shapes of Llama 3 with random weights in bfloat16, cut to half their parameters and recovered on the demo's text:
the time does not depend on weights. What runs is the engine as a user runs it, and the figures are its report's. Recovery's are
those of its curve, without what comes before its first step.

FLOPs are those of the weights (6 a parameter and token that is trained on, 2 that the teacher reads), not of attention, and not
those of activations that are computed again. The limit is the data sheet's where the device is known, else that of a square
matrix product measured here. Needs twenty bytes of disk a parameter (in TMPDIR). On a CPU ask for few tokens:

    python bench/real_sizes.py --shapes 1B-4 --budget 0.75 --calibration-tokens 1024 --block-tokens 512 --skill-tokens 1024 \\
        --recover-tokens 6144 --batch-tokens 2048
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from narrow_engine.doctor import gigaflops
from narrow_engine.models import device
from narrow_engine.muon import training_dtype
from narrow_engine.sizing import plan_sizes
from narrow_engine.spec import Options
from narrow_engine.train import machine

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4},
    "1B-4": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4, "num_attention_heads": 32},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8B": {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
"""1B-4 is the first four layers of 1B, which a CPU is enough for."""
TIED = ("tiny", "1B-4", "1B")
DENSE_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12}
"""FLOPs a second by NVIDIA's data sheets, without sparsity."""


def build(shape: str, folder: Path) -> None:
    """A base with the demo's tokenizer, whose tokens are the first of its vocabulary."""
    config = LlamaConfig(
        **SHAPES[shape],
        num_key_value_heads=SHAPES[shape]["num_attention_heads"] // 4,
        vocab_size=8192 if shape == "tiny" else 128_256,
        tie_word_embeddings=shape in TIED,
        max_position_embeddings=8192,
        bos_token_id=0,
        eos_token_id=0,
    )
    with device():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="4GB")
    del model
    if device().type == "cuda":
        torch.cuda.empty_cache()  # the job is another process
    for path in (ROOT / "demo" / "base").glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())


def limit() -> tuple[float, str]:
    """FLOPs a second that the device could do in what training multiplies in, and where that is from."""
    where = device()
    if where.type == "cuda":
        name = torch.cuda.get_device_name()
        known = [peak for part, peak in DENSE_BF16.items() if re.search(rf"\b{part}\b", name)]
        if known:
            return known[0], f"{name}, data sheet"
    dtype = training_dtype(where)
    measured = gigaflops(where, dtype)
    assert measured is not None
    return measured * 1e9, f"{where}, {dtype}, measured"


def run(base: Path, scratch: Path, asked: argparse.Namespace) -> tuple[dict, dict[str, int]]:
    """The report of a job, and the bytes that its stages were thought to take."""
    inputs = {"base": {"path": str(base)}, "target": {"path": str(ROOT / "demo" / "data" / "python.jsonl.gz")}}
    spec = {
        "method": {
            "units": ["neuron"],
            "calibration_tokens": asked.calibration_tokens,
            "recover": {"tokens": asked.recover_tokens, "batch_tokens": asked.batch_tokens},
        },
        "budget": {"parameters": asked.budget},
        "block_tokens": asked.block_tokens,
        "skill_tokens": asked.skill_tokens,
        "export": ["safetensors"],
    }
    (scratch / "spec.json").write_text(json.dumps({**inputs, **spec}))
    start = [sys.executable, "-m"]
    if asked.processes > 1:
        start += ["torch.distributed.run", "--nproc-per-node", str(asked.processes), "-m"]
    command = [*start, "narrow_engine", str(scratch / "spec.json"), "--out", str(scratch / "run")]
    # It tells each stage as it ends: a bench that is cut off has those.
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'client'}"})
    config = json.loads((base / "config.json").read_text())
    predicted = plan_sizes(config, Options.model_validate(spec), 2, machine=machine(device())).memory
    return json.loads((scratch / "run" / "result" / "report.json").read_text()), predicted


def flops_of_recovery(report: dict) -> float:
    """FLOPs a token: forward and backward of the result, forward of the base."""
    return 3.0 * report["after"]["flops_per_token"] + report["before"]["flops_per_token"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1B"])
    parser.add_argument("--budget", type=float, default=0.5, help="Share of the parameters that stays.")
    parser.add_argument("--calibration-tokens", type=int, default=65_536)
    parser.add_argument("--recover-tokens", type=int, default=2**21)
    parser.add_argument("--batch-tokens", type=int, default=2**17)
    parser.add_argument("--block-tokens", type=int, default=2048)
    parser.add_argument("--skill-tokens", type=int, default=16_384)
    parser.add_argument("--processes", type=int, default=1, help="GPUs, or processes on a CPU.")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "out" / "real_sizes.json")
    asked = parser.parse_args()
    peak, source = limit()
    found = []
    for shape in asked.shapes:
        with tempfile.TemporaryDirectory() as scratch:
            build(shape, Path(scratch) / "base")
            report, predicted = run(Path(scratch) / "base", Path(scratch), asked)
        curve = [point for point in report["curve"] if point["phase"] == "recover"]
        pace = (curve[-1]["tokens"] - curve[0]["tokens"]) / (curve[-1]["seconds"] - curve[0]["seconds"])
        share = pace * flops_of_recovery(report) / (peak * asked.processes)
        provenance = report["provenance"]
        found.append(
            {
                "shape": shape,
                "parameters": [report["before"]["parameters"], report["after"]["parameters"]],
                "seconds": provenance["seconds"],
                "predicted_bytes": predicted,
                "peak_bytes": provenance["memory"],
                "recovery_tokens_per_second": pace,
                "share_of_limit": share,
                "notices": [notice["message"] for notice in report["notices"]],
            }
        )
        print(f"\n{shape}: {report['before']['parameters']:,} parameters, cut to {report['after']['parameters']:,}")
        print(f"recovery: {pace:,.0f} tokens/s, {share:.0%} of {peak / 1e12:.3g} TFLOP/s ({source})\n")
        print("| stage | seconds | predicted, GB | peak, GB |\n|---|---|---|---|")
        for stage, seconds in provenance["seconds"].items():
            thought, taken = (bytes_of.get(stage, 0) / 1e9 for bytes_of in (predicted, provenance["memory"]))
            print(f"| {stage} | {seconds:.1f} | {thought:.1f} | {taken:.1f} |")
    asked.out.parent.mkdir(exist_ok=True)
    written = {"limit": peak, "source": source, "processes": asked.processes, "torch": torch.__version__, "rows": found}
    asked.out.write_text(json.dumps(written, indent=1))


if __name__ == "__main__":
    main()
