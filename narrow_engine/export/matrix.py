"""Which programs take which files: what this run has tried, and of servers that need a GPU what their rules say.

vLLM: docs.vllm.ai, supported models and parallelism; in its source models/registry.py, config/model.py
(verify_with_parallel_config) and v1/attention/backends (supports_head_size), read at 0.33.
TGI: huggingface.co/docs/text-generation-inference, supported models.
"""

from collections.abc import Collection
from typing import Any

from narrow_engine.families import dimensions
from narrow_engine.report.model import Load
from narrow_engine.spec import Format

NOT_IN_VLLM = frozenset({"ministral"})
"""Of the families here."""
IN_TGI = frozenset(
    "llama mistral mixtral qwen2 granite gemma gemma2 gemma3_text cohere phi3 starcoder2 gpt2 gpt_neox".split()  # noqa: SIM905
)
HEAD_MULTIPLE, HEAD_LARGEST = 8, 256
"""Of head sizes that FlashAttention takes."""
MOST_GPUS = 64


def runtimes(config: dict[str, Any], forms: Collection[Format], ran: Collection[Format]) -> list[Load]:
    """For a result with this config, in these formats, of which some were run."""
    found = [Load(runtime="transformers", format="safetensors", loads=True, checked=True, note="In a fresh process.")]
    found += [_vllm(config), _tgi(config)]
    for form in forms:
        if form.startswith("onnx"):
            found.append(Load(runtime="ONNX Runtime", format=form, loads=True, checked=form in ran))
            note = "genai_config.json is beside it."
            found.append(Load(runtime="ONNX Runtime GenAI", format=form, loads=True, checked=False, note=note))
        elif form.startswith("gguf"):
            note = "" if form in ran else "It is not installed where the job ran."
            found.append(Load(runtime="llama.cpp", format=form, loads=True, checked=form in ran, note=note))
    return found


def _vllm(config: dict[str, Any]) -> Load:
    if config["model_type"] in NOT_IN_VLLM:
        note = f"It has no implementation of {config['model_type']}."
        return Load(runtime="vLLM", format="safetensors", loads=False, checked=False, note=note)
    head = dimensions(config).head_dim
    fast = head % HEAD_MULTIPLE == 0 and head <= HEAD_LARGEST
    where = "in FlashAttention" if fast else "in its slower attention, not in FlashAttention"
    note = f"On {_numbers(gpus(config))}. Heads of {head} run {where}."
    return Load(runtime="vLLM", format="safetensors", loads=True, checked=False, note=note)


def _tgi(config: dict[str, Any]) -> Load:
    if config["model_type"] not in IN_TGI:
        note = f"It runs {config['model_type']} through transformers, on one GPU."
        return Load(runtime="TGI", format="safetensors", loads=True, checked=False, note=note)
    return Load(runtime="TGI", format="safetensors", loads=True, checked=False, note=f"On {_numbers(gpus(config, alike=False))}.")


def gpus(config: dict[str, Any], alike: bool = True) -> list[int]:
    """Over how many GPUs tensor parallelism can spread a model: heads, neurons and KV heads must divide, but that with `alike`
    several GPUs may hold the same KV head."""
    dims = dimensions(config)
    return [
        count
        for count in (2**power for power in range(MOST_GPUS.bit_length()))
        if dims.heads % count == 0
        and dims.width % count == 0
        and (dims.kv_heads % count == 0 or (alike and count % dims.kv_heads == 0))
    ]


def _numbers(counts: list[int]) -> str:
    several = " or ".join(filter(None, [", ".join(map(str, counts[:-1])), str(counts[-1])]))
    return f"{several} GPU{'s' if counts[-1] > 1 else ''}"
