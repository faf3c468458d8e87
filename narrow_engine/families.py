"""The architectures that Narrow knows, as data: every tensor of a layer with the meaning of each of its axes.

One table serves everything that has to know a model's structure. `sizing` multiplies axis lengths to count parameters,
`model_files` compares them with a file's header, `slice` selects along them. A new family is one entry here, and no
code, as long as its axes are in `Axis`. This module imports no torch: the API process plans with it.

Axes:
    hidden     the residual stream
    width      MLP neurons; in a tensor of all experts, those of one expert
    gate_up    MLP neurons twice, the gates in front (Phi-3, GLM, experts)
    expert     experts
    shared     neurons of the expert that sees every token (Qwen2-MoE), which are never cut
    one        a single number
    q, kv      heads × head_dim of the query heads, of the key/value heads, head by head
    q_k_v      all of q, then all of the keys, then all of the values (Phi-3, GPT-2)
    qkv        query, key and value of each head side by side (GPT-NeoX)
    head_dim   one head's dimensions
    vocab      tokens
    context    positions, where they are embedded
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from narrow_engine.errors import NarrowError
from narrow_engine.spec import Unit

Axis = Literal["hidden", "width", "gate_up", "expert", "shared", "one", "q", "kv", "q_k_v", "qkv", "head_dim", "vocab", "context"]

PARTS: dict[Axis, tuple[Axis, ...]] = {"gate_up": ("width", "width"), "q_k_v": ("q", "kv", "kv")}
"""Fused axes, as the axes that lie end to end along them."""


@dataclass(frozen=True)
class Tensor:
    """A parameter: its name inside the layer or the model, and what each axis counts.

    `when` names the config key that decides whether the tensor exists; empty if it always does. `saved` is what it is
    called in files, where that differs: a name for each part of a fused axis that is saved in parts, with a * for the
    number of the expert where each expert is saved on its own.
    """

    name: str
    axes: tuple[Axis, ...]
    when: str = ""
    saved: tuple[str, ...] = ()

    @property
    def routed(self) -> bool:
        """Whether it holds the experts themselves: a token meets those that it is routed to."""
        return self.axes[0] == "expert" and len(self.axes) == 3

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def reads(self) -> bool:
        """Whether it is a weight that reads the residual stream."""
        return len(self.axes) > 1 and self.axes[-1] == "hidden"

    @property
    def writes(self) -> bool:
        """Whether it writes to the residual stream: an output projection or its bias."""
        return "hidden" in self.axes and not self.reads and not self.is_norm

    @property
    def is_norm(self) -> bool:
        """Whether this is the weight of a norm: a vector that is no bias."""
        return len(self.axes) == 1 and not self.name.endswith(".bias")


@dataclass(frozen=True)
class Family:
    """One architecture. Paths are in-memory module names of the stock transformers class."""

    model_type: str
    layer_tensors: tuple[Tensor, ...]
    outer_tensors: tuple[Tensor, ...]
    layers: str = "model.layers"
    body: str = "model"
    head: str = "lm_head"
    attention_out: str = "self_attn.o_proj"
    """Reads the heads, writes the residual stream."""
    mlp_out: str = "mlp.down_proj"
    """Reads the neurons, writes the residual stream. Where there are experts, the module of them all."""
    mlp: str = "mlp"
    """The whole MLP: what it returns is what is written."""
    router: str = ""
    """Gives each token its experts; empty where there are none."""
    units: tuple[Unit, ...] = ("neuron", "head", "kv_group", "layer", "residual", "token")
    hidden_key: str = "hidden_size"
    width_key: str = "intermediate_size"
    multiple: int = 1
    """The stock code runs no width and no hidden size that is not a multiple of this. Its grouped product of experts takes rows
    of 16 bytes and multiples of that: eight numbers in bfloat16."""
    layers_key: str = "num_hidden_layers"
    heads_key: str = "num_attention_heads"
    context_key: str = "max_position_embeddings"
    kv_heads_key: str = "num_key_value_heads"
    """Config key of the number of key/value heads; empty where each query head has its own."""
    head_dim_key: str = "head_dim"
    """Config key of a head's size; empty where it is always hidden ÷ heads, so that no head can be cut alone."""
    experts_key: str = ""
    """Config key of the number of experts; empty where there are none."""
    active_key: str = "num_experts_per_tok"
    """Config key of the number of experts that a token is routed to."""
    shared_key: str = ""
    """Config key of the width of the expert that sees every token, in families that have one."""
    heads_divide_hidden: bool = False
    """Whether stock transformers refuses a number of heads that does not divide the hidden size."""
    writes_normed: bool = False
    """Whether what attention and MLP write is normalised before it is added to the stream."""
    norm_offset: int = 0
    """What a norm adds to its weight: Gemma's norms multiply by 1 + w."""
    embeddings_scaled: bool = False
    """Whether embeddings are multiplied by the square root of the hidden size."""
    write_scale_key: str = ""
    """Config key of the factor on what attention and MLP write, where there is one."""
    pairs: int = 0
    """Numbers that training keeps of every pair of positions in every head, where the stock attention is not fused."""
    softcap_key: str = ""
    """Config key of the cap on the logits, in families that have one."""
    logit_scale: tuple[str, int] = ("", 1)
    """Config key of the factor on the logits, and the power that it is taken to."""
    per_layer_keys: tuple[str, ...] = ("layer_types",)
    """Config lists with an entry a layer."""
    defaults: dict[str, int | bool] = field(default_factory=dict)
    """What transformers takes for keys that config.json leaves out, other than false and one key/value head a query head."""
    aliases: tuple[tuple[str, str], ...] = ()
    """Config keys that transformers reads as another: the name in some files, and the key."""
    only: tuple[tuple[str, Any], ...] = ()
    """Config keys that must have this value, if they are there, for the table to be true of every layer."""

    @property
    def readers(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The modules of a layer that read the normalised stream: the attention's, and the MLP's."""
        reading = {t.module: t.axes[0] in ("q", "kv", "q_k_v", "qkv") for t in self.layer_tensors if t.reads}
        return tuple(m for m, attention in reading.items() if attention), tuple(
            m for m, attention in reading.items() if not attention
        )

    @property
    def qk_normed(self) -> bool:
        """Whether queries and keys are normalised."""
        return any(t.is_norm and t.axes != ("hidden",) for t in self.layer_tensors)


def _linear(name: str, out: Axis, into: Axis, bias: str | None = None) -> tuple[Tensor, ...]:
    """A linear layer; `bias` is None for none, else the config key it depends on (empty: always there)."""
    weight = Tensor(f"{name}.weight", (out, into))
    return (weight,) if bias is None else (weight, Tensor(f"{name}.bias", (out,), bias))


def _norms(*names: str, bias: bool = False) -> tuple[Tensor, ...]:
    parts = ("weight", "bias") if bias else ("weight",)
    return tuple(Tensor(f"{name}.{part}", ("hidden",)) for name in names for part in parts)


def _attention(qkv_bias: str | None, out_bias: str | None, fused: bool = False) -> tuple[Tensor, ...]:
    out = _linear("self_attn.o_proj", "hidden", "q", out_bias)
    if fused:
        return (*_linear("self_attn.qkv_proj", "q_k_v", "hidden", qkv_bias), *out)
    return (
        *_linear("self_attn.q_proj", "q", "hidden", qkv_bias),
        *_linear("self_attn.k_proj", "kv", "hidden", qkv_bias),
        *_linear("self_attn.v_proj", "kv", "hidden", qkv_bias),
        *out,
    )


def _qk_norms(q: str = "self_attn.q_norm", k: str = "self_attn.k_norm", flat: bool = False) -> tuple[Tensor, ...]:
    """Norms of queries and keys: of each head, or flat over all of them, which then are one whole that cannot be cut."""
    return Tensor(f"{q}.weight", ("q" if flat else "head_dim",)), Tensor(f"{k}.weight", ("kv" if flat else "head_dim",))


def _gated_mlp(bias: str | None = None) -> tuple[Tensor, ...]:
    return (*_linear("mlp.gate_proj", "width", "hidden", bias), *_plain_mlp(bias))


def _plain_mlp(bias: str | None = None, up: str = "mlp.up_proj", down: str = "mlp.down_proj") -> tuple[Tensor, ...]:
    return (*_linear(up, "width", "hidden", bias), *_linear(down, "hidden", "width", bias))


def _fused_mlp() -> tuple[Tensor, ...]:
    return (*_linear("mlp.gate_up_proj", "gate_up", "hidden"), *_linear("mlp.down_proj", "hidden", "width"))


def _experts(block: str, router: str, saved_router: str, gate_up: tuple[str, ...], down: str) -> tuple[Tensor, ...]:
    """Router and experts; of the experts the names in files, in the block."""
    return (
        Tensor(f"{router}.weight", ("expert", "hidden"), saved=(saved_router,)),
        Tensor(f"{block}.experts.gate_up_proj", ("expert", "gate_up", "hidden"), saved=gate_up),
        Tensor(f"{block}.experts.down_proj", ("expert", "hidden", "width"), saved=(down,)),
    )


def _qwen_experts() -> tuple[Tensor, ...]:
    return _experts(
        "mlp",
        "mlp.gate",
        "mlp.gate.weight",
        ("mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"),
        "mlp.experts.*.down_proj.weight",
    )


def _outer(*norms: Tensor) -> tuple[Tensor, ...]:
    return (
        Tensor("model.embed_tokens.weight", ("vocab", "hidden")),
        *norms,
        Tensor("lm_head.weight", ("vocab", "hidden")),
    )


_IN, _POST, _PRE_MLP, _POST_MLP = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_LLAMA_NORMS = _norms(_IN, _POST)
_LLAMA_OUTER = _outer(*_norms("model.norm"))
_NO_HEADS: tuple[Unit, ...] = ("neuron", "layer", "token")
_LAYER_NORM: tuple[Unit, ...] = ("neuron", "head", "kv_group", "layer", "token")
"""LayerNorm subtracts the mean over all hidden dimensions, the silenced ones too: no slice of it is equal to that."""
_MOE: tuple[Unit, ...] = ("neuron", "expert", "head", "kv_group", "layer", "residual", "token")
_SPARSE_EVERYWHERE: tuple[tuple[str, Any], ...] = (("decoder_sparse_step", 1), ("mlp_only_layers", []))

_ALL = (
    Family(
        "llama",
        (*_attention("attention_bias", "attention_bias"), *_gated_mlp("mlp_bias"), *_LLAMA_NORMS),
        _LLAMA_OUTER,
        heads_divide_hidden=True,
    ),
    Family("mistral", (*_attention(None, None), *_gated_mlp(), *_LLAMA_NORMS), _LLAMA_OUTER, defaults={"num_key_value_heads": 8}),
    Family(
        "ministral", (*_attention(None, None), *_gated_mlp(), *_LLAMA_NORMS), _LLAMA_OUTER, defaults={"num_key_value_heads": 8}
    ),
    Family(
        "qwen2",
        (*_attention("", None), *_gated_mlp(), *_LLAMA_NORMS),
        _LLAMA_OUTER,
        defaults={"num_key_value_heads": 32},
    ),
    Family(
        "qwen3",
        (*_attention("attention_bias", "attention_bias"), *_qk_norms(), *_gated_mlp(), *_LLAMA_NORMS),
        _LLAMA_OUTER,
        defaults={"num_key_value_heads": 32, "head_dim": 128},
    ),
    Family(
        "smollm3",
        (*_attention("attention_bias", "attention_bias"), *_gated_mlp("mlp_bias"), *_LLAMA_NORMS),
        _LLAMA_OUTER,
        per_layer_keys=("layer_types", "no_rope_layers"),
        defaults={"num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
    Family(
        "granite",
        (*_attention("attention_bias", "attention_bias"), *_gated_mlp("mlp_bias"), *_LLAMA_NORMS),
        _LLAMA_OUTER,
        write_scale_key="residual_multiplier",
        logit_scale=("logits_scaling", -1),
    ),
    Family(
        "seed_oss",
        (*_attention("attention_bias", "attention_out_bias"), *_gated_mlp("mlp_bias"), *_LLAMA_NORMS),
        _LLAMA_OUTER,
        defaults={"num_key_value_heads": 8, "head_dim": 128, "attention_bias": True},
    ),
    Family(
        "ernie4_5",
        (*_attention("use_bias", "use_bias"), *_gated_mlp("use_bias"), *_LLAMA_NORMS),
        _LLAMA_OUTER,
        defaults={"num_key_value_heads": 2, "head_dim": 128, "tie_word_embeddings": True},
    ),
    Family(
        "hunyuan_v1_dense",
        (
            *_attention("attention_bias", "attention_bias"),
            *_qk_norms("self_attn.query_layernorm", "self_attn.key_layernorm"),
            *_gated_mlp(),
            *_LLAMA_NORMS,
        ),
        _LLAMA_OUTER,
    ),
    Family(
        "arcee",
        (*_attention("attention_bias", "attention_bias"), *_plain_mlp("mlp_bias"), *_LLAMA_NORMS),
        _LLAMA_OUTER,
        heads_divide_hidden=True,
    ),
    Family(
        "nemotron",
        (*_attention("attention_bias", "attention_bias"), *_plain_mlp("mlp_bias"), *_norms(_IN, _POST, bias=True)),
        _outer(*_norms("model.norm", bias=True)),
        units=_LAYER_NORM,
    ),
    Family(
        "starcoder2",
        (
            *_attention("use_bias", "use_bias"),
            *_plain_mlp("use_bias", "mlp.c_fc", "mlp.c_proj"),
            *_norms(_IN, _POST, bias=True),
        ),
        _outer(*_norms("model.norm", bias=True)),
        mlp_out="mlp.c_proj",
        defaults={"num_key_value_heads": 2, "use_bias": True, "tie_word_embeddings": True},
        units=_LAYER_NORM,
    ),
    Family(
        "stablelm",
        (*_attention("use_qkv_bias", None), *_gated_mlp(), *_norms(_IN, _POST, bias=True)),
        _outer(*_norms("model.norm", bias=True)),
        head_dim_key="",
        units=_NO_HEADS,
        defaults={"num_key_value_heads": 32},
    ),
    Family("olmo", (*_attention("attention_bias", "attention_bias"), *_gated_mlp()), _outer(), units=_LAYER_NORM),
    Family(
        "olmo2",
        (
            *_attention("attention_bias", "attention_bias"),
            *_qk_norms(flat=True),
            *_gated_mlp(),
            *_norms(_POST, _POST_MLP),
        ),
        _LLAMA_OUTER,
        writes_normed=True,
        units=(*_NO_HEADS, "residual"),
    ),
    Family(
        "exaone4",
        (*_attention(None, None), *_qk_norms(), *_gated_mlp(), *_norms(_POST, _POST_MLP)),
        _LLAMA_OUTER,
        writes_normed=True,
        defaults={"num_key_value_heads": 32},
    ),
    Family(
        "cohere",
        (*_attention("attention_bias", "attention_bias"), *_gated_mlp(), *_norms(_IN)),
        _LLAMA_OUTER,
        logit_scale=("logit_scale", 1),
        units=_LAYER_NORM,
        defaults={"tie_word_embeddings": True},
    ),
    Family(
        "cohere2",
        (*_attention("attention_bias", "attention_bias"), *_gated_mlp(), *_norms(_IN)),
        _LLAMA_OUTER,
        logit_scale=("logit_scale", 1),
        units=_LAYER_NORM,
        defaults={"tie_word_embeddings": True},
    ),
    Family("phi3", (*_attention(None, None, fused=True), *_fused_mlp(), *_LLAMA_NORMS), _LLAMA_OUTER),
    Family(
        "glm",
        (*_attention("attention_bias", None), *_fused_mlp(), *_LLAMA_NORMS),
        _LLAMA_OUTER,
        defaults={"num_key_value_heads": 2, "head_dim": 128, "attention_bias": True},
    ),
    Family(
        "glm4",
        (
            *_attention("attention_bias", None),
            *_fused_mlp(),
            *_LLAMA_NORMS,
            *_norms("post_self_attn_layernorm", "post_mlp_layernorm"),
        ),
        _LLAMA_OUTER,
        writes_normed=True,
        defaults={"num_key_value_heads": 2, "head_dim": 128, "attention_bias": True},
    ),
    Family(
        "gemma",
        (*_attention("attention_bias", "attention_bias"), *_gated_mlp(), *_LLAMA_NORMS),
        _LLAMA_OUTER,
        norm_offset=1,
        embeddings_scaled=True,
        defaults={"num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True},
    ),
    Family(
        "gemma2",
        (*_attention("attention_bias", "attention_bias"), *_gated_mlp(), *_LLAMA_NORMS, *_norms(_PRE_MLP, _POST_MLP)),
        _LLAMA_OUTER,
        norm_offset=1,
        embeddings_scaled=True,
        heads_divide_hidden=True,
        pairs=2,
        softcap_key="final_logit_softcapping",
        writes_normed=True,
        defaults={"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True},
    ),
    Family(
        "gemma3_text",
        (
            *_attention("attention_bias", "attention_bias"),
            *_qk_norms(),
            *_gated_mlp(),
            *_LLAMA_NORMS,
            *_norms(_PRE_MLP, _POST_MLP),
        ),
        _LLAMA_OUTER,
        norm_offset=1,
        embeddings_scaled=True,
        heads_divide_hidden=True,
        softcap_key="final_logit_softcapping",
        writes_normed=True,
        defaults={"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True},
    ),
    Family(
        "gpt_neox",
        (
            *_linear("attention.query_key_value", "qkv", "hidden", "attention_bias"),
            *_linear("attention.dense", "hidden", "q", "attention_bias"),
            *_plain_mlp("", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
            *_norms(_IN, _POST, bias=True),
        ),
        (
            Tensor("gpt_neox.embed_in.weight", ("vocab", "hidden")),
            *_norms("gpt_neox.final_layer_norm", bias=True),
            Tensor("lm_head.weight", ("vocab", "hidden"), saved=("embed_out.weight",)),
        ),
        layers="gpt_neox.layers",
        body="gpt_neox",
        attention_out="attention.dense",
        mlp_out="mlp.dense_4h_to_h",
        units=_NO_HEADS,
        kv_heads_key="",
        head_dim_key="",
        per_layer_keys=(),
        defaults={"attention_bias": True},
    ),
    Family(
        "gpt2",
        # Conv1D: the weights lie the other way round.
        (
            Tensor("attn.c_attn.weight", ("hidden", "q_k_v")),
            Tensor("attn.c_attn.bias", ("q_k_v",)),
            Tensor("attn.c_proj.weight", ("q", "hidden")),
            Tensor("attn.c_proj.bias", ("hidden",)),
            Tensor("mlp.c_fc.weight", ("hidden", "width")),
            Tensor("mlp.c_fc.bias", ("width",)),
            Tensor("mlp.c_proj.weight", ("width", "hidden")),
            Tensor("mlp.c_proj.bias", ("hidden",)),
            *_norms("ln_1", "ln_2", bias=True),
        ),
        (
            Tensor("transformer.wte.weight", ("vocab", "hidden")),
            Tensor("transformer.wpe.weight", ("context", "hidden")),
            *_norms("transformer.ln_f", bias=True),
            Tensor("lm_head.weight", ("vocab", "hidden")),
        ),
        layers="transformer.h",
        body="transformer",
        attention_out="attn.c_proj",
        mlp_out="mlp.c_proj",
        units=_NO_HEADS,
        hidden_key="n_embd",
        width_key="n_inner",
        layers_key="n_layer",
        heads_key="n_head",
        context_key="n_positions",
        kv_heads_key="",
        head_dim_key="",
        per_layer_keys=(),
        defaults={"tie_word_embeddings": True},
    ),
    Family(
        "mixtral",
        (
            *_attention(None, None),
            *_experts(
                "mlp",
                "mlp.gate",
                "block_sparse_moe.gate.weight",
                ("block_sparse_moe.experts.*.w1.weight", "block_sparse_moe.experts.*.w3.weight"),
                "block_sparse_moe.experts.*.w2.weight",
            ),
            *_LLAMA_NORMS,
        ),
        _LLAMA_OUTER,
        mlp_out="mlp.experts",
        router="mlp.gate",
        multiple=8,
        units=_MOE,
        experts_key="num_local_experts",
        defaults={"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
        aliases=(("num_experts", "num_local_experts"),),
    ),
    Family(
        "qwen3_moe",
        (*_attention("attention_bias", "attention_bias"), *_qk_norms(), *_qwen_experts(), *_LLAMA_NORMS),
        _LLAMA_OUTER,
        mlp_out="mlp.experts",
        router="mlp.gate",
        multiple=8,
        units=_MOE,
        width_key="moe_intermediate_size",
        experts_key="num_local_experts",
        defaults={
            "num_key_value_heads": 4,
            "moe_intermediate_size": 768,
            "num_local_experts": 128,
            "num_experts_per_tok": 8,
        },
        aliases=(("num_experts", "num_local_experts"),),
        only=_SPARSE_EVERYWHERE,
    ),
    Family(
        "qwen2_moe",
        (
            *_attention("qkv_bias", None),
            *_qwen_experts(),
            *_linear("mlp.shared_expert.gate_proj", "shared", "hidden"),
            *_linear("mlp.shared_expert.up_proj", "shared", "hidden"),
            *_linear("mlp.shared_expert.down_proj", "hidden", "shared"),
            *_linear("mlp.shared_expert_gate", "one", "hidden"),
            *_LLAMA_NORMS,
        ),
        _LLAMA_OUTER,
        mlp_out="mlp.experts",
        router="mlp.gate",
        multiple=8,
        units=_MOE,
        width_key="moe_intermediate_size",
        experts_key="num_experts",
        shared_key="shared_expert_intermediate_size",
        defaults={
            "num_key_value_heads": 16,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "qkv_bias": True,
        },
        only=_SPARSE_EVERYWHERE,
    ),
    Family(
        "olmoe",
        (*_attention("attention_bias", "attention_bias"), *_qk_norms(flat=True), *_qwen_experts(), *_LLAMA_NORMS),
        _LLAMA_OUTER,
        mlp_out="mlp.experts",
        router="mlp.gate",
        multiple=8,
        units=("neuron", "expert", "layer", "token"),
        head_dim_key="",
        experts_key="num_experts",
        defaults={"num_experts": 64, "num_experts_per_tok": 8},
        aliases=(("num_local_experts", "num_experts"),),
    ),
    Family(
        "granitemoe",
        (
            *_attention("attention_bias", "attention_bias"),
            *_experts(
                "block_sparse_moe",
                "block_sparse_moe.router",
                "block_sparse_moe.router.layer.weight",
                ("block_sparse_moe.input_linear.weight",),
                "block_sparse_moe.output_linear.weight",
            ),
            *_LLAMA_NORMS,
        ),
        _LLAMA_OUTER,
        mlp_out="block_sparse_moe.experts",
        mlp="block_sparse_moe",
        router="block_sparse_moe.router",
        multiple=8,
        units=_MOE,
        experts_key="num_local_experts",
        write_scale_key="residual_multiplier",
        logit_scale=("logits_scaling", -1),
        defaults={"num_local_experts": 8, "num_experts_per_tok": 2},
    ),
)

FAMILIES = {family.model_type: family for family in _ALL}


def family_of(config: dict[str, Any]) -> Family:
    """The family of a config.json. Raises NarrowError (unsupported_architecture)."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise NarrowError(
            "unsupported_architecture",
            f"The model's type {str(model_type)[:60]!r} is not one that Narrow knows: it takes {', '.join(sorted(FAMILIES))}. "
            "A new one needs an entry in narrow_engine/families.py that names its tensors and what each of their axes counts.",
        )
    return FAMILIES[model_type]


@dataclass(frozen=True)
class Dimensions:
    """The lengths that a config fixes."""

    hidden: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    tied: bool
    experts: int = 1
    """One in dense models, whose MLP every token meets."""
    active: int = 1
    """Experts that a token is routed to."""
    shared: int = 0

    def axis(self, axis: Axis) -> int:
        if axis in PARTS:
            return sum(self.axis(part) for part in PARTS[axis])
        lengths: dict[Axis, int] = {
            "hidden": self.hidden,
            "width": self.width,
            "expert": self.experts,
            "shared": self.shared,
            "one": 1,
            "q": self.heads * self.head_dim,
            "kv": self.kv_heads * self.head_dim,
            "qkv": 3 * self.heads * self.head_dim,
            "head_dim": self.head_dim,
            "vocab": self.vocab,
            "context": self.context,
        }
        return lengths[axis]


LIMIT = 2**24
COUNT_LIMIT = 4096
"""No length of a real model is larger, and no number of layers or heads: this bounds what a hostile config can ask for."""


CONTEXT = 2048
"""Taken where a config does not say; transformers' own defaults are this or longer."""


def opening(config: dict[str, Any]) -> int | None:
    """The token that opens a document: BOS, else EOS, else none."""
    for key in ("bos_token_id", "eos_token_id"):
        value = config.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int) and 0 <= value < config["vocab_size"]:
            return value
    return None


def dimensions(config: dict[str, Any]) -> Dimensions:
    """The lengths in a config.json. Raises NarrowError (unsupported_architecture, bad_config)."""
    family = family_of(config)
    values = _values(family, config)

    def length(key: str, default: int | None = None, limit: int = LIMIT) -> int:
        value = values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            raise NarrowError(
                "bad_config", f"config.json: {key!r} must be a whole number from 1 to {limit}, not {str(value)[:60]!r}."
            )
        return value

    hidden, heads = length(family.hidden_key), length(family.heads_key, limit=COUNT_LIMIT)
    kv_heads = length(family.kv_heads_key, heads) if family.kv_heads_key else heads
    if not family.head_dim_key or family.head_dim_key not in values:
        if hidden % heads:
            raise NarrowError("bad_config", f"config.json: {family.hidden_key} {hidden} is not divisible by {heads} heads.")
        head_dim = hidden // heads
    else:
        head_dim = length(family.head_dim_key)
    if heads % kv_heads:
        raise NarrowError(
            "bad_config", f"config.json: {heads} query heads cannot be shared equally by {kv_heads} key/value heads."
        )
    experts = length(family.experts_key, limit=COUNT_LIMIT) if family.experts_key else 1
    return Dimensions(
        hidden=hidden,
        width=length(family.width_key, 4 * hidden),
        layers=length(family.layers_key, limit=COUNT_LIMIT),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=length("vocab_size"),
        context=length(family.context_key, CONTEXT),
        tied=bool(values.get("tie_word_embeddings", False)),
        experts=experts,
        active=length(family.active_key, limit=experts) if family.experts_key else 1,
        shared=length(family.shared_key) if family.shared_key else 0,
    )


def _values(family: Family, config: dict[str, Any]) -> dict[str, Any]:
    """A config under the family's own keys, with its defaults. Raises NarrowError (bad_config, unsupported_architecture)."""
    given = {key: value for key, value in config.items() if value is not None}
    for alias, key in family.aliases:
        if alias in given and given.setdefault(key, given[alias]) != given[alias]:
            raise NarrowError("bad_config", f"config.json: {alias!r} and {key!r} are one number under two names, but differ.")
    for key, value in family.only:
        if given.get(key, value) != value:
            raise NarrowError(
                "unsupported_architecture",
                f"config.json: {key!r} is {str(given[key])[:60]}, but Narrow takes {family.model_type} models only where it is "
                f"{value}, so that all layers are alike.",
            )
    return {**family.defaults, **given}


def tensor_shapes(config: dict[str, Any], dims: Dimensions) -> dict[str, tuple[int, ...]]:
    """In-memory name → shape of every parameter; a tied head is left out, since it is the embedding."""
    return {name: _shape(tensor, dims) for name, tensor in _tensors(config, dims)}


def saved_shapes(config: dict[str, Any], dims: Dimensions) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor in the files of such a model, one after the other: a config can ask for billions."""
    for name, tensor in _tensors(config, dims):
        prefix = name.removesuffix(tensor.name)
        shape = list(_shape(tensor, dims))
        number = next((n for n, axis in enumerate(tensor.axes) if axis in PARTS), None)
        for position, saved in enumerate(tensor.saved or (tensor.name,)):
            if number is not None and len(tensor.saved) > 1:
                shape[number] = dims.axis(PARTS[tensor.axes[number]][position])
            if "*" not in saved:
                yield prefix + saved, tuple(shape)
                continue
            for expert in range(dims.experts):
                yield prefix + saved.replace("*", str(expert)), tuple(shape[1:])


def saved_names(config: dict[str, Any], name: str) -> tuple[str, ...]:
    """What an outer tensor is called in files."""
    family = family_of(config)
    return next((t.saved for t in family.outer_tensors if t.name == name), ()) or (name,)


def _tensors(config: dict[str, Any], dims: Dimensions) -> Iterator[tuple[str, Tensor]]:
    family = family_of(config)
    for tensor in present(family.outer_tensors, family, config):
        if not (dims.tied and tensor.name == f"{family.head}.weight"):
            yield tensor.name, tensor
    for layer in range(dims.layers):
        for tensor in present(family.layer_tensors, family, config):
            yield f"{family.layers}.{layer}.{tensor.name}", tensor


def present(tensors: tuple[Tensor, ...], family: Family, config: dict[str, Any]) -> list[Tensor]:
    """Those of `tensors` that a model with this config has."""
    values = {**family.defaults, **config}
    return [t for t in tensors if not t.when or values.get(t.when)]


def _shape(tensor: Tensor, dims: Dimensions) -> tuple[int, ...]:
    return tuple(dims.axis(axis) for axis in tensor.axes)
