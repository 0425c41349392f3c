"""Batching: which sessions a step verifies together, how long it waits for more, the decision on their drafts."""

import fleet_edge.openmp  # first: what follows may import torch

__all__ = ["fleet_edge"]
