"""Cells: one draft model, distance, load and cost of the target, and what came out of each plan there."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from types import MappingProxyType
from typing import Any, Final

from fleet_device.pacing.adaptive import AdaptivePacing
from fleet_device.pacing.contract import STREAMED, FixedPacing, Pacing

__all__ = ["CHOSEN", "PLANS", "STREAM", "Cell", "Outcome", "geometric_mean"]

CHOSEN: Final = "auto"
STREAM: Final = "stream"

PLANS: Final[Mapping[str, Callable[[], Pacing]]] = MappingProxyType(
    {
        "1": lambda: FixedPacing(1),
        "2": lambda: FixedPacing(2),
        "4": lambda: FixedPacing(4),
        "8": lambda: FixedPacing(8),
        "4 ahead": lambda: FixedPacing(4, ahead=True),
        STREAM: lambda: FixedPacing(STREAMED, stream=True),
        CHOSEN: lambda: AdaptivePacing(stream=None),
    }
)
"""By name, what makes the pacing of one device."""


@dataclass(slots=True)
class Outcome:
    """What was written under one plan.

    Attributes:
        paces: By round, tokens a second of a device from its first piece to its last: the mean over devices.
        drafted: Draft tokens.
        drafts: Sent.
        tested: Draft tokens that were decided on.
        accepted: Of them, accepted.
        tokens: Committed.
        streamed: Of them, written by the edge alone.
    """

    paces: list[float] = field(default_factory=list)
    drafted: int = 0
    drafts: int = 0
    tested: int = 0
    accepted: int = 0
    tokens: int = 0
    streamed: int = 0

    @property
    def pace(self) -> float:
        """The median over rounds, so that one that the machine disturbed counts no more than another."""
        return median(self.paces)


@dataclass(slots=True)
class Cell:
    """A place where plans were compared.

    Attributes:
        cost: How many times the target costs what the demo's does.
        draft: The draft model.
        round_trip_ms: Between devices and broker.
        devices: That write at the same time.
        outcomes: By plan.
    """

    cost: int
    draft: str
    round_trip_ms: int
    devices: int
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    @property
    def best(self) -> str:
        """Name of the best fixed plan."""
        return max((plan for plan in self.outcomes if plan != CHOSEN), key=lambda plan: self.outcomes[plan].pace)

    @property
    def against_best(self) -> float:
        """The chosen plans' pace, as a ratio to that of the best fixed plan, known only afterwards."""
        return self._ratio(self.best)

    @property
    def against_stream(self) -> float:
        """The same, to the edge's writing by itself."""
        return self._ratio(STREAM)

    def json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "cost": self.cost,
            "draft": self.draft,
            "round_trip_ms": self.round_trip_ms,
            "devices": self.devices,
            "best": self.best,
            "auto_against_best": self.against_best,
            "auto_against_stream": self.against_stream,
            "plans": {
                plan: {
                    "tokens_per_s": outcome.pace,
                    "rounds": outcome.paces,
                    "acceptance": outcome.accepted / outcome.tested if outcome.tested else None,
                    "mean_draft": outcome.drafted / outcome.drafts if outcome.drafts else None,
                    "streamed": outcome.streamed / outcome.tokens if outcome.tokens else None,
                }
                for plan, outcome in self.outcomes.items()
            },
        }

    def _ratio(self, plan: str) -> float:
        # Round by round: what disturbs the machine for a while is in both.
        chosen, other = self.outcomes[CHOSEN].paces, self.outcomes[plan].paces
        return median(ours / theirs for ours, theirs in zip(chosen, other, strict=True))


def geometric_mean(ratios: Sequence[float]) -> float:
    """Return the mean that twice as fast and half as fast make one."""
    return math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))
