"""Language of the scripted edge, for whoever writes with it: a device need not load what the edge computes with."""

from typing import Final

from fleet_testing.markov import MarkovScript

__all__ = ["CONTEXT", "LANGUAGE"]

CONTEXT: Final = 4096
"""Most tokens in one sequence."""

LANGUAGE: Final = MarkovScript(size=1024, seed=9, sharpness=3.0, period=5)
"""What the target writes. No token ends a text."""
