"""Block verification (Sun et al., arXiv 2403.10444), split between edge and device.

With P_0 = 1 and P_i = min(1, P_{i-1} p(x_i) / q(x_i)), the method accepts the whole block with probability P_n.
Otherwise it goes from i = n - 1 down to 0 and stops at i with probability S / (S + 1 - P_i), where S is the sum of
max(0, P_i p - q) after i tokens. There it accepts i tokens and draws the correction from max(0, P_i p - q), normalised.

Only the device knows q of all tokens, and only the edge knows p. Both decisions at i are the end of one race: draw u;
if u >= P_i, i has failed; else draw y from p, and stop with the correction y if q(y) < (P_i - u) p(y). A draw stops
with probability S and fails with probability 1 - P_i. The edge sends the draws before each failure, each a *try*
(i, y, (P_i - u) p(y)); the device takes the first that meets its condition. At i = 0 nothing fails.

A later draft of a rejected position depends on the numbers that were drawn there. So all numbers of a block are keyed
by its start, which no other decided block has: of the device's n-th draw, and of the n-th draw of the race.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from dssd.distribution import TOTAL, Dist, Float, QuantizedDist
from dssd.sampling import Purpose, inverse, random_uniform
from schemas.downlink import Tries


@dataclass(slots=True, eq=False)
class RejectedBlock:
    """A block that is not accepted whole, and the race for how many of its tokens are.

    Attributes:
        rows: p after 0, 1, 2, … tokens of the block, as far as a race may stop.
        reached: P after as many tokens.
        seed: Of the policy.
        start: Position of the block's first token.
        offered: Number of accepted tokens and correction of each try so far.
    """

    rows: list[Dist]
    reached: list[float]
    seed: int
    start: int
    offered: list[tuple[int, int]] = field(default_factory=list)
    _drawn: int = 1  # numbers; number 0 has decided on the whole block

    def tries(self, number: int) -> Tries:
        """Return the next tries of the race."""
        first, bounds, mass = len(self.offered), list[float](), _mass(self.rows[-1])
        while len(bounds) < number:
            left = self.reached[-1] - random_uniform(self.seed, self.start, Purpose.ACCEPT, self._drawn)
            if left <= 0.0:
                # Nothing returns to a longer head.
                self.rows.pop()
                self.reached.pop()
                mass = _mass(self.rows[-1])
            else:
                p = self.rows[-1]
                place = inverse(mass, random_uniform(self.seed, self.start, Purpose.SAMPLE, self._drawn))
                self.offered.append((len(self.rows) - 1, int(p.ids[place])))
                bounds.append(left * float(p.probs[place]))
            self._drawn += 1
        heads, ids = zip(*self.offered[first:], strict=True)
        return Tries(start=first, heads=bytes(heads), ids=ids, bounds=tuple(bounds))


def reach(row: Callable[[int], Dist], tokens: Sequence[int], counts: Sequence[int]) -> tuple[list[Dist], list[float]]:
    """Return p before each token of a block that was drawn with counts / 65,536, and P after 0, 1, 2, … tokens.

    `row(i)` returns the target's shaped distribution after i tokens. Both lists end behind an impossible token.
    """
    rows, reached = list[Dist](), [1.0]
    for offset, (token, count) in enumerate(zip(tokens, counts, strict=True)):
        rows.append(row(offset))
        reached.append(min(1.0, reached[-1] * rows[-1].probability(token) * TOTAL / count))
        if not reached[-1]:
            break
    return rows, reached


def reject_block(
    row: Callable[[int], Dist], tokens: Sequence[int], counts: Sequence[int], *, seed: int, start: int
) -> RejectedBlock | None:
    """Verify a block; return None if it is accepted whole. Parameters as of `reach`."""
    rows, reached = reach(row, tokens, counts)
    if random_uniform(seed, start, Purpose.ACCEPT) < reached.pop():
        return None
    return RejectedBlock(rows, reached, seed, start)


def choose_try(tries: Tries, drafted: Sequence[QuantizedDist]) -> tuple[int, int] | None:
    """Return the number of accepted tokens and the correction; None if the race goes on and more tries are needed.

    `drafted` has q of each token of the block. Raise IndexError for a try after more tokens than it has.
    """
    for head, token, bound in zip(tries.heads, tries.ids, tries.bounds, strict=True):
        if drafted[head].count(token) < bound * TOTAL:
            return head, token
    return None


def _mass(p: Dist) -> Float:
    return np.cumsum(p.probs)
