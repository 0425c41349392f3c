"""Engines benchmark: a step of each verifier beside the raw engine under it.

    python -m benchmarks engines [--quick] [--json FILE]

For B sequences with T new tokens each, some tokens into them: our step, and what it cannot be faster than. Of
llama.cpp that is the library itself, on the same batch, in processes of its own, with flash attention and without, as
whoever does without us would run it; the faster counts. Of torch it is the matrix products of a step alone. All take
turns, so that a slow moment of the machine meets all, and the ratio is of their medians.
"""

from benchmarks.engines.command import main

__all__ = ["main"]
