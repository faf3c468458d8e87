"""The contract: the OpenAPI document as it is committed. `python -m service.openapi > openapi.yaml` writes it."""

import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from fastapi import FastAPI


def describe(app: FastAPI) -> None:
    """Makes the document say what the handlers do: every error is a problem+json."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = original()
            for path in document["paths"].values():
                for operation in path.values():
                    for status, response in operation["responses"].items():
                        if status[0] in "45" and "HTTPValidationError" in str(response):
                            response["content"] = {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
                        content = response.get("content", {})
                        if "#/components/schemas/Problem" in str(content.get("application/json")):
                            response["content"] = {"application/problem+json": content["application/json"]}
            for unused in ("HTTPValidationError", "ValidationError"):
                document["components"]["schemas"].pop(unused, None)
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]


def document() -> str:
    """The document as YAML."""
    from service.app import create_app
    from service.settings import Settings

    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(data=Path(folder), database_url="sqlite://")
        return yaml.safe_dump(create_app(settings).openapi(), sort_keys=False, allow_unicode=True, width=120)


if __name__ == "__main__":
    sys.stdout.write(document())
