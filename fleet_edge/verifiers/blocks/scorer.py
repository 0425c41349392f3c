"""The engine for programs of other kinds: scores sequences of tokens, and knows nothing of fleets; docs/scoring.md."""

import os
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Final

import numba
import numpy as np
import numpy.typing as npt

from fleet_edge.verifiers.blocks.gguf_weights import GgufWeights
from fleet_edge.verifiers.blocks.kv import PAGE, ProcessMemory
from fleet_edge.verifiers.blocks.model import Model
from fleet_edge.verifiers.blocks.verifier import BlocksVerifier
from fleet_edge.verifiers.contract import Item, TargetInfo
from schemas.vocabulary import Vocabulary

_MIN_TOKENS: Final = 256
_STATES: Final = 16
"""Of models with states: as many sequences that go on, at most."""


class Scorer:
    """Computes logits of a GGUF's model for many sequences at once.

    A row has the same bits whatever is computed with it, and however the tokens before it were split into calls. Calls
    must not overlap. Token ids come from a tokenizer of the caller's.

    Attributes:
        vocabulary: Number of logits of a row, padding of the model included.
        context: Most tokens of a sequence: those of the model, or of the memory if these are fewer.
    """

    def __init__(self, path: str | os.PathLike[str], *, max_tokens: int = 4096, threads: int | None = None) -> None:
        """Load a model; the first time on a machine loops are compiled, which takes seconds.

        Args:
            path: A GGUF, of several files the first.
            max_tokens: Tokens of all sequences together, for whose keys and values memory is reserved; each sequence
                takes a multiple of 64.
            threads: By default one for each core.

        Raises:
            UnsupportedModel: The file is damaged, or of an architecture that is not served.
            VerifierError: The model does not fit into memory.
        """
        model = Model(GgufWeights(Path(path)), threads=threads or numba.config.NUMBA_DEFAULT_NUM_THREADS)
        its = model.geometry
        vocabulary = Vocabulary(size=its.rows, fingerprint=bytes(32))  # strings of tokens matter to fleets alone
        pages = -(-max(max_tokens, _MIN_TOKENS) // PAGE)
        self.vocabulary, self.context = its.rows, min(its.context, pages * PAGE)
        info = TargetInfo(Path(path).name, vocabulary, self.context, its.end_tokens)
        self._verifier = BlocksVerifier(model, info, ProcessMemory(its.pools, pages, its.states(_STATES)))
        self._names = count()

    def open(self) -> int:
        """Begin an empty sequence; return its number."""
        sequence = next(self._names)
        self._verifier.open(sequence)
        return sequence

    def fork(self, source: int, length: int) -> int:
        """Begin a sequence with the first tokens of another, without computing or copying them; return its number."""
        sequence = next(self._names)
        self._verifier.fork(sequence, source, length)
        return sequence

    def cut(self, sequence: int, length: int) -> None:
        """Forget the tokens of a sequence behind the first `length`."""
        self._verifier.truncate(sequence, length)

    def close(self, sequence: int) -> None:
        """End a sequence, and free its memory."""
        self._verifier.close(sequence)

    def length(self, sequence: int) -> int:
        return self._verifier.computed(sequence)

    def score(self, batch: Sequence[tuple[int, Sequence[int]]], *, last: bool = False) -> list[npt.NDArray[np.float32]]:
        """Append tokens to sequences, each of which occurs once, in one forward pass.

        Returns:
            For each sequence its logits `[tokens, vocabulary]`; row j is about the token that follows the j-th one.
            With `last` only of the last token, `[1, vocabulary]`.

        Raises:
            CapacityExceeded: `max_tokens` is exceeded; nothing was computed.
            VerifierError: A sequence is not open or occurs twice, or a token is none; nothing was computed.
        """
        items = [Item(sequence, tokens, 1 if last else len(tokens)) for sequence, tokens in batch]
        logits = self._verifier.score(items)
        ends = np.cumsum([item.rows for item in items])
        return [logits[end - item.rows : end].copy() for item, end in zip(items, ends, strict=True)]
