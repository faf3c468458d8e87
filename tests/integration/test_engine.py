"""`narrow run` as a user runs it: a real process on real text, killed, cancelled, resumed, and wrong."""

import json
import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from runs import Run, wait_for
from safetensors.torch import load_file
from tiny import documents, tiny_model, write_jsonl
from tokenizers import Tokenizer

from narrow_engine import answers, corpus, earlier
from narrow_engine.events import read_events
from narrow_engine.models import load_model
from narrow_engine.report.model import Report
from narrow_engine.spec import Answer

OPTIONS = {
    "budget": {"parameters": 0.85},
    "method": {"calibration_tokens": 1024, "recover": {"tokens": 2560, "batch_tokens": 256}},
    "block_tokens": 64,
    "skill_tokens": 2048,
    "relearn": {"tokens": 512},
    "export": ["safetensors"],
}


@pytest.fixture
def spec(tmp_path, tiny_folder, python_file, german_file):
    def make(**changes):
        skills = [{"name": "german", "path": str(german_file), "role": "forget"}]
        whole = {
            "base": {"path": str(tiny_folder)},
            "target": {"path": str(python_file)},
            "target_name": "python",
            "skills": skills,
        }
        path = tmp_path / "spec.json"
        path.write_text(json.dumps({**whole, "skills": skills, **OPTIONS, **changes}))
        return path

    return make


def start(spec, out):
    return Run("run", spec, "--out", out, "--quiet")


def finish(process):
    out, err = process.communicate(timeout=240)
    return process.returncode, out + err


def numbered(out):
    assert [e.seq for e in read_events(out / "events.jsonl")] == list(range(1, len(read_events(out / "events.jsonl")) + 1))


def weights(out):
    return (out / "result" / "model" / "model.safetensors").read_bytes()


def test_a_whole_run_with_every_part(spec, tmp_path, python_file, german_file):
    method = {**OPTIONS["method"], "units": ["neuron", "layer", "residual"], "regularizer": {"tokens": 2560}}
    options = {"export": ["safetensors", "onnx"], "controls": ["trained", "random"], "budget": {"parameters": 0.7}}
    code, told = finish(start(spec(method=method, **options), tmp_path / "run"))
    assert code == 0, told
    result = tmp_path / "run" / "result"
    report = Report.model_validate_json((result / "report.json").read_text())
    assert report.after.parameters <= 0.7 * report.before.parameters
    assert {cut.unit: cut.kept for cut in report.cuts} == report.allocation.keep
    assert len(report.allocation.trials) > 1
    assert set(report.skills) == {"python", "german"}
    assert report.skills["german"].role == "forget"
    for skill in report.skills.values():
        for fit in (skill.base, skill.cut, skill.recovered, skill.random, skill.trained):
            assert fit.low < fit.loss < fit.high
        for figure in (skill.retention, skill.agreement, skill.kl):
            assert figure.low <= figure.value <= figure.high
    python = report.skills["python"]
    assert python.trained.loss < python.base.loss, "narrow text improves any model on it"
    assert python.random.loss != python.cut.loss
    assert report.parity["slice"].relative_error < 1e-5
    assert report.parity["reload"].relative_error < 1e-5
    assert report.parity["onnx"].greedy_equal == report.parity["onnx"].greedy_tokens >= 64
    assert report.skills["python"].recovered.loss < report.skills["python"].cut.loss
    sparse = [p.sparsity for p in report.curve if p.phase == "sparsify" and p.sparsity is not None]
    assert sparse[-1] == pytest.approx(1 - report.after.width / report.before.width, abs=0.02)
    assert {f.path for f in report.files} >= {"model/config.json", "model/model.safetensors", "onnx/model.onnx", "plan.json"}
    assert report.locality.skills == ["python", "german"]
    assert {overlap.unit for overlap in report.locality.overlaps} >= {"neuron", "residual"}
    assert {curve.unit: list(curve.loss) for curve in report.locality.curves} == {
        unit: ["python", "german"] for unit in ("neuron", "residual", "layer")
    }
    assert "python" in report.locality.summary
    german = report.relearning["german"]
    for learner in (german.narrow, german.random, german.fresh):
        assert learner.curve[0].tokens == 0
        assert learner.curve[-1].tokens <= 512
        assert all(point.validation is not None for point in (learner.curve[0], learner.curve[-1]))
    # A part of the text that the table is measured on, so nearly the same.
    assert german.narrow.curve[0].validation == pytest.approx(report.skills["german"].recovered.loss, abs=0.1)
    page = (result / "report.html").read_text()
    for title in ("Gone or hidden?", "What the skills share"):
        assert title in page
    assert (result / "model" / "README.md").exists()
    told = [e for e in read_events(tmp_path / "run" / "events.jsonl") if (e.kind, e.phase) == ("progress", "load")]
    read = python_file.stat().st_size + german_file.stat().st_size
    assert (told[-1].data, told[-1].message) == ({"done": read, "total": read}, "bytes of text read")
    numbered(tmp_path / "run")


@pytest.mark.slow
def test_a_model_is_exported_as_it_is_in_another_type(spec, tmp_path, tokenizer_file):
    base = tmp_path / "base"
    tiny_model("llama", intermediate_size=2048).save_pretrained(base)  # large enough to be timed
    shutil.copy(tokenizer_file, base / "tokenizer.json")
    options = {
        "base": {"path": str(base)},
        "method": {"kind": "export"},
        "budget": None,
        "export": ["onnx-int4"],
        "dtype": "bfloat16",
        "skills": [],
    }
    path = spec(**options)
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if v is not None}))
    code, told = finish(start(path, tmp_path / "run"))
    assert code == 0, told
    result = tmp_path / "run" / "result"
    report = Report.model_validate_json((result / "report.json").read_text())
    assert (report.after.parameters, report.after.bytes) == (report.before.parameters, 2 * report.before.parameters)
    made, before = (load_file(folder / "model.safetensors") for folder in (result / "model", base))
    assert all(torch.equal(made[name], before[name].bfloat16()) for name in before)
    assert [speed.format for speed in report.speed] == ["safetensors", "onnx-int4"]
    assert all(speed.base for speed in report.speed)
    python = report.skills["python"]
    assert python.retention.value == pytest.approx(1, abs=0.01)
    assert python.rounded["onnx-int4"].value == pytest.approx(1, abs=0.2)
    assert python.rounded["onnx-int4"].value != python.retention.value
    assert not (result / "onnx").exists(), "what it was made of was not asked for"
    assert {file.path for file in report.files} >= {
        "onnx-int4/model.onnx",
        "onnx-int4/genai_config.json",
        "onnx-int4/tokenizer.json",
    }
    page = (result / "report.html").read_text()
    for words in ("What rounding the weights keeps", "What runs which files", "ONNX Runtime, int4"):
        assert words in page


def test_a_model_with_experts_loses_experts_and_neurons(spec, tmp_path, tokenizer_file):
    base = tmp_path / "base"
    tiny_model("qwen3_moe", initializer_range=0.1).save_pretrained(base)
    shutil.copy(tokenizer_file, base / "tokenizer.json")
    method = {**OPTIONS["method"], "units": ["expert", "neuron"]}
    code, told = finish(start(spec(base={"path": str(base)}, method=method, budget={"parameters": 0.6}), tmp_path / "run"))
    assert code == 0, told
    report = Report.model_validate_json((tmp_path / "run" / "result" / "report.json").read_text())
    assert report.after.parameters <= 0.6 * report.before.parameters
    assert report.after.experts < report.before.experts == 6
    assert {cut.unit: cut.per_layer for cut in report.cuts} == {
        "expert": [report.after.experts] * 3,
        "neuron": [report.after.width] * 3,
    }
    assert report.parity["slice"].relative_error < 1e-5
    assert report.parity["reload"].relative_error < 1e-5
    assert report.skills["python"].recovered.loss < report.skills["python"].cut.loss
    assert "in each expert" in (tmp_path / "run" / "result" / "report.html").read_text()


def test_what_the_base_answers_is_asked_of_what_is_left_of_it(spec, tmp_path, tiny_folder):
    """The answers are what the base itself writes, so it answers all prompts."""
    read = earlier.Reader(Tokenizer.from_file(str(tiny_folder / "tokenizer.json")), None, 320)
    prompts = [f"def step_{number}(value):\n    return" for number in range(60)]
    asked = {"column": "reply", "tokens": 8, "stop": ["\n", "\x00"], "prompts": 20}
    written = answers.write(load_model(tiny_folder), read, prompts, Answer.model_validate(asked), lambda *_: None)
    rows = [{"prompt": prompt, "reply": text} for prompt, text in zip(prompts, written, strict=True)]
    quiz = tmp_path / "quiz.jsonl"
    quiz.write_text('{"prompt": "no reply"}\n' + "".join(json.dumps(row) + "\n" for row in rows))
    skills = [{"name": "quiz", "path": str(quiz), "column": "prompt", "answer": asked, "bad_rows": "skip"}]
    # Fresh weights have nothing of it.
    method = {**OPTIONS["method"], "kind": "scratch", "units": ["neuron"]}
    code, told = finish(start(spec(skills=skills, method=method), tmp_path / "run"))
    assert code == 0, told
    report = Report.model_validate_json((tmp_path / "run" / "result" / "report.json").read_text())
    found = report.skills["quiz"].answers
    assert found.prompts == 20
    assert found.base.value == 1
    assert found.cut.value < 1
    assert found.lost == round(20 * (1 - found.recovered.value))
    assert report.skills["python"].answers is None
    assert any(f"Bad rows of {quiz.name} that were left out: 1." in notice.message for notice in report.notices)
    assert "How often a model writes the answer" in (tmp_path / "run" / "result" / "report.html").read_text()


def test_kill_9_anywhere_and_again_gives_the_same_model(spec, tmp_path):
    path = spec()
    code, told = finish(start(path, tmp_path / "whole"))
    assert code == 0, told
    moments = [
        lambda e: e.phase == "score" and e.kind == "started",
        lambda e: e.phase == "recover" and e.kind == "progress" and e.data["done"] >= 4,
        lambda e: e.phase == "export" and e.kind == "started",
    ]
    broken = tmp_path / "broken"
    for moment in moments:
        process = start(path, broken)
        wait_for(broken, moment, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (broken / "result").exists()
    code, told = finish(start(path, broken))
    assert code == 0, told
    assert weights(broken) == weights(tmp_path / "whole")
    numbered(broken)
    reused = [e.phase for e in read_events(broken / "events.jsonl") if e.kind == "finished" and e.data["reused"]]
    assert "score" in reused


def test_sigterm_stops_soon_with_a_checkpoint_and_the_next_run_goes_on_from_it(spec, tmp_path):
    method = {**OPTIONS["method"], "recover": {"tokens": 200_000, "batch_tokens": 256}}
    out = tmp_path / "run"
    process = start(spec(method=method), out)
    wait_for(out, lambda e: e.phase == "recover" and e.kind == "progress", process)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code, _ = finish(process)
    assert code == 130
    assert time.monotonic() - asked < 5
    assert (out / "work" / "recover" / "checkpoint.safetensors").exists()
    first = max(e.data["done"] for e in read_events(out / "events.jsonl") if e.phase == "recover" and e.kind == "progress")
    process = start(spec(method=method), out)
    wait_for(out, lambda e: e.phase == "recover" and e.kind == "progress" and e.data["done"] > first, process)
    process.send_signal(signal.SIGTERM)
    finish(process)
    done = [e.data["done"] for e in read_events(out / "events.jsonl") if e.phase == "recover" and e.kind == "progress"]
    assert done == sorted(done), "no step is counted twice"


def test_another_spec_in_the_same_folder_runs_what_it_changes(spec, tmp_path):
    out = tmp_path / "run"
    assert finish(start(spec(), out))[0] == 0
    method = {**OPTIONS["method"], "recover": {"tokens": 0}}
    assert finish(start(spec(method=method), out))[0] == 0
    runs = [(e.phase, e.data["reused"]) for e in read_events(out / "events.jsonl") if e.kind == "finished"][10:]
    assert dict(runs)["reconstruct"] is True
    assert dict(runs)["recover"] is False
    report = Report.model_validate_json((out / "result" / "report.json").read_text())
    assert report.provenance.recovery_tokens == 0


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"block_tokens": 100_000}, "block_too_long", "context is 1024 tokens"),
        ({"target": {"path": "short.jsonl"}}, "text_too_short", "lower block_tokens"),
        ({"target": {"path": "empty.txt"}}, "empty_dataset", "empty.txt"),
        ({"budget": {"parameters": 0.01}}, "budget_too_small", "raise the budget"),
    ],
)
def test_what_is_wrong_is_told_in_one_sentence(spec, tmp_path, change, code, words):
    write_jsonl(tmp_path / "short.jsonl", ["a short text", "and another"])
    (tmp_path / "empty.txt").write_text("\n \n")
    status, told = finish(start(spec(**change), tmp_path / "run"))
    assert status == 1
    assert "Traceback" not in told
    assert words in told
    assert json.loads((tmp_path / "run" / "failure.json").read_text())["code"] == code


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": {"path": "nowhere.jsonl"}}, "there is nothing at"),
        ({"banana": 1}, "there is no option 'banana' here"),
        ({"budget": {"parameters": 1.5}}, "budget: 'parameters' above 1 is a count"),
    ],
)
def test_a_wrong_spec_is_wrong_usage(spec, tmp_path, change, words):
    status, told = finish(start(spec(**change), tmp_path / "run"))
    assert (status, "Traceback" in told, words in told) == (2, False, True), told


def test_a_folder_that_cannot_be_made_is_wrong_usage(spec, tmp_path):
    status, told = finish(start(spec(), "/proc/narrow/run"))
    assert (status, "Traceback" in told, "cannot be made" in told) == (2, False, True), told


@pytest.mark.slow
def test_a_report_is_made_again_from_the_same_bytes_and_from_no_other(spec, tmp_path, tiny_folder, python_file, german_file):
    german_file = shutil.copy(german_file, tmp_path / "german with a bad row.jsonl")
    german_file.write_text(german_file.read_text() + "oops\n")
    skills = [{"name": "german", "path": str(german_file), "role": "forget", "bad_rows": "skip"}]
    path = spec(skills=skills)
    assert finish(start(path, tmp_path / "run"))[0] == 0
    report = tmp_path / "run" / "result" / "report.json"
    status, told = finish(Run("run", path, "--out", tmp_path / "run", "--quiet", "--json"))
    assert (status, json.loads(told)) == (0, json.loads(report.read_text()))
    moved = tmp_path / "elsewhere"
    shutil.copytree(tiny_folder, moved / "a model")
    (moved / "no model").mkdir()
    (moved / "no model" / "config.json").write_text("{}")
    shutil.copy(python_file, moved / "a plain text.txt")
    shutil.copy(python_file, moved / "text.jsonl")

    def reproduce(*inputs, out="again"):
        return finish(Run("reproduce", report, *inputs, "--out", tmp_path / out))

    status, told = reproduce(moved)
    assert (status, f"{german_file.name!r} with the SHA-256" in told, "Traceback" in told) == (1, True, False), told
    status, told = reproduce(moved, german_file)
    assert status == 0, told
    assert told.rstrip().endswith("The same model, byte for byte.")
    assert weights(tmp_path / "again") == weights(tmp_path / "run")
    status, told = reproduce(moved, german_file)
    assert (status, "holds the results of a run already" in told) == (1, True)
    edited = json.loads(report.read_text())
    edited["skills"]["more"] = edited["skills"]["german"]
    report.write_text(json.dumps(edited))
    status, told = reproduce(moved, german_file, out="edited")
    assert (status, "was it edited?" in told) == (1, True), told
    # As it would be on a machine that computes otherwise: what a report says is compared, not what it says of itself.
    other = {**edited, "skills": {name: row for name, row in edited["skills"].items() if name != "more"}}
    other["files"] = [{**file, "sha256": "0" * 64} for file in other["files"]]
    other["provenance"]["versions"]["torch"] = "1.0"
    recovered = other["skills"]["python"]["recovered"]
    recovered.update(loss=recovered["loss"] + 9, low=recovered["low"] + 9, high=recovered["high"] + 9)
    report.write_text(json.dumps(other))
    status, told = reproduce(moved, german_file, out="other")
    assert status == 1
    assert "outside its interval" in told
    assert "torch is" in told
    assert "and was 1.0" in told


@pytest.mark.slow
def test_names_of_skills_may_be_anything(spec, tmp_path, german_file):
    """They once were file names: 'training' took the place of the training text."""
    names = ["training", "字" * 100]
    skills = [{"name": name, "path": str(german_file)} for name in names]
    out = tmp_path / "run"
    assert finish(start(spec(skills=skills, export=["safetensors"]), out))[0] == 0
    report = Report.model_validate_json((out / "result" / "report.json").read_text())
    assert list(report.skills) == ["python", *names]
    assert report.skills["training"].base == report.skills[names[1]].base != report.skills["python"].base
    assert len(corpus.load(out / "load", "training").tokens) > 5 * report.skills["training"].tokens


@pytest.mark.slow
def test_a_stopped_run_of_another_spec_keeps_no_result(spec, tmp_path):
    out = tmp_path / "run"
    assert finish(start(spec(export=["safetensors"]), out))[0] == 0
    assert (out / "result").exists()
    process = start(spec(method={**OPTIONS["method"], "recover": {"tokens": 10_000_000}}), out)
    seen = len(read_events(out / "events.jsonl"))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not any(
        e.phase == "recover" and e.kind == "progress" for e in read_events(out / "events.jsonl")[seen:]
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 130
    assert not (out / "result").exists()


def test_broken_weights_and_tokenizers_are_told(spec, tmp_path, tiny_folder):
    import torch
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_folder, tmp_path / "nan")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    status, told = finish(start(spec(base={"path": str(folder)}), tmp_path / "a"))
    assert (status, "model.norm.weight" in told) == (1, True)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    shutil.copy(tiny_folder / "model.safetensors", folder)
    status, told = finish(start(spec(base={"path": str(folder)}), tmp_path / "b"))
    assert (status, "tokenizer.json" in told) == (1, True)
    vocabulary = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": vocabulary}))
    status, told = finish(start(spec(base={"path": str(folder)}), tmp_path / "c"))
    assert (status, "tokenizer fails on python.jsonl" in told) == (1, True), told


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
@pytest.mark.parametrize(
    ("size", "recover", "finished"),
    [("600k", {}, ()), pytest.param("3m", {"cache": "top", "top": 320}, ("reconstruct",), marks=pytest.mark.slow)],
)
def test_a_full_disk_is_told_and_costs_nothing_that_was_finished(spec, tmp_path, size, recover, finished):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("this machine cannot mount")
    method = {**OPTIONS["method"], "recover": {**OPTIONS["method"]["recover"], **recover}}
    try:
        status, told = finish(start(spec(method=method), disk / "run"))
        assert status == 1, told
        assert all((disk / "run" / stage).exists() for stage in finished)
        assert "disk is full" in told
        assert "Traceback" not in told
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        status, told = finish(start(spec(method=method), disk / "run"))
        assert status == 0, told
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_two_processes_never_work_in_one_folder(spec, tmp_path):
    out = tmp_path / "run"
    first = start(spec(), out)
    wait_for(out, lambda e: e.phase == "load" and e.kind == "started", first)
    second = start(spec(), out)
    assert finish(first)[0] == 0
    code, told = finish(second)
    assert code == 0 or "Another process is working" in told
    started = [e.phase for e in read_events(out / "events.jsonl") if e.kind == "started"]
    assert len(started) == len(set(started)), "the second found everything done"


@pytest.mark.slow
def test_a_dataset_with_blank_rows_says_how_many(spec, tmp_path, python_file):
    texts = [json.loads(line)["text"] for line in python_file.read_text().splitlines()]
    data = write_jsonl(tmp_path / "blanks.jsonl", [*texts, "", "  "])
    status, told = finish(start(spec(target={"path": str(data)}), tmp_path / "run"))
    assert status == 0, told
    report = Report.model_validate_json((tmp_path / "run" / "result" / "report.json").read_text())
    assert any("2 blank documents" in n.message for n in report.notices)


@pytest.mark.parametrize(
    ("method", "from_base"),
    [
        ({"kind": "distill"}, False),
        pytest.param({"kind": "distill", "init": "cut"}, True, marks=pytest.mark.slow),
        ({"kind": "distill", "init": "layers", "units": ["layer", "token"]}, True),
        pytest.param({"kind": "scratch"}, False, marks=pytest.mark.slow),
    ],
)
def test_students_go_down_the_same_line(spec, tmp_path, method, from_base):
    method = {"calibration_tokens": 1024, "recover": {"tokens": 5120, "batch_tokens": 256}, **method}
    budget = {"keep": {"layer": 0.67}} if "layer" in method.get("units", ()) else {"parameters": 0.8}
    code, told = finish(start(spec(method=method, budget=budget), tmp_path / "run"))
    assert code == 0, told
    report = Report.model_validate_json((tmp_path / "run" / "result" / "report.json").read_text())
    assert report.after.parameters < report.before.parameters
    assert report.spec["method"]["recover"]["objective"] == ("next_token" if method["kind"] == "scratch" else "distill")
    assert report.skills["python"].recovered.loss < report.skills["python"].cut.loss
    assert ("slice" in report.parity) == from_base
    assert (report.skills["python"].random is not None) == from_base, "of fresh weights nothing is chosen"
    assert (tmp_path / "run" / "score").exists() == (method.get("init") == "cut")
    if method.get("init") == "layers":
        assert [cut.per_layer for cut in report.cuts if cut.unit == "layer"] == [[0, 2]]
    card = (tmp_path / "run" / "result" / "model" / "README.md").read_text()
    assert ("Trained from scratch" if method["kind"] == "scratch" else "Distilled from") in card


@pytest.fixture
def larger(tmp_path, tokenizer_file):
    """Another model with the base's tokenizer, and some spare rows."""
    tiny_model("qwen3", vocab_size=336, hidden_size=48).save_pretrained(tmp_path / "larger")
    shutil.copy(tokenizer_file, tmp_path / "larger" / "tokenizer.json")
    return tmp_path / "larger"


@pytest.mark.slow
def test_what_the_teacher_said_teaches_as_the_teacher_does(spec, tmp_path):
    losses = []
    for cache in (None, "hidden"):
        method = {**OPTIONS["method"], "recover": {"tokens": 1024, "batch_tokens": 256, "cache": cache}}
        code, told = finish(start(spec(method=method), tmp_path / str(cache)))
        assert code == 0, told
        report = Report.model_validate_json((tmp_path / str(cache) / "result" / "report.json").read_text())
        losses.append(report.skills["python"].recovered.loss)
    # To the bit where training computes in bfloat16: tests/unit/test_teacher.py.
    assert losses[1] == pytest.approx(losses[0], abs=0.02)
    assert (tmp_path / "hidden" / "teach" / "states.npy").stat().st_size > 2 * 32 * 1024


@pytest.mark.parametrize(
    "recover",
    [
        pytest.param({"cache": "top", "top": 32, "temperature": 2.0}, marks=pytest.mark.slow),
        {"correction": {"tokens": 2560}, "cache": "hidden"},
        pytest.param({"match": {"hidden": 1.0, "attention": 1.0}, "on_policy": 0.5}, marks=pytest.mark.slow),
    ],
)
def test_ways_of_being_taught(spec, tmp_path, recover):
    method = {**OPTIONS["method"], "units": ["neuron", "head", "token"], "recover": {**OPTIONS["method"]["recover"], **recover}}
    budget = {"keep": {"neuron": 0.5, "head": 0.5}}
    code, told = finish(start(spec(method=method, budget=budget), tmp_path / "run"))
    assert code == 0, told
    report = Report.model_validate_json((tmp_path / "run" / "result" / "report.json").read_text())
    assert report.skills["python"].recovered.loss < report.skills["python"].cut.loss
    assert report.provenance.correction_tokens == (2560 if "correction" in recover else 0)
    assert {point.phase for point in report.curve} == {"recover"}, "the teacher's own training is not the student's"


def test_a_training_that_does_harm_is_told_and_not_kept(spec, tmp_path):
    # Few steps, of which none is small: with more of them the loss comes down again on some machines.
    far = {"tokens": 512, "learning_rate": 1.0}
    recover = {**far, "batch_tokens": 256, "schedule": "constant", "correction": far}
    method = {**OPTIONS["method"], "units": ["neuron"], "recover": recover}
    code, told = finish(start(spec(method=method), tmp_path / "run"))
    assert code == 0, told
    report = Report.model_validate_json((tmp_path / "run" / "result" / "report.json").read_text())
    assert {"correction_harmed", "recovery_harmed"} <= {notice.code for notice in report.notices}
    python = report.skills["python"]
    assert python.recovered.loss == pytest.approx(python.cut.loss, abs=0.01), "but for the rounding to the base's type"


@pytest.mark.parametrize(
    ("units", "cache"),
    [
        pytest.param(["neuron"], None, marks=pytest.mark.slow),
        (["neuron", "token"], "hidden"),
        pytest.param(["neuron", "token"], "top", marks=pytest.mark.slow),
    ],
)
def test_a_larger_model_teaches(spec, tmp_path, larger, units, cache):
    method = {"kind": "distill", "units": units, "recover": {"tokens": 2560, "batch_tokens": 256, "cache": cache}}
    code, told = finish(start(spec(method=method, teacher={"path": str(larger)}), tmp_path / "run"))
    assert code == 0, told
    report = Report.model_validate_json((tmp_path / "run" / "result" / "report.json").read_text())
    curve = [point.loss for point in report.curve if point.loss is not None]
    assert curve[-1] < curve[0]
    states = tmp_path / "run" / "teach" / "states.npy"
    assert not states.exists() or np.load(states, mmap_mode="r").shape[-1] == 48


def test_a_teacher_that_reads_other_tokens_is_refused(spec, tmp_path, larger):
    file = larger / "tokenizer.json"
    whole = file.read_text()
    other = json.loads(whole)
    other["model"]["merges"] = other["model"]["merges"][:-1]
    file.write_text(json.dumps(other))
    status, told = finish(start(spec(teacher={"path": str(larger)}), tmp_path / "run"))
    assert (status, "they differ in 'model' of tokenizer.json" in told) == (1, True), told
    # The same, written by another version, is no other.
    same = json.loads(whole)
    same["model"]["merges"] = [" ".join(pair) if isinstance(pair, list) else pair.split(" ") for pair in same["model"]["merges"]]
    file.write_text(json.dumps(same))
    small = tmp_path / "small"
    tiny_model("llama", vocab_size=300).save_pretrained(small)
    shutil.copy(file, small / "tokenizer.json")
    status, told = finish(start(spec(teacher={"path": str(small)}), tmp_path / "run"))
    assert (status, "the size of the vocabulary (300, the base has more)" in told) == (1, True), told
    config = larger / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 32}))
    status, told = finish(start(spec(teacher={"path": str(larger)}), tmp_path / "run"))
    assert (status, "The teacher reads 32 tokens at most" in told) == (1, True), told


@pytest.mark.slow
def test_a_curriculum_mixes_in_broad_text_that_nothing_is_measured_on(spec, tmp_path):
    broad = write_jsonl(tmp_path / "broad.jsonl", [*documents("german", 40), *documents("python", 5)])
    recover = {"tokens": 5120, "batch_tokens": 256, "curriculum": {"start": 1, "end": 1}}
    method = {"kind": "scratch", "recover": recover}
    code, told = finish(start(spec(method=method, broad={"path": str(broad)}), tmp_path / "run"))
    assert code == 0, told
    run = tmp_path / "run"
    report = Report.model_validate_json((run / "result" / "report.json").read_text())
    assert "measured_on" in [notice.code for notice in report.notices]
    measured = [corpus.load(run / "load", f"skill-{n}.base").hashes for n in (0, 1)]
    kept = corpus.load(run / "load", "broad").hashes
    assert len(kept) > 10
    assert not np.isin(kept, np.concatenate(measured)).any()
    assert report.spec.get("broad") is None
    # Broad alone, half German, teaches more of it than the target's text does.
    method = {"kind": "scratch", "recover": {**recover, "curriculum": {"start": 0, "end": 0}}}
    code, told = finish(start(spec(method=method, broad={"path": str(broad)}), run))
    assert code == 0, told
    narrow = Report.model_validate_json((run / "result" / "report.json").read_text())
    assert report.skills["german"].recovered.loss < narrow.skills["german"].recovered.loss
