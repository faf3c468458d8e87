"""Loading a model, and the few things that every stage asks of it: its layers, its hidden states, its head."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from narrow_engine.errors import NarrowError
from narrow_engine.families import Family, family_of
from narrow_engine.losses import Head


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(folder: Path) -> PreTrainedModel:
    """A causal LM in float32 from a local folder: safetensors only, no code but transformers' own.

    Raises NarrowError (bad_model) where transformers cannot build it, (non_finite_weights) where a weight is NaN or
    infinite.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except (ValueError, TypeError, KeyError, OSError, RuntimeError, AttributeError) as error:
        raise NarrowError("bad_model", f"transformers cannot build the model from {folder.name}: {str(error)[:300]}") from error
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise NarrowError("non_finite_weights", f"The weights of {name!r} hold NaN or infinity: the model is broken.")
    model.config.use_cache = False
    return model.to(device()).eval()


def family(model: PreTrainedModel) -> Family:
    return family_of(config_dict(model))


def config_dict(model: PreTrainedModel) -> dict[str, Any]:
    """The model's config as it would be saved."""
    return dict(model.config.to_dict())


def layers(model: PreTrainedModel) -> nn.ModuleList:
    found = model.get_submodule(family(model).layers)
    assert isinstance(found, nn.ModuleList)
    return found


def hidden_states(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The body's output after the final norm, [rows, length, hidden]; `ids` is [rows, length]."""
    body = model.get_submodule(family(model).body)
    return body(input_ids=ids, use_cache=False).last_hidden_state  # type: ignore[no-any-return]


def head(model: PreTrainedModel) -> Head:
    weight = model.get_output_embeddings().weight
    return Head(weight, getattr(model.config, "final_logit_softcapping", None))


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
