"""What llama.cpp calls each family, and where its code for it is narrower than transformers': a table, no code.

llama.cpp has one implementation an architecture, with the activation, the order of rotary dimensions, the window pattern and
the tensors that may have a bias written into it. A GGUF file cannot change these, so a model that needs another value is
refused rather than computed wrongly. Every entry was read from the sources that come with llama-cpp-python 0.3.36
(src/models/*.cpp for tensors and hyperparameters, conversion/*.py for what is done to weights) and is held by running it:
tests/unit/test_gguf.py.
"""

from dataclasses import dataclass
from typing import Any, Literal

SILU, RELU2 = ("silu", "swish"), ("relu2",)
GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu")
"""ggml computes GELU by tanh, whichever is asked for, and on a CPU from a table in float16: logits of float32 files were up to
1e-3 of the largest one off, those of other families 2e-6."""

_OUT, _MLP = ("attn_output",), ("ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True)
class Arch:
    """One architecture of llama.cpp, for one family."""

    name: str
    act: tuple[str, ...] = SILU
    """Activations that its code is true of."""
    interleaved: bool = False
    """It turns neighbouring dimensions of a head together where transformers turns the two halves: rows of queries and keys
    are put in that order."""
    square: bool = False
    """It takes no other number of heads × head_dim than the hidden size."""
    grouped: bool = True
    """Whether it takes fewer key/value heads than query heads."""
    otherwise: "Arch | None" = None
    """Another architecture that computes the same and takes the models that this one cannot because of `square`."""
    fused: bool = True
    """Queries, keys and values, gates and inputs of an MLP stay one tensor where the family has them so."""
    head: Literal["optional", "required", "none"] = "optional"
    """Whether it reads an output matrix; one that is required is written even where it is the embedding again."""
    biases: tuple[str, ...] = ()
    """Tensors that may have a bias, besides queries, keys, values and norms."""
    norm_offset: int = 0
    """What the family's norms add to their weight and its own do not, so that it is added in the file."""
    transposed: bool = False
    """The family's weights lie the other way round (Conv1D)."""
    eps_key: str = "rms_norm_eps"
    """Config key of what is added to a variance; LayerNorm where it is not that of RMSNorm, with OLMo's 1e-5 where empty."""
    rotary: Literal["full", "part", "none"] = "full"
    """Whether only a part of a head may be turned."""
    rope_types: tuple[str, ...] = ("default", "linear", "yarn")
    window_period: int = 0
    """Layers with a sliding window come in groups of this size, whose last layer sees everything; 0 if it knows no windows."""
    windowless: Literal["", "context", "refuse"] = ""
    """What is done if it knows windows and no layer has one: say nothing, or call the whole context a window, or refuse it."""
    numbers: tuple[tuple[str, str], ...] = ()
    """Config keys of numbers that it reads, and their metadata key, without the architecture's name in front."""
    flags: tuple[tuple[str, str], ...] = ()
    only: tuple[tuple[str, Any], ...] = ()
    """Config keys that must have this value for its code to be true of the model; a missing key is None."""
    layers_below: int = 0
    """From so many layers on it takes the model for another one; 0 for no limit."""
    layers_not: int = 0
    """With just so many layers it takes the model for another one; 0 for none."""
    query_scale: str = ""
    """The tensor that takes up the difference where `query_pre_attn_scalar` is not head_dim, which its code takes for granted."""
    large_layers: int = 0
    """With just so many layers its code takes hidden ÷ heads for that scalar (Gemma 27B)."""


_FREQUENCIES = ("default", "linear", "yarn", "llama3")
_LLAMA = Arch("llama", interleaved=True, fused=False, biases=(*_OUT, *_MLP), rope_types=_FREQUENCIES)
_GRANITE = (
    ("attention_multiplier", "attention.scale"),
    ("embedding_multiplier", "embedding_scale"),
    ("residual_multiplier", "residual_scale"),
    ("logits_scaling", "logit_scale"),
)
_PLAIN_EXPERTS: tuple[tuple[str, Any], ...] = (("norm_topk_prob", False),)

ARCHES: dict[str, Arch] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "ministral": _LLAMA,
    "mixtral": _LLAMA,
    # With rows reordered, Qwen2 without square attention and Phi-3 with tensors split are Llamas, whose code takes any head.
    "qwen2": Arch("qwen2", square=True, otherwise=_LLAMA),
    "phi3": Arch("phi3", square=True, otherwise=_LLAMA, rotary="part", rope_types=("default", "longrope")),
    "qwen3": Arch("qwen3"),
    "smollm3": Arch("smollm3", interleaved=True),
    "granite": Arch("granite", interleaved=True, biases=(*_OUT, *_MLP), rope_types=_FREQUENCIES, numbers=_GRANITE),
    "granitemoe": Arch("granitemoe", interleaved=True, biases=_OUT, rope_types=_FREQUENCIES, numbers=_GRANITE),
    "seed_oss": Arch("seed_oss"),
    "ernie4_5": Arch("ernie4_5", biases=_OUT),
    "hunyuan_v1_dense": Arch("hunyuan-dense"),
    "arcee": Arch("arcee", RELU2, interleaved=True, rope_types=_FREQUENCIES),
    "nemotron": Arch(
        "nemotron",
        RELU2,
        square=True,
        head="required",
        biases=(*_OUT, "ffn_up", "ffn_down"),
        norm_offset=1,
        eps_key="norm_eps",
        rotary="part",
    ),
    "starcoder2": Arch(
        "starcoder2",
        GELU,
        square=True,
        biases=(*_OUT, "ffn_up", "ffn_down"),
        eps_key="norm_epsilon",
        only=(("use_bias", True),),
    ),
    "stablelm": Arch(
        "stablelm",
        square=True,
        head="required",
        eps_key="layer_norm_eps",
        rotary="part",
        flags=(("use_parallel_residual", "use_parallel_residual"),),
        only=(("qk_layernorm", False), ("use_parallel_residual", False)),
    ),
    "olmo": Arch("olmo", interleaved=True, square=True, eps_key="", numbers=(("clip_qkv", "attention.clamp_kqv"),)),
    "olmo2": Arch("olmo2", square=True, head="required"),
    "olmoe": Arch("olmoe", square=True, grouped=False, head="required", only=(*_PLAIN_EXPERTS, ("clip_qkv", None))),
    "exaone4": Arch("exaone4", square=True, rope_types=_FREQUENCIES, only=(("sliding_window", None),), layers_not=64),
    "cohere": Arch(
        "command-r",
        square=True,
        head="none",
        eps_key="layer_norm_eps",
        numbers=(("logit_scale", "logit_scale"),),
        only=(("use_qk_norm", False),),
        layers_below=64,
    ),
    "cohere2": Arch(
        "cohere2",
        square=True,
        head="none",
        eps_key="layer_norm_eps",
        window_period=4,
        windowless="refuse",
        numbers=(("logit_scale", "logit_scale"),),
    ),
    "glm": Arch("chatglm", square=True, rotary="part", rope_types=("default",)),
    "glm4": Arch("glm4", rotary="part", rope_types=("default",)),
    "gemma": Arch("gemma", GELU, head="none", norm_offset=1),
    "gemma2": Arch(
        "gemma2",
        GELU,
        head="none",
        norm_offset=1,
        window_period=2,
        windowless="context",
        numbers=(
            ("attn_logit_softcapping", "attn_logit_softcapping"),
            ("final_logit_softcapping", "final_logit_softcapping"),
        ),
        query_scale="attn_q",
        large_layers=46,
    ),
    "gemma3_text": Arch(
        "gemma3",
        GELU,
        norm_offset=1,
        window_period=6,
        numbers=(("final_logit_softcapping", "final_logit_softcapping"),),
        only=(("attn_logit_softcapping", None), ("use_bidirectional_attention", False)),
        query_scale="attn_q_norm",
        large_layers=62,
    ),
    "gpt_neox": Arch(
        "gptneox",
        GELU,
        square=True,
        head="required",
        biases=(*_OUT, "attn_qkv", "ffn_up", "ffn_down"),
        eps_key="layer_norm_eps",
        rotary="part",
        flags=(("use_parallel_residual", "use_parallel_residual"),),
        only=(("attention_bias", True),),
    ),
    "gpt2": Arch(
        "gpt2",
        GELU,
        square=True,
        biases=(*_OUT, "attn_qkv", "ffn_up", "ffn_down"),
        transposed=True,
        eps_key="layer_norm_epsilon",
        rotary="none",
        only=(("scale_attn_by_inverse_layer_idx", False), ("scale_attn_weights", True), ("add_cross_attention", False)),
    ),
    "qwen3_moe": Arch("qwen3moe", only=(("norm_topk_prob", True),)),
    "qwen2_moe": Arch("qwen2moe", square=True, head="required", only=_PLAIN_EXPERTS),
}
