"""Running statistics of a session: acceptance of its drafts and times of its tokens; acceptance by draft model.

A sequence can make the draft model nearly always wrong (arXiv 2605.14005), by accident or on purpose. Each round then
costs the target model a whole draft and yields one token. Acceptance by draft model is reported to devices, because
each device alone sees too few drafts to learn it quickly.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Final, TypeVar

_MEMORY: Final = 64.0
"""Tested tokens after which half of the statistics is forgotten."""

_ENOUGH: Final = 32.0
"""Tested tokens before a collapse is reported."""

_COLLAPSED: Final = 0.1

_FAIR: Final = 8.0
"""Tested tokens of a device before it counts for its model."""

_MODELS: Final = 64
_DEVICES: Final = 64
"""Devices remembered of a model, the most recent ones."""

_T = TypeVar("_T")


@dataclass(slots=True)
class RecentAcceptance:
    """Tested and accepted draft tokens with exponential forgetting."""

    _tested: float = 0.0
    _accepted: float = 0.0

    def count(self, *, tested: int, accepted: int) -> None:
        kept = 0.5 ** (tested / _MEMORY)
        self._tested = self._tested * kept + tested
        self._accepted = self._accepted * kept + accepted

    @property
    def share(self) -> float:
        return self._accepted / self._tested if self._tested else 1.0

    @property
    def fair(self) -> bool:
        """Enough was tested to count for the model."""
        return self._tested >= _FAIR

    @property
    def collapsed(self) -> bool:
        return self._tested >= _ENOUGH and self.share < _COLLAPSED


@dataclass(slots=True)
class AcceptanceByModel:
    """Acceptance of each draft model: the median of its devices, so that a few cannot distort it."""

    _known: OrderedDict[str, OrderedDict[str, RecentAcceptance]] = field(default_factory=OrderedDict)

    def count(self, model: str, device: str, *, tested: int, accepted: int) -> None:
        if not tested:
            return
        devices = _latest(self._known, model, OrderedDict, most=_MODELS)
        _latest(devices, device, RecentAcceptance, most=_DEVICES).count(tested=tested, accepted=accepted)

    def share(self, model: str) -> float | None:
        shares = [each.share for each in self._known.get(model, {}).values() if each.fair]
        return median(shares) if shares else None


def _latest(known: OrderedDict[str, _T], name: str, make: Callable[[], _T], *, most: int) -> _T:
    """Return the entry of a name, moved to the end; the oldest is dropped if there are too many."""
    found = known.pop(name, None)
    known[name] = make() if found is None else found
    if len(known) > most:
        known.popitem(last=False)
    return known[name]


_PER_OCTAVE: Final = 8
_MIN_MS: Final = 0.01
_TAIL: Final = 0.05


@dataclass(slots=True)
class TokenTimes:
    """Time to first token and gaps between tokens of a session; monotonic seconds.

    Gaps are counted in buckets of an eighth of an octave, so that memory does not grow with the generation.
    """

    first_token_ms: float | None = None
    _last: float = math.nan
    _committed: int = 0
    _gaps: dict[int, int] = field(default_factory=dict)  # tokens by bucket

    def begin(self, *, committed: int, at: float) -> None:
        self._last, self._committed = at, committed

    def add_tokens(self, *, committed: int, at: float) -> None:
        """Count new tokens: they came together and share the time since the last."""
        new = committed - self._committed
        if new <= 0:
            return
        gap_ms = (at - self._last) * 1e3
        if self.first_token_ms is None:
            self.first_token_ms = gap_ms
        else:
            bucket = round(_PER_OCTAVE * math.log2(max(gap_ms / new, _MIN_MS)))
            self._gaps[bucket] = self._gaps.get(bucket, 0) + new
        self._last, self._committed = at, committed

    @property
    def gap_p95_ms(self) -> float | None:
        """95th percentile of the gap between two tokens, in milliseconds; None before the second verdict."""
        left = _TAIL * sum(self._gaps.values())
        for bucket in sorted(self._gaps, reverse=True):
            left -= self._gaps[bucket]
            if left < 0:
                return float(2.0 ** (bucket / _PER_OCTAVE))
        return None
