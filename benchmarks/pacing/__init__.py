"""Pacing: chosen plans beside every fixed one, the edge's own writing among them."""

from typing import TYPE_CHECKING

from fleet_runtime.lazy import lazy_names

if TYPE_CHECKING:
    from benchmarks.pacing.command import main

__all__ = ["main"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, {"main": "benchmarks.pacing.command"})
