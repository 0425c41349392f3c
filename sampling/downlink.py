"""Downlink of p at a rejected position: how the edge chooses a form, and how the device draws from it.

`sparse` sends the shaped support. `samples` sends independent draws y of p with p(y): the device keeps each with
probability max(0, 1 - q(y)/p(y)) and takes the first that it keeps, which has distribution max(0, p - q), normalised;
it requests more if it keeps none. `dense` sends p over the whole vocabulary, the form of the paper.
"""

from enum import StrEnum
from typing import Final

import numpy as np

from sampling.distribution import Dist, QuantizedDist
from sampling.drawing import Inversion, Purpose, draw, random_uniform, random_uniforms, residual
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


def entry_bytes(vocabulary_size: int) -> int:
    """Return the bytes of a token id and its probability."""
    return 6 if vocabulary_size <= 1 << 16 else 8


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
    """Encode p in the smallest form that fits `max_bytes`, or in `form` if that is given and fits.

    `tried` is the number of samples that the device has rejected. Samples always fit, and may need another round.
    """
    entry = entry_bytes(vocabulary_size)
    wanted = FIRST_SAMPLES if tried == 0 else SAMPLES_GROWTH * tried  # number of samples that is likely to suffice
    sizes = {FormName.SPARSE: entry * len(p), FormName.DENSE: 4 * vocabulary_size}
    chosen = form
    if sizes.get(form, 0) > max_bytes or form is FormName.AUTO:
        # top_k bounds the support. Without it, sending p pays only if the support is small or the first samples have
        # failed: then p is nearly q, and further samples would mostly fail too.
        pays = policy.top_k > 0 or len(p) <= wanted or tried > 0
        smallest = min(sizes, key=lambda name: sizes[name])
        chosen = smallest if pays and sizes[smallest] <= max_bytes else FormName.SAMPLES
    match chosen:
        case FormName.SPARSE:
            return sparse(p)
        case FormName.DENSE:
            return dense(p, vocabulary_size)
        case _:
            number = min(wanted, MAX_SAMPLES, max(1, max_bytes // entry))
            return samples(p, policy=policy, position=position, start=tried, number=number)


def correct(form: DownlinkForm, quantized: QuantizedDist, *, policy: SamplingPolicy, position: int) -> int | None:
    """Draw the correction on the device from max(0, p - q), normalised; `quantized` is q.

    Return None if no sample was kept and more are needed. The caller checks that the vocabulary contains the token.
    """
    match form:
        case Sparse():
            p = Dist(np.array(form.ids, dtype=np.int64), np.array(form.probs))
        case Dense():
            values = np.frombuffer(form.probs, dtype="<f4").astype(np.float64)
            support = np.flatnonzero(values)
            p = Dist(support, values[support])
        case Samples():
            tokens = np.array(form.ids, dtype=np.int64)
            indices = np.arange(form.start, form.start + len(tokens), dtype=np.int64)
            uniform = random_uniforms(policy.seed, position, Purpose.THIN, indices)
            passed = np.flatnonzero(uniform * np.array(form.probs) >= quantized.probabilities(tokens))
            return int(tokens[passed[0]]) if len(passed) else None
        case _:
            raise ValueError("not a form of p")
    return draw(residual(p, quantized), random_uniform(policy.seed, position, Purpose.RESIDUAL))


def probability_of(form: object, token: int) -> float:
    """Return the probability of a token that was drawn from a form; raise ValueError if it does not contain it."""
    match form:
        case Sparse() | Samples():
            return form.probs[form.ids.index(token)]
        case Dense():
            return float(np.frombuffer(form.probs, dtype="<f4")[token])
        case _:
            raise ValueError("not a form of p")
