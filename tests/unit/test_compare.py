"""Two reports side by side."""

import json

import pytest
from click.testing import CliRunner
from test_report import EVIL, example

from narrow_engine.cli import compare as command
from narrow_engine.errors import NarrowError
from narrow_engine.report import compare as reports
from narrow_engine.report.model import Answers, Interval, Learner, Relearning


def pair(**changes):
    """The example's report, and another that is `changes` better on its target."""
    a, b = example(), example()
    fit = b.skills["python"].recovered
    b.skills["python"].recovered = fit.model_copy(update=changes)
    return a, b


def test_what_does_not_overlap_is_told_apart_and_what_does_is_not():
    a, b = pair(loss=1.5, low=1.4, high=1.6)
    found = reports.compare(a, b, ("one", "two"))
    row = next(row for row in found.skills if row.name == "python")
    assert (row.apart, row.a.value, row.b.value) == (True, a.skills["python"].recovered.loss, 1.5)
    assert reports.verdict(found) == "two is better on python."
    assert reports.verdict(reports.compare(b, a, ("one", "two"))) == "one is better on python."
    near = reports.compare(*pair(loss=2.1, low=2.0, high=2.2), ("one", "two"))
    assert "further apart than their intervals" in reports.verdict(near)
    assert found.warnings == []


def test_options_sizes_and_what_does_not_compare_are_told():
    a, b = pair()
    b.spec["method"]["recover"] = {"objective": "distill", "tokens": 7}
    b.after.parameters += 5
    b.skills["only there"] = b.skills["python"]
    b.skills["python"] = b.skills["python"].model_copy(update={"documents": 3})
    b.provenance.inputs[0].sha256 = "f" * 64
    found = reports.compare(a, b, ("one", "two"))
    assert {"method.recover.objective", "method.recover.tokens"} <= {row.name for row in found.options}
    assert [row.name for row in found.sizes] == ["parameters"]
    assert next(row for row in found.skills if row.name == "only there").apart is None
    assert [("bases" in w, "python was not measured" in w) for w in found.warnings] == [(True, False), (False, True)]
    assert reports.Comparison.model_validate_json(found.model_dump_json()) == found


def test_answers_and_relearning_are_put_beside_each_other():
    a, b = pair()
    share = Interval(value=0.5, low=0.4, high=0.6)
    b.skills["python"].answers = Answers(prompts=1200, base=share, cut=share, recovered=share, gained=0, lost=0)
    for report, tokens in ((a, None), (b, 1234)):
        models = dict.fromkeys(("narrow", "random", "fresh"), Learner(tokens=tokens, curve=[]))
        report.relearning = {EVIL: Relearning(base=2, within=0.1, tokens=4096, text=4096, note="", **models)}
    found = reports.compare(a, b, ("one", "two"))
    assert [(row.skill, row.probe, row.a, row.b) for row in found.probes] == [
        ("python", "prompts answered", None, "50.0% of 1,200"),
        (EVIL, "learned again", "not in 4,096 tokens", "after 1,234 tokens"),
    ]
    told = "\n".join(reports.lines(found)), reports.render_comparison(found)
    for text in told:
        assert all(word in text for word in ("50.0% of 1,200", "not in 4,096 tokens", "after 1,234 tokens"))
    assert reports.compare(*pair(), ("one", "two")).probes == []


def test_the_command_reads_folders_and_writes_a_page_that_runs_nothing(tmp_path):
    a, b = pair(loss=1.5, low=1.4, high=1.6)
    for name, made in (("one", a), ("two", b)):
        (tmp_path / name / "result").mkdir(parents=True)
        (tmp_path / name / "result" / "report.json").write_text(made.model_dump_json())
    page = tmp_path / "page.html"
    one, two = str(tmp_path / "one"), str(tmp_path / "two" / "result" / "report.json")
    done = CliRunner().invoke(command, [one, str(tmp_path / "two"), "--html", str(page)])
    assert done.exit_code == 0, done.output
    assert "two is better on python." in done.output
    text = page.read_text()
    assert "two is better on python." in text
    assert "<script" not in text
    assert EVIL not in text
    assert json.loads(CliRunner().invoke(command, [one, two, "--json"]).stdout)["a"] == "one"


def test_what_is_no_report_is_told(tmp_path):
    (tmp_path / "report.json").write_text('{"schema_version": 1}')
    with pytest.raises(NarrowError, match="is not a report of this version"):
        reports.read_report(tmp_path)
    done = CliRunner().invoke(command, [str(tmp_path), str(tmp_path)])
    assert (done.exit_code, "Traceback" in done.output) == (1, False)
    for change in ({"base": {"loss": "1e400"}}, {"base": {"loss": "NaN"}}, {"tokens": "1" * 400}):
        whole = json.loads(example().model_dump_json())
        text = json.dumps(whole)
        for number in json.dumps(change).split('"'):
            if number[:1].isdigit() or number == "NaN":
                text = text.replace('"documents": 40', f'"documents": {number}', 1)
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(NarrowError, match="is not a report"):
            reports.read_report(tmp_path)
    made = example()
    made.provenance.inputs = []
    made.speed[0].base = None
    assert reports.compare(made, example(), ("a", "b")).warnings == [
        "They come of different bases: losses are per token of each one's base and may not compare."
    ]
    (tmp_path / "report.json").write_text(made.model_dump_json())
    done = CliRunner().invoke(command, [str(tmp_path), str(tmp_path), "--html", str(tmp_path / "report.json")])
    assert (done.exit_code, "is one of the reports" in done.output) == (1, True)
    assert reports.read_report(tmp_path) == made
    (tmp_path / "report.json").unlink()
    with pytest.raises(NarrowError, match=r"There is no report\.json"):
        reports.read_report(tmp_path)
