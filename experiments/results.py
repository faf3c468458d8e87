"""What an experiment's command and its result.json have in common with the others'."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch


def begin(doc: str | None) -> bool:
    """Reads the command line and settles on one thread; returns whether only the figure and the table are wanted."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--draw", action="store_true", help="the figure and the table again, from result.json")
    torch.set_num_threads(1)
    return bool(parser.parse_args().draw)


def pyplot() -> Any:
    """Matplotlib, for figures that are the same bytes from the same numbers. Only who draws waits for it to come."""
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": "narrow"})
    return pyplot


def read(path: Path) -> list[dict[str, Any]]:
    """The points that are done."""
    found: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return found


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """A line a point."""
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
