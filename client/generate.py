"""Writes what of narrow_client is not written by hand: python client/generate.py

models.py is made from the service's contract, and _sync.py from _async.py, by taking out what has to do with asyncio.
"""

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
OPTIONS = """
    --input-file-type openapi --openapi-scopes schemas --output-model-type pydantic_v2.BaseModel --target-python-version 3.11
    --use-standard-collections --use-union-operator --use-annotated --collapse-root-models --use-schema-description
    --field-constraints --enum-field-as-literal all --use-double-quotes --disable-timestamp --formatters builtin
    --disable-future-imports
    --base-class narrow_client._base.Resource
"""


CLIENT = HERE / "narrow_client"
WITHOUT_ASYNCIO = (
    (r"^import asyncio\n", ""),
    ("asyncio.sleep", "time.sleep"),
    (r"asyncio\.to_thread\((\S+?), ", r"\1("),
    ("client of one service, for asyncio: `Narrow` with `await`", "client of one service"),
    (r"\basync (?=def|for|with)", ""),
    (r"\bawait ", ""),
    (r"\bAsync(?=[A-Z])", ""),
    (r"\b__a(?=enter|exit)", "__"),
    (r"\baclose\b", "close"),
    ("  # noqa: ASYNC109", ""),
    (r'\A""".*?"""', '"""`Narrow`: the client without asyncio. client/generate.py makes this file of _async.py."""'),
)
"""Patterns and what takes their place, one after the other."""


def models(out: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "datamodel_code_generator",
        "--input",
        str(HERE.parent / "openapi.yaml"),
        "--output",
        str(out),
    ]
    subprocess.run([*command, *OPTIONS.split()], check=True)


def sync(out: Path) -> None:
    text = without_parentheses((CLIENT / "_async.py").read_text())
    for pattern, instead in WITHOUT_ASYNCIO:
        text = re.sub(pattern, instead, text, flags=re.MULTILINE)
    out.write_text(text)
    subprocess.run([sys.executable, "-m", "ruff", "check", "--quiet", "--select", "I,F401", "--fix", str(out)], check=True)
    subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", str(out)], check=True)


def without_parentheses(text: str) -> str:
    """`(await a(b)).c` as `await a(b).c`."""
    while found := re.search(r"(?<!\w)\(await ", text):
        depth, start, end = 1, found.start(), found.start()
        while depth:
            end += 1
            depth += {"(": 1, ")": -1}.get(text[end], 0)
        text = text[:start] + text[start + 1 : end] + text[end + 1 :]
    return text


if __name__ == "__main__":
    models(CLIENT / "models.py")
    sync(CLIENT / "_sync.py")
