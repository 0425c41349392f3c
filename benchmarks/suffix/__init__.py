"""Suffix benchmark: texts that repeat themselves, and texts that do not, with and without drafts from earlier text."""

from benchmarks.suffix.command import main

__all__ = ["main"]
