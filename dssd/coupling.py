"""Coupled mode: both ends share Gumbel noise, so that nothing but token ids needs to travel.

argmax(log p + g) with g standard Gumbel has law p; the device's argmax(log q + g) under the same noise often falls on
the same token (Daliri, Musco, Suresh, arXiv 2408.07978). A draft token is accepted iff the target draws it too, so the
text is the target's own draw at every position: it depends on the seed and on p, and not on the drafter at all.
"""

import numpy as np

from dssd.counter_rng import gumbel
from dssd.distribution import Dist

__all__ = ["coupled_token"]


def coupled_token(dist: Dist, seed: int, position: int) -> int:
    """Return argmax(log p + g), which has law p; ties, of probability zero, to the more probable token."""
    if len(dist) == 1:
        return int(dist.ids[0])
    return int(dist.ids[np.argmax(np.log(dist.probs) + gumbel(seed, position, dist.ids))])
