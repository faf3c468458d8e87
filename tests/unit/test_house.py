"""The map of the code names every module, once, and nothing that is gone."""

import re

from tiny import ROOT

MAP = (ROOT / "docs" / "explanation" / "architecture.md").read_text()
HEADS = {"narrow_engine": "The engine", "service": "The service", "client/narrow_client": "The client"}


def test_every_module_is_in_the_map():
    for folder, head in HEADS.items():
        part = MAP.split(f"## {head}\n")[1].split("\n## ")[0]
        named = re.findall(r"`([\w/]+(?:\.py|/))`", part)
        for name in named:
            assert (ROOT / folder / name).exists(), f"{name} is gone"
        for path in (ROOT / folder).glob("*"):
            if path.name.startswith("__") or not (path.suffix == ".py" or (path / "__init__.py").exists()):
                continue
            inside = f"{path.name}/" if path.is_dir() else path.name
            assert any(name.startswith(inside) for name in named), f"{path.name} is not in the map"
