"""`narrow doctor` of the full installation: what the machine can do, and whether a job fits."""

import json
import subprocess
import sys

import pytest
from misbehaving import run_cli

from narrow_engine import doctor, memory, processors, sandbox
from narrow_engine.sizing import plan_sizes
from narrow_engine.spec import Options


def test_it_says_what_this_machine_can_do(monkeypatch):
    monkeypatch.setattr(doctor, "MEASURED_SECONDS", 0.0)
    monkeypatch.setattr(sandbox, "lacking", lambda: ["a sentence"])
    found = doctor.machine()
    json.dumps(found)
    assert found["machine"]["memory_bytes"] > 2**28
    assert found["packages"]["torch"]
    assert found["runtimes"]["onnx"].startswith("onnxruntime 1.")
    assert found["speed"]["float32_gflop_per_second"] > 0
    assert found["speed"]["memory_gb_per_second"] > 0
    assert found["speed"]["trains_in"] in ("float32", "bfloat16")
    assert found["sandbox"]["lacking"] == ["a sentence"]


def test_a_container_has_less_than_the_machine(monkeypatch, tmp_path):
    quota, most = tmp_path / "cpu.max", tmp_path / "memory.max"
    quota.write_text("50000 100000\n")
    most.write_text(f"{2**20}\n")
    monkeypatch.setattr(processors, "QUOTA", quota)
    monkeypatch.setattr(processors, "CONTAINER", (tmp_path / "there-is-none", most))
    assert doctor._processors()["processors_usable"] == 0.5
    assert doctor._memory()["memory_of_the_container_bytes"] == 2**20
    quota.write_text("max 100000\n")
    assert doctor._processors().get("processors_usable") != 0.5
    most.write_text("max\n")
    assert doctor._memory().get("memory_of_the_container_bytes") != 2**20


def test_a_process_that_is_shut_in_has_less_than_the_machine():
    code = "import resource, torch; resource.setrlimit(resource.RLIMIT_DATA, (3_000_000_000, 3_000_000_000))\n"
    code += "from narrow_engine import memory; print(memory.limit(torch.device('cpu')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "3000000000\n"


def test_a_job_is_estimated_as_the_service_does_and_compared_with_the_memory(monkeypatch, tiny_folder):
    base = ("doctor", "--base", tiny_folder, "--budget", "0.85", "--recover-tokens", "4096")
    result = run_cli(*base, "--json")
    found = json.loads(result.stdout)["job"]
    config = json.loads((tiny_folder / "config.json").read_text())
    options = Options.model_validate({"budget": {"parameters": 0.85}, "method": {"recover": {"tokens": 4096}}})
    sizes = plan_sizes(config, options, 4)
    assert (result.exit_code, found["fits"]) == (0, True)
    assert (found["memory_bytes"], found["parameters"]["after"]) == (sizes.memory_bytes, sizes.after.parameters)
    assert found["estimated_seconds"] == round(sizes.seconds)
    monkeypatch.setattr(memory, "limit", lambda where: 2**20)
    result = run_cli(*base)
    assert (result.exit_code, "It does not fit" in result.stdout) == (1, True)


@pytest.mark.parametrize(("budget", "said"), [("0.001", "raise the budget"), ("0.5", "config.json is missing")])
def test_what_cannot_be_estimated_is_wrong_usage(tiny_folder, tmp_path, budget, said):
    base = tiny_folder if budget == "0.001" else tmp_path
    result = run_cli("doctor", "--base", base, "--budget", budget)
    assert (result.exit_code, said in " ".join(result.stderr.split())) == (2, True), result.output


@pytest.mark.parametrize(
    ("files", "usable"),
    [
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.cfs_quota_us": "50000", "cpu.cfs_period_us": "100000"}, 0.5),
        ({"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_threads_follow_the_quota_of_a_container(monkeypatch, tmp_path, files, usable):
    for name, told in files.items():
        (tmp_path / name).write_text(f"{told}\n")
    monkeypatch.setattr(processors, "allowed", lambda: 64)
    monkeypatch.setattr(processors, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(processors, "OLD_QUOTA", (tmp_path / "cpu.cfs_quota_us", tmp_path / "cpu.cfs_period_us"))
    assert processors.usable() == (64 if usable is None else usable)
    assert processors.threads() == (None if usable is None else 1)
    assert processors.threads(4) == (16 if usable is None else 1)
