"""One run on several processes: the same model as on one, and no process left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from runs import Run

from narrow_engine.events import read_events
from narrow_engine.report.model import Report

OPTIONS = {
    "budget": {"parameters": 0.85},
    "block_tokens": 64,
    "skill_tokens": 2048,
    "export": ["safetensors"],
    "relearn": None,
}


@pytest.fixture
def spec(tmp_path, tiny_folder, python_file):
    def make(name="spec", recover=None, **method):
        recovery = {"tokens": 1920, "batch_tokens": 192, **(recover or {})}  # three rows: not the same for each of two
        whole = {
            "base": {"path": str(tiny_folder)},
            "target": {"path": str(python_file)},
            "target_name": "python",
            "method": {"calibration_tokens": 1024, "recover": recovery, **method},
        }
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({**whole, **{k: v for k, v in OPTIONS.items() if v is not None}}))
        return path

    return make


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(spec, out, count=2):
    """What torchrun would start, the first process first."""
    port, found = free_port(), []
    for rank in range(count):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": count,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }.items():
                patch.setenv(name, str(value))
            found.append(Run("run", spec, "--out", out, "--quiet"))
    return found


def finish(processes):
    told = [process.communicate(timeout=120)[0] for process in processes]
    return [process.returncode for process in processes], told


def report(out):
    return Report.model_validate_json((out / "result" / "report.json").read_text())


def same(one, other):
    """Two reports tell of the same model, to rounding."""
    assert len(one.curve) == len(other.curve)
    for a, b in zip(one.curve, other.curve, strict=True):
        assert (a.phase, a.tokens, a.sparsity) == (b.phase, b.tokens, b.sparsity)
        assert a.loss == pytest.approx(b.loss, rel=1e-4)
        assert a.validation == pytest.approx(b.validation, rel=1e-4)
    for name, skill in one.skills.items():
        assert skill.recovered.loss == pytest.approx(other.skills[name].recovered.loss, rel=1e-4)


def test_two(spec, tmp_path):
    path = spec(regularizer={"tokens": 1920})
    t = time.time()
    codes, told = finish(start(path, tmp_path / "one", 1))
    print(codes, told, time.time() - t)
    assert codes == [0], told
    codes, told = finish(start(path, tmp_path / "two"))
    print(codes, told, time.time() - t)
    assert codes == [0, 0], told
    for a, b in zip(report(tmp_path / "one").curve, report(tmp_path / "two").curve):
        print(a.phase, a.loss, b.loss, a.validation, b.validation, a.sparsity, b.sparsity)
    same(report(tmp_path / "one"), report(tmp_path / "two"))
