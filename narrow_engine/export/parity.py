"""Whether what runs a format computes what torch does with the same weights: logits, and greedy text token by token."""

from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from narrow_engine.export.runtimes import Runtime
from narrow_engine.export.runtimes import greedy as continued
from narrow_engine.families import dimensions
from narrow_engine.models import config_dict, greedy
from narrow_engine.report.model import Parity

PROMPT_TOKENS, GREEDY_TOKENS = 16, 256


@torch.no_grad()
def compare(model: PreTrainedModel, runtime: Runtime, ids: Tensor) -> Parity:
    """Logits on tokens [rows, length], the second half of which follows from a past; and up to GREEDY_TOKENS of greedy text."""
    expected = model(input_ids=ids, use_cache=False).logits.float().cpu().numpy()
    tokens = ids.cpu().numpy()
    half, found = tokens.shape[1] // 2, []
    for rows in [tokens] if runtime.batched else np.split(tokens, len(tokens)):
        runtime.reset()
        found.append(np.concatenate([runtime.step(rows[:, :half]), runtime.step(rows[:, half:])], axis=1))
    prompt = min(PROMPT_TOKENS, tokens.shape[1])
    count = min(GREEDY_TOKENS, dimensions(config_dict(model)).context - prompt)
    made = greedy(model, ids[:1, :prompt], count)
    written = list(islice(continued(runtime, tokens[0, :prompt]), count))
    return parity(expected, np.concatenate(found), made, written)


def parity(expected: NDArray[np.float32], found: NDArray[np.float32], made: list[int], written: list[int]) -> Parity:
    """Of logits [rows, length, vocabulary] and of greedy tokens: torch's, and those of what runs the files."""
    errors = np.abs(found - expected)
    return Parity(
        max_error=float(errors.max()),
        mean_error=float(errors.mean()),
        relative_error=float(errors.max()) / max(float(np.abs(expected).max()), 1e-9),
        greedy_tokens=len(made),
        greedy_equal=next((at for at, (a, b) in enumerate(zip(made, written, strict=True)) if a != b), len(made)),
    )
