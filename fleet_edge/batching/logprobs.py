"""Log-probabilities of what a step has decided, for the sessions that ask for them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dssd.verification import Judgement, logprobs_of_rejection, logprobs_of_token
from schemas.policy import SamplingPolicy


class _Case(Protocol):
    @property
    def tokens(self) -> Sequence[int]: ...

    @property
    def policy(self) -> SamplingPolicy: ...

    @property
    def logprobs(self) -> int | None: ...


def tell_logprobs(
    judgement: Judgement, case: _Case, row_at: Callable[[int], NDArray[np.float32]], start: int
) -> Judgement:
    """Return a judgement that tells the log-probabilities of its tokens.

    Args:
        judgement: What was decided.
        case: On what.
        row_at: Returns a row of the step's logits, not shaped.
        start: Number of the case's first row.
    """
    most = case.logprobs or 0
    tokens = case.tokens[: judgement.accepted]
    if judgement.token is not None:
        tokens = (*tokens, judgement.token)
    told = [logprobs_of_token(row_at(start + place), token, most=most) for place, token in enumerate(tokens)]
    if judgement.p is not None:
        row = row_at(start + judgement.accepted)
        told.append(logprobs_of_rejection(row, judgement.p, policy=case.policy, most=most))
    return replace(judgement, logprobs=tuple(told))
