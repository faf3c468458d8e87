"""One run's training on several processes, each with a share of the weights, the gradients and the optimizer's states.

`torchrun --nproc-per-node N -m narrow_engine SPEC --out DIR` starts them. The first is the run: it goes through the stages, and
before one that trains the large model it names it to the others, who then train along (`pipeline.follow`) and throw away what
comes out. What a model learns is the same, but for the order of sums, on any number of processes: each takes a part of every
batch, and gradients are averaged over the batch.

The sharding is FSDP2 (`fully_shard`; Zhao et al., arXiv 2304.11277): a layer's weights are gathered when it runs, and its
gradients are summed to where their shard is. The other weights (embeddings, last norm, head) are gathered for the forward pass
of the module at the root. The training loop calls a model's parts and never its `forward`, so that module is `Whole`, whose
forward pass is whatever it is told to do with the model.
"""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from narrow_engine.errors import NarrowError
from narrow_engine.models import device, layers

PATIENCE = timedelta(days=365)
"""How long a process waits for the others: stages that the first does alone take hours. The end of one ends them all at once."""


@contextmanager
def processes() -> Iterator[DeviceMesh | None]:
    """The processes that torchrun started, as a mesh of one dimension; None if this one is alone. Raises NarrowError
    (too_few_gpus)."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    kind = device().type
    if kind == "cuda":
        there, asked = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
        if asked > there:
            raise NarrowError(
                "too_few_gpus", f"Each of {asked} processes takes a GPU, and there are {there}: ask for {there} (resources.gpus)."
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # What they tell each other, as names and flags, is on the CPU and goes through gloo also where tensors go through NCCL.
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=PATIENCE)
    yield init_device_mesh(kind, (dist.get_world_size(),))
    # Not after an error: it waits for the others, and they may be waiting for this one.
    dist.destroy_process_group()


def is_first() -> bool:
    """Whether this process is the run, or alone."""
    return not dist.is_initialized() or dist.get_rank() == 0


def tell(stage: str) -> None:
    """Has the other processes join in a stage; "" ends them."""
    dist.broadcast_object_list([stage], device=torch.device("cpu"))


def told() -> str:
    """What the first process tells."""
    found: list[str] = [""]
    dist.broadcast_object_list(found, device=torch.device("cpu"))
    return found[0]


def any_of(mesh: DeviceMesh | None, flag: bool) -> bool:
    """Whether a flag is set on any process, so that all do the same."""
    if mesh is None:
        return flag
    found = torch.tensor(float(flag))
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def mean(mesh: DeviceMesh | None, value: float) -> float:
    """Of a value, over all processes."""
    if mesh is None:
        return value
    found = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(found)
    return found.item() / mesh.size()


class Part(NamedTuple):
    """What a process takes of a batch at a time: `rows` from number `first` on. Times `weight`, the sum of its parts' means has
    the mean over the whole batch as its mean over the processes."""

    first: int
    rows: int
    weight: float


def parts(mesh: DeviceMesh | None, rows: int, pieces: int) -> list[Part]:
    """This process's part of a batch, in pieces. Where there are too few rows, some take a row of weight 0: all processes must
    run the same passes."""
    rank, size = (mesh.get_local_rank(), mesh.size()) if mesh is not None else (0, 1)
    ends = [rows * number // (size * pieces) for number in range(rank * pieces, (rank + 1) * pieces + 1)]
    return [Part(first, max(1, end - first), (end - first) * size / rows) for first, end in pairwise(ends)]


class Whole(nn.Module):
    """Runs `act(model)` as a forward pass of its own, within which all weights can be read."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, act: Callable[[PreTrainedModel], Any]) -> Any:
        return act(self.model)


def spread(model: PreTrainedModel, mesh: DeviceMesh | None) -> Whole:
    """The model, or a copy of it whose parameters are spread over the processes: tensors [d, ...] along their first dimension."""
    if mesh is None:
        return Whole(model)
    whole = Whole(copy.deepcopy(model))
    for layer in layers(whole.model):
        fully_shard(layer, mesh=mesh)
    fully_shard(whole, mesh=mesh)
    return whole


def full(tensor: Tensor) -> Tensor:
    """A tensor of which each process may have a shard. All must call it, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor that every process has, spread as another is."""
    if not isinstance(other, DTensor):
        return tensor
    # Each takes its shard of its own: nothing is sent.
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


@torch.no_grad()
def pull(whole: Whole, model: PreTrainedModel) -> None:
    """Copies the parameters into the model that they were spread from."""
    for own, spread_out in zip(model.parameters(), whole.model.parameters(), strict=True):
        own.copy_(full(spread_out))


@torch.no_grad()
def push(model: PreTrainedModel, whole: Whole) -> None:
    """The other way."""
    for own, spread_out in zip(model.parameters(), whole.model.parameters(), strict=True):
        spread_out.copy_(like(own, spread_out))
