"""Field types of session messages, with their bounds: a value outside them is no message."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from schemas.printable import PRINTABLE

MAX_DRAFT = 64
"""Most tokens in one draft, whatever an edge grants."""

MAX_WINDOW = 64
"""Most drafts of a session without a verdict, whatever an edge grants."""

SESSIONS_PER_DEVICE = 8
"""Default number of sessions that an edge grants one device, and of requests that a device runs at once."""

MAX_TOKENS = 1 << 17
"""Most tokens in a prompt or a continuation."""

MAX_SENTENCE = 500
MAX_LABEL = 200
MAX_CODE = 40
MAX_APP_NAME = 40
SESSION_BYTES = 8
TARGET_ID_BYTES = 8
MAX_POSITION = 1 << 20
MAX_VOCABULARY = 1 << 21
QUANTIZED_TOTAL = 1 << 16

U16 = Annotated[int, Field(ge=0, lt=1 << 16, strict=True)]
U32 = Annotated[int, Field(ge=0, lt=1 << 32, strict=True)]
Position = Annotated[int, Field(ge=0, lt=MAX_POSITION, strict=True)]
Count = Annotated[int, Field(ge=1, le=QUANTIZED_TOTAL, strict=True)]
SessionId = Annotated[bytes, Field(min_length=SESSION_BYTES, max_length=SESSION_BYTES, strict=True)]
TargetId = Annotated[bytes, Field(min_length=TARGET_ID_BYTES, max_length=TARGET_ID_BYTES, strict=True)]
TokenId = Annotated[int, Field(ge=0, lt=MAX_VOCABULARY, strict=True)]
Tokens = Annotated[tuple[TokenId, ...], Field(max_length=MAX_TOKENS, fail_fast=True)]
Milliseconds = Annotated[float, Field(ge=0.0, allow_inf_nan=False, strict=True)]
Seconds = Annotated[float, Field(ge=0.0, allow_inf_nan=False, strict=True)]
Code = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$", max_length=MAX_CODE, strict=True)]
Sentence = Annotated[str, Field(max_length=MAX_SENTENCE, strict=True), PRINTABLE]
AppName = Annotated[str, Field(min_length=1, max_length=MAX_APP_NAME, strict=True), PRINTABLE]
Label = Annotated[str, Field(max_length=MAX_LABEL, strict=True), PRINTABLE]


_CHANGED: Final = 0.25
"""Relative change of a time that is worth sending."""

_CHANGED_REQUESTS: Final = 0.125
"""Likewise of the number of requests, which all estimates of shared steps depend on."""

_CHANGED_ACCEPTANCE: Final = 0.05


class EdgeLoad(BaseModel):
    """Load of an edge, and what its steps take. Times are None until enough different steps were measured.

    Attributes:
        requests: Running requests, including the receiver's.
        writing_ms: Time per token of each if the edge decoded all of them alone: a step, or less with n-gram
            speculation.
        step_ms: Fixed time of a step that verifies drafts.
        request_ms: Additional time per request, with its first token.
        token_ms: Additional time per further token of a request.
        acceptance: Of tokens drafted with the receiver's draft model, the share accepted lately, as the median of its
            devices; None if unknown.
        free: Further tokens of the receiver's request that cost nothing: batch-invariant decoding pads to this number.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    requests: Annotated[int, Field(ge=1, lt=1 << 16, strict=True)]
    writing_ms: Milliseconds | None = None
    step_ms: Milliseconds | None = None
    request_ms: Milliseconds | None = None
    token_ms: Milliseconds | None = None
    acceptance: Annotated[float, Field(ge=0.0, le=1.0, strict=True)] | None = None
    free: Annotated[int, Field(ge=0, le=MAX_DRAFT, strict=True)] = 0

    def differs(self, sent: "EdgeLoad") -> bool:
        """Compare with the load last sent; small changes are not worth a message's bytes."""
        if (self.requests == 1) is not (sent.requests == 1):
            return True
        if abs(self.requests - sent.requests) > _CHANGED_REQUESTS * max(self.requests, sent.requests):
            return True
        times = [(getattr(self, name), getattr(sent, name)) for name in _TIMES]
        return any(_differ(now, before, _CHANGED * max(now or 0.0, before or 0.0)) for now, before in times) or _differ(
            self.acceptance, sent.acceptance, _CHANGED_ACCEPTANCE
        )


_TIMES: Final = ("writing_ms", "step_ms", "request_ms", "token_ms")


def _differ(now: float | None, before: float | None, most: float) -> bool:
    if now is None or before is None:
        return now is not before
    return abs(now - before) > most


MAX_TOP_LOGPROBS: Final = 20
"""Most likely tokens of a position that can be requested."""

MIN_LOGPROB: Final = -9999.0
"""Replaces smaller values: the logarithm of 0 is no number."""

_Logprob = Annotated[float, Field(ge=MIN_LOGPROB, le=1e-3, allow_inf_nan=False, strict=True)]
_Offset = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False, strict=True)]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position.

    Attributes:
        logprob: The token's own; or the offset, if the device draws the token.
        ids: Most likely tokens, in descending order.
        values: Their log-probabilities.
    """

    logprob: float
    ids: tuple[int, ...] = ()
    values: tuple[float, ...] = ()


class Logprobs(BaseModel):
    """Log-probabilities of a verdict's tokens, in order: three typed arrays on the wire.

    They are the target's own before shaping: natural logarithms of softmax(logits), as if the temperature were 1 and
    nothing were cut off or ruled out.

    The edge does not know a correction that the device draws. Instead of its log-probability there is an offset: with p
    as received, the token's log-probability is `offset + temperature * log p(token)`. That is exact, since shaping
    divides the logits by the temperature and removes tokens, but does not change their ratios.

    Attributes:
        own: Of each token; the offset for a correction that the device draws.
        ids: Most likely tokens at each position, the same number for each.
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
            raise ValueError("the number of most likely tokens differs between positions, or is too high")
        return self

    @classmethod
    def of(cls, tokens: Sequence[TokenLogprobs]) -> Self:
        return cls(
            own=tuple(each.logprob for each in tokens),
            ids=tuple(token for each in tokens for token in each.ids),
            values=tuple(value for each in tokens for value in each.values),
        )

    def tokens(self) -> tuple[TokenLogprobs, ...]:
        most = len(self.ids) // len(self.own)
        return tuple(
            TokenLogprobs(
                own, self.ids[place * most : (place + 1) * most], self.values[place * most : (place + 1) * most]
            )
            for place, own in enumerate(self.own)
        )
