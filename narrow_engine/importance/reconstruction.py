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
ROUND = 16
"""Steps after which what is gone leaves the matrices."""


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
    places = [_Place(weight, gram, size) for weight, gram in zip(weights, grams, strict=True)]
    scores = torch.zeros(count, dtype=torch.float64, device=device)
    alive = torch.arange(count, device=device)
    spent = 0.0
    at_once = max(1, count // STEPS)
    while len(alive):
        gone = torch.zeros(len(alive), dtype=torch.bool, device=device)
        for left in range(len(alive), max(0, len(alive) - ROUND * at_once), -at_once):
            errors = torch.stack([place.errors() for place in places]).sum(0)
            going = errors.masked_fill(gone, torch.inf).argsort(stable=True)[: min(at_once, left)]
            spent += max(float(errors[going].sum()), 0.0)
            scores[alive[going]] = spent
            gone[going] = True
            for place in places:
                place.remove(going)
        staying = (~gone).nonzero().flatten()
        for place in places:
            place.keep(staying)
        alive = alive[staying]
    return scores


class _Place:
    """A projection, as it is without the blocks that are gone.

    Removing blocks g turns G⁻¹ into G⁻¹ − Vᵀ V, with V = L⁻¹ [G⁻¹]_g,: and L Lᵀ = [G⁻¹]_gg, and W into W − (W_g L⁻ᵀ) V. All of
    G⁻¹ is large and only rows and its diagonal are asked for, so V is put aside and taken off once a round. Rows of what is
    gone become zero.
    """

    def __init__(self, weight: Tensor, gram: Tensor, size: int) -> None:
        self.size = size
        self.inputs = weight.detach().T.double().contiguous()
        """Wᵀ, [inputs, outputs]: a block's part lies together."""
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(gram)))
        count = len(gram) // size
        blocks = self.inverse.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        self.diagonal = blocks.contiguous()
        """[G⁻¹]_uu of every block, [blocks, size, size]."""
        self.aside: list[Tensor] = []

    def errors(self) -> Tensor:
        """What each block would cost now: tr(W_u [G⁻¹]_uu⁻¹ W_uᵀ), [blocks]."""
        if self.size == 1:
            # A batch of 1 × 1 systems would be as many calls into LAPACK, each with threads of its own.
            energy: Tensor = torch.linalg.vector_norm(self.inputs, dim=1).square()
            return energy / self.diagonal.flatten()
        parts = self.inputs.view(len(self.diagonal), self.size, -1)
        solved: Tensor = torch.linalg.solve(self.diagonal, parts)
        return (parts * solved).sum((1, 2))

    def remove(self, blocks: Tensor) -> None:
        gone = _expand(blocks, self.size)
        rows = self.inverse[gone]
        for before in self.aside:
            rows.addmm_(before[:, gone].T, before, alpha=-1)
        lower = torch.linalg.cholesky(rows[:, gone])
        taken = torch.linalg.solve_triangular(lower, rows, upper=False)
        moved = torch.linalg.solve_triangular(lower, self.inputs[gone], upper=False)
        self.inputs.addmm_(taken.T, moved, alpha=-1)
        parts = taken.view(len(gone), -1, self.size).permute(1, 2, 0)
        self.diagonal -= parts @ parts.mT
        self.diagonal[blocks] = torch.eye(self.size, dtype=parts.dtype, device=parts.device)  # zeros could not be solved with
        self.aside.append(taken)

    def keep(self, blocks: Tensor) -> None:
        """Ends a round: only these are left."""
        left = _expand(blocks, self.size)
        self.inputs, self.diagonal = self.inputs[left], self.diagonal[blocks]
        self.inverse = self.inverse[left][:, left]
        taken = torch.cat(self.aside)[:, left]
        self.inverse.addmm_(taken.T, taken, alpha=-1)
        self.aside = []


def _expand(blocks: Tensor, size: int) -> Tensor:
    return (blocks[:, None] * size + torch.arange(size, device=blocks.device)).flatten()


def damped(gram: Tensor) -> Tensor:
    """G + DAMPING · mean diagonal · I, so that it can be inverted however few the tokens."""
    ridge = DAMPING * gram.diagonal().mean().clamp(min=1e-12)
    return gram + ridge * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
