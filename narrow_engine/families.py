"""The architectures that Narrow knows, as data: every tensor of a layer with the meaning of each of its axes.

One table serves everything that has to know a model's structure. `sizing` multiplies axis lengths to count parameters,
`model_files` compares them with a file's header, `slice` selects along them. A new family is one entry here, and no
code, as long as its axes are in `Axis`. This module imports no torch: the API process plans with it.

Axes:
    hidden     the residual stream
    width      MLP neurons
    q, kv      heads × head_dim of the query heads, of the key/value heads, head by head
    qkv        query, key and value of each head side by side (GPT-NeoX)
    head_dim   one head's dimensions
    vocab      tokens
"""

from dataclasses import dataclass
from typing import Any, Literal

from narrow_engine.errors import NarrowError
from narrow_engine.spec import Unit

Axis = Literal["hidden", "width", "q", "kv", "qkv", "head_dim", "vocab"]


@dataclass(frozen=True)
class Tensor:
    """A parameter: its name inside the layer or the model, and what each axis counts.

    `when` names the config key that decides whether the tensor exists; empty if it always does.
    """

    name: str
    axes: tuple[Axis, ...]
    when: str = ""


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
    """Reads the neurons, writes the residual stream."""
    units: tuple[Unit, ...] = ("neuron", "head", "kv_group", "layer")
    kv_heads_key: str = "num_key_value_heads"
    """Config key of the number of key/value heads; empty where each query head has its own."""
    head_dim_key: str = "head_dim"
    """Config key of a head's size; empty where it is always hidden ÷ heads, so that no head can be cut alone."""
    heads_divide_hidden: bool = False
    """Whether stock transformers refuses a number of heads that does not divide the hidden size."""
    writes_normed: bool = False
    """Whether what attention and MLP write is normalised before it is added to the stream."""
    per_layer_keys: tuple[str, ...] = ("layer_types",)
    """Config lists with an entry a layer."""
    defaults: tuple[tuple[str, int | bool], ...] = ()
    """What transformers takes for keys that config.json leaves out."""
    on_disk: tuple[tuple[str, str], ...] = ()
    """In-memory name and saved name, where transformers renames."""


def _linear(name: str, out: Axis, into: Axis, bias: str | None = None) -> tuple[Tensor, ...]:
    """A linear layer; `bias` is None for none, else the config key it depends on (empty: always there)."""
    weight = Tensor(f"{name}.weight", (out, into))
    return (weight,) if bias is None else (weight, Tensor(f"{name}.bias", (out,), bias))


def _norms(*names: str, bias: bool = False) -> tuple[Tensor, ...]:
    parts = ("weight", "bias") if bias else ("weight",)
    return tuple(Tensor(f"{name}.{part}", ("hidden",)) for name in names for part in parts)


def _attention(qkv_bias: str | None, out_bias: str | None) -> tuple[Tensor, ...]:
    return (
        *_linear("self_attn.q_proj", "q", "hidden", qkv_bias),
        *_linear("self_attn.k_proj", "kv", "hidden", qkv_bias),
        *_linear("self_attn.v_proj", "kv", "hidden", qkv_bias),
        *_linear("self_attn.o_proj", "hidden", "q", out_bias),
    )


def _gated_mlp(bias: str | None = None) -> tuple[Tensor, ...]:
    return (
        *_linear("mlp.gate_proj", "width", "hidden", bias),
        *_linear("mlp.up_proj", "width", "hidden", bias),
        *_linear("mlp.down_proj", "hidden", "width", bias),
    )


_LLAMA_NORMS = _norms("input_layernorm", "post_attention_layernorm")
_LLAMA_OUTER = (
    Tensor("model.embed_tokens.weight", ("vocab", "hidden")),
    Tensor("model.norm.weight", ("hidden",)),
    Tensor("lm_head.weight", ("vocab", "hidden")),
)

_ALL = (
    Family(
        "llama",
        (*_attention("attention_bias", "attention_bias"), *_gated_mlp("mlp_bias"), *_LLAMA_NORMS),
        _LLAMA_OUTER,
        heads_divide_hidden=True,
    ),
    Family("mistral", (*_attention(None, None), *_gated_mlp(), *_LLAMA_NORMS), _LLAMA_OUTER),
    Family("qwen2", (*_attention("", None), *_gated_mlp(), *_LLAMA_NORMS), _LLAMA_OUTER),
    Family(
        "qwen3",
        (
            *_attention("attention_bias", "attention_bias"),
            Tensor("self_attn.q_norm.weight", ("head_dim",)),
            Tensor("self_attn.k_norm.weight", ("head_dim",)),
            *_gated_mlp(),
            *_LLAMA_NORMS,
        ),
        _LLAMA_OUTER,
        defaults=(("head_dim", 128),),
    ),
    Family(
        "gemma2",
        (
            *_attention("attention_bias", "attention_bias"),
            *_gated_mlp(),
            *_LLAMA_NORMS,
            *_norms("pre_feedforward_layernorm", "post_feedforward_layernorm"),
        ),
        _LLAMA_OUTER,
        heads_divide_hidden=True,
        writes_normed=True,
        defaults=(("head_dim", 256), ("tie_word_embeddings", True)),
    ),
    Family(
        "gpt_neox",
        (
            *_linear("attention.query_key_value", "qkv", "hidden", "attention_bias"),
            *_linear("attention.dense", "hidden", "q", "attention_bias"),
            *_linear("mlp.dense_h_to_4h", "width", "hidden", ""),
            *_linear("mlp.dense_4h_to_h", "hidden", "width", ""),
            *_norms("input_layernorm", "post_attention_layernorm", bias=True),
        ),
        (
            Tensor("gpt_neox.embed_in.weight", ("vocab", "hidden")),
            *_norms("gpt_neox.final_layer_norm", bias=True),
            Tensor("lm_head.weight", ("vocab", "hidden")),
        ),
        layers="gpt_neox.layers",
        body="gpt_neox",
        attention_out="attention.dense",
        mlp_out="mlp.dense_4h_to_h",
        units=("neuron", "layer"),
        kv_heads_key="",
        head_dim_key="",
        per_layer_keys=(),
        defaults=(("attention_bias", True),),
        on_disk=(("lm_head.weight", "embed_out.weight"),),
    ),
)

FAMILIES = {family.model_type: family for family in _ALL}


def family_of(config: dict[str, Any]) -> Family:
    """The family of a config.json. Raises NarrowError (unsupported_architecture)."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise NarrowError(
            "unsupported_architecture",
            f"The model's type {str(model_type)[:60]!r} is not one that Narrow knows: it takes {', '.join(sorted(FAMILIES))}.",
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
    tied: bool

    def axis(self, axis: Axis) -> int:
        lengths: dict[Axis, int] = {
            "hidden": self.hidden,
            "width": self.width,
            "q": self.heads * self.head_dim,
            "kv": self.kv_heads * self.head_dim,
            "qkv": 3 * self.heads * self.head_dim,
            "head_dim": self.head_dim,
            "vocab": self.vocab,
        }
        return lengths[axis]


LIMIT = 2**24
"""No length of a real model is larger; it bounds what a hostile config can ask for before anything is allocated."""


def dimensions(config: dict[str, Any]) -> Dimensions:
    """The lengths in a config.json. Raises NarrowError (unsupported_architecture, bad_config)."""
    family = family_of(config)
    values: dict[str, Any] = {**dict(family.defaults), **{k: v for k, v in config.items() if v is not None}}

    def length(key: str, default: int | None = None) -> int:
        value = values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LIMIT:
            raise NarrowError(
                "bad_config", f"config.json: {key!r} must be a whole number from 1 to {LIMIT}, not {str(value)[:60]!r}."
            )
        return value

    hidden, heads = length("hidden_size"), length("num_attention_heads")
    kv_heads = length(family.kv_heads_key, heads) if family.kv_heads_key else heads
    if not family.head_dim_key or family.head_dim_key not in values:
        if hidden % heads:
            raise NarrowError("bad_config", f"config.json: hidden_size {hidden} is not divisible by {heads} heads.")
        head_dim = hidden // heads
    else:
        head_dim = length(family.head_dim_key)
    if heads % kv_heads:
        raise NarrowError(
            "bad_config", f"config.json: {heads} query heads cannot be shared equally by {kv_heads} key/value heads."
        )
    return Dimensions(
        hidden=hidden,
        width=length("intermediate_size"),
        layers=length("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=length("vocab_size"),
        tied=bool(values.get("tie_word_embeddings", False)),
    )


def tensor_shapes(config: dict[str, Any], dims: Dimensions) -> dict[str, tuple[int, ...]]:
    """In-memory name → shape of every parameter; a tied head is left out, since it is the embedding."""
    family = family_of(config)
    return {
        **{t.name: _shape(t, dims) for t in present(family.outer_tensors, family, config) if not _tied_head(t, family, dims)},
        **{
            f"{family.layers}.{layer}.{t.name}": _shape(t, dims)
            for layer in range(dims.layers)
            for t in present(family.layer_tensors, family, config)
        },
    }


def present(tensors: tuple[Tensor, ...], family: Family, config: dict[str, Any]) -> list[Tensor]:
    """Those of `tensors` that a model with this config has."""
    values = {**dict(family.defaults), **config}
    return [t for t in tensors if not t.when or values.get(t.when)]


def _shape(tensor: Tensor, dims: Dimensions) -> tuple[int, ...]:
    return tuple(dims.axis(axis) for axis in tensor.axes)


def _tied_head(tensor: Tensor, family: Family, dims: Dimensions) -> bool:
    return dims.tied and tensor.name == f"{family.head}.weight"
