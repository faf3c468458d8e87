"""The fixtures: a tokenizer, a tiny model and data as files, a running service."""

import os
from pathlib import Path

import pytest

# Two test processes share two cores; torch's threads would only fight.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

from live import running
from misbehaving import DATASET, JOB, MODEL, answer, misbehaving
from tiny import documents, tiny_model, write_jsonl


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory) -> Path:
    """A byte-level BPE tokenizer of 320 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents(count=20), trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tokenizer_file) -> Path:
    """A tiny Llama as a user would bring it: config, safetensors, tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    tiny_model("llama", initializer_range=0.1).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    return folder


@pytest.fixture(scope="session")
def python_file(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "python.jsonl", documents())


@pytest.fixture(scope="session")
def german_file(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "german.jsonl", documents("german", 12))


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """`narrow serve` with one worker, for a module's tests."""
    with running(tmp_path_factory.mktemp("service") / "data") as found:
        yield found


@pytest.fixture
def server(monkeypatch):
    """A service that answers by a script, at NARROW_URL."""
    with misbehaving() as found:
        monkeypatch.setenv("NARROW_URL", f"http://127.0.0.1:{found.server_port}")
        yield found


@pytest.fixture
def uploads(server):
    """The same, which takes what is uploaded and makes a job of it."""
    server.script |= {"/models": [answer(MODEL, 201)], "/datasets": [answer(DATASET, 201)], "/jobs": [answer(JOB, 201)]}
    server.script[f"/jobs/{JOB['id']}"] = [answer(JOB)]
    return server


@pytest.fixture
def impatient(monkeypatch):
    """A client that loses its patience in a second, after many tries."""
    from narrow_client import _transport

    monkeypatch.setattr(_transport, "PATIENCE", 1.0)
    monkeypatch.setattr(_transport, "pause", lambda *_: 0.01)


@pytest.fixture
def local(tmp_path):
    """A model folder and a file, as far as the client looks at them."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "text.txt").write_text("text")
    return "--base", tmp_path / "base", "--target", tmp_path / "text.txt"
