"""Recent acceptance of drafts: of one session, to notice where it collapses; of a draft model, to tell its devices.

A text can be made so that the draft model is hardly ever right about it, by accident or on purpose (arXiv 2605.14005):
each round then costs the target model a whole draft, and brings one token.

Devices have the same few draft models. Each sees too little of its own to tell soon how good it is; an edge sees all.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Final, TypeVar

_MEMORY: Final = 64.0
"""Tested tokens after which half of what was known is forgotten."""

_ENOUGH: Final = 32.0
"""Tested tokens before anything is said."""

_COLLAPSED: Final = 0.1

_FAIR: Final = 8.0
"""Tested tokens of a device before it counts among others."""

_MODELS: Final = 64
_DEVICES: Final = 64
"""Of a model, the latest so many."""

_T = TypeVar("_T")


@dataclass(slots=True)
class RecentAcceptance:
    """Tested and accepted draft tokens, the older ones counting less."""

    _tested: float = 0.0
    _accepted: float = 0.0

    def count(self, *, tested: int, accepted: int) -> None:
        """Count what a verdict has tested, and accepted of it."""
        kept = 0.5 ** (tested / _MEMORY)
        self._tested = self._tested * kept + tested
        self._accepted = self._accepted * kept + accepted

    @property
    def share(self) -> float:
        """Accepted of tested; 1 of nothing."""
        return self._accepted / self._tested if self._tested else 1.0

    @property
    def fair(self) -> bool:
        """Whether enough is known to be counted among others."""
        return self._tested >= _FAIR

    @property
    def collapsed(self) -> bool:
        """Whether hardly anything is accepted any more."""
        return self._tested >= _ENOUGH and self.share < _COLLAPSED


@dataclass(slots=True)
class AcceptanceByModel:
    """How much of a draft model's latest tokens is accepted: the median of its devices, whatever some of them send."""

    _known: OrderedDict[str, OrderedDict[str, RecentAcceptance]] = field(default_factory=OrderedDict)

    def count(self, model: str, device: str, *, tested: int, accepted: int) -> None:
        """Count what a verdict has tested, and accepted of it."""
        if not tested:
            return
        devices = _latest(self._known, model, OrderedDict, most=_MODELS)
        _latest(devices, device, RecentAcceptance, most=_DEVICES).count(tested=tested, accepted=accepted)

    def share(self, model: str) -> float | None:
        """Return how much is accepted; None while too little is known."""
        shares = [each.share for each in self._known.get(model, {}).values() if each.fair]
        return median(shares) if shares else None


def _latest(known: OrderedDict[str, _T], name: str, make: Callable[[], _T], *, most: int) -> _T:
    """Return what is known by a name, as the latest; the oldest is forgotten where there are too many."""
    found = known.pop(name, None)
    known[name] = make() if found is None else found
    if len(known) > most:
        known.popitem(last=False)
    return known[name]
