"""Trial run: a GGUF is served only if its rows do not depend on how a text was cut, rolled back, copied and batched."""

import random
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fleet_edge.verifiers.contract import Item, UnsupportedModel, Verifier

_LENGTH: Final = 24
_SEED: Final = 20_261_125

_TOLERANCE: Final = 0.1
"""Root mean square of the difference over the standard deviation of the logits: kernels for few and for many tokens
round in unlike ways, which makes some 1e-2; a rollback that is none makes 0.1 to 1."""

_REPEATS: Final = 3
_MANY: Final = 17
_MOST_CALL_TOKENS: Final = 64.0


def run_trial(verifier: Verifier) -> None:
    """Hold rows after chunks, rollback and a copy against those of the whole text at once; leaves no sequence behind.

    Raises:
        UnsupportedModel: They differ, or the model takes no tokens back.
    """
    length = min(_LENGTH, verifier.info.context - 1)
    text = random.Random(_SEED).choices(range(verifier.info.vocabulary.size), k=length)  # noqa: S311 - no secret
    cut = length // 3
    first, second, third = -1, -2, -3  # no session has these
    try:
        verifier.open(first)
        whole = _rows(verifier, [Item(first, text, length - cut)])
        verifier.close(first)
        verifier.open(first)
        verifier.score([Item(first, text[:cut], 0)])
        verifier.score([Item(first, text[1 : cut + 1], 1)])
        verifier.truncate(first, cut)
        cut_rows = _rows(verifier, [Item(first, text[cut:], length - cut)])
        pairs = [(whole, cut_rows)]
        if verifier.fits([Item(second, [0], 0)]):
            verifier.fork(second, first, cut + 1)
            pairs.append((whole[1:], _rows(verifier, [Item(second, text[cut + 1 :], length - cut - 1)])))
    finally:
        for sequence in (first, second, third):
            verifier.close(sequence)
    for one, other in pairs:
        distance = float(np.sqrt(np.square(one - other).mean()) / max(one.std(), 1e-9))
        if not distance <= _TOLERANCE:  # also if it is not a number
            raise UnsupportedModel(
                f"{verifier.info.name} cannot be served: in a trial run its logits after a rollback were off by "
                f"{distance:.1e} of their spread; choose another target model, or the engine torch."
            )


def measure_call_tokens(verifier: Verifier, clock: Callable[[], float]) -> float:
    """Return as how many tokens one pass over the weights costs, 1 to 64.

    Args:
        verifier: Without sequences; it is left so.
        clock: Monotonic seconds.
    """
    sequence = -1
    many = min(_MANY, verifier.info.context - 1)
    verifier.open(sequence)
    try:
        verifier.score([Item(sequence, [0], 0)])
        one_s, many_s = (_seconds(verifier, sequence, count, clock) for count in (1, many))
    finally:
        verifier.close(sequence)
    token_s = (many_s - one_s) / max(1, many - 1)
    if token_s * _MOST_CALL_TOKENS <= one_s:
        return _MOST_CALL_TOKENS
    return max(1.0, one_s / token_s - 1.0)


def _seconds(verifier: Verifier, sequence: int, count: int, clock: Callable[[], float]) -> float:
    least = float("inf")
    for _ in range(_REPEATS):
        before = clock()
        verifier.score([Item(sequence, [0] * count, 1)])
        least = min(least, clock() - before)
        verifier.truncate(sequence, 1)
    return least


def _rows(verifier: Verifier, items: Sequence[Item]) -> NDArray[np.float32]:
    """Return a copy of a step's rows, which the next step would overwrite."""
    found: Any = verifier.score(items)
    return np.array(found, dtype=np.float32)
