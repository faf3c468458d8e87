"""Writes narrow_client/models.py from the service's contract: python client/generate.py [OUT]"""

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


def generate(out: Path) -> None:
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


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "narrow_client" / "models.py")
