"""Verifier over a model in blocks: the contract of an engine, with keys and values in pages."""

import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt

from fleet_edge.verifiers.blocks.kv import Pages
from fleet_edge.verifiers.blocks.model import Model, Part
from fleet_edge.verifiers.contract import Item, TargetInfo, VerifierError
from fleet_edge.verifiers.paged import PagedVerifier

_log = logging.getLogger(__name__)

_CHECKED: Final = 48
_SEED: Final = 20_250_716


class BlocksVerifier(PagedVerifier):
    """`Verifier` over a loaded model."""

    def __init__(self, model: Model, info: TargetInfo, *, budget_bytes: int) -> None:
        """Prepare a model to be served, and check that its rows do not depend on the batch.

        Raises `VerifierError` if the budget for keys and values is too small.
        """
        its = model.geometry
        try:
            self._pages = Pages(layers=its.layers, kv_heads=its.kv_heads, dim=its.head_dim, budget_bytes=budget_bytes)
        except (OSError, OverflowError) as error:
            raise VerifierError(
                f"The machine does not provide {budget_bytes} bytes for keys and values; set a smaller kv_bytes."
            ) from error
        self._model = model
        super().__init__(info, self._pages)
        self._info = replace(self._info, batch_invariant=rows_repeat(self))
        if not self._info.batch_invariant:
            _log.warning("Rows depend on the batch on this processor, so that seeded requests may not repeat.")

    def compute(self, items: Sequence[Item]) -> npt.NDArray[np.float32]:
        if not items:
            return np.empty((0, self._info.vocabulary.size), np.float32)
        parts = [
            Part(self._pages.table(item.sequence), self._table.computed(item.sequence), item.tokens, item.rows)
            for item in items
        ]
        return self._model.forward(parts, self._pages)


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
