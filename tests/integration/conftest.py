"""The fixture of `live.py`."""

from live import service

__all__ = ["service"]
