"""Background work: what may wait while other devices are verified, and its share of the target model's time then.

Two kinds of work would let one device slow all others: prompts without end, and drafts that are hardly ever accepted.
Neither is forbidden, and on an edge that nobody else uses neither waits. While others are verified, such work gets a
small share of the time, together. Ordinary prompts are none of it: a device has a credit of prompt
tokens that are computed at once, and earns it by writing.
"""

from dataclasses import dataclass, field
from typing import Final

from fleet_common.limits import TokenBucket

_HALF_LIFE_S: Final = 2.0
_CREDIT: Final = 512.0
_CREDIT_PER_S: Final = 8.0
_EARNED_PER_TOKEN: Final = 16.0
_MOST_EARNED: Final = 4096.0
"""Prompt tokens: what anybody has, at once and each second, and what is earned by each committed token. What is asked
in proportion to what is written is in nobody's way; who opens sessions and writes nothing soon has no credit left."""

_LEAST_YIELD: Final = 0.15
_SHORT: Final = 4
"""Tokens of a draft that is worth its cost though none of it is accepted: it still brings one token for five rows."""

_JUDGED_AT_LEAST: Final = 64.0
_MEMORY: Final = 512.0
"""Tokens computed after which half of what was known of a device's drafts is forgotten."""


@dataclass(slots=True)
class _Drafts:
    """What a device's drafts have cost and brought, of late."""

    computed: float = 0.0
    committed: float = 0.0


@dataclass(slots=True)
class _Credit:
    """Prompt tokens that a device may have computed at once."""

    given: TokenBucket
    earned: float = 0.0

    def left(self, now: float) -> bool:
        return self.earned >= 1.0 or self.given.wait_s(1.0, now) == 0.0

    def spend(self, tokens: float, now: float) -> None:
        paid = min(tokens, self.earned)
        self.earned -= paid
        self.given.spend(tokens - paid, now)

    def give_back(self, tokens: float) -> None:
        self.earned = min(_MOST_EARNED, self.earned + tokens)

    def earn(self, committed: int) -> None:
        self.earned = min(_MOST_EARNED, self.earned + _EARNED_PER_TOKEN * committed)


@dataclass(slots=True)
class BackgroundWork:
    """Tells which work may wait, and when it may run. Times are monotonic seconds.

    Attributes:
        share: Of the time, while others are verified or expected.
    """

    share: float = 0.05
    _foreground_s: float = 0.0
    _background_s: float = 0.0
    _ended_at: float | None = None  # the latest step
    _drafts: dict[str, _Drafts] = field(default_factory=dict)
    _credits: dict[str, _Credit] = field(default_factory=dict)

    def may_run(self) -> bool:
        """Return whether background work may delay others in the next step."""
        return self._background_s * (1.0 - self.share) <= self._foreground_s * self.share

    def stepped(self, *, started: float, ended: float, tokens: int, background: int) -> None:
        """Note a step that was computed.

        Args:
            started: When.
            ended: When.
            tokens: Computed in it.
            background: Of these, of background work.
        """
        seconds = ended - (started if self._ended_at is None else min(started, self._ended_at))
        kept = 0.5 ** (seconds / _HALF_LIFE_S)
        mine = (ended - started) * background / tokens if tokens else 0.0
        self._background_s = self._background_s * kept + mine
        self._foreground_s = self._foreground_s * kept + min(seconds, _HALF_LIFE_S) - mine
        self._ended_at = ended

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
        if (credit := self._credits.get(device)) is not None:
            credit.earn(committed)

    def wasteful(self, device: str) -> bool:
        """Whether a device's drafts are hardly ever accepted, for what they cost."""
        drafts = self._drafts.get(device)
        return drafts is not None and (
            drafts.computed >= _JUDGED_AT_LEAST and drafts.committed < _LEAST_YIELD * drafts.computed
        )

    def longest_draft(self, device: str, most: int) -> int:
        """Return how long the drafts of a device's next session may be: short enough not to be wasteful again.

        Args:
            device: Whose.
            most: Tokens that are granted otherwise.
        """
        return min(most, _SHORT) if self.wasteful(device) else most

    def has_credit(self, device: str, now: float) -> bool:
        """Whether prompt tokens of a device are to be computed at once."""
        return self._credit(device, now).left(now)

    def prefilled(self, device: str, tokens: int, now: float) -> None:
        """Prompt tokens of a device were put into a step."""
        self._credit(device, now).spend(tokens, now)

    def left_out(self, device: str, tokens: int) -> None:
        """Prompt tokens of a device that were put into a step are not computed in it after all."""
        self._credits[device].give_back(tokens)

    def _credit(self, device: str, now: float) -> _Credit:
        credit = self._credits.get(device)
        if credit is None:
            credit = self._credits[device] = _Credit(TokenBucket(_CREDIT_PER_S, _CREDIT, now=now))
        return credit
