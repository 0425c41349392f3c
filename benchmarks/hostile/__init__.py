"""Hostile devices: a fleet under attack by one of its own, measured."""

from typing import TYPE_CHECKING

from fleet_runtime.lazy import lazy_names

if TYPE_CHECKING:
    from benchmarks.hostile.command import main

__all__ = ["main"]

if not TYPE_CHECKING:
    # The attacker's process imports this package too, and none of what the benchmark needs beside.
    __getattr__, __dir__ = lazy_names(__name__, {"main": "benchmarks.hostile.command"})
