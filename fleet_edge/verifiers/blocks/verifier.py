"""Verifier over a model in blocks: the contract of an engine, with keys and values in pages."""

import logging
import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt

from fleet_edge.verifiers.blocks.kv import PAGE, ProcessMemory
from fleet_edge.verifiers.blocks.model import Model, Part
from fleet_edge.verifiers.blocks.page_file import PageFile
from fleet_edge.verifiers.blocks.portable import Floats
from fleet_edge.verifiers.blocks.states import States
from fleet_edge.verifiers.contract import CapacityExceeded, Item, KeptPrefix, TargetInfo
from fleet_edge.verifiers.paged import PagedVerifier

_log = logging.getLogger(__name__)

_CHECKED: Final = 21  # tokens, in pieces of one to five and one again: a second at 7B on two cores
_SEED: Final = 20_250_716


class BlocksVerifier(PagedVerifier):
    """`Verifier` over a loaded model."""

    def __init__(self, model: Model, info: TargetInfo, memory: ProcessMemory | PageFile, *, threads: int = 1) -> None:
        """Prepare a model to be served.

        `threads` check what a `PageFile` holds. Raises `VerifierError` if the memory is too small.
        """
        self._model, self._memory = model, memory
        self._states = States(memory) if memory.states else None
        self._file = memory if isinstance(memory, PageFile) else None
        self._threads = threads
        self._tokens: dict[int, array[int]] = {}
        self._owners: dict[int, str] = {}  # of such sequences
        super().__init__(info, memory)

    def open(self, sequence: int) -> None:
        super().open(sequence)
        self._tokens[sequence] = array("i")
        if self._states is not None:
            self._states.open(sequence)

    def fork(self, sequence: int, source: int, length: int) -> None:
        super().fork(sequence, source, length)
        self._tokens[sequence] = self._tokens[source][:length]
        if self._states is not None:
            self._states.fork(sequence, source, length)
        if self._file is not None:
            self._file.note_use(self._pages.table(sequence))

    def truncate(self, sequence: int, length: int) -> None:
        super().truncate(sequence, length)
        del self._tokens[sequence][length:]
        if self._states is not None:
            self._states.truncate(sequence, length)

    def close(self, sequence: int) -> None:
        super().close(sequence)
        self._tokens.pop(sequence, None)
        self._owners.pop(sequence, None)
        if self._states is not None:
            self._states.close(sequence)

    @property
    def allocated_bytes(self) -> int:
        states = 0 if self._states is None else self._states.used
        return super().allocated_bytes + states * sum(each[:1].nbytes for each in self._memory.states)

    def fits(self, items: Sequence[Item]) -> bool:
        return super().fits(items) and self._missing_states(items) <= 0

    def capacity(self) -> int:
        tokens, room = super().capacity(), None if self._states is None else self._states.room()
        return tokens if room is None else min(tokens, room)

    def reach(self, sequence: int, length: int) -> int:
        return length if self._states is None else self._states.reach(sequence, length)

    def own(self, sequence: int, owner: str) -> None:
        self._owners[sequence] = owner

    def restore(self, keys: Iterator[int], *, keep_s: float) -> list[KeptPrefix]:
        if self._file is None:
            return []
        size = self._info.vocabulary.size
        found = self._file.sequences(vocabulary=size, keep_s=keep_s, threads=self._threads)
        kept = [KeptPrefix(key, each.owner, each.tokens, each.age_s) for key, each in zip(keys, found, strict=False)]
        self._pages.restore({its.key: each.pages for its, each in zip(kept, found, strict=True)})
        if self._states is not None:
            self._states.restore({its.key: each.states for its, each in zip(kept, found, strict=True)})
        for its in kept:
            self._table.restore(its.key, len(its.tokens))
            self._tokens[its.key], self._owners[its.key] = its.tokens[:], its.owner
        return kept

    def erase_free(self) -> None:
        if self._file is not None:
            self._file.erase(self._pages.free, [] if self._states is None else self._states.free)

    @property
    def is_forgotten(self) -> bool:
        return self._file is not None and self._file.is_deleted

    def score(self, items: Sequence[Item]) -> npt.NDArray[np.float32]:
        self._reserve(items)
        if not items:
            return np.empty((0, self._info.vocabulary.size), np.float32)
        for item in items:
            self._catch_up(item.sequence)
        parts = {}
        for item in items:
            sequence, begin = item.sequence, self._begin(item.sequence)
            tokens = [*self._tokens[sequence][begin:], *item.tokens]
            parts[sequence] = Part(self._pages.table(sequence), begin, tokens, item.rows)
        logits = self._forward(parts)
        self._table.commit(items)
        for item in items:
            self._record(item)
        return logits[:, : self._info.vocabulary.size]

    def _reserve(self, items: Sequence[Item]) -> None:
        super()._reserve(items)
        if (missing := self._missing_states(items)) > 0:
            raise CapacityExceeded(
                f"The step is {missing} states of recurrent layers short; evict a sequence and try again."
            )

    def _missing_states(self, items: Sequence[Item]) -> int:
        return 0 if self._states is None else self._states.missing([item.sequence for item in items])

    def _begin(self, sequence: int) -> int:
        """Return the number of tokens behind which a step begins: all that are computed, where there is a state."""
        return self.reach(sequence, self._table.computed(sequence))

    def _catch_up(self, sequence: int) -> None:
        """Compute tokens again that have no state, by whole pages; the step itself computes the last of them."""
        while (begin := self._begin(sequence)) + PAGE < self._table.computed(sequence):
            tokens = self._tokens[sequence][begin : begin + PAGE]
            self._forward({sequence: Part(self._pages.table(sequence), begin, tokens, 0)})

    def _forward(self, parts: Mapping[int, Part]) -> Floats:
        if self._states is None:
            return self._model.forward(list(parts.values()), self._pages)
        steps = {sequence: (len(part.tokens), max(0, part.rows - 1)) for sequence, part in parts.items()}
        plans = self._states.plan(steps)
        try:
            planned = [replace(part, replay=plans[sequence]) for sequence, part in parts.items()]
            logits = self._model.forward(planned, self._pages, self._memory.states)
        except BaseException:
            self._states.abandon(plans)
            raise
        self._states.settle(plans, steps)
        return logits

    def _record(self, item: Item) -> None:
        """Note what an item has computed, also in the file if there is one."""
        tokens, table = self._tokens[item.sequence], self._pages.table(item.sequence)
        first = len(tokens) // PAGE
        tokens.extend(item.tokens)
        if self._file is None:
            return
        for place in range(first, -(-len(tokens) // PAGE)):
            its = tokens[place * PAGE : (place + 1) * PAGE]
            before = table[place - 1] if place else None
            self._file.record(table[place], its, before, self._owners.get(item.sequence, ""))
        copies = {} if self._states is None else self._states.copies(item.sequence)
        for length, state in copies.items():
            self._file.record_state(state, table[length // PAGE - 1])


class Trial:
    """A fixed sequence, computed once as a whole, and once in pieces next to other sequences."""

    def __init__(self, model: Model, info: TargetInfo) -> None:
        self._length = min(_CHECKED, info.context)
        its = model.geometry
        memory = ProcessMemory(its.pools, 4, its.states(8))
        self._verifier = BlocksVerifier(model, replace(info, context=self._length), memory)
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
