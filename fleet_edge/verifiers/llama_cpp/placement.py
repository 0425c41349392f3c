"""Placement of sequences: when to move which to another stream, so that those computed together are neighbours.

llama.cpp computes neighbouring streams in one pass over the weights (see `layout`). Between the running sequences lie
others that are kept for their prefix, or whose devices are silent, and the longer an edge serves, the more passes a
step takes. Moving a sequence costs less than one pass. Each step adds what it has lost to a debt, and sequences are
moved once that is more than moving costs: the total is at most twice that of the best plan, whatever comes.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

_PATIENCE: Final = 2
"""A sequence counts as active for this many times the longest pause between two of its steps."""

_SHORTEST_PAUSE: Final = 2
_FIRST_PAUSE: Final = 4
_LONGEST_PAUSE: Final = 64
"""Steps: a device that is silent for longer may not come back."""

_COPIED_TOKENS: Final = 1.0 / 64
"""Price of copying a token's keys and values, in tokens computed in a batch. On one core with a model of 135 million
weights, which has many for its size, copying takes 0.014 ms and computing 5.6 ms."""

_COPY_OVERHEAD: Final = 64
"""Tokens that take as long to copy as a copy takes however short it is."""


@dataclass(slots=True)
class _Use:
    step: int
    pause: int = _FIRST_PAUSE


@dataclass(slots=True)
class ActiveSequences:
    """Sequences that are likely to be in one of the next steps, by how often they were in the latest."""

    _step: int = 0
    _uses: dict[int, _Use] = field(default_factory=dict)

    def step(self, sequences: Iterable[int]) -> None:
        """Note which sequences the next step has."""
        self._step += 1
        for sequence in sequences:
            use = self._uses.setdefault(sequence, _Use(self._step))
            use.pause = min(_LONGEST_PAUSE, max(self._step - use.step, use.pause * 3 // 4, _SHORTEST_PAUSE))
            use.step = self._step

    def began(self, sequence: int) -> None:
        """Note that a sequence is going to be in one of the next steps."""
        self._uses[sequence] = _Use(self._step)

    def forget(self, sequence: int) -> None:
        """Note that a sequence has ended."""
        self._uses.pop(sequence, None)

    def __contains__(self, sequence: int) -> bool:
        use = self._uses.get(sequence)
        return use is not None and self._step - use.step <= _PATIENCE * use.pause


def nearest(free: Iterable[int], active: Sequence[int]) -> int:
    """Return the free stream that is nearest to those of active sequences; of several the lowest."""
    return min(free, key=lambda stream: (min((abs(stream - each) for each in active), default=0), stream))


@dataclass(frozen=True, slots=True)
class Moves:
    """Streams to exchange.

    Attributes:
        pairs: Streams whose sequences, of which the first may be none, change places.
        price: What that costs, in tokens computed in a batch.
    """

    pairs: tuple[tuple[int, int], ...]
    price: float


def plan_moves(active: Sequence[int], *, lengths: Mapping[int, int], begins: Iterable[int]) -> Moves | None:
    """Return the cheapest moves after which the active sequences are neighbours; None without a place for all of them.

    Args:
        active: Streams of the active sequences, rising.
        lengths: By stream that has a sequence, its tokens.
        begins: First streams of the places that there are for them.
    """
    best: Moves | None = None
    for begin in begins:
        place = range(begin, begin + len(active))
        holes = sorted(set(place).difference(active))
        outside = [stream for stream in active if stream not in place]
        copied = [lengths[stream] for stream in (*holes, *outside) if stream in lengths]
        price = _COPIED_TOKENS * (sum(copied) + _COPY_OVERHEAD * len(copied))
        if best is None or price < best.price:
            best = Moves(tuple(zip(holes, outside, strict=True)), price)
    return best
