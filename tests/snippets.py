"""The code blocks of the docs, and the `narrow` that they call while they are tested.

What stands in an HTML comment before a block says what becomes of it, and is not seen by readers:

    <!-- not run: REASON -->                the block is not run
    <!-- not run, WORDS: REASON -->         of the block, lines that begin with these words are not run
    <!-- file: NAME -->                     the block is the content of this file, which is there from the beginning of the page

A page is one script of bash: its blocks run in order, in one folder, and variables stay. Run as a program this module is
`narrow`: dry, it only looks at sizes where a job would be made, and of what needs a job's result reads the command line alone.
"""

import copy
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import click
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parent.parent
RUN = ("sh", "console", "python")
"""Languages of blocks that are run. Others are shown alone: text, json without a file, ..."""
_COMMENT = re.compile(r"<!-- (not run|file)(?:, (.+?))?: (.+?) -->")
_NAMES = {"JOB": "job_...", "SWEEP": "swp_..."}


@dataclass
class Block:
    page: str
    line: int
    language: str
    text: str
    file: str = ""
    reason: str = ""
    """Why it is not run."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Why lines that begin so are not run."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> str:
        """What is run of it."""
        if self.language == "python":
            return self.text
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return "\n".join(line for line in lines if not line.startswith(tuple(self.left_out)))

    @property
    def words(self) -> list[list[str]]:
        """The words of each `narrow` command in it."""
        if self.language not in ("sh", "console"):
            return []
        lines = [line.strip() for line in self.commands.splitlines()]
        return [shlex.split(line, comments=True) for line in lines if line.startswith("narrow ")]


def pages() -> list[Path]:
    """README and what is written by hand in docs/."""
    written = [path for path in sorted((ROOT / "docs").rglob("*.md")) if not {"reference", "_build"} & set(path.parts)]
    return [ROOT / "README.md", *written]


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    said: list[re.Match[str]] = []
    for token in MarkdownIt("commonmark", {"html": True}).enable("table").parse(page.read_text()):
        if token.type == "html_block":
            said = [*said, *_COMMENT.finditer(token.content)]
        elif token.type in ("fence", "code_block"):
            language = token.info.split()[0] if token.info.strip() else "sh" if token.type == "code_block" else "text"
            block = Block(page.relative_to(ROOT).as_posix(), (token.map or [0])[0] + 1, language, token.content)
            for comment in said:
                what, begin, told = comment.groups()
                if what == "file":
                    block.file = told
                elif begin:
                    block.left_out[begin] = told
                else:
                    block.reason = told
            found.append(block)
            said = []
        elif token.type.endswith("_open"):
            said = []
    return found


def lowered(text: str) -> str:
    """With some thousand tokens to train on where there are more: enough for a model that is small as well."""
    return re.sub(r'(tokens"?:? )[0-9_]{5,}', r"\g<1>4096", text)


def script(page: list[Block], folder: Path, dry: bool, real: bool = False) -> str:
    """A page as a script for bash; writes its files. Dry, Python is only compiled; real, it has all the tokens that it says."""
    parts = ["set -eo pipefail"]
    for block in page if real else [replace(block, text=lowered(block.text)) for block in page]:
        if block.file:
            (folder / block.file).write_text(block.text)
        if block.file or block.reason or block.language not in RUN:
            continue
        where = str(block)
        parts += [f"cd {shlex.quote(str(folder))}", f"echo '@@ {where}' >&2"]
        if block.language == "python":
            path = folder / f"block-{block.line}.py"
            path.write_text(block.text)
            compile(block.text, where, "exec")
            parts.append("true" if dry else f"python {path}")
        elif dry and "$U/jobs" in block.commands:
            parts.append("true")  # it makes a job by hand
        else:
            parts.append(block.commands.replace("http://127.0.0.1:8000", "$NARROW_URL"))
    return "\n".join(parts) + "\n"


def shims(folder: Path, dry: bool) -> None:
    """`narrow` and `python` for a PATH. Dry, what needs a job's result does nothing: its command line is read by another test."""
    skip = f"case $1 in {'|'.join(NEEDS_RESULT)}) exit 0;; esac\n" if dry else ""
    for name, begin, module in (
        ("narrow", skip, shlex.quote(str(Path(__file__).resolve()))),
        ("python", "", ""),
        ("python3", "", ""),
    ):
        path = folder / name
        path.write_text(f'#!/bin/sh\n{begin}exec {shlex.quote(sys.executable)} {module} "$@"\n')
        path.chmod(0o755)


# --- As `narrow` ---

NEEDS_RESULT = ("sweep", "run", "run-model", "reproduce", "compare", "evaluate", "download", "report", "watch", "show", "serve")


def main(words: list[str]) -> None:
    from narrow_client import cli

    if os.environ.get("NARROW_DOCS") == "dry" and words[0] == "compress":
        words = [*words, "--dry-run"]
    if words[0] == "serve":
        _start_and_stop(words)
        return
    sys.argv = ["narrow", *(_real(word) for word in words)]
    cli.main()


def read(words: list[str]) -> None:
    """Reads a command line as click does and does nothing; what it names need not be there. Ends the process if it is wrong."""
    from narrow_client import cli

    command: click.Command = cli.main
    with click.Context(cli.main, info_name="narrow") as context:
        while isinstance(command, click.Group) and words:
            found = command.get_command(context, words[0])
            if found is None:
                context.fail(f"there is no command {words[0]!r}")
            command, words = found, words[1:]
        command = copy.copy(command)
        command.params = [_anywhere(parameter) for parameter in command.params]
        if "-h" not in words and "--help" not in words:
            command.make_context(command.name, list(words), parent=context).close()


def _anywhere(parameter: click.Parameter) -> click.Parameter:
    """The same, but it takes what is not there."""
    found = copy.copy(parameter)
    found.type = copy.copy(parameter.type)
    if isinstance(found.type, click.Path):
        found.type.exists = False
    elif found.name in ("base", "target", "skills"):
        found.callback = None
    return found


def _real(word: str) -> str:
    """What a placeholder stands for: the newest of its kind on the service, or a folder that is not there yet."""
    from narrow_client import Narrow

    word = _NAMES.get(word, word)
    if word == "DIR":
        numbers = [int(path.name.partition("-")[2]) for path in Path().glob("DIR-*")]
        return f"DIR-{max(numbers, default=0) + 1}"
    if word.endswith("_..."):
        with Narrow() as client:
            kinds = {"job_": client.jobs, "swp_": client.sweeps, "mdl_": client.models, "ds_": client.datasets}
            things = kinds[word.removesuffix("...")].list()
            if word == "job_...":
                return next(job.id for job in things if job.status == "succeeded")
            # A dataset that is there already is not uploaded again, so the newest may be any.
            found = list(things)
            return next((thing.id for thing in found if getattr(thing, "name", "") == "python"), found[0].id)
    return word


def _start_and_stop(words: list[str]) -> None:
    """A service as it would be started, but at a free port, and ended when it is ready."""
    command = [sys.executable, "-m", "narrow_client.cli", *words, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline() if process.stdout else ""
        process.terminate()
        if "is ready at" not in line:
            sys.exit(f"it did not start: {line}")


if __name__ == "__main__":
    main(sys.argv[1:])
