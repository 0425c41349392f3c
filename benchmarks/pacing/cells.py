"""Cells: one draft model, distance, load and cost of the target, and what came out of each plan there."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, stdev
from types import MappingProxyType
from typing import Any, Final

from fleet_device.pacing.adaptive import AdaptivePacing
from fleet_device.pacing.contract import STREAMED, FixedPacing, Pacing

__all__ = ["AGAIN", "CHOSEN", "PLANS", "STREAM", "Cell", "Outcome", "geometric_mean"]

CHOSEN: Final = "auto"
STREAM: Final = "stream"
AGAIN: Final = "stream again"
"""The same plan, so that its ratio to the other tells what two measurements of one thing differ by."""

PLANS: Final[Mapping[str, Callable[[], Pacing]]] = MappingProxyType(
    {
        "1": lambda: FixedPacing(1),
        "2": lambda: FixedPacing(2),
        "4": lambda: FixedPacing(4),
        "8": lambda: FixedPacing(8),
        "4 ahead": lambda: FixedPacing(4, ahead=True),
        STREAM: lambda: FixedPacing(STREAMED, stream=True),
        AGAIN: lambda: FixedPacing(STREAMED, stream=True),
        CHOSEN: lambda: AdaptivePacing(stream=None),
    }
)
"""By name, what makes the pacing of one device."""


@dataclass(slots=True)
class Outcome:
    """What was written under one plan.

    Attributes:
        paces: By round, tokens a second of a device from its first piece to its last: the mean over devices.
        learning: The same in the round that is not counted.
        drafted: Draft tokens.
        drafts: Sent.
        tested: Draft tokens that were decided on.
        accepted: Of them, accepted.
        tokens: Committed.
        streamed: Of them, written by the edge alone.
    """

    paces: list[float] = field(default_factory=list)
    learning: float = 0.0
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
        fixed = (plan for plan in self.outcomes if plan not in (CHOSEN, AGAIN))
        return max(fixed, key=lambda plan: self.outcomes[plan].pace)

    @property
    def against_best(self) -> float:
        """The chosen plans' pace, as a ratio to that of the best fixed plan, known only afterwards."""
        return self._ratio(self.best)

    @property
    def against_stream(self) -> float:
        """The same, to the edge's writing by itself."""
        return self._ratio(STREAM)

    @property
    def stream_error(self) -> float:
        """Standard error of `against_stream`, from round to round; 0 of one round."""
        ratios = self._ratios(CHOSEN, STREAM)
        return stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else 0.0

    @property
    def again(self) -> float | None:
        """The edge's writing by itself as a ratio to the same, measured anew; None where it was measured once."""
        return median(self._ratios(AGAIN, STREAM)) if AGAIN in self.outcomes else None

    @property
    def learning(self) -> float:
        """The chosen plans' pace as a ratio to the edge's by itself in the round in which devices learn."""
        return self.outcomes[CHOSEN].learning / self.outcomes[STREAM].learning

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
            "standard_error": self.stream_error,
            "while_learning": self.learning,
            "stream_again": self.again,
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
        return median(self._ratios(CHOSEN, plan))

    def _ratios(self, plan: str, other: str) -> list[float]:
        # Round by round: what disturbs the machine for a while is in both.
        paces, others = self.outcomes[plan].paces, self.outcomes[other].paces
        return [pace / its for pace, its in zip(paces, others, strict=True)]


def geometric_mean(ratios: Sequence[float]) -> float:
    """Return the mean that twice as fast and half as fast make one."""
    return math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))
