"""Kept sequences: texts that a draft model has computed before, and may be asked to go on with.

A device has one draft model and serves several conversations. What is computed of them is copied out of the model's
context, and back when it is needed: a copy takes milliseconds where computing takes seconds. Left in the context, it
would slow down every token of the present text. Nothing native is called here: this is the account of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

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
    """A sequence, and the copy of what is computed of it.

    Attributes:
        tokens: Computed.
        state: Their keys and values, as the model's library gives and takes them.
    """

    tokens: tuple[int, ...]
    state: Any


class KeptSequences:
    """Sequences beside the present one.

    Args:
        most_tokens: Of all of them together.
    """

    def __init__(self, most_tokens: int) -> None:
        self._most_tokens = most_tokens
        self._kept: list[KeptSequence] = []  # the one unused for longest first

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def tokens(self) -> int:
        """Of all of them."""
        return sum(len(kept.tokens) for kept in self._kept)

    def longest(self, tokens: Sequence[int]) -> tuple[KeptSequence | None, int]:
        """Return the sequence that begins as `tokens` do for longest, and with how many of them."""
        best, found = 0, None
        for kept in self._kept:
            common = common_prefix(kept.tokens, tokens)
            if common > best:
                best, found = common, kept
        return found, best

    def keep(self, tokens: Sequence[int], copy: Callable[[], Any]) -> None:
        """Take a sequence, if there is something in it that none has; those unused for longest make room.

        Args:
            tokens: Computed.
            copy: Returns its state, or None if there is no memory for it.
        """
        kept = tuple(tokens)
        if not LEAST_KEPT <= len(kept) <= self._most_tokens:
            return
        if any(each.tokens[: len(kept)] == kept for each in self._kept):
            return
        self._kept = [each for each in self._kept if kept[: len(each.tokens)] != each.tokens]
        while self._kept and (len(self) >= MOST_KEPT or self.tokens + len(kept) > self._most_tokens):
            del self._kept[0]
        state = copy()
        if state is not None:
            self._kept.append(KeptSequence(kept, state))

    def used(self, kept: KeptSequence, *, whole: bool) -> None:
        """Note that a sequence was gone on from.

        Args:
            kept: One of them.
            whole: Whether what goes on has all of it, so that it need not be kept.
        """
        self._kept.remove(kept)
        if not whole:
            self._kept.append(kept)
