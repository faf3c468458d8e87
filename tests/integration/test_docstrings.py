"""The examples in the client's docstrings, as a reader would type them, against a real service; and that all have one."""

import ast
import asyncio
import doctest
import inspect
import re
from contextlib import redirect_stdout
from io import StringIO

import narrow_client
import pytest
from live import running
from narrow_client import _async, _sync

QUICK = {"calibration_tokens": 512, "recover": {"tokens": 512, "batch_tokens": 256}}
SMALL = {"block_tokens": 64, "skill_tokens": 1024, "export": ["safetensors"], "controls": []}
CLASSES = ["", "Jobs", "Sweeps", "Models", "Datasets", "Keys"]


def public(kind):
    """The public methods of a class, and the class itself, by name."""
    found = {kind.__name__: kind}
    for name, member in vars(kind).items():
        if not name.startswith("_"):
            found[f"{kind.__name__}.{name}"] = member.fget if isinstance(member, property) else member
    return found


SYNC = {name: f for kind in CLASSES for name, f in public(getattr(_sync, kind or "Narrow")).items()}
ASYNC = {name: f for kind in CLASSES for name, f in public(getattr(_async, f"Async{kind or 'Narrow'}")).items()}
GROUPS = {"Jobs", "Sweeps", "Models", "Datasets", "Keys"}
DOCUMENTED = {name: f for name, f in {**SYNC, **ASYNC}.items() if name.removeprefix("Async") not in GROUPS}
COMPRESS = {"compress": narrow_client.compress, "compress_async": narrow_client.compress_async}


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_folder, python_file):
    """What the examples name: a service that has made one job, and takes others but works on none."""
    data, out = tmp_path_factory.mktemp("docstrings") / "data", tmp_path_factory.mktemp("out")
    known = {
        "base": tiny_folder,
        "target": python_file,
        "folder": tiny_folder,
        "file": python_file,
        "quick": QUICK,
        "small": SMALL,
    }
    known |= {"narrow_client": narrow_client, "out": out}
    with pytest.MonkeyPatch.context() as patch:
        with running(data) as service:
            patch.setenv("NARROW_URL", service.url)
            check(narrow_client.compress, known)
        with running(data, workers=0) as service:
            patch.setenv("NARROW_URL", service.url)
            with narrow_client.Narrow() as client:
                (job,) = client.jobs.list()
                known |= {"job": job, "model": client.models.get(job.spec.base.model)}
                known |= {"dataset": client.datasets.get(job.spec.target.dataset)}
                known["spec"] = job.spec.model_dump(mode="json", exclude_none=True)
                yield known


def check(function, known):
    """Runs a docstring's example, with `await` where it stands, and compares what it prints."""
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(function))
    assert examples, function

    async def run(globs):
        for example in examples:
            said = StringIO()
            code = compile(example.source, "<docstring>", "single", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            with redirect_stdout(said):
                made = eval(code, globs)
                if inspect.isawaitable(made):
                    await made
            assert doctest.OutputChecker().check_output(example.want, said.getvalue(), 0), (example.source, said.getvalue())

    asyncio.run(run(dict(known)))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name.startswith("Async") else name for name in DOCUMENTED]
)
def test_examples_in_docstrings_do_what_they_say(world, name):
    function = DOCUMENTED[name]
    with narrow_client.Narrow() as maker:
        known = {**world, "client": narrow_client.AsyncNarrow() if name.startswith("Async") else maker}
        if re.search(r"\bkey\.", inspect.getdoc(function)):
            known["key"] = maker.keys.create("example")
        if re.search(r"\bsweep\.", inspect.getdoc(function)):
            inputs = {part: world["spec"][part] for part in ("base", "target")}
            known["sweep"] = maker.sweeps.create({**inputs, "budgets": [{"parameters": 0.9}]})
        check(function, known)


@pytest.mark.slow
def test_the_example_of_compress_async_does_what_it_says(world, tmp_path):
    with running(tmp_path / "data") as service, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NARROW_URL", service.url)
        check(narrow_client.compress_async, world)


def test_every_public_method_says_what_it_takes_returns_and_raises():
    for name, function in {**DOCUMENTED, **COMPRESS}.items():
        text = inspect.getdoc(function)
        assert "\nExamples:\n" in text, name
        signature = inspect.signature(function)
        taken = [p for p in signature.parameters if p != "self"]
        if taken and not name.startswith("compress_"):
            listed = re.search(r"\nArgs:\n((?:    .*\n|\n)+)", text)[1]
            assert re.findall(r"^    (\w+):", listed, re.MULTILINE) == taken, name
        if inspect.isfunction(function) and signature.return_annotation not in (None, "None", str):
            assert "\nReturns:\n" in text or not taken, name


def test_the_twins_are_twins():
    one, other = (inspect.signature(f).parameters.values() for f in (narrow_client.compress, narrow_client.compress_async))
    assert [(p.name, p.default, p.kind) for p in one] == [(p.name, p.default, p.kind) for p in other]
