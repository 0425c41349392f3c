"""Block verification (Sun et al., arXiv 2403.10444), split between edge and device.

With P_0 = 1 and P_i = min(1, P_{i-1} p(x_i) / q(x_i)), the method accepts the whole block with probability P_n.
Otherwise it goes from i = n - 1 down to 0 and stops at i with probability S / (S + 1 - P_i), where S is the sum of
max(0, P_i p - q) after i tokens. There it accepts i tokens and draws the correction from max(0, P_i p - q), normalised.

Only the device knows q of all tokens, and only the edge knows p. Both decisions at i are the end of one race: draw u;
if u >= P_i, i has failed; else draw y from p, and stop with the correction y if q(y) < (P_i - u) p(y). A draw stops
with probability S and fails with probability 1 - P_i. The edge sends some draws, each a *try* (i, y, (P_i - u) p(y));
the device takes the first that meets its condition. At i = 0 nothing fails.

Where q is nearly p, S is small and a race takes thousands of draws. So if no try passes, the edge sends P_i and p for
the i that the race has come to and all lower ones, and the device draws both decisions itself: the draws of a race are
independent, so those that have failed do not matter for the others.

A later draft of a rejected position depends on the numbers that were drawn there. So all numbers of a block are keyed
by its start, which no other decided block has: of the device's n-th draw, of the n-th draw of the race, and of the
device's decision after i tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from dssd.distribution import TOTAL, Dist, Float, QuantizedDist
from dssd.sampling import Purpose, draw, inverse, random_uniform, residual
from schemas.downlink import Rows, Tries


@dataclass(slots=True, eq=False)
class RejectedBlock:
    """A block that is not accepted whole, and the race for how many of its tokens are.

    Attributes:
        rows: p after 0, 1, 2, … tokens of the block, up to where the race is.
        reached: P after as many tokens.
        seed: Of the policy.
        start: Position of the block's first token.
        offered: Number of accepted tokens and correction of each try.
    """

    rows: list[Dist]
    reached: list[float]
    seed: int
    start: int
    offered: list[tuple[int, int]] = field(default_factory=list)
    _sent_rows: bool = False

    def tries(self, number: int) -> Tries:
        """Return the first tries of the race. Call it once."""
        drawn, bounds, mass = 1, list[float](), _mass(self.rows[-1])  # number 0 has decided on the whole block
        while len(bounds) < number:
            left = self.reached[-1] - random_uniform(self.seed, self.start, Purpose.ACCEPT, drawn)
            if left <= 0.0:
                # Nothing returns to a longer head.
                self.rows.pop()
                self.reached.pop()
                mass = _mass(self.rows[-1])
            else:
                p = self.rows[-1]
                place = inverse(mass, random_uniform(self.seed, self.start, Purpose.SAMPLE, drawn))
                self.offered.append((len(self.rows) - 1, int(p.ids[place])))
                bounds.append(left * float(p.probs[place]))
            drawn += 1
        heads, ids = zip(*self.offered, strict=True)
        return Tries(heads=bytes(heads), ids=ids, bounds=tuple(bounds))

    def remainder(self) -> Rows:
        """Return what the device needs to end the race after the tries."""
        self._sent_rows = True
        return Rows(
            reached=tuple(self.reached),
            sizes=tuple(len(p) for p in self.rows),
            ids=tuple(token for p in self.rows for token in p.ids.tolist()),
            probs=tuple(prob for p in self.rows for prob in p.probs.tolist()),
        )

    def offers(self, accepted: int, correction: int) -> bool:
        """Whether the race may end with this correction after as many accepted tokens, from what was sent."""
        if (accepted, correction) in self.offered:
            return True
        return self._sent_rows and accepted < len(self.rows) and self.rows[accepted].probability(correction) > 0.0


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
    """Return the number of accepted tokens and the correction; None if the race goes on, and its rest is needed.

    `drafted` has q of each token of the block. Raise IndexError for a try after more tokens than it has.
    """
    for head, token, bound in zip(tries.heads, tries.ids, tries.bounds, strict=True):
        if drafted[head].count(token) < bound * TOTAL:
            return head, token
    return None


def end_race(rows: Rows, drafted: Sequence[QuantizedDist], *, seed: int, start: int) -> tuple[int, int]:
    """Return the number of accepted tokens and the correction, drawn from what is left of a race.

    `drafted` has q of each token of the block, which starts at position `start`. Raise IndexError if there are more
    rows.
    """
    end = len(rows.ids)
    for head in reversed(range(len(rows.sizes))):
        begin = end - rows.sizes[head]
        scaled = Dist(
            np.array(rows.ids[begin:end], dtype=np.int64), rows.reached[head] * np.array(rows.probs[begin:end])
        )
        rest = scaled.probs - drafted[head].probabilities(scaled.ids)
        stops = float(rest[rest > 0.0].sum())
        fails = 1.0 - rows.reached[head]
        if head == 0 or random_uniform(seed, start, Purpose.THIN, head) * (stops + fails) < stops:
            break
        end = begin
    return head, draw(residual(scaled, drafted[head]), random_uniform(seed, start, Purpose.RESIDUAL, head))


def _mass(p: Dist) -> Float:
    return np.cumsum(p.probs)
