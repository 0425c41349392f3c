"""Sequence table: what is open and what is computed; the contract without tensors and without a budget."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from fleet_edge.verifiers.contract import Item, VerifierError


class SequenceTable:
    """Sequences with their computed lengths.

    Every verifier that keeps its own sequences keeps one of these, so that all refuse the same things in the
    same words, and before anything is computed.
    """

    def __init__(self, *, context: int, vocabulary: int) -> None:
        """Begin with no sequences.

        Args:
            context: Most tokens in one sequence.
            vocabulary: Ids from here on are refused.
        """
        self._context = context
        self._vocabulary = vocabulary
        self._computed: dict[int, int] = {}
        self._total = 0

    @property
    def total(self) -> int:
        return self._total

    @property
    def lengths(self) -> Mapping[int, int]:
        return MappingProxyType(self._computed)

    def open(self, sequence: int) -> None:
        """Begin a sequence with nothing computed.

        Raises:
            VerifierError: It is open already.
        """
        self._check_new(sequence)
        self._computed[sequence] = 0

    def fork(self, sequence: int, source: int, length: int) -> None:
        """Begin a sequence with the first `length` tokens of another computed.

        Raises:
            VerifierError: It is open already, the other is not, or that has fewer.
        """
        self.check_fork(sequence, source, length)
        self._computed[sequence] = length
        self._total += length

    def check_fork(self, sequence: int, source: int, length: int) -> None:
        """Check that `fork` can be done; raises what it raises."""
        computed = self.computed(source)
        if not 0 <= length <= computed:
            raise VerifierError(f"Sequence {source} has {computed} computed tokens and cannot pass on {length}.")
        self._check_new(sequence)

    def computed(self, sequence: int) -> int:
        """Return the number of computed tokens.

        Raises:
            VerifierError: The sequence is not open.
        """
        try:
            return self._computed[sequence]
        except KeyError:
            raise VerifierError(f"Sequence {sequence} is not open.") from None

    def truncate(self, sequence: int, length: int) -> None:
        """Lower the number of computed tokens to `length`.

        Raises:
            VerifierError: The sequence is not open, or has fewer.
        """
        computed = self.computed(sequence)
        if not 0 <= length <= computed:
            raise VerifierError(f"Sequence {sequence} has {computed} computed tokens and cannot be cut to {length}.")
        self._computed[sequence] = length
        self._total -= computed - length

    def close(self, sequence: int) -> bool:
        """End a sequence; return whether it was open."""
        computed = self._computed.pop(sequence, None)
        self._total -= computed or 0
        return computed is not None

    def check(self, items: Sequence[Item]) -> None:
        """Check that a step can be computed, if there is room for it.

        Raises:
            VerifierError: An item is not one that can be computed.
        """
        for item in items:
            self._check(item)
        if len({item.sequence for item in items}) != len(items):
            raise VerifierError("A sequence occurs twice in one step.")

    def commit(self, items: Sequence[Item]) -> None:
        """Count a step's tokens as computed."""
        for item in items:
            self._computed[item.sequence] += len(item.tokens)
            self._total += len(item.tokens)

    def _check_new(self, sequence: int) -> None:
        if sequence in self._computed:
            raise VerifierError(f"Sequence {sequence} is open already; close it first.")

    def _check(self, item: Item) -> None:
        computed = self.computed(item.sequence)
        if not item.tokens:
            raise VerifierError(f"Sequence {item.sequence} has no tokens to compute in this step.")
        if not 0 <= item.rows <= len(item.tokens):
            raise VerifierError(f"Sequence {item.sequence} wants {item.rows} rows of {len(item.tokens)} tokens.")
        if computed + len(item.tokens) > self._context:
            raise VerifierError(
                f"Sequence {item.sequence} would have {computed + len(item.tokens)} tokens; "
                f"the target model's context holds {self._context}."
            )
        if min(item.tokens) < 0 or max(item.tokens) >= self._vocabulary:
            raise VerifierError(f"Sequence {item.sequence} has a token id outside 0..{self._vocabulary - 1}.")
