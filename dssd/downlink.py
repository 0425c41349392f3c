"""Downlink of p at a rejected position: the choice of its form, and the device's draw from each.

`sparse` sends the shaped support. `samples` sends independent draws y of p with p(y): the device keeps the first that
passes a coin of probability max(0, 1 - q(y)/p(y)), which has law max(0, p - q), and asks for more if none does. `dense`
sends p over the whole vocabulary, the paper's own form.
"""

from enum import StrEnum
from typing import Final

import numpy as np

from dssd.counter_rng import Purpose, random_uniform, random_uniforms
from dssd.distribution import Dist
from dssd.quantized import QuantizedDist
from dssd.residual import draw, residual
from schemas.downlink import MAX_SAMPLES, Dense, DownlinkForm, Samples, Sparse
from schemas.policy import SamplingPolicy

__all__ = ["Form", "choose_form", "correct", "dense", "samples", "sparse"]

# With a realistic draft a rejection needs about three tries and 16 fail once in a hundred; where p is nearly q they
# fail every other time.
FIRST_SAMPLES: Final = 16
SAMPLES_GROWTH: Final = 4


class Form(StrEnum):
    """How p goes down; `AUTO` takes the smallest that fits."""

    AUTO = "auto"
    SPARSE = "sparse"
    SAMPLES = "samples"
    DENSE = "dense"


def sparse(p: Dist) -> Sparse:
    """Return p's support and probabilities."""
    return Sparse(ids=tuple(p.ids.tolist()), probs=tuple(p.probs.tolist()))


def samples(p: Dist, *, policy: SamplingPolicy, position: int, start: int, number: int) -> Samples:
    """Return draws number `start` to `start + number - 1` of p; each index is one draw for good."""
    indices = np.arange(start, start + number, dtype=np.int64)
    mass = np.cumsum(p.probs)
    uniform = random_uniforms(policy.seed, position, Purpose.SAMPLE, indices)
    where = np.minimum(np.searchsorted(mass, uniform * mass[-1], side="right"), len(p) - 1)
    return Samples(start=start, ids=tuple(p.ids[where].tolist()), probs=tuple(p.probs[where].tolist()))


def dense(p: Dist, vocabulary_size: int) -> Dense:
    """Return p over the whole vocabulary."""
    values = np.zeros(vocabulary_size, dtype="<f4")
    values[p.ids] = p.probs
    return Dense(probs=values.tobytes())


def choose_form(
    p: Dist,
    *,
    policy: SamplingPolicy,
    position: int,
    vocabulary_size: int,
    max_bytes: int,
    form: Form = Form.AUTO,
    tried: int = 0,
) -> DownlinkForm:
    """Put p into the smallest form that fits.

    Args:
        p: The target's distribution at the rejected position.
        policy: The session's.
        position: The rejected position.
        vocabulary_size: Of the target.
        max_bytes: Room for the form in a packet.
        form: A form to insist on, as long as it fits.
        tried: Samples that the device has tried in vain.
    """
    width = 6 if vocabulary_size <= 1 << 16 else 8
    sparse_bytes, dense_bytes = width * len(p), 4 * vocabulary_size
    if form is Form.DENSE and dense_bytes <= max_bytes:
        return dense(p, vocabulary_size)
    if form is Form.SPARSE and sparse_bytes <= max_bytes:
        return sparse(p)
    number = FIRST_SAMPLES if tried == 0 else SAMPLES_GROWTH * tried
    # A policy with top_k bounds the support; without it p is worth its bytes only if it is short, or if a first
    # lot of samples has failed: p is nearly q then, and the next lots would mostly fail too.
    whole = form is not Form.SAMPLES and (policy.top_k > 0 or len(p) <= number or tried > 0)
    if whole and min(sparse_bytes, dense_bytes) <= max_bytes:
        return sparse(p) if sparse_bytes <= dense_bytes else dense(p, vocabulary_size)
    number = min(number, MAX_SAMPLES, max(1, max_bytes // width))
    return samples(p, policy=policy, position=position, start=tried, number=number)


def correct(form: DownlinkForm, quantized: QuantizedDist, *, policy: SamplingPolicy, position: int) -> int | None:
    """Draw the correction on the device.

    Args:
        form: p as it came down.
        quantized: The q from which the rejected token was drawn.
        policy: The session's.
        position: The rejected position.

    Returns:
        The token, with law max(0, p - q) normalised; None if no sample passed and more are needed. Whether the
        vocabulary has it is the caller's to check.
    """
    match form:
        case Sparse(ids=ids, probs=probs):
            p = Dist(np.array(ids, dtype=np.int64), np.array(probs))
        case Dense(probs=raw):
            values = np.frombuffer(raw, dtype="<f4").astype(np.float64)
            support = np.flatnonzero(values)
            p = Dist(support, values[support])
        case Samples(start=start, ids=ids, probs=probs):
            return _thin(start, ids, probs, quantized, policy=policy, position=position)
    return draw(residual(p, quantized), random_uniform(policy.seed, position, Purpose.RESIDUAL))


def _thin(
    start: int,
    ids: tuple[int, ...],
    probs: tuple[float, ...],
    quantized: QuantizedDist,
    *,
    policy: SamplingPolicy,
    position: int,
) -> int | None:
    tokens = np.array(ids, dtype=np.int64)
    indices = np.arange(start, start + len(tokens), dtype=np.int64)
    uniform = random_uniforms(policy.seed, position, Purpose.THIN, indices)
    passed = np.flatnonzero(uniform * np.array(probs) >= quantized.probabilities(tokens))
    return int(tokens[passed[0]]) if len(passed) else None
