"""Background work: what may wait while other devices are verified, and its share of the target model's time then.

Two kinds of work would let one device slow all others: prompts without end, and drafts that are hardly ever accepted.
Neither is forbidden, and on an edge that nobody else uses neither waits. While others are verified, such work gets a
small share of the target model's time, together. Ordinary prompts are none of it: a device has a credit of prompt
tokens that are computed at once.
"""

from dataclasses import dataclass, field
from typing import Final

from fleet_edge.guard.token_bucket import TokenBucket

__all__ = ["BackgroundWork"]

_ACTIVE_S: Final = 0.5
"""Others count as being verified for so long after their last verdict: they draft meanwhile."""

_HALF_LIFE_S: Final = 2.0
_PROMPT_CREDIT: Final = 2048.0
_PROMPT_CREDIT_PER_S: Final = 64.0
_LEAST_YIELD: Final = 0.15
_JUDGED_AT_LEAST: Final = 64.0
_MEMORY: Final = 512.0
"""Tokens computed after which half of what was known of a device's drafts is forgotten."""


@dataclass(slots=True)
class _Drafts:
    """What a device's drafts have cost and brought, of late."""

    computed: float = 0.0
    committed: float = 0.0


@dataclass(slots=True)
class BackgroundWork:
    """Tells which work may wait, and when it may run. Times are monotonic seconds.

    Attributes:
        share: Of the target model's time, while others are verified.
    """

    share: float = 0.1
    _foreground_s: float = 0.0
    _background_s: float = 0.0
    _others_at: float = float("-inf")
    _drafts: dict[str, _Drafts] = field(default_factory=dict)
    _credits: dict[str, TokenBucket] = field(default_factory=dict)

    def may_run(self, now: float) -> bool:
        """Whether background work may have a part of the next step."""
        if now - self._others_at > _ACTIVE_S:
            return True
        return self._background_s * (1.0 - self.share) <= self._foreground_s * self.share

    def stepped(self, *, started: float, ended: float, tokens: int, background: int, verified: bool) -> None:
        """A step was computed.

        Args:
            started: When.
            ended: When.
            tokens: Computed in it.
            background: Of these, of background work.
            verified: Whether it verified anything else.
        """
        seconds = ended - started
        kept = 0.5 ** (seconds / _HALF_LIFE_S)
        mine = seconds * background / tokens if tokens else 0.0
        self._background_s = self._background_s * kept + mine
        self._foreground_s = self._foreground_s * kept + seconds - mine
        if verified:
            self._others_at = ended

    def judged(self, device: str, *, computed: int, committed: int) -> None:
        """Drafts of a device were decided on.

        Args:
            device: Whose.
            computed: Tokens that this took.
            committed: Tokens by which the text has grown.
        """
        drafts = self._drafts.setdefault(device, _Drafts())
        kept = 0.5 ** (computed / _MEMORY)
        drafts.computed = drafts.computed * kept + computed
        drafts.committed = drafts.committed * kept + committed

    def wasteful(self, device: str) -> bool:
        """Whether a device's drafts are hardly ever accepted, for what they cost."""
        drafts = self._drafts.get(device)
        return drafts is not None and (
            drafts.computed >= _JUDGED_AT_LEAST and drafts.committed < _LEAST_YIELD * drafts.computed
        )

    def has_credit(self, device: str, now: float) -> bool:
        """Whether prompt tokens of a device are to be computed at once."""
        return self._credit(device, now).wait_s(1.0, now) == 0.0

    def prefilled(self, device: str, tokens: int, now: float) -> None:
        """Prompt tokens of a device were put into a step."""
        self._credit(device, now).spend(tokens, now)

    def _credit(self, device: str, now: float) -> TokenBucket:
        credit = self._credits.get(device)
        if credit is None:
            credit = self._credits[device] = TokenBucket(_PROMPT_CREDIT_PER_S, _PROMPT_CREDIT, now=now)
        return credit
