"""Token times of a session: how long its first token took, and how far apart the others came.

What is kept does not grow with the text: gaps are counted in buckets, each an eighth of an octave wide.
"""

import math
from dataclasses import dataclass, field
from typing import Final

_PER_OCTAVE: Final = 8
_LEAST_MS: Final = 0.01
_TAIL: Final = 0.05


@dataclass(slots=True)
class TokenTimes:
    """When tokens of one session were committed, since an edge has opened it. Times are monotonic seconds.

    Attributes:
        first_token_ms: From the Open to the first token that was committed here; None before.
    """

    first_token_ms: float | None = None
    _last: float = math.nan
    _committed: int = 0
    _gaps: dict[int, int] = field(default_factory=dict)  # tokens by bucket

    def begin(self, *, committed: int, at: float) -> None:
        """The session is opened, with a text of so many tokens."""
        self._last, self._committed = at, committed

    def grew(self, *, committed: int, at: float) -> None:
        """The text has so many tokens now: those that are new came together, and share the time since the last."""
        new = committed - self._committed
        if new <= 0:
            return
        gap_ms = (at - self._last) * 1e3
        if self.first_token_ms is None:
            self.first_token_ms = gap_ms
        else:
            bucket = round(_PER_OCTAVE * math.log2(max(gap_ms / new, _LEAST_MS)))
            self._gaps[bucket] = self._gaps.get(bucket, 0) + new
        self._last, self._committed = at, committed

    @property
    def gap_p95_ms(self) -> float | None:
        """Time between two tokens that one in twenty exceeds, within a twentieth; None before the second verdict."""
        left = _TAIL * sum(self._gaps.values())
        for bucket in sorted(self._gaps, reverse=True):
            left -= self._gaps[bucket]
            if left < 0:
                return float(2.0 ** (bucket / _PER_OCTAVE))
        return None
