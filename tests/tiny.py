"""Tiny random models of every family, and a small corpus of real text."""

import gzip
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = (
    *("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3", "granite", "seed_oss", "ernie4_5", "hunyuan_v1_dense"),
    *("arcee", "nemotron", "starcoder2", "stablelm", "olmo", "olmo2", "exaone4", "cohere", "cohere2", "phi3", "glm", "glm4"),
    *("gemma", "gemma2", "gemma3_text", "gpt_neox", "gpt2"),
    *("mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "granitemoe"),
)
EXPERTS = FAMILIES[-5:]


EXTRA = {
    "gemma2": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8},
    "cohere2": {"sliding_window": 8},
    "granite": {"residual_multiplier": 0.5, "logits_scaling": 4.0, "embedding_multiplier": 2.0, "attention_multiplier": 0.3},
    "seed_oss": {"attention_out_bias": True},
    "ernie4_5": {"use_bias": True},
    "starcoder2": {"use_bias": True},
    "stablelm": {"use_qkv_bias": True},
    "mixtral": {"num_local_experts": 6},
    "qwen3_moe": {"num_local_experts": 6, "norm_topk_prob": True},
    "qwen2_moe": {"num_experts": 6, "shared_expert_intermediate_size": 20},
    "olmoe": {"num_experts": 6},
    "granitemoe": {
        "num_local_experts": 6,
        "residual_multiplier": 0.5,
        "logits_scaling": 4.0,
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.3,
    },
}
"""What makes a family special, turned on."""

MISSING = {
    "gpt_neox": ("num_key_value_heads", "head_dim", "mlp_bias"),
    "gpt2": ("num_key_value_heads", "head_dim", "mlp_bias"),
    "stablelm": ("head_dim",),
    "olmoe": ("head_dim",),
}
DIVIDED = tuple(MISSING)
"""Families whose heads are always hidden ÷ heads wide."""
RENAMED = {
    "gpt2": {
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    },
    "qwen3_moe": {"intermediate_size": "moe_intermediate_size"},
    "qwen2_moe": {"intermediate_size": "moe_intermediate_size"},
}


def tiny_config(family: str, **changes):
    """A config whose every optional part (biases, sliding window) is there."""
    from transformers import AutoConfig

    options = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "initializer_range": 0.25,
        "rms_norm_eps": 0.01,  # large enough to show where a cut forgets it
        "attention_bias": True,
        "mlp_bias": True,
        "num_experts_per_tok": 2,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        **EXTRA.get(family, {}),
        **changes,
    }
    if family == "smollm3":
        options.setdefault("no_rope_layers", [layer % 2 for layer in range(options["num_hidden_layers"])])
    for name in MISSING.get(family, ()):
        options.pop(name)
    renamed = RENAMED.get(family, {})
    return AutoConfig.for_model(family, **{renamed.get(k, k): v for k, v in options.items()})


def tiny_model(family: str, seed: int = 0, **changes):
    """A random model in float32 whose norms and biases are random too, so that forgetting one shows."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(-0.5, 1.5)
    model.config.use_cache = False
    return model


def multiply_in(patch, dtype):
    """Has training multiply in a type, whichever is faster on this machine."""
    from narrow_engine import muon, reconstruct, teacher, train

    for module in (muon, reconstruct, teacher, train):
        patch.setattr(module, "training_dtype", lambda _: dtype)


def kept(model, rows: int, length: int) -> int:
    """Bytes that autograd keeps of a forward pass of the body on blocks [rows, length], beside the weights: counted."""
    import torch
    from torch.autograd.graph import saved_tensors_hooks

    from narrow_engine.models import hidden_states

    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.arange(rows * length).view(rows, length) % model.config.vocab_size
    with torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = hidden_states(model, ids)  # the graph holds what is counted until all of it is
    del hidden
    return sum(found.values())


def documents(domain: str = "python", count: int = 60) -> list[str]:
    """The beginnings of real documents that ship with the demo."""
    with gzip.open(ROOT / "demo" / "data" / f"{domain}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"][:1500] for line, _ in zip(file, range(count), strict=False)]


def write_jsonl(path: Path, texts: list[str], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts), encoding="utf-8")
    return path
