"""Log-probabilities of tokens, as a verdict carries them: the target's own, before any shaping.

They are natural logarithms of softmax(logits): as if the temperature were 1, and nothing were cut off or ruled out.

A correction that the device draws is not known to the edge. There, in place of its log-probability, stands an offset:
with p as it came down, the token's log-probability is `offset + temperature * log p(token)`. That is exact, since
shaping divides the logits by the temperature and leaves out tokens, but changes none beside another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from schemas.downlink import TokenId

MAX_TOP_LOGPROBS: Final = 20
"""Most of a position's likeliest tokens that can be asked for."""

LEAST_LOGPROB: Final = -9999.0
"""Stands for all that is less: the logarithm of a probability of 0 is no number."""

_Logprob = Annotated[float, Field(ge=LEAST_LOGPROB, le=1e-3, allow_inf_nan=False, strict=True)]
_Offset = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False, strict=True)]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One token's.

    Attributes:
        logprob: The token's own; or the offset, where the device draws it.
        ids: The likeliest tokens at its place, the likeliest first.
        values: Their log-probabilities.
    """

    logprob: float
    ids: tuple[int, ...] = ()
    values: tuple[float, ...] = ()


class Logprobs(BaseModel):
    """Those of a verdict's tokens, in order: three typed arrays on the wire.

    Attributes:
        own: Of each token; of a correction that the device draws the offset.
        ids: The likeliest tokens at each place, as many for each.
        values: Their log-probabilities.
    """

    model_config = ConfigDict(frozen=True)

    own: Annotated[tuple[_Offset, ...], Field(min_length=1, fail_fast=True)]
    ids: Annotated[tuple[TokenId, ...], Field(fail_fast=True)]
    values: Annotated[tuple[_Logprob, ...], Field(fail_fast=True)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.ids) != len(self.values):
            raise ValueError("ids and log-probabilities differ in number")
        each, rest = divmod(len(self.ids), len(self.own))
        if rest or each > MAX_TOP_LOGPROBS:
            raise ValueError("the likeliest tokens are not as many for each place, or too many")
        return self

    @classmethod
    def of(cls, tokens: Sequence[TokenLogprobs]) -> Self:
        """Return those of some tokens; at least one."""
        return cls(
            own=tuple(each.logprob for each in tokens),
            ids=tuple(token for each in tokens for token in each.ids),
            values=tuple(value for each in tokens for value in each.values),
        )

    def tokens(self) -> tuple[TokenLogprobs, ...]:
        most = len(self.ids) // len(self.own)
        return tuple(
            TokenLogprobs(
                own,
                self.ids[place * most : (place + 1) * most],
                self.values[place * most : (place + 1) * most],
            )
            for place, own in enumerate(self.own)
        )
