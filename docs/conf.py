"""The site: `make docs`. Its source is the whole repository, so that a link leads to the same place there and on GitHub."""

from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes

project = "Narrow"
author = copyright = "the authors of Narrow"
extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "experiments/*/README.md",
    "demo/recipe/README.md",
    "README.md",
    "SECURITY.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
]
exclude_patterns = ["docs/_build", ".venv", "**/out"]
myst_enable_extensions = ["alert"]  # GitHub's notes: > [!WARNING]
myst_heading_anchors = 4
nitpicky = True
smartquotes = False  # what looks like code is to be copied
html_theme = "furo"
html_title = "Narrow"
html_static_path = ["_static"]
html_css_files = ["narrow.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"top_of_page_buttons": []}
pygments_style = "friendly"
pygments_dark_style = "monokai"

# Not in index.md, which is read on GitHub as well.
CHAPTERS = {
    "Tutorial": ["tutorial"],
    "How-to": ["how-to/your-own-*", "how-to/choose-*", "how-to/formats", "how-to/run-the-result", "how-to/unlearn", "how-to/*"],
    "Reference": ["reference/spec", "reference/api", "reference/problems", "reference/events", "reference/report", "reference/*"],
    "Explanation": ["how-it-works", "explanation/*"],
    "Experiments": ["../experiments/README", "../experiments/*/README", "../demo/recipe/README"],
    "Decisions": ["decisions/README", "decisions/*"],
    "Project": ["../README", "../bench/README", "../CONTRIBUTING", "../SECURITY", "../CHANGELOG"],
}


def _contents(app: Any, page: str, source: list[str]) -> None:
    """The tree of pages, where the index ends."""
    if page == root_doc:
        for caption, places in CHAPTERS.items():
            source[0] += f"\n```{{toctree}}\n:hidden:\n:glob:\n:caption: {caption}\n\n" + "\n".join(places) + "\n```\n"


def _folders(app: Any, page: nodes.document) -> None:
    """A link to a folder, which GitHub shows and a site does not, is shown as its text. That it leads somewhere is tested."""
    for link in list(page.findall(addnodes.pending_xref)):
        if (Path(page["source"]).parent / link["reftarget"]).is_dir():
            link.replace_self(nodes.inline("", "", *(child.deepcopy() for child in link.children)))


def _index(app: Any, failure: Exception | None) -> None:
    """The site begins at index.html, wherever its first page lies."""
    if failure is None and app.builder.format == "html":
        refresh = '<meta http-equiv="refresh" content="0; url=docs/index.html">'
        page = f'<!doctype html><meta charset="utf-8"><title>Narrow</title>{refresh}\n'
        (Path(app.outdir) / "index.html").write_text(page)


def setup(app: Any) -> dict[str, bool]:
    app.connect("source-read", _contents)
    app.connect("doctree-read", _folders)
    app.connect("build-finished", _index)
    return {"parallel_read_safe": True}
