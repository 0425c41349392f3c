"""Fenced device: what the messages of a device that is shut out cost the edge."""

from typing import TYPE_CHECKING

from fleet_runtime.lazy import lazy_names

if TYPE_CHECKING:
    from benchmarks.fenced.command import main

__all__ = ["main"]

if not TYPE_CHECKING:
    # The reader's process imports this package too, and none of what the benchmark needs beside.
    __getattr__, __dir__ = lazy_names(__name__, {"main": "benchmarks.fenced.command"})
