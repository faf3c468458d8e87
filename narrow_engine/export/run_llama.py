"""Run as a script in a fresh, isolated process: computes with a GGUF file as any user of llama-cpp-python would.

usage: run_llama.py MODEL REQUEST ANSWER THREADS, the middle two npz files. Imports nothing of Narrow, on purpose.
"""

import ctypes
import json
import sys

# Linux: end with the process that started this one (PR_SET_PDEATHSIG, SIGKILL), however that ends.
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)

import llama_cpp
import numpy as np
from numpy.typing import NDArray

F32 = 0
"""ggml's number of the type, here of keys and values."""


def main(model: str, request: str, answer: str, threads: str) -> None:
    with np.load(request) as asked:
        ids, prompt, made = asked["ids"], asked["prompt"].tolist(), asked["made"].tolist()
        texts = json.loads(str(asked["texts"]))
    length = max(ids.shape[1], len(prompt) + len(made))
    llama = llama_cpp.Llama(
        model, n_ctx=length, n_batch=512, n_threads=int(threads), n_threads_batch=int(threads), n_gpu_layers=0,
        logits_all=True, type_k=F32, type_v=F32, verbose=False,
    )  # fmt: skip

    def logits(tokens: list[int]) -> NDArray[np.float32]:
        """Of tokens from the beginning, [length, vocabulary]."""
        llama.reset()
        llama.eval(tokens)
        return np.array(llama.scores[: len(tokens)])

    follow = logits([*prompt, *made])[len(prompt) - 1 : -1].argmax(-1)
    by_llama: list[int] = []
    llama.reset()
    llama.eval(prompt)
    while len(by_llama) < len(made):
        by_llama.append(int(llama.scores[llama.n_tokens - 1].argmax()))
        llama.eval(by_llama[-1:])
    tokens = [llama.tokenize(text.encode(), add_bos=True, special=True) for text in texts]
    np.savez(
        answer,
        logits=np.stack([logits(row.tolist()) for row in ids]),
        follow=follow,
        made=np.array(by_llama),
        texts=np.array(json.dumps(tokens)),
    )


main(*sys.argv[1:])
