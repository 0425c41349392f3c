"""Keys and values in pages of some tokens, which sequences share until one of them writes.

A page is taken from the budget when the first token is written to it. A fork shares all pages of its source. Before a
sequence writes to a page that others use as well, it gets a copy. With a file (`PageFile`), pages survive the process.
"""

import math
import mmap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from fleet_edge.verifiers.contract import CapacityExceeded

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


class PageMemory(Protocol):
    """Memory of pages: `keys` and `values` as `Pages` has them."""

    keys: Halves
    values: Halves

    def provide(self, page: int) -> None:
        """Provide memory for a page that was never used; raises OSError if there is none."""

    def forget(self, page: int, kept: int = 0) -> None:
        """Note that a page will be written to behind its first `kept` tokens, or is used by nobody."""


class ProcessMemory:
    """Memory that ends with the process; the system provides it as pages are written to.

    Raises OSError if the system refuses.
    """

    def __init__(self, *, layers: int, kv_heads: int, dim: int, count: int) -> None:
        self.keys, self.values = (_reserve(shape) for shape in shapes(layers, kv_heads, dim, count))

    def provide(self, page: int) -> None:
        """Do nothing."""

    def forget(self, page: int, kept: int = 0) -> None:
        """Do nothing."""


def shapes(layers: int, kv_heads: int, dim: int, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of the keys and of the values of a number of pages."""
    return (count, layers, kv_heads, dim, PAGE), (count, layers, kv_heads, PAGE, dim)


class Pages:
    """Pages of all sequences; the caller keeps the sequences' lengths.

    Attributes:
        keys: float16 as uint16, `[pages, layers, kv_heads, dim, PAGE]`: scores of several keys are computed together.
        values: Likewise, `[pages, layers, kv_heads, PAGE, dim]`.
    """

    def __init__(self, memory: PageMemory) -> None:
        self._memory = memory
        self.keys, self.values = memory.keys, memory.values
        self.count = len(self.keys)
        self._fresh = 0  # pages that were never used begin here
        self._free: list[int] = []  # pages before it that are free again
        self._users: dict[int, int] = {}
        self._tables: dict[int, list[int]] = {}

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values of a token."""
        return 2 * math.prod(self.keys.shape[1:4]) * _NUMBER_BYTES

    @property
    def used(self) -> int:
        return self._fresh - len(self._free)

    @property
    def free(self) -> Sequence[int]:
        """Pages that were used, and are not now."""
        return self._free

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
        kept = length % PAGE
        for page in table[length // PAGE :]:
            self._memory.forget(page, kept)
            kept = 0

    def _take(self) -> int:
        if not self._free:
            try:
                self._memory.provide(self._fresh)
            except OSError as error:
                self.count = self._fresh  # others use what was free at the start
                raise CapacityExceeded(f"The machine has no memory left for keys and values: {error}") from error
            self._free.append(self._fresh)
            self._fresh += 1
        page = self._free.pop()
        self._memory.forget(page)
        self._users[page] = 1
        return page

    def restore(self, tables: Mapping[int, Sequence[int]]) -> None:
        """Begin with sequences whose pages the memory holds already; the others before the last of them are free."""
        self._users = Counter(page for table in tables.values() for page in table)
        self._tables = {sequence: list(table) for sequence, table in tables.items()}
        self._fresh = max(self._users, default=-1) + 1
        self._free = [page for page in range(self._fresh) if page not in self._users]

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
                self._memory.forget(page)
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
