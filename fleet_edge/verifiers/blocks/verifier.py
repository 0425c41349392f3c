"""Verifier over a model in blocks: the contract of an engine, with keys and values in pages."""

import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt

from fleet_edge.verifiers.blocks.kv import PAGE, Pages
from fleet_edge.verifiers.blocks.model import Model, Part
from fleet_edge.verifiers.contract import CapacityExceeded, Item, TableVerifier, TargetInfo, VerifierError

_log = logging.getLogger(__name__)

FEWEST_TOKENS: Final = 256
"""Shortest sequence that a budget must hold."""

_CHECKED: Final = 48
_SEED: Final = 20_250_716


class BlocksVerifier(TableVerifier):
    """`Verifier` over a loaded model."""

    def __init__(self, model: Model, info: TargetInfo, *, budget_bytes: int) -> None:
        """Prepare a model to be served, and check that its rows do not depend on the batch.

        The budget for keys and values also bounds the length of a sequence: where it does not hold the model's whole
        context, `info.context` is smaller, and a warning says so. Raises `VerifierError` if it is too small.
        """
        its = model.geometry
        try:
            self._pages = Pages(layers=its.layers, kv_heads=its.kv_heads, dim=its.head_dim, budget_bytes=budget_bytes)
        except (OSError, OverflowError) as error:
            raise VerifierError(
                f"The machine does not provide {budget_bytes} bytes for keys and values; set a smaller kv_bytes."
            ) from error
        self._model = model
        super().__init__(replace(info, context=_context(info, self._pages, budget_bytes)))
        self._info = replace(self._info, batch_invariant=rows_repeat(self))
        if not self._info.batch_invariant:
            _log.warning("Rows depend on the batch on this processor, so that seeded requests may not repeat.")

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
        return logits[:, : self._info.vocabulary.size]

    def _missing(self, items: Sequence[Item]) -> int:
        """Return how many pages a step lacks; negative if some are left."""
        needed = sum(
            self._pages.needed(item.sequence, self._table.computed(item.sequence), len(item.tokens)) for item in items
        )
        return needed - (self._pages.count - self._pages.used)


def _context(info: TargetInfo, pages: Pages, budget_bytes: int) -> int:
    """Return the longest sequence that a budget serves; raises `VerifierError` if it is too short to be of use."""
    context = min(info.context, pages.count * PAGE)
    whole = -(-info.context // PAGE) * PAGE * pages.token_bytes
    if context < min(FEWEST_TOKENS, info.context):
        raise VerifierError(
            f"kv_bytes = {budget_bytes} holds {context} tokens of {info.name}; set it to at least "
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


def rows_repeat(verifier: BlocksVerifier) -> bool:
    """Return whether rows are bit-identical however a sequence is split, alone and among others."""
    size, length = verifier.info.vocabulary.size, min(_CHECKED, verifier.info.context)
    draw = random.Random(_SEED)  # noqa: S311 - no secret
    mine, *others = (draw.choices(range(size), k=length) for _ in range(4))
    keys = range(-1, -1 - len(others) - 1, -1)  # no session has these
    try:
        for key in keys:
            verifier.open(key)
        whole = verifier.score([Item(keys[0], mine, length)]).copy()
        verifier.truncate(keys[0], 0)
        pieces, begin, new = [], 0, 1
        while begin < length:
            piece = mine[begin : begin + new]
            items = [Item(key, other[:new], 1) for key, other in zip(keys[1:], others, strict=True)]
            found = verifier.score([*items, Item(keys[0], piece, len(piece))])
            pieces.append(found[len(items) :].copy())
            for key in keys[1:]:
                verifier.truncate(key, 0)
            begin, new = begin + len(piece), new % 5 + 1
    finally:
        for key in keys:
            verifier.close(key)
    return np.array_equal(whole, np.concatenate(pieces))
