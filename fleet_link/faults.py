"""How a broker in memory misbehaves."""

from dataclasses import dataclass

__all__ = ["Faults"]


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong between the broker and a subscriber, each with its probability.

    Attributes:
        drop: A message is never delivered.
        duplicate: It is delivered twice.
        delay: It is held back for 1 to `max_delay` steps, so that others overtake it.
        max_delay: Longest delay in steps.
        reorder: It overtakes the one before it, if that still waits.
        only: Filter of the topics that suffer; the others do not.
    """

    drop: float = 0.0
    duplicate: float = 0.0
    delay: float = 0.0
    max_delay: int = 8
    reorder: float = 0.0
    only: str = "#"
