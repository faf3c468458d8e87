"""Plan + model → a smaller stock model. Exact: its logits equal those of the base with the cut units masked.

What is selected along which axis of which tensor follows from the family table alone. The result is an ordinary
transformers model with an ordinary config: it loads anywhere and knows nothing of Narrow.
"""

import copy
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from narrow_engine import layerwise
from narrow_engine.families import PARTS, Axis, Dimensions, Family, dimensions, family_of, present
from narrow_engine.families import Tensor as Parameter
from narrow_engine.models import (
    Outline,
    config_dict,
    family,
    head,
    hidden_states,
    layers,
    neuron_readers,
    outline,
    output_weight,
)
from narrow_engine.parked import brought, resident
from narrow_engine.plan import Plan, whole_plan
from narrow_engine.report.model import Parity
from narrow_engine.vocabulary import renumber_config

EPSILON = "rms_norm_eps"
"""Config key of the ε of every norm, in the families that can lose hidden dimensions."""
QK = ("self_attn.q_proj", "self_attn.k_proj")


def slice_model(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """A new model with the kept units only. `model` is left as it is."""
    table, config = family(model), config_dict(model)
    dims = dimensions(config)
    like = model.get_input_embeddings().weight
    small = unfilled(outline(model), plan, like)
    old, new = model.state_dict(), small.state_dict()
    for tensor in present(table.outer_tensors, table, config):
        new[tensor.name].copy_(slice_tensor(old[tensor.name], tensor, table, plan, dims))
    for position, layer in enumerate(plan.layers):
        for tensor in present(table.layer_tensors, table, config):
            # As it computes: a parked layer's weights may be stored in fewer bits than what is made of them needs.
            value = brought(old[f"{table.layers}.{layer}.{tensor.name}"], like)
            new[f"{table.layers}.{position}.{tensor.name}"].copy_(slice_tensor(value, tensor, table, plan, dims, position))
    return small


def unfilled(whole: Outline, plan: Plan, like: Tensor) -> PreTrainedModel:
    """What slicing by the plan makes of a model, on the device and in the precision of `like`, but with any weights."""
    config = dict(whole.config.to_dict())
    dims = dimensions(config)
    with no_init_weights():
        small = AutoModelForCausalLM.from_config(
            type(whole.config).from_dict({**config, **_sliced_config(family_of(config), config, plan, dims)}),
            dtype=torch.float32,
            attn_implementation=whole.config._attn_implementation,
        ).to(device=like.device, dtype=like.dtype)
    small.tie_weights()
    small.config.use_cache = whole.config.use_cache
    if whole.generation is not None:
        small.generation_config = copy.deepcopy(whole.generation)
        for key, numbers in _renumbered(small.generation_config.to_dict(), plan, dims).items():
            setattr(small.generation_config, key, numbers)
    return small.eval()


def trim_vocabulary(model: PreTrainedModel, tokens: list[int]) -> PreTrainedModel:
    """The model with these of its tokens only. It shares all other weights with `model`, which is left as it is: neither may
    be trained."""
    table, config = family(model), config_dict(model)
    plan, dims = whole_plan(config, tokens), dimensions(config)
    small = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for tensor in present(table.outer_tensors, table, config):
        if "vocab" in tensor.axes:
            module = small.get_submodule(tensor.module)
            value = slice_tensor(small.get_parameter(tensor.name).detach(), tensor, table, plan, dims)
            setattr(module, tensor.name.rpartition(".")[2], nn.Parameter(value))
    for module in (small, small.get_submodule(table.body)):
        if hasattr(module, "vocab_size"):
            module.vocab_size = len(tokens)
    small.get_input_embeddings().num_embeddings = small.get_output_embeddings().out_features = len(tokens)
    small.tie_weights()
    for kept in (small.config, small.generation_config):
        for key, value in renumber_config(kept.to_dict(), tokens).items() if kept is not None else ():
            setattr(kept, key, value)
    small.config.vocab_size = len(tokens)
    small.get_input_embeddings().padding_idx = None  # it is for training
    return small


def renew(model: PreTrainedModel, seed: int) -> None:
    """Gives a model fresh weights, as transformers draws them for its family."""
    torch.manual_seed(seed)
    fresh = AutoModelForCausalLM.from_config(model.config, attn_implementation=model.config._attn_implementation)
    model.load_state_dict(fresh.state_dict())
    model.tie_weights()


def slice_tensor(value: Tensor, tensor: Parameter, table: Family, plan: Plan, dims: Dimensions, position: int = 0) -> Tensor:
    """What is left of one of the model's tensors, or of one of the layer that the plan keeps at `position`."""
    if tensor.routed:
        value = torch.stack([_cut(value[e], tensor.axes[1:], plan, position, dims, e) for e in plan.experts[position]])
    else:
        value = _cut(value, tensor.axes, plan, position, dims)
    if len(plan.residual) == dims.hidden:
        return value
    offset = table.norm_offset if tensor.is_norm else 0
    return (value + offset) * _fold(tensor, table, plan, dims) - offset


def _fold(tensor: Parameter, table: Family, plan: Plan, dims: Dimensions) -> float:
    """The factor that makes up for what the removal of hidden dimensions changes beside the dimensions themselves.

    RMSNorm divides by the root mean square over all D dimensions, of which the silenced ones add nothing. Over the D' that
    are kept the mean is D/D' times as large, so the weights take √(D/D') and ε, one for all norms of the model, D/D'. The
    norms of queries and keys lost no dimension, but share that ε: their inputs take √(D/D') too, and the norm takes it out
    again. Gemma multiplies embeddings by √D, which takes the same factor back; where the embedding is the head as well,
    that is the factor of the last norm already.
    """
    factor = math.sqrt(dims.hidden / len(plan.residual))
    last_norm = tensor.axes == ("hidden",) and tensor in table.outer_tensors
    if tensor.is_norm and "hidden" in tensor.axes:
        return 1.0 if last_norm and table.embeddings_scaled and dims.tied else factor
    if table.qk_normed and tensor.module in QK:
        return factor
    if table.embeddings_scaled and tensor.axes[0] == "vocab" and (dims.tied or tensor.module != table.head):
        return factor
    return 1.0


def mask_model(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """The base with everything outside the plan silenced and nothing removed: what slicing must be equal to. A token that is
    never fed is silent already: `compare` looks at the others."""
    masked = copy.deepcopy(model)
    dims = dimensions(config_dict(model))
    with torch.no_grad():
        masked.get_input_embeddings().weight[:, _gone(plan, dims)] = 0
    for number, layer in enumerate(layers(masked)):
        _mask_layer(model, layer, number, plan)
    return masked


@torch.no_grad()
def masked_states(model: PreTrainedModel, plan: Plan, ids: Tensor) -> Tensor:
    """What the head of `mask_model` reads of tokens [rows, length], with no copy of the model but that of a layer at a time."""
    stream, calls = layerwise.enter(model, ids)
    stream = stream.clone()
    stream[..., _gone(plan, dimensions(config_dict(model)))] = 0
    for number, call in enumerate(calls):
        with resident(call.layer, stream):
            layer = copy.deepcopy(call.layer)
        _mask_layer(model, layer, number, plan)
        stream = replace(call, layer=layer)(stream)
    return layerwise.leave(model, ids, stream)


def _gone(plan: Plan, dims: Dimensions) -> list[int]:
    return sorted(set(range(dims.hidden)) - set(plan.residual))


@torch.no_grad()
def _mask_layer(model: PreTrainedModel, layer: nn.Module, number: int, plan: Plan) -> None:
    """Silences in a copy of the model's layer `number` what is outside the plan.

    A neuron or head is silenced where it is read, a layer and a hidden dimension where the residual stream is written, an
    expert by its logit in the router.
    """
    table, config = family(model), config_dict(model)
    dims = dimensions(config)
    if number not in plan.layers:
        for name in (table.attention_out, table.mlp):
            for parameter in layer.get_submodule(name).parameters():
                parameter.zero_()
        return
    position = plan.layers.index(number)
    _silence(output_weight(layer, table, table.attention_out), _kept("q", plan, position, dims))
    for expert, weight in enumerate(neuron_readers(layer, table)):
        _silence(weight, _kept("width", plan, position, dims, expert))
    if table.router:
        _never_route(layer.get_submodule(table.router), plan.experts[position])
    for tensor in present(table.layer_tensors, table, config):
        if tensor.writes:
            parameter = layer.get_parameter(tensor.name)
            gone = torch.tensor(_gone(plan, dims), dtype=torch.int64, device=parameter.device)
            parameter.index_fill_(tensor.axes.index("hidden"), gone, 0.0)


def _silence(weight: Tensor, kept: list[int] | None) -> None:
    silent = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    silent[kept] = False
    weight[:, silent] = 0


def _never_route(router: nn.Module, kept: list[int]) -> None:
    """Gives all experts but the kept the logit −∞, so that what the router does with logits is done among the kept.

    Routers have no bias: a further input that is always 1 carries one.
    """
    weight = router.get_parameter("weight")
    bias = torch.full((len(weight), 1), -torch.inf, dtype=weight.dtype, device=weight.device)
    bias[kept] = 0
    router.weight = nn.Parameter(torch.cat([weight, bias], 1))
    router.hidden_dim = weight.shape[1] + 1  # type: ignore[assignment]
    router.register_forward_pre_hook(lambda _, args: (functional.pad(args[0], (0, 1), value=1.0),))


@torch.no_grad()
def compare(
    one: PreTrainedModel, other: PreTrainedModel, ids: Tensor, tokens: list[int] | None = None, plan: Plan | None = None
) -> Parity:
    """The largest difference between the logits of two models on tokens [rows, length].

    Where the vocabulary of `other` is trimmed, `tokens` are its tokens in `one`, and `ids` are numbers of `other`. With a `plan`,
    what is outside of it is silenced in `one`: what slicing by the plan must be equal to.
    """
    kept = torch.arange(one.config.vocab_size) if tokens is None else torch.tensor(tokens)
    kept = kept.to(ids.device)
    states = masked_states(one, plan, kept[ids]) if plan else hidden_states(one, kept[ids])
    first = head(one).logits(states.flatten(0, 1))[:, kept]
    second = head(other).logits(hidden_states(other, ids).flatten(0, 1))
    error = (first - second).abs().max().item()
    return Parity(max_error=error, relative_error=error / max(first.abs().max().item(), 1e-9))


def _cut(value: Tensor, axes: tuple[Axis, ...], plan: Plan, position: int, dims: Dimensions, expert: int = 0) -> Tensor:
    """A tensor of the layer at `position` of the plan, or one expert's part of it, without what is cut."""
    for number, axis in enumerate(axes):
        rows = _kept(axis, plan, position, dims, expert)
        if rows is not None and len(rows) < value.shape[number]:
            value = value.index_select(number, torch.tensor(rows, device=value.device))
    return value


def _kept(axis: Axis, plan: Plan, position: int, dims: Dimensions, expert: int = 0) -> list[int] | None:
    """Kept indices along an axis of the layer at `position` of the plan; None for an axis that is never cut."""
    if axis in PARTS:
        found, start = [], 0
        for part in PARTS[axis]:
            found += [start + index for index in _kept(part, plan, position, dims, expert) or ()]
            start += dims.axis(part)
        return found
    if axis == "vocab":
        return plan.tokens
    if axis == "width":
        first = expert * dims.width
        return [neuron - first for neuron in plan.neurons[position] if first <= neuron < first + dims.width]
    if axis == "expert":
        return plan.experts[position]
    if axis == "q":
        return _expand(plan.heads[position], dims.head_dim)
    if axis == "qkv":
        return _expand(plan.heads[position], 3 * dims.head_dim)
    if axis == "kv":
        return _expand(plan.kv_groups[position], dims.head_dim)
    if axis == "hidden":
        return plan.residual
    return None


def _expand(blocks: list[int], size: int) -> list[int]:
    return [block * size + i for block in blocks for i in range(size)]


def _renumbered(config: dict[str, Any], plan: Plan, dims: Dimensions) -> dict[str, Any]:
    """What a config or generation config says of tokens by number, in the new numbers; nothing where all are kept."""
    return {} if len(plan.tokens) == dims.vocab else renumber_config(config, plan.tokens)


def _sliced_config(table: Family, config: dict[str, Any], plan: Plan, dims: Dimensions) -> dict[str, Any]:
    changes: dict[str, Any] = {
        table.layers_key: len(plan.layers),
        table.width_key: len(plan.neurons[0]) // len(plan.experts[0]),
        table.heads_key: len(plan.heads[0]),
        "vocab_size": len(plan.tokens),
        **_renumbered(config, plan, dims),
    }
    if len(plan.residual) < dims.hidden:
        changes[table.hidden_key] = len(plan.residual)
        changes[EPSILON] = config[EPSILON] * dims.hidden / len(plan.residual)
    if table.experts_key:
        changes[table.experts_key] = len(plan.experts[0])
    if table.kv_heads_key:
        changes[table.kv_heads_key] = len(plan.kv_groups[0])
    if table.head_dim_key:
        changes[table.head_dim_key] = dims.head_dim
    for key in table.per_layer_keys:
        if config.get(key) is not None:
            changes[key] = [config[key][layer] for layer in plan.layers]
    return changes
