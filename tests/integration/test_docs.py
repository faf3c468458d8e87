"""The docs: every block runs, every link leads somewhere, every command, option and variable that is named exists.

Fast, pages run dry: what would make a job only looks at its size, and what needs a job's result is left out, but for its command
line. Slow, pages that make jobs do it, on a tiny model, and the tutorial on the embedded one.
"""

import gzip
import json
import os
import re
import subprocess
import sys
from itertools import pairwise

import pytest
import snippets
from live import running
from markdown_it import MarkdownIt
from narrow_client._sweep import read_sweep
from snippets import ROOT
from tiny import documents, tiny_model, write_jsonl

from narrow_engine.cli import read_spec

PAGES = {page.relative_to(ROOT).as_posix(): snippets.blocks(page) for page in snippets.pages()}
TUTORIAL = "docs/tutorial.md"
WITH_BLOCKS = [name for name, blocks in PAGES.items() if any(not b.reason and b.language in snippets.RUN for b in blocks)]
JOBS = re.compile(r"^narrow (compress(?!.*--dry-run)|sweep|run) |compress\(|jobs\.create|/jobs ", re.MULTILINE)
WITH_JOBS = [name for name in WITH_BLOCKS if any(JOBS.search(block.commands) for block in PAGES[name] if not block.reason)]
MARKDOWN = subprocess.check_output(["git", "ls-files", "*.md"], cwd=ROOT, text=True).splitlines()
DOMAINS = ("python", "c", "german", "math", "medical")
OTHERS = {"NARROW_URL", "NARROW_API_KEY", "NARROW_HUB_TOKEN", "NARROW_PORT", "NARROW_TEST_DATABASE"}
"""Variables that are no settings of the service: the client's, those of compose.yaml and of the tests."""


@pytest.fixture(scope="module")
def things(tmp_path_factory, tokenizer_file):
    """What the docs take to be there: a base, data by the names of the demo, and files of one's own."""
    folder = tmp_path_factory.mktemp("things")
    for base in (folder / "base", folder / "demo" / "base"):
        # Wide, so that a quarter of it is still a model.
        tiny_model("llama", initializer_range=0.1, num_hidden_layers=4, intermediate_size=512).save_pretrained(base)
        (base / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    (folder / "demo" / "data").mkdir()
    for domain in DOMAINS:
        path = write_jsonl(folder / f"{domain}.jsonl", documents(domain, 40))
        (folder / "demo" / "data" / f"{domain}.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    rows = [{"question": f"{n} + {n} = ", "answer": f"{2 * n}"} for n in range(60)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory, things):
    with running(tmp_path_factory.mktemp("docs") / "data", NARROW_MAX_DATASET_BYTES="10000000") as found:
        found.upload_model(things / "base")
        found.upload_dataset(things / "python.jsonl")
        yield found


def run(name, folder, server, dry=False, real=False):
    """A page's blocks, in order, in a folder."""
    (folder / "bin").mkdir()
    snippets.shims(folder / "bin", dry)
    (folder / "page.sh").write_text(snippets.script(PAGES[name], folder, dry, real))
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("NARROW_")},
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "client")]),
        "NARROW_URL": server.url,
        "NARROW_DATA": str(server.data),
        "NARROW_DOCS": "dry" if dry else "",
    }
    done = subprocess.run(
        ["bash", "page.sh"], cwd=folder, env=environment, capture_output=True, text=True, timeout=3000, check=False
    )
    told = f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    assert done.returncode == 0, f"the last block that began is the one that fails:\n{told}"


def link(folder, things):
    for path in things.iterdir():
        (folder / path.name).symlink_to(path)
    # README's two reports: of the job in Python and of its first `narrow run`.
    (folder / "A").symlink_to("narrow-python")
    (folder / "B").symlink_to("DIR-1/result")


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_a_page_dry(name, tmp_path, server, things):
    link(tmp_path, things)
    run(name, tmp_path, server, dry=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [name for name in WITH_JOBS if name != TUTORIAL])
def test_a_page(name, tmp_path, server, things):
    link(tmp_path, things)
    run(name, tmp_path, server)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_tutorial_at_its_real_size(tmp_path, server):
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    run(TUTORIAL, tmp_path, server, real=True)


@pytest.mark.slow
def test_events_hold_what_the_reference_says(server):
    """Of all jobs that the pages before have made."""
    from narrow_engine.events import DATA

    jobs = server.http.get("/jobs", params={"limit": 100}).json()["data"]
    if not jobs:
        pytest.skip("no page has made a job in this process")
    for job in jobs:
        for event in server.events(job["id"]):
            assert event["data"].keys() <= DATA[event["kind"]].keys(), event


def test_what_is_not_run_has_a_reason():
    left_out = [block for blocks in PAGES.values() for block in blocks if block.reason or block.left_out]
    every = [block for blocks in PAGES.values() for block in blocks if block.language in snippets.RUN]
    told = [f"  {block.page}:{block.line}: {block.reason or block.left_out}\n" for block in left_out]
    sys.stdout.write(f"{len(left_out)} of {len(every)} blocks are not run, or not all of them:\n{''.join(told)}")
    assert len(left_out) < len(every) / 2
    lost = [f"{b.page}:{b.line}" for bs in PAGES.values() for b in bs if b.language == "json" and not b.file and not b.reason]
    assert not lost, "JSON that is in no file is in no test"


@pytest.mark.parametrize("block", [b for blocks in PAGES.values() for b in blocks if b.language == "json" and b.file], ids=str)
def test_every_spec_is_one(block, things):
    path = things / block.file
    path.write_text(block.text)
    (read_sweep if "methods" in json.loads(block.text) else read_spec)(path)


@pytest.mark.parametrize("name", PAGES)
def test_every_command_and_option_exists(name):
    """Also those of blocks that are not run, and those within sentences."""
    for block in PAGES[name]:
        for words in block.words:
            snippets.read(words[1:])
    page = (ROOT / name).read_text()
    for told in re.findall(r"`narrow ([a-z-]+[^`]*)`", page):
        exists(told.split())
    for variable in re.findall(r"NARROW_[A-Z0-9_]*[A-Z0-9]", page):
        from service.settings import Settings

        assert variable in OTHERS or variable.removeprefix("NARROW_").lower() in Settings.model_fields, variable


def exists(words):
    """That there is such a command, with such options; what is between them may be anything."""
    import click
    from narrow_client import cli

    command = cli.main
    with click.Context(cli.main, info_name="narrow") as context:
        while isinstance(command, click.Group) and words and re.fullmatch("[a-z-]+", words[0]):
            found = command.get_command(context, words[0])
            assert found is not None, f"there is no command {words[0]!r}"
            command, words = found, words[1:]
        options = {name for parameter in command.get_params(context) for name in (*parameter.opts, "--help")}
    for word in words:
        assert not word.startswith("--") or word.partition("=")[0].rstrip(".,") in options, word


@pytest.mark.parametrize("name", MARKDOWN)
def test_every_link_leads_somewhere(name):
    path = ROOT / name
    for href in links(path):
        if re.match(r"[a-z]+:", href):
            continue
        place, _, anchor = href.partition("#")
        target = (path.parent / place).resolve() if place else path
        assert target.exists(), href
        if anchor:
            assert anchor in anchors(target), href


def tokens(path):
    return MarkdownIt("commonmark", {"html": True}).enable("table").parse(path.read_text())


def links(path):
    for token in tokens(path):
        for inner in token.children or []:
            yield from (str(value) for key, value in inner.attrs.items() if key in ("href", "src"))


def anchors(path):
    """Of headings, as GitHub and MyST make them."""
    found = []
    everything = tokens(path)
    for opening, inline in pairwise(everything):
        if opening.type == "heading_open":
            text = "".join(part.content for part in inline.children or [] if part.type in ("text", "code_inline"))
            slug = "".join(c for c in text.lower().replace(" ", "-") if c.isalnum() or c in "-_")
            count = sum(re.fullmatch(re.escape(slug) + r"(-\d+)?", other) is not None for other in found)
            found.append(f"{slug}-{count}" if count else slug)
    return found


def test_the_reference_is_as_the_code_has_it():
    subprocess.run([sys.executable, str(ROOT / "docs" / "generate.py"), "--check"], check=True, timeout=60)
