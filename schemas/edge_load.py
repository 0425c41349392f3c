"""Load of an edge, as it tells devices: how many texts it has, and what its steps take."""

from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

from schemas.bounds import MAX_DRAFT, Milliseconds

_NEWS: Final = 0.25
"""By which share a time must have changed to be told anew."""

_NEWS_OF_TEXTS: Final = 0.125
"""Likewise the number of texts, in which all that a device reckons of shared steps grows."""

_NEWS_OF_ACCEPTANCE: Final = 0.05


class EdgeLoad(BaseModel):
    """What an edge does at present, and what its steps take; None of what steps have not differed enough in to tell.

    Attributes:
        texts: That it writes or has verified lately, the receiver's counted in.
        writing_ms: Time for a token of each if it wrote all of them by itself: a step, or less where it guesses some.
        step_ms: A step that verifies drafts, however little is in it.
        text_ms: By how much each text makes that longer, with its first token.
        token_ms: By how much each further token of a text does.
        acceptance: Of tokens drafted with the receiver's draft model, the share that was accepted lately here, as the
            median of its devices; None while too little is known.
        free: Further tokens of the receiver's text that cost nothing: a text that is to repeat, to the bit, may be
            computed in no fewer.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    texts: Annotated[int, Field(ge=1, lt=1 << 16, strict=True)]
    writing_ms: Milliseconds | None = None
    step_ms: Milliseconds | None = None
    text_ms: Milliseconds | None = None
    token_ms: Milliseconds | None = None
    acceptance: Annotated[float, Field(ge=0.0, le=1.0, strict=True)] | None = None
    free: Annotated[int, Field(ge=0, le=MAX_DRAFT, strict=True)] = 0

    def differs(self, told: "EdgeLoad") -> bool:
        """Whether it is worth telling a device that was told another one."""
        if (self.texts == 1) is not (told.texts == 1):
            return True
        if abs(self.texts - told.texts) > _NEWS_OF_TEXTS * max(self.texts, told.texts):
            return True
        times = [(getattr(self, name), getattr(told, name)) for name in _TIMES]
        return any(_differ(now, before, _NEWS * max(now or 0.0, before or 0.0)) for now, before in times) or _differ(
            self.acceptance, told.acceptance, _NEWS_OF_ACCEPTANCE
        )


_TIMES: Final = ("writing_ms", "step_ms", "text_ms", "token_ms")


def _differ(now: float | None, before: float | None, most: float) -> bool:
    if now is None or before is None:
        return now is not before
    return abs(now - before) > most
