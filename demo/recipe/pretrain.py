"""Pretrains the embedded model from scratch: python demo/recipe/pretrain.py CORPORA OUT [--minutes 100] [--steps N]

OUT holds the tokenizer already (tokenizer.py). Batches mix the domains in proportion to their tokens times WEIGHT. The
schedule goes by time: 100 steps of warm-up, constant until 60 % of the time is over, then linear to 2 %.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from narrow_engine import corpus
from narrow_engine.losses import objective
from narrow_engine.models import head, hidden_states
from narrow_engine.muon import orthogonalize, training_dtype

WEIGHT = {"python": 1.3, "c": 1.2, "fiction": 1.1, "medical": 1.1, "math": 1.5}
LENGTH, BATCH = 512, 16
MUON, ADAM = 0.02, 3e-3
CONFIG = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


class Muon(torch.optim.Optimizer):
    """Muon in the scale that this model was trained with: lr · √max(1, rows ÷ columns), weight decay 0.02."""

    def __init__(self, parameters, lr: float) -> None:
        super().__init__(list(parameters), {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for matrix in group["params"]:
                buffer = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
                buffer.lerp_(matrix.grad, 0.05)
                update = matrix.grad.lerp(buffer, 0.95)
                tall = update.shape[0] > update.shape[1]
                update = orthogonalize((update.T if tall else update)[None])[0]
                scale = max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5
                matrix.mul_(1 - group["lr"] * 0.02).add_(update.T if tall else update, alpha=-group["lr"] * scale)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpora", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=100)
    parser.add_argument("--steps", type=int, default=10**9)
    options = parser.parse_args()
    torch.manual_seed(0)
    random = np.random.default_rng(1)
    tokenizer = Tokenizer.from_file(str(options.out / "tokenizer.json"))
    domains = {}
    for path in sorted(options.corpora.glob("*/train.jsonl.gz")):
        tokens = corpus.tokenize(path, "text", tokenizer, 0).documents.tokens
        domains[path.parent.name] = tokens
    share = np.array([WEIGHT.get(name, 1.0) * len(tokens) for name, tokens in domains.items()])
    streams = list(domains.values())

    def batch() -> torch.Tensor:
        rows = np.empty((BATCH, LENGTH + 1), np.int64)
        for row, domain in enumerate(random.choice(len(streams), BATCH, p=share / share.sum())):
            at = random.integers(0, len(streams[domain]) - LENGTH - 1)
            rows[row] = streams[domain][at : at + LENGTH + 1]
        return torch.from_numpy(rows)

    model = LlamaForCausalLM(LlamaConfig(vocab_size=tokenizer.get_vocab_size(), **CONFIG))
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in named.items() if not (p.ndim == 2 and "embed" not in name)]
    optimizers = [Muon(matrices, MUON), torch.optim.AdamW(rest, lr=ADAM, betas=(0.9, 0.98), weight_decay=0.0)]
    low = training_dtype(model.device)
    started, step = time.monotonic(), 0
    while (done := max((time.monotonic() - started) / 60 / options.minutes, step / options.steps)) < 1:
        rate = min(1, (step + 1) / 100) * (1 if done < 0.6 else max(0.02, (1 - done) / 0.4))
        for optimizer, peak in zip(optimizers, (MUON, ADAM), strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate
        rows = batch()
        with torch.autocast("cpu", low, enabled=low != torch.float32):
            hidden = hidden_states(model, rows[:, :-1]).flatten(0, 1).to(low)
        loss = objective(hidden, head(model), rows[:, 1:].flatten()).total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 20 == 0 or step == options.steps:
            print(f"step {step}  {time.monotonic() - started:.0f} s  loss {loss.item():.3f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(options.out)


if __name__ == "__main__":
    main()
