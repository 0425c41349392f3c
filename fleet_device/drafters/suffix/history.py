"""History: what this device has written, to be searched for what follows; bounded in memory and on disk."""

import threading
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np

from fleet_device.drafters.suffix.history_file import HistoryFile
from fleet_device.drafters.suffix.index import Ints, Match, SuffixIndex, token_bytes

__all__ = ["History"]

_BETWEEN: Final = (-1,)
"""Stands between two texts."""

_PROMPT_TOKENS: Final = 8
"""Of a prompt's end, so that a text's first tokens are found. Nothing else of a prompt is kept."""

_SHORTEST: Final = 2
"""Tokens: a text that is shorter is not worth its place."""


class History:
    """Texts that were written before. Several threads may use it.

    Args:
        memory_bytes: Most that it takes.
        file: Where texts are kept from one run to the next; None for in memory alone.
    """

    def __init__(self, *, memory_bytes: int, file: HistoryFile | None = None) -> None:
        self._capacity = max(64, memory_bytes // token_bytes())
        self._index = SuffixIndex(capacity=self._capacity)
        self._file = file
        self._lock = threading.Lock()
        if file is not None:
            self._take([np.asarray(text, dtype=np.int32) for text in file.read()])

    @property
    def tokens(self) -> int:
        """Tokens of all texts that can be found."""
        return len(self._index)

    def remember(self, prompt: Sequence[int], text: Sequence[int]) -> None:
        """Add a text, behind the last tokens of its prompt."""
        if len(text) < _SHORTEST:
            return
        kept = [*prompt[-_PROMPT_TOKENS:], *text]
        with self._lock:
            self._take([np.asarray(kept, dtype=np.int32)])
            if self._file is not None:
                self._file.append(kept)

    def find(self, end: Sequence[int] | Ints) -> Match | None:
        """Return what followed such tokens; see `SuffixIndex.find`."""
        with self._lock:
            return self._index.find(end)

    def _take(self, texts: Iterable[Ints]) -> None:
        parts = [part for text in texts for part in (text, np.array(_BETWEEN, dtype=np.int32))]
        if not parts:
            return
        new = np.concatenate(parts)[-self._capacity :]
        if len(new) > self._index.room:
            # The older half goes, so that this is done rarely.
            keep = max(0, min(self._capacity // 2, self._capacity - len(new)))
            old = self._index.tokens[len(self._index) - min(keep, len(self._index)) :]
            new = np.concatenate([old, new])
            self._index.clear()
        self._index.append(new)
