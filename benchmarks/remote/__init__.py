"""Inference servers under an edge: whether texts are exactly theirs, and what a step takes."""

from benchmarks.remote.command import main

__all__ = ["main"]
