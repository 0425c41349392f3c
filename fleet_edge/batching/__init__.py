"""Batching: which sessions a step verifies together, how long it waits for more, and the decision on their drafts."""

import fleet_edge.verifiers  # sets OpenMP's wait policy before a module here imports torch

__all__ = ["fleet_edge"]
