"""Verifier that drafts with a layer of its own model (multi-token prediction).

The layer takes a token and the row of the token before it, as the model's last norm leaves it, and its logits are about
the next token. It is computed for all tokens of a step next to the model, so that its keys and values lie in the same
pages. To propose several tokens it takes its own rows: their keys and values are void, and lie behind the computed
tokens, where the next step overwrites them.

What it computes decides about speed alone, so a row that is not there any more, behind a fork or a restart, is zero.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from fleet_edge.verifiers.blocks.geometry import LOGGED
from fleet_edge.verifiers.blocks.kv import ProcessMemory
from fleet_edge.verifiers.blocks.model import Model, Part
from fleet_edge.verifiers.blocks.page_file import PageFile
from fleet_edge.verifiers.blocks.portable import Floats
from fleet_edge.verifiers.blocks.verifier import BlocksVerifier
from fleet_edge.verifiers.contract import Item, TargetInfo

_MAX_SEQUENCES: Final = 256
"""Those whose last rows are kept: at a width of 4,096, 16 KB for each row."""


class MtpVerifier(BlocksVerifier):
    """`DraftsItself` over a loaded model that has such a layer."""

    def __init__(self, model: Model, info: TargetInfo, memory: ProcessMemory | PageFile, *, threads: int = 1) -> None:
        self._rows: dict[int, tuple[int, Floats]] = {}  # a position, and rows from there; the latest sequence last
        self._proposed: dict[int, Floats] = {}  # before the token that is proposed next, in this step
        super().__init__(model, info, memory, threads=threads)

    def fork(self, sequence: int, source: int, length: int) -> None:
        super().fork(sequence, source, length)
        if source in self._rows:
            self._keep(sequence, *self._rows[source])

    def close(self, sequence: int) -> None:
        super().close(sequence)
        self._rows.pop(sequence, None)
        self._proposed.pop(sequence, None)

    def propose(self, tokens: Mapping[int, Sequence[int]]) -> Floats:
        parts = []
        for sequence, its in tokens.items():
            length = self._table.computed(sequence)
            if len(its) == 1:
                self._proposed[sequence] = self._row(sequence, length - 1)
            self._pages.reserve(sequence, length, len(its))
            start, before = length + len(its) - 1, self._proposed[sequence]
            parts.append(Part(self._pages.table(sequence), start, its[-1:], 1, before=before))
        logits, rows = self._model.propose(parts, self._pages)
        self._proposed |= {sequence: rows[place : place + 1] for place, sequence in enumerate(tokens)}
        return logits[:, : self._info.vocabulary.size]

    def score(self, items: Sequence[Item]) -> Floats:
        for sequence in self._proposed:  # pages that were reserved for it alone
            self._pages.truncate(sequence, self._table.computed(sequence))
        self._proposed.clear()
        return super().score(items)

    def _forward(self, parts: Mapping[int, Part]) -> Floats:
        ready = {}
        for sequence, part in parts.items():
            computed = self._table.computed(sequence)
            again = min(computed - part.start, len(part.tokens))
            ready[sequence] = replace(part, again=again, before=self._row(sequence, computed - 1))
        logits = super()._forward(ready)
        end = 0
        for sequence, part in ready.items():
            end += len(part.tokens)
            if part.again < len(part.tokens):
                count = min(max(1, part.rows), 1 + LOGGED)  # a cut leaves one of them as the last
                rows = self._model.hidden[end - count : end].copy()
                self._keep(sequence, part.start + len(part.tokens) - count, rows)
        return logits

    def _row(self, sequence: int, position: int) -> Floats:
        first, rows = self._rows.get(sequence, (0, self._model.hidden[:0]))
        place = position - first
        return rows[place : place + 1] if 0 <= place < len(rows) else self._model.no_row

    def _keep(self, sequence: int, first: int, rows: Floats) -> None:
        self._rows.pop(sequence, None)
        self._rows[sequence] = first, rows
        if len(self._rows) > _MAX_SEQUENCES:
            del self._rows[next(iter(self._rows))]
