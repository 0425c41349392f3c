"""Keys and values in pages of some tokens, which sequences share until one of them writes; the base of their engines.

A page is taken when the first token is written to it. A fork shares all pages of its source. Before a sequence writes
to a page that others use as well, it gets a copy.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Final

from fleet_edge.verifiers.contract import CapacityExceeded, Item, TableVerifier, TargetInfo, VerifierError

_log = logging.getLogger(__name__)

PAGE: Final = 64
"""Tokens of a page: few enough that a short sequence wastes little, a multiple of the lanes of the attention loops."""

FEWEST_TOKENS: Final = 256
"""Shortest sequence that a budget must hold."""


class PageTables(ABC):
    """Pages of all sequences, `count` of them; the caller keeps the sequences' lengths."""

    def __init__(self, count: int, *, token_bytes: int) -> None:
        self.count = count
        self.token_bytes = token_bytes
        self._fresh = 0  # pages that were never used begin here
        self._free: list[int] = []  # pages before it that are free again
        self._users: dict[int, int] = {}
        self._tables: dict[int, list[int]] = {}

    @abstractmethod
    def copy_page(self, source: int, page: int) -> None:
        """Fill a page with the keys and values of another."""

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
            self.copy_page(table[place], page)
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


class PagedVerifier(TableVerifier):
    """Base of a `Verifier` whose keys and values are in pages.

    The pages also bound the length of a sequence: where they do not hold the model's whole context, `info.context` is
    smaller, and a warning says so. Raises `VerifierError` if there are too few.
    """

    def __init__(self, info: TargetInfo, pages: PageTables) -> None:
        super().__init__(replace(info, context=_context(info, pages)))
        self._tables = pages

    def compute(self, items: Sequence[Item]) -> Any:  # noqa: ANN401 - an array or a tensor
        """Return logits `[sum of rows, rows of the vocabulary]`; the items have their pages."""
        raise NotImplementedError

    @property
    def allocated_bytes(self) -> int:
        """Memory of pages in use."""
        return self._tables.used * PAGE * self._tables.token_bytes

    def fork(self, sequence: int, source: int, length: int) -> None:
        self._table.fork(sequence, source, length)
        self._tables.fork(sequence, source, length)

    def truncate(self, sequence: int, length: int) -> None:
        super().truncate(sequence, length)
        self._tables.truncate(sequence, length)

    def close(self, sequence: int) -> None:
        self._table.close(sequence)
        self._tables.close(sequence)

    def fits(self, items: Sequence[Item]) -> bool:
        return self._missing(items) <= 0

    def capacity(self) -> int:
        return self._tables.room(self._table.lengths.items())

    def score(self, items: Sequence[Item]) -> Any:  # noqa: ANN401 - likewise
        self._table.check(items)
        missing = self._missing(items)
        if missing > 0:
            raise CapacityExceeded(
                f"The step is {missing * PAGE} tokens short of memory for keys and values; evict a sequence and try "
                "again."
            )
        try:
            for item in items:
                self._tables.reserve(item.sequence, self._table.computed(item.sequence), len(item.tokens))
            logits = self.compute(items)
        except BaseException:
            for item in items:
                self._tables.truncate(item.sequence, self._table.computed(item.sequence))
            raise
        self._table.commit(items)
        return logits[:, : self._info.vocabulary.size]

    def _missing(self, items: Sequence[Item]) -> int:
        """Return how many pages a step lacks; negative if some are left."""
        needed = sum(
            self._tables.needed(item.sequence, self._table.computed(item.sequence), len(item.tokens)) for item in items
        )
        return needed - (self._tables.count - self._tables.used)


def _context(info: TargetInfo, pages: PageTables) -> int:
    """Return the longest sequence that the pages serve; raises `VerifierError` if it is too short to be of use."""
    context = min(info.context, pages.count * PAGE)
    whole = -(-info.context // PAGE) * PAGE * pages.token_bytes
    if context < min(FEWEST_TOKENS, info.context):
        raise VerifierError(
            f"kv_bytes holds {context} tokens of {info.name}; set it to at least {FEWEST_TOKENS * pages.token_bytes}, "
            f"or to {whole} for the whole context of {info.context} tokens."
        )
    if context < info.context:
        _log.warning(
            "kv_bytes holds %d of the %d tokens of %s's context; set it to %d for longer requests.",
            context,
            info.context,
            info.name,
            whole,
        )
    return context
