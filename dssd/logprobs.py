"""Log-probabilities of the target before shaping."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dssd.distribution import Dist
from schemas.logprobs import LEAST_LOGPROB, TokenLogprobs
from schemas.policy import SamplingPolicy


def logprobs_of_token(logits: NDArray[Any], token: int, *, most: int) -> TokenLogprobs:
    """Return the log-probabilities of a token and of the most likely ones.

    Args:
        logits: `[vocabulary]`, logits of the target, not shaped.
        token: The token at this position.
        most: Number of most likely tokens.
    """
    row = _log_softmax(logits)
    ids, values = _likeliest(row, most)
    return TokenLogprobs(_bounded(row[token]), ids, values)


def logprobs_of_rejection(logits: NDArray[Any], p: Dist, *, policy: SamplingPolicy, most: int) -> TokenLogprobs:
    """Return what a device needs to compute the log-probability of its correction.

    Args:
        logits: `[vocabulary]`, logits of the target, not shaped.
        p: Their shaped distribution.
        policy: Sampling policy of the session.
        most: Number of most likely tokens.
    """
    row = _log_softmax(logits)
    ids, values = _likeliest(row, most)
    place = int(np.argmax(p.probs))  # float32 is most accurate where p is largest
    offset = float(row[p.ids[place]]) - policy.temperature * math.log(float(np.float32(p.probs[place])))
    return TokenLogprobs(offset, ids, values)


def logprobs_of_correction(rejection: TokenLogprobs, probability: float, *, policy: SamplingPolicy) -> TokenLogprobs:
    """Return the log-probabilities of a correction.

    Args:
        rejection: Log-probabilities that the edge sent with p.
        probability: Probability of the correction in p.
        policy: Sampling policy of the session.
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
    ids = ids[np.lexsort((ids, -row[ids]))]  # ties: the lower id first
    return tuple(ids.tolist()), tuple(_bounded(value) for value in row[ids])


def _bounded(value: float) -> float:
    return min(0.0, max(LEAST_LOGPROB, float(value)))
