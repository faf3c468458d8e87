"""Models as programs run them: torch, ONNX Runtime and llama.cpp behind one small interface, to compare, to time and to try.

A runtime is opened on the folder of one format and keeps what it was fed: `step` takes tokens after those before, `reset` forgets
them. Each library is imported where it is opened, so that a process that runs one has the memory of that one.
"""

import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from narrow_engine.errors import NarrowError
from narrow_engine.families import dimensions, opening
from narrow_engine.spec import Format
from narrow_engine.trial import read_tokenizer

Name = Literal["torch", "onnxruntime", "llama.cpp"]
GGUF_CONTEXT = 2048
"""Tokens that llama.cpp is opened for."""


Reader = tuple[Callable[[str], list[int]], Callable[[list[int]], str], set[int], int]
"""How text becomes tokens and tokens text, the tokens that end a text, and the length of the context."""


class Runtime(Protocol):
    vocabulary: int
    batched: bool
    """Whether it takes several rows at once."""

    def step(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits [batch, length, vocabulary] of tokens [batch, length] that follow those fed before."""

    def reset(self) -> None:
        """Forgets what was fed."""


def runtime_of(form: Format) -> Name:
    return "torch" if form == "safetensors" else "onnxruntime" if form.startswith("onnx") else "llama.cpp"


def form_of(folder: Path) -> Format:
    """The format that a folder's files are in. Raises NarrowError (no_model)."""
    if (folder / "model.onnx").is_file():
        return "onnx"
    if list(folder.glob("*.gguf")):
        return "gguf-f16"
    if list(folder.glob("model*.safetensors")):
        return "safetensors"
    raise NarrowError("no_model", f"{folder} holds no model.onnx, *.gguf or model*.safetensors: name the folder of one format.")


def have_llama() -> bool:
    """Whether llama.cpp can be run here, by llama-cpp-python."""
    return find_spec("llama_cpp") is not None


def is_there(form: Format) -> bool:
    """Whether what runs a format is installed here."""
    return form.startswith(("safetensors", "onnx")) or have_llama()


def open_runtime(form: Format, folder: Path, threads: int) -> Runtime:
    """Loads a model. Raises NarrowError (missing_extra)."""
    if form == "safetensors":
        return Torch(folder, threads)
    if form.startswith("onnx"):
        return Onnx(folder / "model.onnx", threads)
    if not have_llama():
        raise NarrowError("missing_extra", "A GGUF file takes llama-cpp-python to run: pip install 'narrow[llama]'.")
    return Llama(next(iter(sorted(folder.glob("*.gguf")))), threads)


def likeliest(runtime: Runtime, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The likeliest token after tokens [batch, length] that follow those fed before, [batch, 1]."""
    if isinstance(runtime, Torch):
        # Chosen where they are: the logits of a prompt take longer to come from a GPU than to be computed.
        return runtime.logits(ids)[:, -1:].argmax(-1).cpu().numpy()  # type: ignore[no-any-return]
    return runtime.step(ids)[:, -1:].argmax(-1)  # type: ignore[no-any-return]


def greedy(runtime: Runtime, ids: NDArray[np.int64]) -> Iterator[int]:
    """The likeliest next token after tokens [length], and so on."""
    runtime.reset()
    while True:
        token = int(likeliest(runtime, ids[None])[0, 0])
        yield token
        ids = np.array([token])


def write(folder: Path, prompt: str, tokens: int, threads: int) -> Iterator[str]:
    """What the model in a folder, of whatever format, writes after a prompt, piece by piece: greedily, up to so many tokens, its
    end of text or the end of its context. Raises NarrowError (no_model, bad_model, missing_extra, bad_tokenizer,
    prompt_too_long)."""
    form = form_of(folder)
    try:
        runtime = open_runtime(form, folder, threads)
        encode, decode, ends, room = runtime.reader() if isinstance(runtime, Llama) else _reader(folder, runtime.vocabulary)
    except (NarrowError, MemoryError):
        raise
    except Exception as error:  # of a file that is broken each library says so in a type of its own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise NarrowError("bad_model", f"The model in {folder} cannot be read: {reason}") from error
    ids = encode(prompt)
    if not 0 < len(ids) < room:
        raise NarrowError("prompt_too_long", f"The prompt has {len(ids):,} tokens, and the model's context holds {room:,}.")
    made: list[int] = []
    told = ""
    for token in islice(greedy(runtime, np.array(ids)), min(tokens, room - len(ids))):
        if token in ends:
            return
        made.append(token)
        text = decode(made)
        if not text.endswith("\ufffd"):  # half of a character: the next token may have the other
            yield text[len(told) :]
            told = text


def _reader(folder: Path, size: int) -> Reader:
    config = json.loads((folder / "config.json").read_text())
    tokenizer, start = read_tokenizer(folder, size), opening(config)
    path = folder / "generation_config.json"
    end = (json.loads(path.read_text()) if path.is_file() else config).get("eos_token_id")

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text).ids
        return ids if start is None or ids[:1] == [start] else [start, *ids]

    return encode, tokenizer.decode, set(end if isinstance(end, list) else [end]), dimensions(config).context


class Torch:
    """transformers: on a GPU in the saved type, else in float32, which is what CPUs are fastest in."""

    batched = True

    def __init__(self, folder: Path, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.torch, self.past = torch, None
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = "auto" if self.device.type == "cuda" else torch.float32
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(self.device).eval()
        self.vocabulary: int = self.model.config.vocab_size

    def logits(self, ids: NDArray[np.int64]) -> Any:
        """What `step` returns, as a tensor on the device."""
        with self.torch.no_grad():
            given = self.torch.from_numpy(ids).to(self.device)
            out = self.model(input_ids=given, past_key_values=self.past, use_cache=True)
        self.past = out.past_key_values
        return out.logits

    def step(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        return self.logits(ids).float().cpu().numpy()  # type: ignore[no-any-return]

    def reset(self) -> None:
        self.past = None


class Onnx:
    """ONNX Runtime on the CPU, on a decoder with the inputs and outputs of `export.onnx`."""

    batched = True

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.shapes = {i.name: i.shape for i in self.session.get_inputs() if i.name.startswith("past_key_values.")}
        self.vocabulary: int = self.session.get_outputs()[0].shape[2]
        self.past: list[NDArray[np.float32]] = []

    def step(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        batch, length = ids.shape
        if not self.past:
            self.past = [np.zeros((batch, shape[1], 0, shape[3]), np.float32) for shape in self.shapes.values()]
        before = self.past[0].shape[2]
        feed = {
            "input_ids": ids,
            "attention_mask": np.ones((batch, before + length), np.int64),
            "position_ids": np.tile(np.arange(before, before + length), (batch, 1)),
            **dict(zip(self.shapes, self.past, strict=True)),
        }
        logits, *self.past = self.session.run(None, feed)
        return logits  # type: ignore[no-any-return]

    def reset(self) -> None:
        self.past = []


class Llama:
    """llama.cpp on the CPU, a row at a time."""

    batched = False

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp  # type: ignore[import-not-found,unused-ignore]

        self.llama: Any = llama_cpp.Llama(
            str(path), n_ctx=GGUF_CONTEXT, n_threads=threads, n_threads_batch=threads, logits_all=True, verbose=False
        )
        self.vocabulary: int = self.llama.n_vocab()

    def reader(self) -> Reader:
        """By what the file says of its tokenizer."""

        def encode(text: str) -> list[int]:
            return self.llama.tokenize(text.encode(), special=True)  # type: ignore[no-any-return]

        def decode(ids: list[int]) -> str:
            return self.llama.detokenize(ids).decode("utf-8", "replace")  # type: ignore[no-any-return]

        context = self.llama.metadata.get(f"{self.llama.metadata['general.architecture']}.context_length", GGUF_CONTEXT)
        return encode, decode, {self.llama.token_eos()}, min(GGUF_CONTEXT, int(context))

    def step(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        before = self.llama.n_tokens
        self.llama.eval(ids[0].tolist())
        return self.llama.scores[None, before : self.llama.n_tokens].copy()  # type: ignore[no-any-return]

    def reset(self) -> None:
        self.llama.reset()


def main(form: Format, folder: str, threads: str) -> None:
    """A model in a process of its own: `python -m narrow_engine.export.runtimes FORMAT FOLDER THREADS`.

    Each line that it reads is `PREFILL DECODE`, tokens; for each it writes how many seconds these took. Before, it writes how
    long the model took to load; in the end, the most memory that it has had.
    """
    import sys
    import time

    def tell(**figures: float) -> None:
        sys.stdout.write(json.dumps(figures) + "\n")
        sys.stdout.flush()

    _imports(form)
    started = time.perf_counter()
    runtime = open_runtime(form, Path(folder), int(threads))
    tell(load=time.perf_counter() - started)
    for line in sys.stdin:
        prefill, decode = map(int, line.split())
        runtime.reset()
        started = time.perf_counter()
        token = likeliest(runtime, np.arange(1, prefill + 1)[None] % runtime.vocabulary)
        middle = time.perf_counter()
        for _ in range(decode):
            token = likeliest(runtime, token)
        tell(prefill=middle - started, decode=time.perf_counter() - middle)
    tell(memory=_peak())


def _imports(form: Format) -> None:
    """Of the library, which is no part of how long a model takes to load."""
    if form == "safetensors":
        import transformers.models.auto.modeling_auto  # noqa: F401
    elif form.startswith("onnx"):
        import onnxruntime  # noqa: F401
    else:
        import llama_cpp  # noqa: F401


def _peak() -> int:
    """Bytes. What getrusage says is inherited from who started the process."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    import sys

    main(*sys.argv[1:])  # type: ignore[arg-type]
