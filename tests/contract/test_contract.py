"""What was promised stays: the OpenAPI document, the client's models, the direction of imports, a start without torch."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml
from narrow_client._render import WORDS
from tiny import ROOT

from narrow_engine.families import FAMILIES
from narrow_engine.pipeline import LINE
from narrow_engine.report.page import STAGES
from service.api.schemas import Phase
from service.openapi import document


def test_the_committed_contract_is_the_apps():
    assert (ROOT / "openapi.yaml").read_text() == document(), "run `make openapi` and look at the difference"


def test_what_of_the_client_is_generated_is_up_to_date(tmp_path):
    spec = importlib.util.spec_from_file_location("generate", ROOT / "client" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for made, name in ((generate.models, "models.py"), (generate.sync, "_sync.py")):
        made(tmp_path / name)
        assert (tmp_path / name).read_text() == (generate.CLIENT / name).read_text()


def test_a_job_can_be_in_every_stage():
    assert set(get_args(Phase)) == {"", *(stage.name for stage in LINE)}
    assert set(WORDS) == {stage.name for stage in LINE}, "and the terminal has words for it"
    assert set(STAGES) | {"report"} == {stage.name for stage in LINE}, "and the page its place"


def test_every_error_is_a_documented_problem():
    paths = yaml.safe_load((ROOT / "openapi.yaml").read_text())["paths"]
    for path, operations in paths.items():
        for name, operation in operations.items():
            for status, response in operation["responses"].items():
                if status[0] in "45" and path != "/readyz":
                    assert list(response["content"]) == ["application/problem+json"], f"{name} {path} {status}"


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


ENGINE_FOR_THE_SERVICE = {
    f"narrow_engine.{name}"
    for name in (
        "spec",
        "families",
        "footprint",
        "sizing",
        "errors",
        "events",
        "documents",
        "model_files",
        "processors",
        "report",
        "sandbox",
        "shelf",
    )
}


@pytest.mark.parametrize("file", sorted((ROOT / "client" / "narrow_client").rglob("*.py")), ids=lambda p: p.name)
def test_the_client_imports_neither_of_the_others(file):
    assert not {name for name in imported(file) if name.split(".")[0] in ("narrow_engine", "service", "torch")}


@pytest.mark.parametrize("file", sorted((ROOT / "narrow_engine").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_engine_imports_neither_of_the_others(file):
    assert not {name for name in imported(file) if name.split(".")[0] in ("narrow_client", "service")}


@pytest.mark.parametrize("file", sorted((ROOT / "service").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_service_imports_only_the_engine_without_torch(file):
    for name in imported(file):
        top = name.split(".")[0]
        assert top not in ("narrow_client", "torch", "transformers")
        if top == "narrow_engine" and name != "narrow_engine":
            assert ".".join(name.split(".")[:2]) in ENGINE_FOR_THE_SERVICE, name


@pytest.mark.parametrize("module", ["service.app", "service.server", "service.worker", "narrow_client.cli", "narrow_engine.cli"])
def test_starting_imports_no_torch(module):
    code = f"import sys, {module}; sys.exit(bool({{'torch', 'transformers', 'matplotlib', 'onnx'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_docs_name_every_family_and_no_other():
    section = (ROOT / "docs" / "reference" / "what-it-takes.md").read_text().split("## Text")[0].split("All can")[0]
    assert re.findall(r"`(\w+)`", section.split("types:")[1]) == sorted(FAMILIES)
