"""Log-probabilities of the target before shaping: at the edge from a row of logits, on the device for a correction."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dssd.distribution import Dist
from schemas.logprobs import LEAST_LOGPROB, TokenLogprobs
from schemas.policy import SamplingPolicy

__all__ = ["logprobs_of_correction", "logprobs_of_rejection", "logprobs_of_token"]


def logprobs_of_token(logits: NDArray[Any], token: int, *, most: int) -> TokenLogprobs:
    """Return the log-probabilities of a token and of the likeliest ones.

    Args:
        logits: `[vocabulary]`, of the target, not shaped.
        token: That stands at their place.
        most: Of the likeliest tokens.
    """
    row = _log_softmax(logits)
    ids, values = _likeliest(row, most)
    return TokenLogprobs(_bounded(row[token]), ids, values)


def logprobs_of_rejection(logits: NDArray[Any], p: Dist, *, policy: SamplingPolicy, most: int) -> TokenLogprobs:
    """Return what a device needs to know the log-probability of the correction that it draws.

    Args:
        logits: As for a token.
        p: What they are shaped to.
        policy: By which.
        most: As for a token.
    """
    row = _log_softmax(logits)
    ids, values = _likeliest(row, most)
    place = int(np.argmax(p.probs))  # in float32 p is surest where it is largest
    offset = float(row[p.ids[place]]) - policy.temperature * math.log(float(np.float32(p.probs[place])))
    return TokenLogprobs(offset, ids, values)


def logprobs_of_correction(rejection: TokenLogprobs, probability: float, *, policy: SamplingPolicy) -> TokenLogprobs:
    """Return the log-probabilities of a correction.

    Args:
        rejection: As the edge has sent them with p.
        probability: Of the correction in p.
        policy: The session's.
    """
    own = rejection.logprob + policy.temperature * math.log(probability)
    return replace(rejection, logprob=min(0.0, max(LEAST_LOGPROB, own)))


def _log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    wide = np.asarray(logits, dtype=np.float64)
    shifted = wide - wide.max()
    return np.asarray(shifted - math.log(float(np.exp(shifted).sum())))


def _likeliest(row: NDArray[np.float64], most: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    most = min(most, len(row))
    if not most:
        return (), ()
    ids = np.argpartition(row, len(row) - most)[len(row) - most :]
    ids = ids[np.lexsort((ids, -row[ids]))]  # of equal ones the lower id first
    return tuple(ids.tolist()), tuple(_bounded(value) for value in row[ids])


def _bounded(value: float) -> float:
    return min(0.0, max(LEAST_LOGPROB, float(value)))
