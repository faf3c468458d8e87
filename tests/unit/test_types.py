"""The client as type checkers see it: its own code and what users write with it, by strict mypy and strict pyright."""

import json
import shutil
import subprocess
import sys

import pytest
from tiny import ROOT

pytestmark = pytest.mark.slow
USE = ROOT / "tests" / "typical_use.py"


def test_mypy_is_content():
    command = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", str(ROOT / "client" / "narrow_client"), str(USE)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_pyright_is_content(tmp_path):
    if not shutil.which("node"):
        pytest.skip("pyright runs in node, which is not installed here")
    config = json.dumps(
        {"include": ["client/narrow_client", "use"], "strict": ["**"], "extraPaths": ["client"], "pythonVersion": "3.11"}
    )
    for name, target in (("client", ROOT / "client"), ("use", tmp_path / "files")):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "typical_use.py").write_text(USE.read_text())
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "-p", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    if "0 errors" not in done.stdout and "error:" not in done.stdout:
        pytest.skip(f"pyright fetches itself from npm at its first run, which did not work: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stdout
    assert "No source files" not in done.stdout
