"""The parsers that are ours, for a while each under coverage-guided fuzzing (`make fuzz` for long)."""

import subprocess
import sys

import pytest
from tiny import ROOT

FUZZ = ROOT / "tests" / "fuzz.py"
PARSERS = (
    *("header", "config", "rows", "zipped_rows", "zstandard_rows", "table", "text"),
    *("job", "name", "metadata", "checksum", "ranges"),
)


def test_every_parser_is_known_by_name():
    pytest.importorskip("atheris", reason="fuzzing takes atheris, which is for Linux")
    told = subprocess.run([sys.executable, FUZZ, "--list"], capture_output=True, text=True, check=True).stdout
    assert set(told.split()) == set(PARSERS)


@pytest.mark.slow
@pytest.mark.parametrize("parser", PARSERS)
def test_a_parser_answers_whatever_comes(tmp_path, parser):
    pytest.importorskip("atheris", reason="fuzzing takes atheris, which is for Linux")
    command = [sys.executable, FUZZ, parser, "-max_total_time=20", "-seed=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Done" in done.stderr
