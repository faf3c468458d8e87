"""Runs that share their first stages: the same results as alone, the same notices, and nothing lost where the shelf fails."""

import fcntl
import json
import os
import threading
import time

import pytest
from runs import Run

from narrow_engine import shelf
from narrow_engine.events import read_events
from narrow_engine.report.model import Report

SHARED = ["load", "measure_base", "score"]


@pytest.fixture
def run(tmp_path, tiny_folder, python_file):
    def start(name, share=True, **changes):
        spec = {
            "base": {"path": str(tiny_folder)},
            "target": {"path": str(python_file)},
            "target_name": "python",
            "budget": {"parameters": 0.85},
            "method": {"calibration_tokens": 512, "recover": {"tokens": 512, "batch_tokens": 256}},
            "block_tokens": 64,
            "skill_tokens": 512,
            "export": ["safetensors"],
            **changes,
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(spec))
        options = ["--shared", tmp_path / "shelf"] if share else []
        told = Run("run", tmp_path / f"{name}.json", "--out", tmp_path / name, "--quiet", *options)
        assert told.wait(240) == 0, told.communicate()
        events = read_events(tmp_path / name / "events.jsonl")
        report = Report.model_validate_json((tmp_path / name / "result" / "report.json").read_bytes())
        return events, report, (tmp_path / name / "result" / "model" / "model.safetensors").read_bytes()

    return start


def reused(events):
    return [e.phase for e in events if e.kind == "finished" and e.data["reused"]]


def test_a_second_size_shares_what_is_the_same_and_comes_out_as_if_alone(run, tmp_path):
    first, _, _ = run("first")
    assert reused(first) == []
    shared, report, weights = run("second", budget={"parameters": 0.8})
    assert reused(shared) == SHARED
    assert next(e.phase for e in shared if e.kind == "started") == "allocate"
    alone, same, expected = run("alone", share=False, budget={"parameters": 0.8})
    assert weights == expected
    assert report.notices == same.notices
    assert [e.message for e in shared if e.kind == "notice"] == [e.message for e in alone if e.kind == "notice"]
    assert set(report.provenance.seconds) == set(same.provenance.seconds), "what was shared took its time too"
    assert (tmp_path / "second" / "score" / "scores.safetensors").stat().st_nlink == 3


@pytest.mark.slow
def test_other_methods_and_sizes_hear_what_was_said_once(run, tmp_path):
    def taught(kind):
        return {"kind": kind, "calibration_tokens": 512, "recover": {"tokens": 512, "batch_tokens": 256, "cache": "hidden"}}

    first, _, _ = run("first", method=taught("distill"))
    assert reused(first) == []
    other, _, weights = run("other", method=taught("prune"), budget={"parameters": 0.8})
    assert reused(other) == ["load", "measure_base", "teach"]
    _, _, expected = run("alone", share=False, method=taught("prune"), budget={"parameters": 0.8})
    assert weights == expected


def test_who_is_at_the_same_is_waited_for_and_who_dies_is_not(tmp_path, tiny_folder, python_file):
    spec = {
        "base": {"path": str(tiny_folder)},
        "target": {"path": str(python_file)},
        "budget": {"parameters": 0.85},
        # Time enough in a stage that is shared.
        "method": {"calibration_tokens": 2_000_000, "recover": {"tokens": 256, "batch_tokens": 256}},
        "block_tokens": 64,
        "skill_tokens": 512,
        "export": ["safetensors"],
    }
    (tmp_path / "spec.json").write_text(json.dumps(spec))

    def start(name):
        return Run("run", tmp_path / "spec.json", "--out", tmp_path / name, "--shared", tmp_path / "shelf", "--quiet")

    def told(name, condition):
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if any(condition(event) for event in read_events(tmp_path / name / "events.jsonl")):
                return
            time.sleep(0.05)
        raise AssertionError("it did not come so far")

    first = start("first")
    told("first", lambda e: e.phase == "score" and e.kind == "progress")
    second = start("second")
    told("second", lambda e: e.phase == "score" and e.message == "another run is at it")
    assert reused(read_events(tmp_path / "second" / "events.jsonl")) == ["load", "measure_base"]
    time.sleep(1)
    assert not any(e.phase == "score" and e.kind == "started" for e in read_events(tmp_path / "second" / "events.jsonl"))
    first.kill()
    first.wait(30)
    told("second", lambda e: e.phase == "score" and e.kind == "started")
    second.terminate()
    assert second.wait(30) == 130
    third = start("third")
    told("third", lambda e: e.phase == "score" and e.kind == "started")
    third.terminate()
    assert third.wait(30) == 130
    assert not list((tmp_path / "shelf").glob(".lock-*")), "who was stopped leaves none"


@pytest.fixture
def finished(tmp_path):
    """A stage that a run has finished, and its record."""
    out, record = tmp_path / "run" / "score", tmp_path / "run" / "score.json"
    (out / "sub").mkdir(parents=True)
    for number in range(20):
        (out / "sub" / str(number)).write_text("x" * number)
    record.write_text('{"key": "k", "seconds": 1.5, "notices": []}')
    return out, record


def test_who_comes_second_changes_nothing(finished, tmp_path):
    place = shelf.place(tmp_path / "shelf", "score", "k")
    shelf.put(place, *finished)
    before = place.stat().st_ino
    shelf.put(place, *finished)
    assert (place.stat().st_ino, [p.name for p in place.parent.iterdir()]) == (before, [place.name])
    assert shelf.take(place, tmp_path / "taken") == {"key": "k", "seconds": 1.5, "notices": []}
    assert len(list((tmp_path / "taken" / "sub").iterdir())) == 20
    assert shelf.take(shelf.place(tmp_path / "shelf", "score", "other"), tmp_path / "none") is None


def test_without_hard_links_it_copies(finished, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    place = shelf.place(tmp_path / "shelf", "score", "k")
    shelf.put(place, *finished)
    assert shelf.take(place, tmp_path / "taken")
    assert (tmp_path / "taken" / "sub" / "7").read_text() == "x" * 7
    assert (tmp_path / "taken" / "sub" / "7").stat().st_nlink == 1


def test_what_nobody_used_for_long_goes_and_the_rest_stays(finished, tmp_path):
    old, fresh = (shelf.place(tmp_path / "shelf", "score", key) for key in ("old", "fresh"))
    shelf.put(old, *finished)
    shelf.put(fresh, *finished)
    for name in (".tmp-torn", ".tmp-now", ".gone-x"):
        (old.parent / name).mkdir()
    for path in (old, fresh, old.parent / ".tmp-torn"):
        os.utime(path, (0, time.time() - 4000))
    shelf.take(fresh, tmp_path / "taken")
    shelf.tidy(old.parent, 2000, 2**30)
    assert sorted(p.name for p in old.parent.iterdir()) == sorted([".tmp-now", fresh.name])


def test_what_is_no_entry_goes_too_but_for_locks_that_are_held(tmp_path):
    for name in ("file", ".home", ".any", ".gone-file", ".lock-left", ".lock-held", "soon", ".soon"):
        path = tmp_path / name
        path.mkdir() if name in (".home", "soon") else path.write_text("x")
        moment = time.time() + (10**6 if name.endswith("soon") else -4000)
        os.utime(path, (0, moment))
    (tmp_path / ".new").mkdir()
    (tmp_path / ".gone-link").symlink_to(tmp_path)
    with (tmp_path / ".lock-held").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        shelf.tidy(tmp_path, 2000, 2**30)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock-held", ".new"]


def test_of_too_much_what_was_used_longest_ago_goes(tmp_path):
    for number in range(6):
        folder = tmp_path / f"score-{number}" / "out"
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(bytes(2**20))
        (folder / "sparse").touch()
        os.truncate(folder / "sparse", 2**40)
        os.utime(folder.parent, (0, time.time() - 100 + number))
    (tmp_path / ".planted").write_bytes(bytes(2**20))
    os.utime(tmp_path / ".planted", (0, time.time() - 97.5))
    shelf.tidy(tmp_path, 2000, 10 * 2**20)
    assert len(list(tmp_path.iterdir())) == 7
    shelf.tidy(tmp_path, 2000, 3 * 2**20 + 2**19)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["score-3", "score-4", "score-5"]
    deep(tmp_path / "score-6", 100)
    shelf.tidy(tmp_path, 2000, 4 * 2**20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["score-3", "score-4", "score-5"]


def deep(folder, levels):
    folder.mkdir()
    here = os.open(folder, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("d" * 200, dir_fd=here)
        within = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = within
    os.mkfifo("pipe", dir_fd=here)
    os.fchmod(here, 0)
    os.close(here)


def test_however_deep_a_folder_is_it_can_be_removed(tmp_path):
    deep(tmp_path / "a", 3000)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").touch()
    (tmp_path / "a" / "link").symlink_to(tmp_path / "outside")
    for name in ("a", "a", "none"):
        shelf.remove(tmp_path / name)
    assert [path.name for path in tmp_path.rglob("*")] == ["outside", "file"]


def test_taking_while_it_is_put_and_removed_gives_all_or_nothing(finished, tmp_path):
    place, stop = shelf.place(tmp_path / "shelf", "score", "k"), threading.Event()
    shelf.put(place, *finished)

    def churn():
        while not stop.is_set():
            shelf.put(place, *finished)
            time.sleep(0.002)
            shelf.tidy(place.parent, 0, 2**30)

    threads = [threading.Thread(target=churn) for _ in range(2)]
    for thread in threads:
        thread.start()
    taken = 0
    for number in range(300):
        out = tmp_path / "taken" / str(number)
        out.parent.mkdir(exist_ok=True)
        if shelf.take(place, out) is not None:
            taken += 1
            assert len(list((out / "sub").iterdir())) == 20
        else:
            assert not out.exists()
    stop.set()
    for thread in threads:
        thread.join()
    assert taken
