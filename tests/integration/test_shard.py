"""One run on several processes: the same model as on one, whichever way it ended before, and no process left behind."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from ports import free_port
from runs import CONTEXT, Run, wait_for
from tiny import multiply_in, tiny_model

from narrow_engine import footprint, matching, shard, teacher, train
from narrow_engine.corpus import Blocks
from narrow_engine.errors import Cancelled
from narrow_engine.events import read_events
from narrow_engine.families import dimensions
from narrow_engine.models import along, config_dict
from narrow_engine.plan import whole_plan
from narrow_engine.regularize import GroupLasso
from narrow_engine.report.model import Report
from narrow_engine.spec import Match

slow = pytest.mark.slow
LENGTH, STEPS = 32, 20
NEAR, FAR = 1e-3, 1e-2
"""How far rounding to bfloat16, where that is what a machine trains in, may bring two runs apart in ten and in hundreds of
steps."""


@pytest.fixture
def spec(tmp_path, tiny_folder, python_file, german_file):
    def make(recover=None, **changes):
        # Three rows: two processes cannot have the same number of them.
        recovery = {"tokens": 1920, "batch_tokens": 192, **(recover or {})}
        method = {"calibration_tokens": 1024, "recover": recovery, **changes.pop("method", {})}
        whole = {
            "base": {"path": str(tiny_folder)},
            "target": {"path": str(python_file)},
            "target_name": "python",
            "skills": [{"name": "german", "path": str(german_file), "role": "forget"}],
            "budget": {"parameters": 0.85},
            "method": method,
            "block_tokens": 64,
            "skill_tokens": 2048,
            "relearn": {"tokens": 512},
            "export": ["safetensors"],
            **changes,
        }
        path = tmp_path / "spec.json"
        path.write_text(json.dumps(whole))
        return path

    return make


def told_of(rank, count, port):
    """What torchrun tells a process."""
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in found.items()}


def learn(mesh, folder, case, stop_at=None):
    """A training in float32, so that little is left to rounding; what a process has in the end."""
    with pytest.MonkeyPatch.context() as patch:
        multiply_in(patch, torch.float32)
        if "way" in case:
            patch.setattr(footprint, "choose", lambda *_: footprint.Way(*case["way"]))
        return _learn(mesh, folder, case, stop_at)


def _learn(mesh, folder, case, stop_at):
    family, rows = case.get("family", "llama"), case.get("rows", 3)
    settings = {"optimizer": "muon", "learning_rate": 3e-3, "objective": "mixed", **case.get("settings", {})}
    model, told = tiny_model(family), teacher.Live(tiny_model(family, seed=1, initializer_range=0.1))
    after_step = None
    if case.get("lasso"):
        scores = torch.rand(
            3 * dimensions(config_dict(model)).experts, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
        after_step = GroupLasso(along(model, "width"), scores + 0.1, 0.5, STEPS)
    seen, notices = [], []

    def check():
        seen.append(1)
        # Only the last process is asked to stop.
        if stop_at is not None and len(seen) > stop_at and (mesh is None or mesh.get_local_rank() == mesh.size() - 1):
            raise Cancelled

    arguments = {
        "phase": "recover",
        "folder": folder,
        "emit": lambda kind, phase, message, data: notices.append(data.get("code")) if kind == "notice" else None,
        "check": check,
        "validate": lambda m: float(m.eval()(input_ids=torch.arange(64).view(2, 32)).logits.detach().square().mean()),
        "after_step": after_step,
        "mesh": mesh,
    }
    blocks = Blocks(np.random.default_rng(0).integers(0, 320, 6000).astype(np.uint32), LENGTH, 5)
    settings = train.Settings(LENGTH * rows * STEPS, LENGTH * rows, **settings)
    if case.get("match"):
        plan = whole_plan(config_dict(model))
        with matching.beside(told.model, model, plan, Match(hidden=0.0, attention=1.0)) as beside:
            curve = train.train(model, blocks, settings, teacher=told, beside=beside, **arguments)
    else:
        curve = train.train(model, blocks, settings, teacher=told, **arguments)
    return {
        "curve": [(p.tokens, p.loss, p.validation, p.sparsity) for p in curve],
        "weights": {name: value.detach().clone() for name, value in model.named_parameters()},
        "notices": notices,
    }


def _process(environment, folder, case, stop_at):
    os.environ.update(environment)
    with shard.processes() as mesh:
        try:
            torch.save(learn(mesh, folder, case, stop_at), folder / f"{environment['RANK']}.pt")
        except Cancelled:
            torch.save("cancelled", folder / f"{environment['RANK']}.pt")


def learn_on(count, folder, case, stop_at=None):
    """The same on several processes: what each of them has."""
    folder.mkdir(exist_ok=True)
    port = free_port()
    found = [CONTEXT.Process(target=_process, args=(told_of(r, count, port), folder, case, stop_at)) for r in range(count)]
    for process in found:
        process.start()
    for process in found:
        process.join(120)
        assert process.exitcode == 0
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def assert_learned_alike(one, other):
    for a, b in zip(one["curve"], other["curve"], strict=True):
        assert [x is None for x in a] == [x is None for x in b]
        assert [x for x in a if x is not None] == pytest.approx([x for x in b if x is not None], rel=1e-5)
    for name, value in one["weights"].items():
        assert float((value - other["weights"][name]).norm() / value.norm()) < 1e-3, name
        assert torch.equal(value == 0, other["weights"][name] == 0), name
    assert one["notices"] == other["notices"]


@pytest.mark.parametrize(
    ("count", "case"),
    [
        (2, {}),
        (2, {"settings": {"optimizer": "adamw", "objective": "next_token"}, "lasso": True}),
        pytest.param(2, {"lasso": True, "rows": 4}, marks=slow),
        pytest.param(2, {"settings": {"optimizer": "adamw"}}, marks=slow),
        pytest.param(3, {"rows": 2}, marks=slow),
        pytest.param(3, {"rows": 1}, marks=slow),
        pytest.param(3, {"rows": 7, "lasso": True}, marks=slow),
        pytest.param(2, {"match": True}, marks=slow),
        (2, {"rows": 7, "way": (2,)}),
        pytest.param(3, {"rows": 4, "way": (3, True)}, marks=slow),
        pytest.param(2, {"match": True, "way": (1, True)}, marks=slow),
        *(pytest.param(2, {"family": family}, marks=slow) for family in ("gemma2", "gpt_neox", "cohere2", "mixtral")),
        pytest.param(2, {"family": "qwen3_moe", "lasso": True}, marks=slow),
    ],
)
def test_any_training_is_the_same_on_several_processes(tmp_path, count, case):
    (tmp_path / "one").mkdir()
    one, several = learn(None, tmp_path / "one", case), learn_on(count, tmp_path / "several", case)
    for found in several:
        assert_learned_alike(one, {**found, "notices": several[0]["notices"]})
    assert one["curve"][-1][1] < one["curve"][1][1]


@pytest.mark.parametrize(
    ("first", "then", "case"),
    [
        (2, 1, {}),
        pytest.param(1, 2, {}, marks=slow),
        pytest.param(2, 2, {"settings": {"optimizer": "adamw"}}, marks=slow),
        pytest.param(2, 3, {"lasso": True}, marks=slow),
        pytest.param(3, 1, {"lasso": True, "settings": {"optimizer": "adamw"}}, marks=slow),
    ],
)
def test_a_checkpoint_is_one_for_any_number_of_processes(tmp_path, first, then, case):
    (tmp_path / "whole").mkdir()
    assert learn_on(first, tmp_path / "broken", case, stop_at=8) == ["cancelled"] * first
    found = learn_on(then, tmp_path / "broken", case)
    whole = learn(None, tmp_path / "whole", case)
    for one in found:
        assert_learned_alike(whole, one)


def start(spec, out, count=2, *options):
    """The processes that torchrun would start."""
    port, found = free_port(), []
    for rank in range(count):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in told_of(rank, count, port).items():
                patch.setenv(name, value)
            found.append(Run("run", spec, "--out", out, "--quiet", *options))
    return found


def finish(processes):
    told = [process.communicate(timeout=120)[0] for process in processes]
    return [process.returncode for process in processes], told


def done(spec, out, count=2, *options):
    codes, told = finish(start(spec, out, count, *options))
    assert codes == [0] * count, told
    return Report.model_validate_json((out / "result" / "report.json").read_text())


def trained(steps, phase="recover"):
    return lambda e: e.phase == phase and e.kind == "progress" and e.data["done"] >= steps


def assert_same(one, other, rel=NEAR):
    """Two reports tell of the same model, to rounding."""
    assert len(one.curve) == len(other.curve)
    for a, b in zip(one.curve, other.curve, strict=True):
        assert (a.phase, a.tokens, a.sparsity) == (b.phase, b.tokens, b.sparsity)
        for x, y in ((a.loss, b.loss), (a.validation, b.validation)):
            assert (x is None and y is None) or x == pytest.approx(y, rel=rel, abs=1e-5)
    assert one.skills.keys() == other.skills.keys()
    for name, skill in one.skills.items():
        assert skill.recovered.loss == pytest.approx(other.skills[name].recovered.loss, rel=rel)


@pytest.mark.parametrize("pieces", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_parts_of_a_batch_have_the_gradient_of_the_whole(size, pieces):
    for rows in range(1, 12):
        meshes = [SimpleNamespace(get_local_rank=lambda r=r: r, size=lambda: size) for r in range(size)]
        own = [shard.parts(mesh, rows, pieces) for mesh in meshes]
        assert {len(parts) for parts in own} == {pieces}, "all processes run the same passes"
        parts = [part for each in own for part in each]
        assert all(part.rows >= 1 and part.first + part.rows <= rows for part in parts)
        shares = [0.0] * rows
        for part in parts:
            for row in range(part.first, part.first + part.rows):
                shares[row] += part.weight / part.rows / size
        assert shares == pytest.approx([1 / rows] * rows)


@slow
def test_two_processes_make_the_model_that_one_makes(spec, tmp_path):
    """With all that trains: trials of shapes, group lasso, recovery with Muon, controls, relearning."""
    method = {"units": ["neuron", "layer"], "regularizer": {"tokens": 1920}}
    path = spec(method=method, controls=["trained"], budget={"parameters": 0.8})
    one, two = done(path, tmp_path / "one", 1), done(path, tmp_path / "two")
    assert {point.phase for point in two.curve} == {"sparsify", "recover"}
    assert two.allocation == one.allocation
    assert_same(one, two)
    assert "processes" not in one.provenance.machine
    assert two.provenance.machine["processes"] == 2


def torchrun(path, out):
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())),
            *("-m", "narrow_engine", str(path), "--out", str(out), "--quiet"),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )


@slow
def test_processes_end_with_a_torchrun_that_is_killed(spec, tmp_path):
    process = torchrun(spec(recover={"tokens": 200_000}), tmp_path / "run")
    wait_for(tmp_path / "run", trained(1), process)
    children = psutil.Process(process.pid).children()
    assert len(children) == 2
    process.kill()
    process.wait()
    assert psutil.wait_procs(children, 5)[1] == []


@pytest.mark.slow
def test_what_torchrun_was_asked_to_stop_goes_on_on_one_process(spec, tmp_path):
    path, out = spec(recover={"tokens": 19200}, skills=[]), tmp_path / "run"
    process = torchrun(path, out)
    wait_for(out, trained(10), process)
    children = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "The run was cancelled" in told
    assert len(children) == 2
    assert not any(child.is_running() for child in children)
    assert (out / "work" / "recover" / "checkpoint.safetensors").exists()
    seen = len(read_events(out / "events.jsonl"))
    report = done(path, out, 1)
    assert report.provenance.recovery_tokens == 19200
    after = [e.data["done"] for e in read_events(out / "events.jsonl")[seen:] if e.phase == "recover" and e.kind == "progress"]
    assert after[0] > 10


def test_an_error_of_the_first_process_ends_the_others(spec, tmp_path):
    (tmp_path / "short.jsonl").write_text(json.dumps({"text": "def f(): pass"}) + "\n")
    codes, told = finish(start(spec(target={"path": str(tmp_path / "short.jsonl")}), tmp_path / "run"))
    assert codes == [1, 0], told
    assert told[1] == ""
    assert json.loads((tmp_path / "run" / "failure.json").read_text())["message"] in told[0]


@slow
def test_a_process_that_dies_is_told_of(spec, tmp_path):
    out = tmp_path / "run"
    processes = start(spec(recover={"tokens": 200_000}), out)
    wait_for(out, trained(1), processes[0])
    processes[1].kill()
    codes, told = finish(processes)
    assert codes == [1, -signal.SIGKILL], told
    assert json.loads((out / "failure.json").read_text())["code"] == "process_lost"


@slow
@pytest.mark.parametrize(
    ("recover", "method"),
    [
        ({"objective": "next_token"}, {"kind": "scratch"}),
        ({"objective": "distill", "cache": "hidden"}, {}),
        ({"objective": "distill", "cache": "top"}, {}),
        ({"correction": {"tokens": 1920}}, {}),
    ],
)
def test_every_teacher_comes_to_the_same_on_two_processes(spec, tmp_path, recover, method):
    path = spec(recover=recover, method=method)
    assert_same(done(path, tmp_path / "one", 1), done(path, tmp_path / "two"))


@slow
def test_a_model_with_experts_is_spread_as_well(spec, tmp_path, tokenizer_file):
    base = tmp_path / "base"
    tiny_model("qwen3_moe", initializer_range=0.1).save_pretrained(base)
    shutil.copy(tokenizer_file, base / "tokenizer.json")
    path = spec(base={"path": str(base)}, method={"regularizer": {"tokens": 1920}})
    assert_same(done(path, tmp_path / "one", 1), done(path, tmp_path / "two"))


@slow
@pytest.mark.parametrize("recover", [{"objective": "distill", "on_policy": 0.5}, {"match": {"hidden": 1.0, "attention": 0.0}}])
def test_what_is_not_the_same_on_two_processes_works_as_well(spec, tmp_path, recover):
    """What the student samples is drawn anew."""
    path = spec(recover=recover)
    one, two = done(path, tmp_path / "one", 1), done(path, tmp_path / "two")
    assert all(math.isfinite(point.loss) for point in two.curve[1:])
    for a, b in zip(one.curve, two.curve, strict=True):
        assert a.validation is None or a.validation == pytest.approx(b.validation, rel=FAR)


@slow
def test_a_correction_that_another_run_left_is_taken(spec, tmp_path):
    path = spec(recover={"correction": {"tokens": 1920}})
    first = done(path, tmp_path / "first", 2, "--shared", tmp_path / "shelf")
    second = done(path, tmp_path / "second", 2, "--shared", tmp_path / "shelf")
    assert_same(first, second)
    told = {e.phase: e.message for e in read_events(tmp_path / "second" / "events.jsonl") if e.kind == "finished"}
    assert told["correct"] == "done by another run"


@slow
def test_kill_9_and_again_on_any_number_of_processes_gives_the_same_model(spec, tmp_path):
    path, out = spec(recover={"tokens": 38400}, method={"regularizer": {"tokens": 38400}}), tmp_path / "run"
    whole = done(path, tmp_path / "whole", 1)
    for count, moment, number in (
        (2, lambda e: e.phase == "score" and e.kind == "started", signal.SIGKILL),
        (2, trained(40, "sparsify"), signal.SIGTERM),
        (3, trained(80, "sparsify"), signal.SIGTERM),
        (1, trained(120, "sparsify"), signal.SIGTERM),
        (2, trained(40), signal.SIGTERM),
        (2, trained(80), signal.SIGKILL),
    ):
        processes = start(path, out, count)
        wait_for(out, moment, processes[0])
        # Where one is told, all stop.
        for process in processes if number == signal.SIGKILL else processes[-1:]:
            os.killpg(process.pid, number)
        codes, told = finish(processes)
        assert codes == ([-number] * count if number == signal.SIGKILL else [130] + [0] * (count - 1)), told
    assert_same(whole, done(path, out), FAR)
