"""A step: what a verdict has done to the text, for whoever drives the session and its drafter."""

from dataclasses import dataclass

from schemas.messages import Draft

__all__ = ["Step"]


@dataclass(frozen=True, slots=True)
class Step:
    """What a verdict has done.

    Attributes:
        tokens: Newly committed.
        valid: Length of the text that the drafter proposed itself and that still stands.
        correction: The token behind it that the drafter has not seen, drawn by the edge or in its name: the drafter's
            sequence is to be cut to `valid` and to go on with it. None where the drafter has nothing to learn.
        request: A further draft message to send at once: more samples are needed.
    """

    tokens: tuple[int, ...] = ()
    valid: int = 0
    correction: int | None = None
    request: Draft | None = None
