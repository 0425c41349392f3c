"""Prefix digest: a cheap check that both ends mean the same text.

CRC-32 over the token ids as 32-bit little-endian words. It finds a protocol error, not an attacker: a device can only
deceive itself about its own text.
"""

import zlib
from collections.abc import Sequence

import numpy as np

EMPTY = 0
"""Digest of no tokens."""


def extend_digest(digest: int, tokens: Sequence[int]) -> int:
    """Return the digest of the tokens already covered by `digest`, followed by `tokens`."""
    return zlib.crc32(np.asarray(tokens, dtype="<u4").tobytes(), digest)
