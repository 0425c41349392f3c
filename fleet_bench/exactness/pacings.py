"""Pacings of the exactness proof, beside those that devices have."""

from collections.abc import Sequence
from dataclasses import dataclass

from fleet_device.pacing.contract import Choice, DraftOutcome, FixedPacing, Plan
from fleet_testing.sabotage import UNSURE

__all__ = ["StoppingPacing", "TurningPacing"]


@dataclass(frozen=True, slots=True)
class StoppingPacing(FixedPacing):
    """Drafts until the draft model is unsure."""

    def plan(self, *, longest: int, window: int) -> Plan:
        """Return the plan."""
        del longest, window
        return Plan(self.tokens, may_stop=True)

    def goes_on(self, chances: Sequence[float]) -> bool:
        """Stop behind a token that was not the likely one."""
        return chances[-1] >= UNSURE


@dataclass(slots=True)
class TurningPacing:
    """Drafts a token and has the edge write one, in turns."""

    _plans: int = 0

    def plan(self, *, longest: int, window: int) -> Plan:
        """Return the plan whose turn it is."""
        del longest, window
        self._plans += 1
        return Plan(1, stream=self._plans % 2 == 0)

    def goes_on(self, chances: Sequence[float]) -> bool:
        """Draft as planned."""
        del chances
        return True

    def choice(self) -> Choice:
        """Return the plan whose turn it was."""
        return Choice("draft" if self._plans % 2 else "stream", "They take turns.")

    def learn(self, outcome: DraftOutcome) -> None:
        """Learn nothing."""

    def streamed(self, tokens: int, seconds: float) -> None:
        """Learn nothing."""
