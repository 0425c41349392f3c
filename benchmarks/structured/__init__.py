"""Structured: texts that keep to a JSON schema, beside free ones."""

from typing import TYPE_CHECKING

from fleet_runtime.lazy import lazy_names

if TYPE_CHECKING:
    from benchmarks.structured.command import main

__all__ = ["main"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, {"main": "benchmarks.structured.command"})
