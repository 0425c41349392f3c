"""Several texts at once: a drafter that can write them has a sequence for each, all over one model."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from fleet_device.drafters.contract import Drafter

__all__ = ["SeveralSequences", "known_tokens", "sequences_of"]


@runtime_checkable
class SeveralSequences(Protocol):
    """What a `Drafter` has beside the contract if it can write several texts at once.

    Each sequence is a drafter by itself, that one thread at a time uses; different threads may use different ones.
    """

    def another(self) -> Drafter | None:
        """Return a further sequence, closed with this drafter; None if there is no room for one."""


@runtime_checkable
class _Remembers(Protocol):
    def known(self, tokens: Sequence[int]) -> int: ...


def sequences_of(drafter: Drafter, most: int) -> list[Drafter]:
    """Return a drafter and further sequences of it, at most so many together.

    Args:
        drafter: The first of them; one that cannot write several texts at once is the only one.
        most: At least 1.
    """
    found = [drafter]
    while len(found) < most and isinstance(drafter, SeveralSequences):
        another = drafter.another()
        if another is None:
            break
        found.append(another)
    return found


def known_tokens(drafter: Drafter, tokens: Sequence[int]) -> int:
    """Return with how many of these tokens the drafter's present sequence begins; 0 if it does not say."""
    return drafter.known(tokens) if isinstance(drafter, _Remembers) else 0
