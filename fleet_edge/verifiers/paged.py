"""Base of verifiers that keep keys and values in pages (see `blocks/kv`)."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from fleet_edge.verifiers.blocks.kv import PAGE, PageMemory, Pages
from fleet_edge.verifiers.contract import CapacityExceeded, Item, TableVerifier, TargetInfo, VerifierError

_log = logging.getLogger(__name__)

_MIN_TOKENS: Final = 256
"""Shortest sequence that a budget must hold."""


class PagedVerifier(TableVerifier):
    """Sequences in pages: a fork shares those of its source, and a rollback gives back what it no longer needs."""

    def __init__(self, info: TargetInfo, memory: PageMemory) -> None:
        """Begin with no sequence.

        The memory also bounds the length of a sequence: where it does not hold the model's whole context,
        `info.context` is smaller, and a warning says so. Raises `VerifierError` if it is too small.
        """
        self._pages = Pages(memory)
        super().__init__(replace(info, context=_context(info, self._pages)))

    @property
    def allocated_bytes(self) -> int:
        """Memory of pages in use."""
        return self._pages.used * PAGE * self._pages.token_bytes

    def fork(self, sequence: int, source: int, length: int) -> None:
        self._table.fork(sequence, source, length)
        self._pages.fork(sequence, source, length)

    def truncate(self, sequence: int, length: int) -> None:
        super().truncate(sequence, length)
        self._pages.truncate(sequence, length)

    def close(self, sequence: int) -> None:
        self._table.close(sequence)
        self._pages.close(sequence)

    def fits(self, items: Sequence[Item]) -> bool:
        return self._missing(items) <= 0

    def capacity(self) -> int:
        return self._pages.room(self._table.lengths.items())

    def _reserve(self, items: Sequence[Item]) -> None:
        """Check the items of a step, and give their sequences pages; raises `CapacityExceeded`, `VerifierError`."""
        self._table.check(items)
        missing = self._missing(items)
        if missing > 0:
            raise CapacityExceeded(
                f"The step is {missing * PAGE} tokens short of memory for keys and values; evict a sequence and try "
                "again."
            )
        for item in items:
            self._pages.reserve(item.sequence, self._table.computed(item.sequence), len(item.tokens))

    def _missing(self, items: Sequence[Item]) -> int:
        """Return how many pages a step lacks; negative if some are left."""
        needed = sum(
            self._pages.needed(item.sequence, self._table.computed(item.sequence), len(item.tokens)) for item in items
        )
        return needed - (self._pages.count - self._pages.used)


def _context(info: TargetInfo, pages: Pages) -> int:
    """Return the longest sequence that a budget serves; raises `VerifierError` if it is too short to be of use."""
    context = min(info.context, pages.count * PAGE)
    whole = -(-info.context // PAGE) * PAGE * pages.token_bytes
    if context < min(_MIN_TOKENS, info.context):
        raise VerifierError(
            f"kv_bytes holds {context} tokens of {info.name}; set it to at least "
            f"{_MIN_TOKENS * pages.token_bytes}, or to {whole} for the whole context of {info.context} tokens."
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
