"""Arrivals: when clients ask for their texts, and which."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

__all__ = ["Arrival", "Arrivals"]

Thing = TypeVar("Thing")


class Arrivals(StrEnum):
    """How clients ask. Each has one text at a time.

    Attributes:
        AT_ONCE: All at the same moment, and for the next text as soon as one has ended.
        POISSON: Each after a pause that is exponentially distributed, as in a Poisson process.
    """

    AT_ONCE = "at-once"
    POISSON = "poisson"


@dataclass(frozen=True, slots=True)
class Arrival(Generic[Thing]):
    """A request.

    Attributes:
        pause_s: How long after the client's last text, or the beginning.
        text: What is asked for.
    """

    pause_s: float
    text: Thing

    @classmethod
    def of(
        cls, client: int, texts: Sequence[Thing], how: Arrivals, *, pause_s: float, seed: int
    ) -> "Iterator[Arrival[Thing]]":
        """Return the requests of a client, without end; the same for the same arguments.

        Args:
            client: Its number: it begins with that text, so that no two have the same one while there are enough.
            texts: What is asked for, in turn.
            how: When.
            pause_s: Mean pause (seconds); 0 where all ask at once.
            seed: Of the pauses.
        """
        rng = random.Random(f"{seed} {client}")
        place = client
        while True:
            pause = rng.expovariate(1.0 / pause_s) if how is Arrivals.POISSON and pause_s > 0.0 else 0.0
            yield cls(pause, texts[place % len(texts)])
            place += 1
