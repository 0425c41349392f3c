"""Faults of every kind in a fleet that writes: what becomes of texts and session log, and how soon they go on."""

from typing import TYPE_CHECKING

from fleet_runtime.lazy import lazy_names

if TYPE_CHECKING:
    from benchmarks.faults.command import main

__all__ = ["main"]

if not TYPE_CHECKING:
    # The writer's process imports this package too, and none of what the benchmark needs beside.
    __getattr__, __dir__ = lazy_names(__name__, {"main": "benchmarks.faults.command"})
