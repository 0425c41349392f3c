"""Kept sequences: texts that a draft model has computed before, and may be asked to go on with.

A device has one draft model and serves several conversations. Their keys and values stay in the memory that the context
has anyway, as long as the present text leaves room there. Nothing native is called here: this is the account of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fleet_device.drafters.contract import common_prefix

__all__ = ["LEAST_KEPT", "MOST_KEPT", "KeptSequence", "KeptSequences", "is_other_text"]

MOST_KEPT: Final = 8
"""Sequences beside the present one; a device remembers the tokens of as many conversations."""

LEAST_KEPT: Final = 16
"""Tokens. To compute fewer costs hardly more than the book-keeping."""

_TAIL: Final = 64
"""Tokens that a sequence may have behind a text that goes on: what was drafted and rejected."""


def is_other_text(computed: int, common: int) -> bool:
    """Whether a sequence is another text than one that begins with its first tokens, rather than that with a tail.

    Args:
        computed: Tokens of the sequence.
        common: Of these, how many both begin with.
    """
    behind = computed - common
    return behind > _TAIL or (behind >= LEAST_KEPT and behind > common)


@dataclass(frozen=True, slots=True, eq=False)
class KeptSequence:
    """A sequence in the draft model's memory.

    Attributes:
        number: Its number there.
        tokens: Computed.
    """

    number: int
    tokens: tuple[int, ...]


class KeptSequences:
    """Sequences beside the present one, and the numbers that are free."""

    def __init__(self) -> None:
        """Keep nothing; the present sequence has number 0."""
        self._kept: list[KeptSequence] = []  # the one unused for longest first
        self._free = list(range(MOST_KEPT, 0, -1))

    def __len__(self) -> int:
        return len(self._kept)

    def longest(self, tokens: Sequence[int]) -> tuple[KeptSequence | None, int]:
        """Return the sequence that begins as `tokens` do for longest, and with how many of them."""
        best, found = 0, None
        for kept in self._kept:
            common = common_prefix(kept.tokens, tokens)
            if common > best:
                best, found = common, kept
        return found, best

    def keep(self, number: int, tokens: Sequence[int]) -> list[KeptSequence]:
        """Take the present sequence among the kept ones; return those that it stands for, which are kept no longer.

        Args:
            number: Of the present sequence.
            tokens: That it has computed.
        """
        covered = [kept for kept in self._kept if tuple(tokens[: len(kept.tokens)]) == kept.tokens]
        for kept in covered:
            self.drop(kept)
        self._kept.append(KeptSequence(number, tuple(tokens)))
        return covered

    def take(self, kept: KeptSequence) -> None:
        """Let a kept sequence become the present one."""
        self._kept.remove(kept)

    def used(self, kept: KeptSequence) -> None:
        """Note that a sequence was of use."""
        self._kept.remove(kept)
        self._kept.append(kept)

    def drop(self, kept: KeptSequence) -> None:
        """Keep a sequence no longer; its number is free."""
        self._kept.remove(kept)
        self._free.append(kept.number)

    def oldest(self, *, but: KeptSequence | None = None) -> KeptSequence | None:
        """Return the sequence that was unused for longest, if there is one."""
        return next((kept for kept in self._kept if kept is not but), None)

    def new_number(self) -> int | None:
        """Return a number for another sequence; None if all are in use."""
        return self._free.pop() if self._free else None

    def give_back(self, number: int) -> None:
        """Note that a number is in use no longer."""
        self._free.append(number)

    def clear(self) -> None:
        """Keep nothing any more; the memory is empty."""
        self._free += [kept.number for kept in self._kept]
        self._kept.clear()
