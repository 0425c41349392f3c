"""Pages of keys and values in the layout of the attention loops."""

import math
import mmap
from typing import Final

import numpy as np
import numpy.typing as npt

from fleet_edge.verifiers.paged import PAGE, PageTables

Halves = npt.NDArray[np.uint16]

_NUMBER_BYTES: Final = 2
_SPARE_BYTES: Final = 64
"""Loops read whole vectors, behind the last number too."""
_MAP_NORESERVE: Final = 0x4000
"""Linux: a budget larger than what is free now is not refused; what is used counts."""


def page_bytes(layers: int, kv_heads: int, dim: int) -> int:
    return PAGE * 2 * layers * kv_heads * dim * _NUMBER_BYTES


class Pages(PageTables):
    """Pages of all sequences within a budget of bytes.

    Attributes:
        keys: float16 as uint16, `[pages, layers, kv_heads, dim, PAGE]`: scores of several keys are computed together.
        values: Likewise, `[pages, layers, kv_heads, PAGE, dim]`.
    """

    def __init__(self, *, layers: int, kv_heads: int, dim: int, budget_bytes: int) -> None:
        """Reserve addresses for the whole budget; the system provides memory as pages are written to.

        Raises OSError if the system refuses.
        """
        size = page_bytes(layers, kv_heads, dim)
        super().__init__(budget_bytes // size, token_bytes=size // PAGE)
        self.keys = _reserve((self.count, layers, kv_heads, dim, PAGE))
        self.values = _reserve((self.count, layers, kv_heads, PAGE, dim))

    def copy_page(self, source: int, page: int) -> None:
        self.keys[page], self.values[page] = self.keys[source], self.values[source]


def _reserve(shape: tuple[int, ...]) -> Halves:
    size = math.prod(shape) * _NUMBER_BYTES
    memory = mmap.mmap(-1, size + _SPARE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    return np.frombuffer(memory, np.uint16, math.prod(shape)).reshape(shape)
