"""Capacity: how many devices an edge holds at a service level, by this system and by what else there is."""

from typing import TYPE_CHECKING

from fleet_runtime.lazy import lazy_names

if TYPE_CHECKING:
    from benchmarks.capacity.command import main

__all__ = ["main"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, {"main": "benchmarks.capacity.command"})
