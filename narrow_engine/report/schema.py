"""The JSON Schema of report.json, for whoever reads reports without Narrow: `python -m narrow_engine.report.schema`."""

import json
import sys

from narrow_engine.report.model import Report

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema() -> str:
    found = {"$schema": DIALECT, **Report.model_json_schema(mode="serialization"), "title": "Narrow report"}
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(schema())
