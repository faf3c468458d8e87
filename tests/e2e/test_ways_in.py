"""The three ways in, as a user walks them: the Python call, the command, and the files in stock libraries."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import narrow_client
import pytest
from rich.console import Console
from tiny import ROOT, write_jsonl

OPTIONS = {"block_tokens": 64, "skill_tokens": 1024}
METHOD = {"calibration_tokens": 512, "recover": {"tokens": 1024, "batch_tokens": 256}}


def hear_ctrl_c():
    """What starts the tests in the background may have told its children to ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def narrow(*arguments, url):
    environment = {**os.environ, "NARROW_URL": url, "COLUMNS": "100"}
    command = [sys.executable, "-m", "narrow_client.cli", *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c
    )


def test_compress_in_python_and_the_files_in_stock_libraries(service, tiny_folder, python_file, german_file, tmp_path):
    seen = []
    quiz = tmp_path / "quiz.jsonl"
    quiz.write_text("".join(json.dumps({"text": f"x = {n}\ny =", "reply": f" {n + 1}"}) + "\n" for n in range(200)))
    with narrow_client.Narrow(service.url) as client:
        result = narrow_client.compress(
            tiny_folder,
            python_file,
            0.85,
            tmp_path / "out",
            skills={"german": (german_file, "forget"), "quiz": (quiz, "watch", {"column": "reply", "tokens": 4, "prompts": 20})},
            method=METHOD,
            options={**OPTIONS, "relearn": {"tokens": 512}},
            teacher=tiny_folder,
            client=client,
            progress=seen.append,
        )
    assert result.job.status == "succeeded"
    assert result.job.spec.teacher is not None
    assert [e.seq for e in seen] == list(range(1, len(seen) + 1))
    assert 0 < result.report.skills["python"].retention.value < 2
    assert result.report.skills["german"].role == "forget"
    assert result.report.relearning["german"].narrow.curve
    assert set(result.report.locality.skills) == {"python", "german", "quiz"}
    assert result.report.skills["quiz"].answers.prompts == 20
    terminal = Console(file=io.StringIO(), width=100)
    terminal.print(narrow_client.report_view(result.report))
    for title in ("Answers: held-out prompts", "Gone or hidden?", "What the skills share."):
        assert title in terminal.file.getvalue()
    assert result.report_path.read_text().startswith("<!doctype html>")

    import numpy as np
    import onnxruntime
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    model = AutoModelForCausalLM.from_pretrained(result.model_path, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(result.model_path / "tokenizer.json"))
    ids = tokenizer("def main():", return_tensors="pt")["input_ids"]
    session = onnxruntime.InferenceSession(str(result.paths["onnx"] / "model.onnx"))
    feed = {"input_ids": ids.numpy(), "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
    for value in session.get_inputs()[3:]:
        feed[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    with torch.no_grad():
        assert np.abs(session.run(["logits"], feed)[0] - model(ids).logits.numpy()).max() < 1e-3


@pytest.fixture
def api_spec(service, tiny_folder, python_file):
    def make(tokens):
        return {
            "base": {"model": service.upload_model(tiny_folder)},
            "target": {"dataset": service.upload_dataset(python_file)},
            "budget": {"parameters": 0.85},
            "method": {**METHOD, "recover": {"tokens": tokens, "batch_tokens": 256}},
            "export": ["safetensors"],
            **OPTIONS,
        }

    return make


def test_the_command_watches_shows_downloads_and_cancels(service, api_spec, tmp_path):
    job = service.http.post("/jobs", json=api_spec(1024)).json()["id"]
    watching = narrow("watch", job, url=service.url)
    out, err = watching.communicate(timeout=120)
    assert watching.returncode == 0, err
    assert "recover: done in" in err
    for arguments, words in ((("report", job), "retention"), (("jobs",), job), (("show", job), "succeeded"), (("doctor",), "ok")):
        command = narrow(*arguments, url=service.url)
        out, err = command.communicate(timeout=120)
        assert (command.returncode, words in out) == (0, True), (arguments, out, err)
    fetch = narrow("download", job, "--out", tmp_path / "d", "--only", "model/", url=service.url)
    out, err = fetch.communicate(timeout=60)
    assert (tmp_path / "d" / "model" / "model.safetensors").exists(), err
    assert not (tmp_path / "d" / "report.json").exists()

    # The result in another format, later: a job on the model that is there by now, of which one format is fetched and run.
    model = service.job(job)["result_model"]
    data = service.job(job)["spec"]["target"]["dataset"]
    wanted = ("--base", model, "--target", data, "--method", "export", "--export", "onnx-int4", "--out", tmp_path / "e", "--json")
    exporting = narrow("compress", *wanted, url=service.url)
    out, err = exporting.communicate(timeout=240)
    assert exporting.returncode == 0, err
    assert set(json.loads(out)["parity"]) == {"slice", "reload", "onnx-int4"}
    exported = service.http.get("/jobs").json()["data"][0]["id"]
    fetch = narrow("download", exported, "--out", tmp_path / "f", "--format", "onnx-int4", url=service.url)
    out, err = fetch.communicate(timeout=60)
    assert fetch.returncode == 0, err
    assert [path.name for path in (tmp_path / "f").iterdir()] == ["onnx-int4"]
    texts = []
    for folder in ("e/model", "f/onnx-int4"):
        writing = narrow("run-model", tmp_path / folder, "def main", "--tokens", "5", "--threads", "1", url=service.url)
        out, err = writing.communicate(timeout=120)
        assert writing.returncode == 0, err
        texts.append(out)
    assert all(texts)

    slow = service.http.post("/jobs", json=api_spec(5_000_000)).json()["id"]
    service.wait(slow, lambda j: j["status"] == "running")
    watching = narrow("watch", slow, url=service.url)
    assert "queued" in watching.stderr.readline()
    watching.send_signal(signal.SIGINT)
    _, err = watching.communicate(timeout=30)
    assert (watching.returncode, f"the job {slow} goes on" in err) == (130, True), err
    fetch = narrow("download", slow, "--out", tmp_path / "none", url=service.url)
    out, err = fetch.communicate(timeout=30)
    assert (fetch.returncode, "no files since it is running" in err) == (1, True), err
    assert narrow("cancel", slow, url=service.url).wait(30) == 0
    service.wait(slow, lambda j: j["status"] == "cancelled")
    command = narrow("watch", slow, url=service.url)
    assert command.wait(30) == 1


def test_compress_as_a_command_refuses_plans_and_is_interrupted(service, tiny_folder, python_file, tmp_path):
    common = ("compress", "--base", tiny_folder, "--target", python_file)
    plan = narrow(*common, "--budget", "0.85", "--dry-run", "--json", url=service.url)
    out, err = plan.communicate(timeout=60)
    assert json.loads(out)["after"]["parameters"] < json.loads(out)["before"]["parameters"], err

    bad = write_jsonl(tmp_path / "bad.jsonl", ["fine"])
    bad.write_text(bad.read_text() + "{oops\n")
    refused = narrow("compress", "--base", tiny_folder, "--target", bad, url=service.url)
    out, err = refused.communicate(timeout=60)
    assert (refused.returncode, "line 2 of bad.jsonl" in err, "Traceback" in err) == (2, True, False)

    failed = narrow(*common, "--budget", "0.01", url=service.url)
    out, err = failed.communicate(timeout=60)
    assert (failed.returncode, err.count("raise the budget")) == (2, 1)

    quiz = tmp_path / "quiz.jsonl"
    quiz.write_text("".join(json.dumps({"question": f"x = {n}", "reply": f" #### {n}"}) + "\n" for n in range(20)))
    out, err = narrow("upload", quiz, "--column", "question", url=service.url).communicate(timeout=60)
    common += ("--skill", f"quiz={out.strip()}:watch")
    refused = narrow(*common, "--answer", "quizz=reply", url=service.url)
    assert "no --skill 'quizz'" in refused.communicate(timeout=60)[1]
    refused = narrow(*common, "--answer", "quiz=answer", url=service.url)
    assert "line 1 of quiz has no column 'answer' (it has 'question', 'reply')" in refused.communicate(timeout=60)[1]
    common += ("--answer", r"quiz=reply:#### (\d+)")

    running = narrow(*common, "--budget", "0.85", "--recover-tokens", "50000000", "--out", tmp_path / "o", url=service.url)
    deadline = time.monotonic() + 60
    while not (live := service.http.get("/jobs", params={"status": "running"}).json()["data"]) and time.monotonic() < deadline:
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert (running.returncode, f"interrupted: the job {live[0]['id']} was cancelled" in err) == (130, True), err
    service.wait(live[0]["id"], lambda j: j["status"] == "cancelled")
    assert not (tmp_path / "o").exists()
    skill = live[0]["spec"]["skills"][0]
    assert (skill["answer"]["column"], skill["answer"]["extract"], skill["answer"]["prompts"]) == ("reply", r"#### (\d+)", 200)


@pytest.mark.slow
def test_a_sweep_as_a_command_shows_its_frontier(service, tiny_folder, python_file, tmp_path):
    """From a file with local paths to a table, a page and JSON; taken up again by its id; interrupted, it is cancelled."""
    spec = {
        "base": {"path": os.path.relpath(tiny_folder, tmp_path)},
        "target": {"path": str(python_file)},
        "methods": {"default": METHOD, "untrained": {**METHOD, "recover": {"tokens": 0}}},
        "budgets": [{"parameters": 0.85}],
        **OPTIONS,
    }
    (tmp_path / "sweep.json").write_text(json.dumps(spec))
    command = narrow("sweep", tmp_path / "sweep.json", "--out", tmp_path / "out", url=service.url)
    out, err = command.communicate(timeout=240)
    assert command.returncode == 0, err
    assert "2 of 2: untrained, 0.85, seed 0:" in err
    assert "the base" in out
    frontier = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert sorted(point["method"] for point in frontier["points"]) == ["default", "untrained"]
    assert (tmp_path / "out" / "frontier.html").read_text().startswith("<!doctype html>")

    sweep = service.http.get("/sweeps").json()["data"][0]["id"]
    again = narrow("sweep", sweep, "--out", tmp_path / "again", "--json", url=service.url)
    out, err = again.communicate(timeout=60)
    assert (again.returncode, json.loads(out)) == (0, frontier), err

    spec["methods"] = {"slow": {**METHOD, "recover": {"tokens": 50_000_000, "batch_tokens": 256}}}
    (tmp_path / "slow.json").write_text(json.dumps(spec))
    slow = narrow("sweep", tmp_path / "slow.json", "--out", tmp_path / "slow", url=service.url)
    deadline = time.monotonic() + 60
    while not service.http.get("/jobs", params={"status": "running"}).json()["data"] and time.monotonic() < deadline:
        time.sleep(0.1)
    slow.send_signal(signal.SIGINT)
    _, err = slow.communicate(timeout=60)
    sweep = service.http.get("/sweeps").json()["data"][0]["id"]
    assert (slow.returncode, f"interrupted: the sweep {sweep} was cancelled" in err) == (130, True), err
    job = service.http.get("/jobs", params={"sweep": sweep}).json()["data"][0]["id"]
    service.wait(job, lambda j: j["status"] == "cancelled")
    ended = narrow("sweep", sweep, "--out", tmp_path / "slow", url=service.url)
    out, err = ended.communicate(timeout=60)
    assert (ended.returncode, "no point has succeeded" in out, "1 cancelled" in err) == (1, True, True), (out, err)


def test_a_sweep_as_a_command_refuses_what_is_wrong_before_it_sends_anything(tiny_folder, python_file, tmp_path):
    good = {"base": {"path": str(tiny_folder)}, "target": {"path": str(python_file)}, "budgets": [{"parameters": 0.5}]}
    cases = [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        (json.dumps({**good, "base": {"path": "nowhere"}}), "there is no folder at"),
        (json.dumps({**good, "skills": [{"name": "a", "path": "nowhere"}]}), "there is no file at"),
        (json.dumps({**good, "budget": 0.5}), "there is no option 'budget' here"),
        (json.dumps({**good, "methods": {"a": {"kind": "bake"}}}), "methods.a.kind"),
        (json.dumps({"base": good["base"], "target": good["target"]}), "budgets is missing"),
    ]
    for text, words in cases:
        (tmp_path / "spec.json").write_text(text)
        command = narrow("sweep", tmp_path / "spec.json", "--out", tmp_path / "out", url="http://127.0.0.1:9")
        _, err = command.communicate(timeout=30)
        assert (command.returncode, words in " ".join(err.split())) == (2, True), (text, err)
    command = narrow("sweep", tmp_path / "none.json", url="http://127.0.0.1:9")
    assert command.wait(30) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_recipe_makes_a_model(tmp_path):
    for domain in ("python", "c"):
        (tmp_path / "corpora" / domain).mkdir(parents=True)
        data = (ROOT / "demo" / "data" / f"{domain}.jsonl.gz").read_bytes()
        (tmp_path / "corpora" / domain / "train.jsonl.gz").write_bytes(data)
    for script, *options in (("tokenizer.py",), ("pretrain.py", "--steps", "3")):
        command = [
            sys.executable,
            str(ROOT / "demo" / "recipe" / script),
            str(tmp_path / "corpora"),
            str(tmp_path / "out"),
            *options,
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=280)
    from narrow_engine.model_files import inspect_model

    info = inspect_model(tmp_path / "out")
    assert (info.family, info.parameters) == ("llama", 7_802_112)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo(tmp_path):
    started = time.monotonic()
    done = subprocess.run([sys.executable, "demo/demo.py"], cwd=ROOT, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - started < 600
    for words in ("of python kept", "retention", "german", "onnx", "report"):
        assert words in done.stdout
    out = ROOT / "demo" / "out" / "narrow-python"
    report = json.loads((out / "report.json").read_text())
    assert report["after"]["parameters"] <= 0.5 * report["before"]["parameters"]
    assert report["skills"]["python"]["retention"]["low"] > 0.5
    assert (out / "onnx" / "model.onnx").exists()


@pytest.mark.slow
def test_an_interrupted_demo_leaves_nothing_running():
    process = subprocess.Popen(
        [sys.executable, "demo/demo.py"], cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c
    )
    import psutil

    deadline = time.monotonic() + 90
    family = []
    while time.monotonic() < deadline and not any("-m narrow_engine" in " ".join(p.cmdline()) for p in family):
        family = [p for p in psutil.Process(process.pid).children(recursive=True) if p.is_running()]
        time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
