"""What the files for compose and Kubernetes say exists: settings, options, paths, versions."""

import re

import pytest
import yaml
from tiny import ROOT

from service.cli import serve
from service.settings import Settings

FILES = [ROOT / "compose.yaml", *sorted((ROOT / "deploy").rglob("*.yaml"))]
TEXT = {path.relative_to(ROOT).as_posix(): path.read_text() for path in FILES}
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def containers(node):
    """All that has a command or an environment, at any depth."""
    if isinstance(node, dict):
        if "command" in node or "env" in node or "environment" in node:
            yield node
        for value in node.values():
            yield from containers(value)
    elif isinstance(node, list):
        for value in node:
            yield from containers(value)


@pytest.mark.parametrize("name", TEXT)
def test_what_it_says_exists(name):
    options = {option for parameter in serve.params for option in parameter.opts}
    openapi = yaml.safe_load((ROOT / "openapi.yaml").read_text())
    for document in yaml.safe_load_all(TEXT[name]):
        for container in containers(document):
            command = container.get("command") or []
            if command[:1] == ["narrow"]:
                assert command[1] == "serve"
                assert {word for word in command if word.startswith("--")} <= options
    for variable in re.findall(r"NARROW_[A-Z_]+", re.sub(r"\$\{[^}]*\}", "", TEXT[name])):
        assert variable.removeprefix("NARROW_").lower() in Settings.model_fields, variable
    for path in re.findall(r"path: (/\w+)", TEXT[name]):
        assert path in openapi["paths"]
    for argument in re.findall(r"args: \{(\w+):", TEXT[name]):
        assert f"ARG {argument}=" in DOCKERFILE


def test_what_compose_asks_for_is_in_the_example():
    asked = set(re.findall(r"\$\{(\w+)", TEXT["compose.yaml"]))
    given = set(re.findall(r"^(\w+)=", (ROOT / "deploy" / "example.env").read_text(), flags=re.M))
    assert asked == given


def test_nodes_and_head_run_the_ray_of_the_image():
    cluster = yaml.safe_load(TEXT["deploy/kubernetes/raycluster.yaml"])
    assert cluster["spec"]["rayVersion"] == re.search(r"ARG RAY_VERSION=(\S+)", DOCKERFILE).group(1)
    assert cluster["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    api = next(d for d in yaml.safe_load_all(TEXT["deploy/kubernetes/narrow.yaml"]) if d["kind"] == "Deployment")
    environment = {e["name"]: e for e in api["spec"]["template"]["spec"]["containers"][0]["env"]}
    name = cluster["metadata"]["name"]
    assert environment["NARROW_RAY_URL"]["value"] == f"http://{name}-head-svc:8265"
    assert environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": name, "key": "auth_token"}
    drain = Settings.model_fields["drain_seconds"].default
    for group in cluster["spec"]["workerGroupSpecs"]:
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] > drain
