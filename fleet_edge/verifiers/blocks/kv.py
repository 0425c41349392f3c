"""Keys and values in pages of some tokens, which sequences share until one of them writes.

A page is taken from the budget when the first token is written to it. A fork shares all pages of its source. Before a
sequence writes to a page that others use as well, it gets a copy.
"""

import math
import mmap
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

Halves = npt.NDArray[np.uint16]

PAGE: Final = 64
"""Tokens of a page: few enough that a short sequence wastes little, a multiple of the lanes of the attention loops."""

_NUMBER_BYTES: Final = 2
_SPARE_BYTES: Final = 64
"""Loops read whole vectors, behind the last number too."""
_MAP_NORESERVE: Final = 0x4000
"""Linux: a budget larger than what is free now is not refused; what is used counts."""


def page_bytes(layers: int, kv_heads: int, dim: int) -> int:
    return PAGE * 2 * layers * kv_heads * dim * _NUMBER_BYTES


class Pages:
    """Pages of all sequences within a budget of bytes; the caller keeps the sequences' lengths.

    Attributes:
        keys: float16 as uint16, `[pages, layers, kv_heads, dim, PAGE]`: scores of several keys are computed together.
        values: Likewise, `[pages, layers, kv_heads, PAGE, dim]`.
    """

    def __init__(self, *, layers: int, kv_heads: int, dim: int, budget_bytes: int) -> None:
        """Reserve addresses for the whole budget; the system provides memory as pages are written to.

        Raises OSError if the system refuses.
        """
        size = page_bytes(layers, kv_heads, dim)
        self.token_bytes = size // PAGE
        count = budget_bytes // size
        self.keys = _reserve((count, layers, kv_heads, dim, PAGE))
        self.values = _reserve((count, layers, kv_heads, PAGE, dim))
        self.count = count
        self._fresh = 0  # pages that were never used begin here
        self._free: list[int] = []  # pages before it that are free again
        self._users: dict[int, int] = {}
        self._tables: dict[int, list[int]] = {}

    @property
    def used(self) -> int:
        return self._fresh - len(self._free)

    def table(self, sequence: int) -> Sequence[int]:
        """Return the pages of a sequence, in order."""
        return self._tables.get(sequence, ())

    def needed(self, sequence: int, length: int, count: int) -> int:
        """Return the number of pages that `count` more tokens take after the first `length`."""
        more = -(-(length + count) // PAGE) - len(self.table(sequence))
        return more + (self._shared(sequence, length) if count else 0)

    def reserve(self, sequence: int, length: int, count: int) -> None:
        """Give a sequence its own pages for `count` more tokens; there MUST be as many free ones as are `needed`."""
        table = self._tables.setdefault(sequence, [])
        if count and self._shared(sequence, length):
            page, place = self._take(), length // PAGE
            self.keys[page], self.values[page] = self.keys[table[place]], self.values[table[place]]
            self._users[table[place]] -= 1
            table[place] = page
        while len(table) * PAGE < length + count:
            table.append(self._take())

    def _take(self) -> int:
        page = self._free.pop() if self._free else self._fresh
        self._fresh = max(self._fresh, page + 1)
        self._users[page] = 1
        return page

    def fork(self, sequence: int, source: int, length: int) -> None:
        """Share the pages with the first `length` tokens of another sequence."""
        table = list(self.table(source)[: -(-length // PAGE)])
        for page in table:
            self._users[page] += 1
        self._tables[sequence] = table

    def truncate(self, sequence: int, length: int) -> None:
        table = self._tables.get(sequence, [])
        while len(table) * PAGE >= length + PAGE:
            page = table.pop()
            self._users[page] -= 1
            if not self._users[page]:
                self._free.append(page)

    def close(self, sequence: int) -> None:
        self.truncate(sequence, 0)
        self._tables.pop(sequence, None)

    def room(self, lengths: Iterable[tuple[int, int]]) -> int:
        """Return a number of tokens that fits, whichever sequences they go to, given each sequence and its length."""
        # The worst use: each page that is taken next is that which takes the fewest tokens.
        left = self.count - self.used
        costs = list[int]()
        for sequence, length in lengths:
            unused = -length % PAGE
            # The first token takes a copy of a page that others use, which then has as much room as the page had.
            costs += [1, unused] if self._shared(sequence, length) else [unused + 1]
        if not costs:
            return left * PAGE
        first = sorted(costs)[: left + 1]
        return sum(first) + PAGE * (left + 1 - len(first)) - 1

    def _shared(self, sequence: int, length: int) -> bool:
        """Return whether the next token after the first `length` goes to a page that others use."""
        table = self.table(sequence)
        return length // PAGE < len(table) and self._users[table[length // PAGE]] > 1


def _reserve(shape: tuple[int, ...]) -> Halves:
    size = math.prod(shape) * _NUMBER_BYTES
    memory = mmap.mmap(-1, size + _SPARE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    return np.frombuffer(memory, np.uint16, math.prod(shape)).reshape(shape)
