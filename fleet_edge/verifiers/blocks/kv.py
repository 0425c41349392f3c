"""Keys and values in pages of some tokens, which sequences share until one of them writes.

A page is taken from the budget when the first token is written to it. A fork shares all pages of its source. Before a
sequence writes to a page that others use as well, it gets a copy. With a file (`PageFile`), pages survive the process.
"""

import math
import mmap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from fleet_edge.verifiers.blocks.geometry import Geometry, Pool
from fleet_edge.verifiers.contract import CapacityExceeded

Halves = npt.NDArray[np.uint16]
Floats = npt.NDArray[np.float32]

PAGE: Final = 64
"""Tokens of a page: few enough that a short sequence wastes little, a multiple of the lanes of the attention loops."""

_NUMBER_BYTES: Final = 2
_SPARE_BYTES: Final = 64
"""Loops read whole vectors, behind the last number too."""
_MAP_NORESERVE: Final = 0x4000
"""Linux: a budget larger than what is free now is not refused; what is used counts."""


_FLOAT_BYTES: Final = 4
_MAX_STATES: Final = 256
MIN_STATES: Final = 2
"""A sequence that goes on from a copy needs both."""
STATES_SHARE: Final = 2
"""At most this fraction of a budget is for states, the rest for keys and values."""


def page_bytes(pools: Iterable[Pool]) -> int:
    return PAGE * 2 * sum(math.prod(pool) for pool in pools) * _NUMBER_BYTES


def state_bytes(shapes: Iterable[Sequence[int]]) -> int:
    return sum(math.prod(shape) for shape in shapes) * _FLOAT_BYTES


def divide(its: Geometry, budget_bytes: int) -> tuple[int, list[tuple[int, ...]]]:
    """Return how many pages a budget holds besides states of recurrent layers, and the shapes of all these states."""
    each = state_bytes(its.state_shapes)
    count = min(_MAX_STATES, budget_bytes // STATES_SHARE // each) if each else 0
    return (budget_bytes - count * each) // page_bytes(its.pools), its.states(count)


class PageMemory(Protocol):
    """Memory of pages: `keys` and `values` as `Pages` has them."""

    count: int

    @property
    def keys(self) -> Sequence[Any]: ...

    @property
    def values(self) -> Sequence[Any]: ...

    def provide(self, page: int) -> None:
        """Provide memory for a page that was never used; raises OSError if there is none."""

    def forget(self, page: int, kept: int = 0) -> None:
        """Note that a page will be written to behind its first `kept` tokens, or is used by nobody."""


class ProcessMemory:
    """Memory that ends with the process; the system provides it as pages are written to.

    Raises OSError if the system refuses.
    """

    def __init__(self, pools: Sequence[Pool], count: int, states: Sequence[Sequence[int]] = ()) -> None:
        """Reserve memory for a number of pages, and for `states`: arrays of these shapes, as `Geometry.states`."""
        self.count = count
        self.keys = [_reserve(shapes(pool, count)[0]) for pool in pools]
        self.values = [_reserve(shapes(pool, count)[1]) for pool in pools]
        self.states = [_reserve((*shape, 2)).view(np.float32).reshape(shape) for shape in states]

    def provide(self, page: int) -> None:
        """Do nothing."""

    def forget(self, page: int, kept: int = 0) -> None:
        """Do nothing."""

    def provide_state(self, state: int) -> None:
        """Do likewise for a state."""

    def forget_state(self, state: int) -> None:
        """Note that a state will be written to, or is used by nobody."""


def shapes(pool: Pool, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of the keys and of the values of a number of pages."""
    layers, kv_heads, dim = pool
    return (count, layers, kv_heads, dim, PAGE), (count, layers, kv_heads, PAGE, dim)


class Pages:
    """Pages of all sequences; the caller keeps the sequences' lengths.

    A page holds the keys and values of its tokens of all layers: the place of that number in each array of `keys` and
    `values`. In the engine `blocks` they are, by pool, float16 as uint16, `[pages, layers, kv_heads, dim, PAGE]`, since
    scores of several keys are computed together, and `[pages, layers, kv_heads, PAGE, dim]`.
    """

    def __init__(self, memory: PageMemory) -> None:
        self._memory = memory
        self.keys, self.values = memory.keys, memory.values
        self.count = memory.count
        self._fresh = 0  # pages that were never used begin here
        self._free: list[int] = []  # pages before it that are free again
        self._users: dict[int, int] = {}
        self._tables: dict[int, list[int]] = {}

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values of a token."""
        return sum(int(its[:1].nbytes) for its in (*self.keys, *self.values)) // PAGE

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
            for its in (*self.keys, *self.values):
                its[page] = its[table[place]]
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
