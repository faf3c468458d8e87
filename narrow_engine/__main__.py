"""`python -m narrow_engine SPEC.json --out DIR`: a run as a process of its own. The service's worker starts it."""

from narrow_engine.cli import run

run()
