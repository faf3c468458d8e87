"""Compositional multitask sparse parity (arXiv 2505.15811, section 2): many small tasks in one, some made of others.

An input is a row of control bits, one for each atomic subtask, and then task bits. A subtask's answer is the parity of its own
task bits; where several control bits are on, it is the parity of all of theirs together, a composite.
"""

from typing import NamedTuple

import torch
from torch import Tensor

Code = tuple[int, ...]
"""The atomic subtasks that a task is made of: one for an atomic task."""


class Parity(NamedTuple):
    bits: int
    """Task bits."""
    subtasks: int
    each: int
    """Task bits of an atomic subtask; the first subtask has the first ones."""

    @property
    def inputs(self) -> int:
        return self.subtasks + self.bits

    def batch(self, codes: list[Code], each: int, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs [count, len(codes) × each, inputs] and answers [count, len(codes) × each], `each` of every code in turn."""
        bits = torch.randint(0, 2, (count, len(codes), each, self.bits), generator=draw, dtype=torch.float32)
        control = torch.zeros(len(codes), self.subtasks)
        weights = torch.zeros(len(codes), self.bits)
        for row, code in enumerate(codes):
            control[row, list(code)] = 1
            for subtask in code:
                weights[row, subtask * self.each : (subtask + 1) * self.each] = 1
        answers = torch.einsum("nceb,cb->nce", bits, weights).long() % 2
        controls = control[None, :, None].expand(count, -1, each, -1)
        return torch.cat([controls, bits], 3).flatten(1, 2), answers.flatten(1)
