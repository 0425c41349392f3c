"""Which sessions a step verifies together, for how long it waits for more, and the decision on their drafts."""

import fleet_edge.openmp  # first: what follows imports torch

__all__ = ["fleet_edge"]
