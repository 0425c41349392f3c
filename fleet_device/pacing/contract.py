"""Pacing: how many tokens to draft before sending, whether to go on before the verdict, or to have the edge write."""

from dataclasses import dataclass
from typing import Final, Protocol

__all__ = ["STREAMED", "DraftOutcome", "FixedPacing", "Pacing", "Plan"]

STREAMED: Final = 32
"""Tokens that an edge is asked to write at a time. It is asked again when half of them have come, so that it need not
pause on a line over which fewer are under way; and no more than these are written for a device that has gone."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How the next draft is made.

    Attributes:
        tokens: Its length, if the text and the edge have room for it.
        ahead: Whether to draft ahead: the next draft does not wait for the verdict on this one.
        stream: Whether nothing is drafted, and the edge writes so many tokens by itself.
    """

    tokens: int
    ahead: bool = False
    stream: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftOutcome:
    """What became of a draft.

    Attributes:
        tokens: Drafted.
        ahead: Whether another draft was announced, so that the edge has drawn no token after a draft that stands.
        accepted: Of these tokens, accepted.
        token_s: Mean time to draft one of them; 0 if there is none.
        answer_s: From sending to the verdict.
        compute_s: The edge's step in which it was verified.
        opening: Whether it was the first since the session was opened: its times then hold the prompt's as well.
    """

    tokens: int
    ahead: bool
    accepted: int
    token_s: float
    answer_s: float
    compute_s: float
    opening: bool = False

    @property
    def tested(self) -> int:
        """Tokens that were accepted or rejected, not merely flushed."""
        return min(self.tokens, self.accepted + 1)


class Pacing(Protocol):
    """Decides from what has been measured, never from the tokens that it leaves out: that would bend the law.

    So a plan is asked for once, before a draft's first token is drawn, and holds until the draft is sent.
    """

    def plan(self, *, longest: int, window: int) -> Plan:
        """Return the plan of the next draft.

        Args:
            longest: Most tokens that the edge takes in a draft; a plan for more is cut to it.
            window: Most drafts that it lets be under way.
        """

    def learn(self, outcome: DraftOutcome) -> None:
        """Take note of a verdict; in the order of the drafts."""

    def streamed(self, tokens: int, seconds: float) -> None:
        """Take note of what the edge has written by itself.

        Args:
            tokens: How many have come.
            seconds: Since the last ones, while the edge wrote without a pause.
        """


@dataclass(frozen=True, slots=True)
class FixedPacing:
    """Always the same.

    Attributes:
        tokens: Draft length, or tokens that the edge writes before it is asked again.
        ahead: Whether to draft ahead of the verdict.
        stream: Whether the edge writes by itself.
    """

    tokens: int = 5
    ahead: bool = False
    stream: bool = False

    def plan(self, *, longest: int, window: int) -> Plan:
        """Return the plan."""
        del longest, window
        return Plan(self.tokens, self.ahead, self.stream)

    def learn(self, outcome: DraftOutcome) -> None:
        """Learn nothing."""

    def streamed(self, tokens: int, seconds: float) -> None:
        """Learn nothing."""
