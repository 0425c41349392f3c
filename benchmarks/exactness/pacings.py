"""Pacings of the exactness proof, in addition to those that devices have."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fleet_device.drafters.contract import Prospect
from fleet_device.pacing.contract import Choice, DraftOutcome, FixedPacing, Plan, ReportedLoad
from tests.support.sabotage import UNSURE


@dataclass(frozen=True, slots=True)
class StoppingPacing(FixedPacing):
    """Drafts until the draft model is unsure."""

    def plan(self, *, longest: int, window: int) -> Plan:
        del longest, window
        return Plan(self.tokens, may_stop=True)

    def goes_on(self, chances: Sequence[float]) -> bool:
        """Stop behind a token that was not the likely one."""
        return chances[-1] >= UNSURE


@dataclass(slots=True)
class MixingPacing:
    """Drafts from earlier text wherever there is any, but for every third time; the draft model makes the others."""

    tokens: int
    asked: int = 0

    def plan(self, *, longest: int, window: int) -> Plan:
        """Return the plan for the draft model."""
        del longest, window
        return Plan(self.tokens)

    def weigh(self, plan: Plan, prospect: Prospect, *, longest: int, window: int) -> Plan:
        """Return the plan for whose turn it is."""
        del prospect, longest, window
        self.asked += 1
        return replace(plan, repeats=self.asked % 3 > 0)

    def goes_on(self, chances: Sequence[float]) -> bool:
        del chances
        return True

    def choice(self) -> Choice:
        return Choice("draft", "They take turns.")

    def learn(self, outcome: DraftOutcome) -> None: ...

    def note_load(self, load: ReportedLoad) -> None: ...

    def streamed(self, tokens: int, seconds: float, *, step_s: float = 0.0) -> None: ...


@dataclass(slots=True)
class TurningPacing:
    """Drafts a token and has the edge write some, in turns.

    Attributes:
        written: Tokens that the edge writes in its turn.
        plans: Turns there have been; the edge's are the odd ones, counted from 0.
    """

    written: int = 1
    plans: int = 0

    def plan(self, *, longest: int, window: int) -> Plan:
        """Return the plan whose turn it is."""
        del longest, window
        self.plans += 1
        return Plan(1) if self.plans % 2 else Plan(self.written, stream=True)

    def goes_on(self, chances: Sequence[float]) -> bool:
        del chances
        return True

    def weigh(self, plan: Plan, prospect: Prospect, *, longest: int, window: int) -> Plan:
        """Return the plan whose turn it is."""
        del prospect, longest, window
        return plan

    def choice(self) -> Choice:
        """Return the plan whose turn it was."""
        return Choice("draft" if self.plans % 2 else "stream", "They take turns.")

    def learn(self, outcome: DraftOutcome) -> None: ...

    def note_load(self, load: ReportedLoad) -> None: ...

    def streamed(self, tokens: int, seconds: float, *, step_s: float = 0.0) -> None: ...
