"""Steps of verifiers, timed: so many sequences with so many new tokens each, behind a context that is computed."""

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fleet_edge.verifiers.contract import Item, Verifier

__all__ = ["StepTime", "time_steps"]

_WARM_UP = 2


@dataclass(frozen=True, slots=True)
class StepTime:
    """What a step took.

    Attributes:
        engine: By name.
        sequences: How many.
        tokens: New ones of each.
        context: Tokens of each that were computed before.
        ms: Median.
        best_ms: The shortest.
    """

    engine: str
    sequences: int
    tokens: int
    context: int
    ms: float
    best_ms: float


def time_steps(
    verifiers: Mapping[str, Verifier],
    *,
    sequences: Sequence[int],
    tokens: Sequence[int],
    context: int,
    repeats: int,
    seed: int = 1,
) -> list[StepTime]:
    """Time steps of several engines, in turns: each size with all engines before the next size.

    New tokens are drawn anew for every repeat, so that a server has nothing of them in its prefix cache.

    Args:
        verifiers: By name; none has an open sequence.
        sequences: Sizes of a step.
        tokens: New tokens of a sequence, each of whose rows is wanted.
        context: Tokens of a sequence that are computed before.
        repeats: Timed steps of each size.
        seed: Of the tokens.
    """
    rng = random.Random(seed)
    vocabulary = range(min(verifier.info.vocabulary.size for verifier in verifiers.values()))
    found = []
    for number in sequences:
        for verifier in verifiers.values():
            for key in range(number):
                verifier.open(key)
                verifier.score([Item(key, rng.choices(vocabulary, k=context), 1)])
        for new in tokens:
            for name, verifier in verifiers.items():
                steps = [
                    [Item(key, rng.choices(vocabulary, k=new), new) for key in range(number)]
                    for _ in range(_WARM_UP + repeats)
                ]
                times = [_time(verifier, items, back_to=context) for items in steps][_WARM_UP:]
                found.append(StepTime(name, number, new, context, statistics.median(times), min(times)))
        for verifier in verifiers.values():
            for key in range(number):
                verifier.close(key)
    return found


def _time(verifier: Verifier, items: Sequence[Item], *, back_to: int) -> float:
    """Return the milliseconds of one step, which is taken back afterwards."""
    started = time.perf_counter()
    verifier.score(items)
    taken = 1e3 * (time.perf_counter() - started)
    for item in items:
        verifier.truncate(item.sequence, back_to)
    return taken
