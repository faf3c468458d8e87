"""How much faster a result is than its base in each format, beside what its weights say.

    python bench/exports.py [--shapes base-s 60M 160M] [--formats onnx onnx-int8 onnx-int4 gguf-q8_0 ...]

Models of the shapes of small Llamas, with random weights but for base-s, which is the demo's base: the time does not depend on
them. Each is cut to half the FLOPs a token twice, by neurons alone and by layers alone, at random, and base and cuts are written
in every format and timed in turn, one sequence at a time, each in a process of its own.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from narrow_engine import importance, speed
from narrow_engine.export import formats, runtimes
from narrow_engine.families import dimensions
from narrow_engine.models import config_dict
from narrow_engine.plan import make_plan
from narrow_engine.sizing import size_of, solve
from narrow_engine.slice import slice_model
from narrow_engine.spec import Format, Options

HERE = Path(__file__).resolve().parent
SHAPES = {
    "60M": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 10, "num_attention_heads": 8},
    "160M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 12},
    "360M": {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15},
}
CUTS = {"neurons": {"units": ["neuron"]}, "layers": {"units": ["layer"]}}


def build(shape: str, folder: Path) -> None:
    if shape == "base-s":
        model = AutoModelForCausalLM.from_pretrained(HERE.parent / "demo" / "base", dtype=torch.float32)
    else:
        heads = SHAPES[shape]["num_attention_heads"]
        config = LlamaConfig(
            **SHAPES[shape],
            num_key_value_heads=heads // (3 if heads % 3 == 0 else 4),
            vocab_size=32_000,
            tie_word_embeddings=True,
        )
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)


def cut(base: Path, how: str, folder: Path, fraction: float) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = config_dict(model)
    options = Options.model_validate({"method": CUTS[how], "budget": {"flops": fraction}, "block_tokens": 64})
    keep, _ = solve(config, options, 4)
    small = slice_model(model, make_plan(config, importance.random.draw(dimensions(config), 0), keep))
    small.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=["base-s", "60M", "160M"])
    parser.add_argument("--formats", nargs="*", default=["onnx", "onnx-int8", "onnx-int4"])
    parser.add_argument("--fraction", type=float, default=0.6, help="Of the base's FLOPs a token.")
    parser.add_argument("--out", type=Path, default=HERE / "out" / "exports.json")
    asked = parser.parse_args()
    rows = []
    for shape in asked.shapes:
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch)
            build(shape, place / "base")
            for how in CUTS:
                cut(place / "base", how, place / how, asked.fraction)
            sizes = {}
            for name in ("base", *CUTS):
                config = json.loads((place / name / "config.json").read_text())
                sizes[name] = size_of(config, dimensions(config), 4)
                for form in asked.formats:
                    formats.write(form, place / name, place / f"{name}-{form}", place / f"{name}-onnx")
            every: list[Format] = ["safetensors", *asked.formats]
            for form in every:
                if not runtimes.is_there(form):
                    continue
                suffix = "" if form == "safetensors" else f"-{form}"
                for how in CUTS:
                    folders = place / f"base{suffix}", place / f"{how}{suffix}"
                    found = speed.measure_speed(form, folders, (sizes["base"], sizes[how]), 512, lambda: None)
                    assert found.base is not None
                    row = {
                        "shape": shape,
                        "cut": how,
                        "format": form,
                        "predicted": round(found.predicted, 3),
                        "prefill": round(found.narrow.prefill / found.base.prefill, 3),
                        "decode": round(found.narrow.decode / found.base.decode, 3),
                        "memory": round((found.narrow.memory or 0) / (found.base.memory or 1), 3),
                        "base": found.base.model_dump(),
                        "bound": found.bound,
                    }
                    rows.append(row)
                    shown = {name: row[name] for name in ("shape", "cut", "format", "predicted", "prefill", "decode", "memory")}
                    print("  ".join(f"{name} {value}" for name, value in shown.items()), flush=True)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
