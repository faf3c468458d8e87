"""Tasks of lm-evaluation-harness, put to a base and to what was made of it."""

import importlib.util
import json
import sys

import pytest
from click.testing import CliRunner
from tiny import ROOT, tiny_model

from narrow_engine.cli import evaluate

BASE = ROOT / "demo" / "base"
CHOICE = """task: copies
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{said}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def run(*arguments):
    return CliRunner().invoke(evaluate, [str(argument) for argument in arguments], catch_exceptions=False)


def test_without_the_harness_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    found = run(BASE, BASE, "--task", "arc_easy")
    assert (found.exit_code, "pip install 'narrow[eval]'" in found.output) == (1, True)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="needs narrow[eval]")
class TestWithTheHarness:
    @pytest.fixture
    def broken(self, tmp_path):
        """The base's tokenizer with weights that know nothing."""
        folder = tmp_path / "broken"
        tiny_model("llama", vocab_size=8192).save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((BASE / name).read_bytes())
        return folder

    @pytest.fixture
    def task(self, tmp_path):
        # What knows nothing takes the shortest.
        rows = [{"said": f"def f{n}(self):\n    ", "choices": ["return None\n", "?", "@@Ω@@"]} for n in range(30)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        path = tmp_path / "tasks" / "copies.yaml"
        path.parent.mkdir()
        path.write_text(CHOICE.format(rows=tmp_path / "rows.jsonl"))
        return path

    def test_two_models_and_how_sure_their_difference_is(self, task, broken):
        found = json.loads(run(BASE, broken, "--task", task.parent, "--json").stdout)
        (score,) = found["scores"]
        assert (score["task"], score["metric"], score["rows"], score["higher_is_better"]) == ("copies", "acc", 30, True)
        assert score["base"] > 0.9
        assert score["difference"]["value"] == pytest.approx(score["narrow"] - score["base"])
        assert score["difference"]["low"] <= score["difference"]["value"] <= score["difference"]["high"] < 0

    def test_a_limit_and_a_table(self, task):
        found = run(BASE, BASE, "--task", task.parent, "--limit", 7)
        assert [line.split()[:3] for line in found.stdout.splitlines()[1:]] == [["copies", "acc", "7"]]
        assert "within the error" in found.stdout

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            (None, "is no file or folder, and no task of"),
            ("a: 1", "There is no task in"),
            (CHOICE.format(rows="/none.jsonl"), "cannot put these tasks: FileNotFoundError"),
        ],
    )
    def test_what_is_no_task_is_a_sentence(self, tmp_path, text, said):
        folder = tmp_path / "none"
        if text is not None:
            folder.mkdir()
            (folder / "x.yaml").write_text(text)
        found = run(BASE, BASE, "--task", folder if text is not None else "no_such_task")
        assert (found.exit_code, said in found.output) == (1, True), found.output
