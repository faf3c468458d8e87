"""How much memory there is, and how much of it a training step's activations take."""

import os
from pathlib import Path

import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from narrow_engine.models import hidden_states
from narrow_engine.muon import training_dtype

CONTAINER = Path("/sys/fs/cgroup/memory.max")
PROBE = 128
"""Length of block that activations are counted at, at most."""


def limit(device: torch.device) -> int:
    """Bytes that the device has in all, or the container that this process is in. What others take of it is not looked at:
    the same job must do the same on the same machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    told = CONTAINER.read_text().strip() if CONTAINER.is_file() else "max"
    return min(physical, int(told)) if told.isdigit() else physical


def activations(model: PreTrainedModel, rows: int, length: int) -> int:
    """What `kept` would count for blocks [rows, length], in the precision of training.

    They are a + b · length + c · length² for one row: weights in another precision, activations, and, where a family cannot
    have its attention fused, what it keeps of every pair of positions. Short blocks tell a, b and c.
    """
    longest = min(PROBE, length)
    probes = [longest // 4, longest // 2, longest]
    powers = torch.tensor([[probe**power for power in range(3)] for probe in probes], dtype=torch.float64)
    counts = torch.tensor([kept(model, 1, probe) for probe in probes], dtype=torch.float64)
    fixed, linear, square = torch.linalg.solve(powers, counts).tolist()
    total: float = fixed + rows * (linear * length + max(0.0, square) * length**2)
    return round(total)


def kept(model: PreTrainedModel, rows: int, length: int) -> int:
    """Bytes that autograd keeps of a forward pass of the body on blocks [rows, length], beside the weights: counted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    low = training_dtype(model.device)
    ids = torch.arange(rows * length, device=model.device).view(rows, length) % model.config.vocab_size
    with (
        torch.enable_grad(),
        torch.autocast(model.device.type, low, enabled=low != torch.float32),
        saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        # The graph holds what is counted until all of it is.
        hidden = hidden_states(model, ids)
    del hidden
    return sum(found.values())
