"""Both distributions as wheels: what is in them, and that what is installed from them works away from the checkout."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest
import yaml
from tiny import ROOT

PACKAGES = {"narrow": ("narrow_engine/", "service/"), "narrow_client": ("client/narrow_client/",)}


def project(folder):
    return tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]


def tracked():
    """The files that git has, of those that are there."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    return [name for name in listed if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """By the name of the distribution; built of what git would give, without what lies around."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    for name in tracked():
        if name.startswith(("client/", "narrow_engine/", "service/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--disable-pip-version-check", "-w", str(out)]
    subprocess.run([*build, "./client", "."], cwd=source, check=True)
    return {path.name.split("-")[0]: path for path in out.glob("*.whl")}


def test_every_file_of_a_package_is_in_its_wheel(wheels):
    for name, folders in PACKAGES.items():
        inside = set(zipfile.ZipFile(wheels[name]).namelist())
        wanted = {n.removeprefix("client/") for n in tracked() if n.startswith(folders)}
        assert wanted <= inside, sorted(wanted - inside)
        assert (
            not {n.split("/")[0] for n in inside}
            - {"narrow_engine", "service", "narrow_client"}
            - {n.split("/")[0] for n in inside if ".dist-info/" in n}
        ), "nothing else is installed"


def test_versions_agree():
    version = project(".")["version"]
    assert project("client")["version"] == version
    assert f"narrow-client=={version}" in project(".")["dependencies"], "they speak of the same API"
    assert yaml.safe_load((ROOT / "openapi.yaml").read_text())["info"]["version"] == version
    heads = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert heads[0] == "Unreleased"


@pytest.mark.slow
def test_the_client_alone_works_in_a_clean_environment(wheels, tmp_path):
    """No torch, no service: the command says what takes the whole, and the package is typed."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "NARROW"))}
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    bin = tmp_path / "venv" / "bin"
    pip = [str(bin / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, str(wheels["narrow_client"])], check=True, env=environment)

    def run(*command):
        return subprocess.run(
            [str(bin / command[0]), *command[1:]], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    assert project("client")["version"] in run("narrow", "--version").stdout
    assert "compress" in run("narrow", "--help").stdout
    whole = run("narrow", "serve")
    assert whole.returncode == 2
    assert "pip install narrow" in whole.stderr
    code = "import importlib.resources as r, narrow_client as n; n.Narrow(); print((r.files(n) / 'py.typed').is_file())"
    assert run("python", "-c", code).stdout.strip() == "True"
