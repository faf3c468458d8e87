"""What a job's process wrote is bounded and checked: tests/integration/test_told.py has what becomes of the job."""

import json
import os

import pytest
from test_report import example

from service import told


@pytest.mark.parametrize(
    "content", [b"{}", b"[" * 10**6, b"\xff", json.dumps({"target": 5}).encode(), b'{"target": "' + b"a" * 2**25 + b'"}']
)
def test_report_that_is_none_makes_no_figures(tmp_path, content):
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(told.Unfit, match=r"report\.json"):
        told.outcome_of(tmp_path / "report.json")


def test_report_whose_figures_cannot_be_drawn_makes_none(tmp_path):
    path, report = tmp_path / "report.json", example().model_dump(mode="json")
    path.write_text(json.dumps(report))
    assert told.outcome_of(path)["parameters"] == report["after"]["parameters"]
    for loss in (10**400, float("inf"), float("nan"), -(10**18)):
        report["skills"][report["target"]]["recovered"]["loss"] = loss
        path.write_text(json.dumps(report))
        with pytest.raises(told.Unfit):
            told.outcome_of(path)
    os.truncate(path, 2**36)
    with pytest.raises(told.Unfit, match="MiB"):
        told.outcome_of(path)
