"""The error that is left when the other units do their best to make up for a unit: optimal brain surgeon, by structure.

The projection that reads the units computes y = W h. With the second moments G = Σ h hᵀ of its inputs, cutting a block
of inputs u and refitting the rest raises Σ ‖Δy‖² by tr(W_u [G⁻¹]_uu⁻¹ W_uᵀ) (Hassibi & Stork 1993; Frantar & Alistarh,
arXiv 2208.11580, equation 3, for blocks). Units go one after the other, cheapest first, and W and G⁻¹ follow, so a
unit's score is the error at which it goes: a copy of another unit costs nothing until the other is gone. Scores rise
along the order, which makes a plan of any size the same elimination, stopped earlier or later.

Neurons of experts go expert by expert. An expert's own score is Σ ‖what it writes‖², the error of the layer's output
without it.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from narrow_engine import memory
from narrow_engine.errors import NarrowError
from narrow_engine.families import dimensions
from narrow_engine.importance.statistics import LayerStatistics
from narrow_engine.models import config_dict, family, layers, neuron_readers, output_weight
from narrow_engine.plan import Scores

DAMPING = 1e-3
"""Ridge on G, relative to its mean diagonal."""
STEPS = 256


def score(model: PreTrainedModel, found: Iterable[LayerStatistics], seed: int) -> Scores:
    table, dims = family(model), dimensions(config_dict(model))
    width = max(dims.width, dims.axis("q"))
    grams = dims.experts * dims.width**2 + dims.axis("q") ** 2
    require_room("Scoring units", 8 * (grams + 4 * width**2 + 2 * width * dims.hidden), model.device)
    neurons, heads, groups, experts, whole = [], [], [], [], []
    for layer, statistics in zip(layers(model), found, strict=True):
        readers = list(zip(neuron_readers(layer, table), statistics.mlp, strict=True))
        attention = output_weight(layer, table, table.attention_out)
        neurons.append(torch.cat([eliminate([weight], [reader.gram], 1) for weight, reader in readers]))
        experts.append(torch.stack([written_energy(weight, reader.gram) for weight, reader in readers]))
        heads.append(eliminate([attention], [statistics.attention.gram], dims.head_dim))
        groups.append(eliminate([attention], [statistics.attention.gram], dims.head_dim * dims.heads // dims.kv_heads))
        whole.append(statistics.share)
    return {
        "neuron": torch.stack(neurons),
        "expert": torch.stack(experts),
        "head": torch.stack(heads),
        "kv_group": torch.stack(groups),
        "layer": torch.stack(whole),
    }


def require_room(what: str, size: int, device: torch.device) -> None:
    """Raises NarrowError (out_of_memory) where an elimination would take more bytes than there are."""
    there = memory.limit(device)
    if size > there:
        raise NarrowError(
            "out_of_memory",
            f"{what} by 'reconstruction' takes {size / 1e9:,.1f} GB for this base, and there are {there / 1e9:,.1f} GB: set "
            "method.importance to 'fisher', 'attribution' or 'activation'.",
        )


def written_energy(weight: Tensor, gram: Tensor) -> Tensor:
    """Σ ‖W h‖² = tr(W G Wᵀ)."""
    w = weight.double()
    return ((w @ gram) * w).sum()


@torch.no_grad()
def eliminate(weights: list[Tensor], grams: list[Tensor], size: int) -> Tensor:
    """Scores of the blocks of `size` inputs that projections share: weights [outputs, inputs], a gram [inputs, inputs] for each.

    Returns [inputs ÷ size] float64, rising in the order in which the blocks go. Of many blocks, the cheapest STEPth part
    goes at once, so the cost is STEPS updates of each G⁻¹ whatever the width.
    """
    count, device = grams[0].shape[0] // size, grams[0].device
    w = [weight.detach().double() for weight in weights]
    inverse = [torch.cholesky_inverse(torch.linalg.cholesky(damped(gram))) for gram in grams]
    scores = torch.zeros(count, dtype=torch.float64, device=device)
    alive = torch.arange(count, device=device)
    spent = 0.0
    at_once = max(1, count // STEPS)
    while len(alive):
        errors = torch.stack([_errors(*place, size) for place in zip(w, inverse, strict=True)]).sum(0)
        order = errors.argsort(stable=True)
        going, staying = order[:at_once], order[at_once:].sort().values
        spent += max(float(errors[going].sum()), 0.0)
        scores[alive[going]] = spent
        gone, left = _expand(going, size), _expand(staying, size)
        for number, old in enumerate(inverse):
            solved = torch.linalg.solve(old[gone][:, gone], old[gone][:, left])
            w[number] = w[number][:, left] - w[number][:, gone] @ solved
            inverse[number] = old[left][:, left] - old[left][:, gone] @ solved
        alive = alive[staying]
    return scores


def _errors(weight: Tensor, inverse: Tensor, size: int) -> Tensor:
    """What each block would cost now: tr(W_u [G⁻¹]_uu⁻¹ W_uᵀ), [blocks]."""
    if size == 1:
        # A batch of 1 × 1 systems would be as many calls into LAPACK, each with threads of its own.
        return weight.square().sum(0) / inverse.diagonal()
    count = weight.shape[1] // size
    blocks = inverse.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    columns = weight.view(-1, count, size).permute(1, 2, 0)
    solved: Tensor = torch.linalg.solve(blocks, columns)
    return (columns * solved).sum((1, 2))


def _expand(blocks: Tensor, size: int) -> Tensor:
    return (blocks[:, None] * size + torch.arange(size, device=blocks.device)).flatten()


def damped(gram: Tensor) -> Tensor:
    """G + DAMPING · mean diagonal · I, so that it can be inverted however few the tokens."""
    ridge = DAMPING * gram.diagonal().mean().clamp(min=1e-12)
    return gram + ridge * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
