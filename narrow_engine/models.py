"""Loading a model, and the few things that every stage asks of it: its layers, its hidden states, its head."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from narrow_engine import memory, parked
from narrow_engine.errors import NarrowError, out_of_memory
from narrow_engine.families import PARTS, Axis, Family, dimensions, family_of, present
from narrow_engine.losses import Head
from narrow_engine.model_files import read_header, weight_files


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(folder: Path, dtype: torch.dtype = torch.float32, park: bool = False) -> PreTrainedModel:
    """A causal LM from a local folder, that computes in `dtype`: safetensors only, no code but transformers' own.

    Weights are read from the mapped file tensor by tensor, to the device and the precision that they are wanted in; on the CPU,
    those that are in `dtype` already stay in the file. With `park` those of all layers do: see `parked`.
    (Experts that a file holds one by one are put together in memory, in the file's precision.)

    Raises NarrowError (bad_model) where transformers cannot build or run it, (non_finite_weights) where a weight is NaN or
    infinite.
    """
    stored = _stored(folder, dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=stored, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except Exception as error:  # what a wrong value in config.json raises is up to the code that meets it
        if out_of_memory(error):
            raise
        raise NarrowError("bad_model", f"transformers cannot build the model from its config: {_first_line(error)}") from error
    for name, tensor in model.state_dict().items():
        # The smallest and the largest take no copy as large as the tensor, and NaN is both.
        if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise NarrowError("non_finite_weights", f"The weights of {name!r} hold NaN or infinity: the model is broken.")
    _ask_nothing_else(model.config)
    _settle(model, stored, torch.empty(0, dtype=dtype, device=device()), park)
    _try_out(model)
    return model.eval()


class Outline(NamedTuple):
    """All that a model is but its weights."""

    config: PreTrainedConfig
    generation: GenerationConfig | None


def outline(model: PreTrainedModel) -> Outline:
    return Outline(model.config, model.generation_config)


def read_outline(folder: Path) -> Outline:
    """Of the model that `load_model` would read from a folder."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    _ask_nothing_else(config)
    try:
        generation = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except OSError:  # there is none, or none that transformers could read
        # An old config.json says how to generate as well, which is not among what transformers reads of it as a config.
        generation = GenerationConfig.from_model_config(json.loads((folder / "config.json").read_bytes()))
    return Outline(config, generation)


def _ask_nothing_else(config: PreTrainedConfig) -> None:
    """What a config may ask the model to return as well is of no use here."""
    for key, value in {
        "use_cache": False,
        "output_attentions": False,
        "output_hidden_states": False,
        "return_dict": True,
    }.items():
        setattr(config, key, value)
    if family_of(dict(config.to_dict())).router:
        config.output_router_logits = False


def _stored(folder: Path, dtype: torch.dtype) -> torch.dtype:
    """The type to read a folder's weights in: their own, if `dtype` can hold what it does, else `dtype`."""
    found = {kind for path in weight_files(folder) for kind, _ in read_header(path).values()}
    half = {"BF16": torch.bfloat16, "F16": torch.float16}.get(found.pop()) if len(found) == 1 else None
    return half if half and dtype == torch.float32 else dtype


def _settle(model: PreTrainedModel, stored: torch.dtype, like: Tensor, park: bool) -> None:
    """Brings the weights to where the model computes, all of them or all but the layers'."""
    inside = {id(part) for part in layers(model).modules()} if park else set()
    parked.bring((part for part in model.modules() if id(part) not in inside), like)
    if park:
        parked.park(layers(model), like)
    model.config.dtype = like.dtype
    embedding = model.get_input_embeddings()
    if stored != like.dtype and family(model).embeddings_scaled:
        # Made in the type that was loaded in, which would round it.
        embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale, dtype=like.dtype, device=like.device)


def is_parked(model: PreTrainedModel) -> bool:
    """Whether the weights of its layers stay in their file."""
    return parked.is_parked(layers(model))


@torch.no_grad()
def _try_out(model: PreTrainedModel) -> None:
    """Runs the model on some tokens, so that what is wrong with its config shows before the work and not behind it."""
    length = min(64, dimensions(config_dict(model)).context)
    ids = torch.arange(length, device=model.device)[None] % model.config.vocab_size
    try:
        model.train()(input_ids=ids)
        logits = model.eval()(input_ids=ids).logits
    except Exception as error:
        if out_of_memory(error):
            raise
        raise NarrowError("bad_model", f"The model does not run as its config says: {_first_line(error)}") from error
    if not torch.isfinite(logits).all():
        raise NarrowError(
            "bad_model",
            "The model computes NaN or infinity on plain tokens: a scale, an epsilon or the rotary base in config.json is wrong.",
        )


def _first_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def family(model: PreTrainedModel) -> Family:
    return family_of(config_dict(model))


def config_dict(model: PreTrainedModel) -> dict[str, Any]:
    """The model's config as it would be saved."""
    return dict(model.config.to_dict())


def size_in_memory(model: PreTrainedModel) -> int:
    """Bytes of its weights; of one that is parked, of those of one layer, and of its file where that counts (`memory`)."""
    inside = {id(parameter) for parameter in layers(model).parameters()} if is_parked(model) else set()
    like: int = model.get_input_embeddings().weight.element_size()
    found = like * sum(parameter.numel() for parameter in layers(model)[0].parameters()) if inside else 0
    counts = model.device.type == "cpu" and memory.counts_files()
    for parameter in model.parameters():
        if counts or id(parameter) not in inside:
            found += parameter.numel() * parameter.element_size()
    return found


def layers(model: PreTrainedModel) -> nn.ModuleList:
    found = model.get_submodule(family(model).layers)
    assert isinstance(found, nn.ModuleList)
    return found


def along(model: PreTrainedModel, axis: Axis) -> list[list[Tensor]]:
    """For each layer, views of its parameters that have an axis, that axis first; a fused tensor gives one for each part.

    Along an axis of the experts' own, one list for each expert of each layer.
    """
    table, config = family(model), config_dict(model)
    dims = dimensions(config)
    inside = axis == "width"
    found: list[list[Tensor]] = []
    for layer in layers(model):
        rows: list[list[Tensor]] = [[] for _ in range(dims.experts if inside else 1)]
        for tensor in present(table.layer_tensors, table, config):
            parameter = layer.get_parameter(tensor.name).detach()
            own = inside and tensor.routed
            axes, wholes = (tensor.axes[1:], list(parameter)) if own else (tensor.axes, [parameter] * len(rows))
            for row, whole in zip(rows, wholes, strict=True):
                for number, fused in enumerate(axes):
                    parts = PARTS.get(fused, (fused,))
                    if axis in parts:
                        pieces = torch.split(whole, [dims.axis(part) for part in parts], dim=number)
                        row += [piece.movedim(number, 0) for piece, part in zip(pieces, parts, strict=True) if part == axis]
        found += rows
    return found


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """Without gradients of the weights, where those of activations are all that is wanted."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(True)


def output_weight(layer: nn.Module, table: Family, name: str) -> Tensor:
    """The weight of a layer's output projection (`attention_out` or `mlp_out`), as a view [outputs, inputs]."""
    axes = next(tensor.axes for tensor in table.layer_tensors if tensor.name == f"{name}.weight")
    weight = layer.get_parameter(f"{name}.weight").detach()
    return weight if axes[0] == "hidden" else weight.T


def neuron_readers(layer: nn.Module, table: Family) -> list[Tensor]:
    """The weights that read a layer's neurons, one of each expert, as views [outputs, inputs]."""
    if not table.router:
        return [output_weight(layer, table, table.mlp_out)]
    return list(layer.get_parameter(f"{table.mlp_out}.down_proj").detach())


class Routed(NamedTuple):
    """An expert and the tokens that are routed to it, of which there is one at least."""

    expert: int
    tokens: Tensor
    """Their numbers, [m]."""
    inputs: Tensor
    """What the expert's output projection reads, times the router's gate: [m, width]. The gates are linear in the output."""


def routed(experts: nn.Module, tokens: Tensor, chosen: Tensor, gates: Tensor) -> Iterator[Routed]:
    """What goes on inside a module of experts that is called so: tokens [n, hidden], and of each token the numbers and the
    gates of its experts, [n, k]."""
    activation = experts.get_submodule("act_fn")
    for expert in sorted(set(chosen.flatten().tolist())):
        rows, places = (chosen == expert).nonzero(as_tuple=True)
        weight = experts.get_parameter("gate_up_proj")[expert]
        gate, up = functional.linear(tokens[rows].to(weight.device), weight).chunk(2, -1)
        yield Routed(expert, rows, activation(gate) * up * gates[rows, places, None].to(weight.device))


def hidden_states(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """What the head reads: the body's output after the final norm, times the factor that the family puts on its logits.

    [rows, length, hidden]; `ids` is [rows, length].
    """
    table = family(model)
    key, power = table.logit_scale
    hidden: Tensor = model.get_submodule(table.body)(input_ids=ids, use_cache=False).last_hidden_state
    return hidden * getattr(model.config, key) ** power if key else hidden


def head(model: PreTrainedModel) -> Head:
    key = family(model).softcap_key
    return Head(model.get_output_embeddings().weight, getattr(model.config, key) if key else None)


@torch.no_grad()
def sampled(model: PreTrainedModel, ids: Tensor, count: int) -> Tensor:
    """Continues each row of tokens [rows, length] by `count` tokens, drawn from what the model says. [rows, length + count]."""
    whole, past = ids, None
    for _ in range(count):
        out = model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
        past, ids = out.past_key_values, out.logits[:, -1].float().softmax(-1).multinomial(1)
        whole = torch.cat([whole, ids], 1)
    return whole


def matrices(model: PreTrainedModel) -> Iterator[tuple[str, Tensor, bool]]:
    """What multiplies activations, [outputs, inputs] each, of experts one by one, as views into the parameters: the name of the
    parameter, the matrix, and whether it is the embedding or the head. Routers and embeddings of positions are not among them."""
    outer = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None}
    turned = {id(module.weight) for module in model.modules() if isinstance(module, Conv1D)}  # which are [inputs, outputs]
    positions = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)} - outer
    router = family(model).router
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or id(parameter) in positions or (router and f"{router}." in name):
            continue
        for stored in parameter if parameter.dim() == 3 else parameter[None]:
            yield name, stored.T if id(parameter) in turned else stored, id(parameter) in outer


@torch.no_grad()
def greedy(model: PreTrainedModel, ids: Tensor, count: int) -> list[int]:
    """Continues tokens [1, length] by the `count` most likely next ones. Not `generate`: a base's generation_config can
    change the choice there, by penalising repetition for one."""
    made: list[int] = []
    past = None
    while len(made) < count:
        out = model(input_ids=ids, past_key_values=past, use_cache=True)
        past, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        made.append(int(ids))
    return made
