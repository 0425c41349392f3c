"""Offline benchmark: what becomes of texts whose edge is pulled away in mid-answer, under each policy."""

from typing import TYPE_CHECKING

from fleet_runtime.lazy import lazy_names

if TYPE_CHECKING:
    from benchmarks.offline.command import main

__all__ = ["main"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, {"main": "benchmarks.offline.command"})
