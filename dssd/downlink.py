"""Downlink of p at a rejected position: how the edge chooses a form, and how the device draws from it.

`sparse` sends the shaped support. `samples` sends independent draws y of p with p(y): the device keeps each with
probability max(0, 1 - q(y)/p(y)) and takes the first that it keeps, which has distribution max(0, p - q), normalised;
it requests more if it keeps none. `dense` sends p over the whole vocabulary, the form of the paper.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from dssd.distribution import Dist, QuantizedDist
from dssd.sampling import Inversion, Purpose, draw, random_uniform, random_uniforms, residual
from schemas.downlink import MAX_SAMPLES, Dense, DownlinkForm, Samples, Sparse
from schemas.policy import SamplingPolicy

# With a realistic draft model a rejection needs about three samples, and 16 fail once in a hundred. If p is nearly q,
# 16 fail every other time.
FIRST_SAMPLES: Final = 16
SAMPLES_GROWTH: Final = 4


class FormName(StrEnum):
    """Form of p in a verdict; `AUTO` chooses the smallest that fits."""

    AUTO = "auto"
    SPARSE = "sparse"
    SAMPLES = "samples"
    DENSE = "dense"


def sparse(p: Dist) -> Sparse:
    return Sparse(ids=tuple(p.ids.tolist()), probs=tuple(p.probs.tolist()))


def samples(p: Dist, *, policy: SamplingPolicy, position: int, start: int, number: int) -> Samples:
    """Return draws `start` to `start + number - 1` of p; an index always gives the same draw."""
    indices = np.arange(start, start + number, dtype=np.int64)
    inversion = Inversion(p.probs)
    where = [inversion.place(uniform) for uniform in random_uniforms(policy.seed, position, Purpose.SAMPLE, indices)]
    return Samples(start=start, ids=tuple(p.ids[where].tolist()), probs=tuple(p.probs[where].tolist()))


def dense(p: Dist, vocabulary_size: int) -> Dense:
    values = np.zeros(vocabulary_size, dtype="<f4")
    values[p.ids] = p.probs
    return Dense(probs=values.tobytes())


@dataclass(frozen=True, slots=True)
class RejectedPosition:
    """What a form needs to know about a rejected position.

    `tried` is the number of samples that the device has rejected.
    """

    policy: SamplingPolicy
    position: int
    vocabulary_size: int
    max_bytes: int
    tried: int = 0

    @property
    def entry_bytes(self) -> int:
        return 6 if self.vocabulary_size <= 1 << 16 else 8

    @property
    def wanted_samples(self) -> int:
        """Number of samples that is likely to suffice."""
        return FIRST_SAMPLES if self.tried == 0 else SAMPLES_GROWTH * self.tried

    @property
    def samples(self) -> int:
        return min(self.wanted_samples, MAX_SAMPLES, max(1, self.max_bytes // self.entry_bytes))


@dataclass(frozen=True, slots=True, kw_only=True)
class FormRule:
    """How the edge makes one form of p, and how the device draws from it.

    Attributes:
        whole: Whether the form holds all of p. A partial form always fits and may need another round.
        size: Bytes of p in this form.
        make: Encodes p.
        correct: Draws the correction from max(0, p - q), normalised, or returns None if more is needed.
    """

    whole: bool
    size: Callable[[Dist, RejectedPosition], int]
    make: Callable[[Dist, RejectedPosition], DownlinkForm]
    correct: Callable[[Any, QuantizedDist, SamplingPolicy, int], int | None]


def choose_form(
    p: Dist,
    *,
    policy: SamplingPolicy,
    position: int,
    vocabulary_size: int,
    max_bytes: int,
    form: FormName = FormName.AUTO,
    tried: int = 0,
) -> DownlinkForm:
    """Encode p in the smallest form that fits `max_bytes`, or in `form` if that is given and fits."""
    rejected = RejectedPosition(policy, position, vocabulary_size, max_bytes, tried)
    if form is not FormName.AUTO:
        insisted = RULES[form]
        if not insisted.whole or insisted.size(p, rejected) <= max_bytes:
            return insisted.make(p, rejected)
    # top_k bounds the support. Without it, sending p pays only if the support is small or the first samples have
    # failed: then p is nearly q, and further samples would mostly fail too.
    if policy.top_k > 0 or len(p) <= rejected.wanted_samples or tried > 0:
        smallest = min((rule for rule in RULES.values() if rule.whole), key=lambda rule: rule.size(p, rejected))
        if smallest.size(p, rejected) <= max_bytes:
            return smallest.make(p, rejected)
    return RULES[FormName.SAMPLES].make(p, rejected)


def correct(form: DownlinkForm, quantized: QuantizedDist, *, policy: SamplingPolicy, position: int) -> int | None:
    """Draw the correction on the device from max(0, p - q), normalised; `quantized` is q.

    Return None if no sample was kept and more are needed. The caller checks that the vocabulary contains the token.
    """
    return RULES[FormName(form.kind)].correct(form, quantized, policy, position)


def probability_of(form: object, token: int) -> float:
    """Return the probability of a token that was drawn from a form; raise ValueError if it does not contain it."""
    match form:
        case Sparse() | Samples():
            return form.probs[form.ids.index(token)]
        case Dense():
            return float(np.frombuffer(form.probs, dtype="<f4")[token])
        case _:
            raise ValueError("not a form of p")


def _correct_from(p: Dist, quantized: QuantizedDist, policy: SamplingPolicy, position: int) -> int:
    return draw(residual(p, quantized), random_uniform(policy.seed, position, Purpose.RESIDUAL))


def _correct_sparse(form: Sparse, quantized: QuantizedDist, policy: SamplingPolicy, position: int) -> int:
    p = Dist(np.array(form.ids, dtype=np.int64), np.array(form.probs))
    return _correct_from(p, quantized, policy, position)


def _correct_dense(form: Dense, quantized: QuantizedDist, policy: SamplingPolicy, position: int) -> int:
    values = np.frombuffer(form.probs, dtype="<f4").astype(np.float64)
    support = np.flatnonzero(values)
    return _correct_from(Dist(support, values[support]), quantized, policy, position)


def _correct_samples(form: Samples, quantized: QuantizedDist, policy: SamplingPolicy, position: int) -> int | None:
    tokens = np.array(form.ids, dtype=np.int64)
    indices = np.arange(form.start, form.start + len(tokens), dtype=np.int64)
    uniform = random_uniforms(policy.seed, position, Purpose.THIN, indices)
    passed = np.flatnonzero(uniform * np.array(form.probs) >= quantized.probabilities(tokens))
    return int(tokens[passed[0]]) if len(passed) else None


def _draw_samples(p: Dist, rejected: RejectedPosition) -> Samples:
    return samples(p, policy=rejected.policy, position=rejected.position, start=rejected.tried, number=rejected.samples)


RULES: Final[Mapping[FormName, FormRule]] = MappingProxyType(
    {
        FormName.SPARSE: FormRule(
            whole=True,
            size=lambda p, rejected: rejected.entry_bytes * len(p),
            make=lambda p, _rejected: sparse(p),
            correct=_correct_sparse,
        ),
        FormName.SAMPLES: FormRule(
            whole=False,
            size=lambda _p, rejected: rejected.entry_bytes * rejected.samples,
            make=_draw_samples,
            correct=_correct_samples,
        ),
        FormName.DENSE: FormRule(
            whole=True,
            size=lambda _p, rejected: 4 * rejected.vocabulary_size,
            make=lambda p, rejected: dense(p, rejected.vocabulary_size),
            correct=_correct_dense,
        ),
    }
)
"""All forms by name; of two with equal size the first is sent."""
