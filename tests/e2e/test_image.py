"""The Dockerfile's steps in a clean virtual environment: what is installed from the files it copies is enough to serve."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from tiny import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_every_file_that_is_copied_exists_and_is_not_ignored():
    ignored = (ROOT / ".dockerignore").read_text()
    for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, flags=re.M):
        for name in line.split()[:-1]:
            assert (ROOT / name).exists(), name
            assert f"!{name}" in ignored, name


def test_it_runs_as_a_user_with_a_health_check():
    final = DOCKERFILE.split("FROM ")[-1]
    assert re.search(r"^USER (?!root)", final, flags=re.M)
    assert "HEALTHCHECK" in final
    assert "/readyz" in final


def test_the_image_has_what_runs_and_no_tools():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    names = {line.split("==")[0].lower() for line in lines}
    assert not names & {"pytest", "ruff", "mypy", "hypothesis", "swift", "playwright", "sphinx", "torch"}
    assert {"fastapi", "transformers", "onnxruntime", "sqlmodel", "click", "pyarrow", "zstandard"} <= names
    assert "-r requirements.lock" in DOCKERFILE


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_installed_service_serves(tmp_path):
    """Installs as the image does, from a copy of the copied files alone, and starts it outside of the checkout."""
    for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, flags=re.M):
        for name in line.split()[:-1]:
            source, target = ROOT / name, tmp_path / "src" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    venv, pip = tmp_path / "venv", [str(tmp_path / "venv" / "bin" / "python"), "-m", "pip", "install", "-q"]
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    subprocess.run([*pip, "torch==2.13.0"], check=True)
    subprocess.run([*pip, "-r", str(tmp_path / "src" / "requirements.lock")], check=True)
    subprocess.run([*pip, "--no-deps", str(tmp_path / "src" / "client"), str(tmp_path / "src")], check=True)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    server = subprocess.Popen(
        [str(venv / "bin" / "narrow"), "serve", "--port", "0", "--data", str(tmp_path / "data"), "--workers", "1", "--json"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        url = json.loads(server.stdout.readline())["url"]
        environment["NARROW_URL"] = url
        subprocess.run([str(venv / "bin" / "narrow"), "doctor"], env=environment, check=True)
        subprocess.run([str(venv / "bin" / "python"), "-m", "narrow_engine", "--help"], cwd=tmp_path, env=environment, check=True)
        templates = [
            str(venv / "bin" / "python"),
            "-c",
            "import narrow_engine.report.page as p; p.Path(p.__file__).with_name('page.html').read_text()",
        ]
        subprocess.run(templates, cwd=tmp_path, env=environment, check=True)
    finally:
        server.terminate()
        assert server.wait(60) == 0
