"""The contract: the OpenAPI document as it is committed. `python -m service.openapi > openapi.yaml` writes it."""

import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from fastapi import FastAPI

from service.problems import MEDIA_TYPE, TITLES

_PROBLEM = {"$ref": "#/components/schemas/Problem"}


def describe(app: FastAPI) -> None:
    """Makes the document say what the handlers do: every error is a problem+json."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = original()
            for path in document["paths"].values():
                for operation in path.values():
                    if not app.state.keys_needed and "security" in operation:
                        operation["security"].append({})
                    if "requestBody" in operation:
                        # What FastAPI says to bytes that are neither JSON nor a form.
                        operation["responses"]["400"] = {
                            "description": TITLES[400],
                            "content": {MEDIA_TYPE: {"schema": _PROBLEM}},
                        }
                    for status, response in operation["responses"].items():
                        if status[0] in "45" and "HTTPValidationError" in str(response):
                            response["content"] = {"application/json": {"schema": _PROBLEM}}
                        content = response.get("content", {})
                        if "#/components/schemas/Problem" in str(content.get("application/json")):
                            response["content"] = {MEDIA_TYPE: content["application/json"]}
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
        return yaml.safe_dump(create_app(settings, keys_needed=True).openapi(), sort_keys=False, allow_unicode=True, width=120)


if __name__ == "__main__":
    sys.stdout.write(document())
