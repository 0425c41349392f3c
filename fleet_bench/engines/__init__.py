"""Engines benchmark: a step of each verifier beside the raw engine under it.

    fleet bench engines [--quick] [--json FILE]

For B sequences with T new tokens each, some tokens into them: our step, and what it cannot be faster than. Of
llama.cpp that is the library itself, on the same batch, in a process of its own, as whoever does without us would run
it. Of torch it is the matrix products of a step alone. Both take turns, so that a slow moment of the machine meets
both, and the ratio is of their medians.
"""

from fleet_bench.engines.command import main

__all__ = ["main"]
