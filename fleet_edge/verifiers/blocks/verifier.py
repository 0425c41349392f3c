"""Verifier over a model in blocks: the contract of an engine, with keys and values in pages."""

import logging
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt

from fleet_edge.verifiers.blocks.kv import PAGE, PageMemory, Pages, ProcessMemory
from fleet_edge.verifiers.blocks.model import Model, Part
from fleet_edge.verifiers.blocks.page_file import PageFile
from fleet_edge.verifiers.contract import CapacityExceeded, Item, KeptPrefix, TableVerifier, TargetInfo, VerifierError

_log = logging.getLogger(__name__)

FEWEST_TOKENS: Final = 256
"""Shortest sequence that a budget must hold."""

_CHECKED: Final = 21  # tokens, in pieces of one to five and one again: a second at 7B on two cores
_SEED: Final = 20_250_716


class BlocksVerifier(TableVerifier):
    """`Verifier` over a loaded model."""

    def __init__(self, model: Model, info: TargetInfo, memory: PageMemory, *, threads: int = 1) -> None:
        """Prepare a model to be served.

        The memory for keys and values also bounds the length of a sequence: where it does not hold the model's whole
        context, `info.context` is smaller, and a warning says so. Raises `VerifierError` if it is too small. `threads`
        check what a `PageFile` holds.
        """
        self._model = model
        self._pages = Pages(memory)
        self._file = memory if isinstance(memory, PageFile) else None
        self._threads = threads
        self._tokens: dict[int, array[int]] = {}  # of sequences whose pages are kept
        self._owners: dict[int, str] = {}  # of such sequences
        super().__init__(replace(info, context=_context(info, self._pages)))

    @property
    def allocated_bytes(self) -> int:
        """Memory of pages in use."""
        return self._pages.used * PAGE * self._pages.token_bytes

    def open(self, sequence: int) -> None:
        super().open(sequence)
        if self._file is not None:
            self._tokens[sequence] = array("i")

    def fork(self, sequence: int, source: int, length: int) -> None:
        self._table.fork(sequence, source, length)
        self._pages.fork(sequence, source, length)
        if self._file is not None:
            self._tokens[sequence] = self._tokens[source][:length]
            self._file.note_use(self._pages.table(sequence))

    def truncate(self, sequence: int, length: int) -> None:
        super().truncate(sequence, length)
        self._pages.truncate(sequence, length)
        if self._file is not None:
            del self._tokens[sequence][length:]

    def close(self, sequence: int) -> None:
        self._table.close(sequence)
        self._pages.close(sequence)
        self._tokens.pop(sequence, None)
        self._owners.pop(sequence, None)

    def own(self, sequence: int, owner: str) -> None:
        self._owners[sequence] = owner

    def restore(self, keys: Iterator[int], *, keep_s: float) -> list[KeptPrefix]:
        if self._file is None:
            return []
        size = self._info.vocabulary.size
        found = self._file.sequences(vocabulary=size, keep_s=keep_s, threads=self._threads)
        kept = [KeptPrefix(key, each.owner, each.tokens, each.age_s) for key, each in zip(keys, found, strict=False)]
        self._pages.restore({its.key: each.pages for its, each in zip(kept, found, strict=True)})
        for its in kept:
            self._table.restore(its.key, len(its.tokens))
            self._tokens[its.key], self._owners[its.key] = its.tokens[:], its.owner
        return kept

    def erase_free(self) -> None:
        if self._file is not None:
            self._file.erase(self._pages.free)

    @property
    def is_forgotten(self) -> bool:
        return self._file is not None and self._file.is_deleted

    def fits(self, items: Sequence[Item]) -> bool:
        return self._missing(items) <= 0

    def capacity(self) -> int:
        return self._pages.room(self._table.lengths.items())

    def score(self, items: Sequence[Item]) -> npt.NDArray[np.float32]:
        self._table.check(items)
        if not items:
            return np.empty((0, self._info.vocabulary.size), np.float32)
        missing = self._missing(items)
        if missing > 0:
            raise CapacityExceeded(
                f"The step is {missing * PAGE} tokens short of memory for keys and values; evict a sequence and try "
                "again."
            )
        parts = []
        for item in items:
            length = self._table.computed(item.sequence)
            self._pages.reserve(item.sequence, length, len(item.tokens))
            parts.append(Part(self._pages.table(item.sequence), length, item.tokens, item.rows))
        logits = self._model.forward(parts, self._pages)
        self._table.commit(items)
        self._record(items)
        return logits[:, : self._info.vocabulary.size]

    def _record(self, items: Sequence[Item]) -> None:
        """Record what these items have computed."""
        if self._file is None:
            return
        for item in items:
            tokens, table = self._tokens[item.sequence], self._pages.table(item.sequence)
            first = len(tokens) // PAGE
            tokens.extend(item.tokens)
            for place in range(first, -(-len(tokens) // PAGE)):
                its = tokens[place * PAGE : (place + 1) * PAGE]
                before = table[place - 1] if place else None
                self._file.record(table[place], its, before, self._owners.get(item.sequence, ""))

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
    if context < min(FEWEST_TOKENS, info.context):
        raise VerifierError(
            f"kv_bytes holds {context} tokens of {info.name}; set it to at least "
            f"{FEWEST_TOKENS * pages.token_bytes}, or to {whole} for the whole context of {info.context} tokens."
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


class Trial:
    """A fixed sequence, computed once as a whole, and once in pieces next to other sequences."""

    def __init__(self, model: Model, info: TargetInfo) -> None:
        its = model.geometry
        self._length = min(_CHECKED, info.context)
        pages = ProcessMemory(layers=its.layers, kv_heads=its.kv_heads, dim=its.head_dim, count=4)
        self._verifier = BlocksVerifier(model, replace(info, context=self._length), pages)
        draw, size = random.Random(_SEED), info.vocabulary.size  # noqa: S311 - no secret
        self._mine, *self._others = (draw.choices(range(size), k=self._length) for _ in range(4))
        for sequence in range(len(self._others) + 1):
            self._verifier.open(sequence)
        self.rows = self._verifier.score([Item(0, self._mine, self._length)]).copy()

    def repeats(self) -> bool:
        """Return whether the rows are the same bits in pieces; as slow as eight steps."""
        verifier, others = self._verifier, self._others
        verifier.truncate(0, 0)
        pieces, begin, new = [], 0, 1
        while begin < self._length:
            piece = self._mine[begin : begin + new]
            items = [Item(number, other[:new], 1) for number, other in enumerate(others, 1)]
            found = verifier.score([*items, Item(0, piece, len(piece))])
            pieces.append(found[len(items) :].copy())
            for number in range(1, len(others) + 1):
                verifier.truncate(number, 0)
            begin, new = begin + len(piece), new % 5 + 1
        return np.array_equal(self.rows, np.concatenate(pieces))
