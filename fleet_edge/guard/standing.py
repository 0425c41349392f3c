"""Standing of one device at an edge: what it has left of its quotas, its strikes, and whether it is shut out."""

from dataclasses import dataclass, field
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

from fleet_common.limits import TokenBucket
from fleet_edge.guard.quotas import Quotas
from fleet_edge.guard.strikes import FORGIVEN, FenceSettings, Strikes
from schemas.topics import Topic

_BURST_S: Final = 2.0
"""Seconds of a rate by the second that a device may use at once."""

_BURST_MIN: Final = 0.25
"""Minutes of a rate by the minute, likewise."""

_OPENS_BURST_MIN: Final = 0.75
"""Of sessions: a device opens few in an hour, and then some at once."""

_UPLINK_BURST_S: Final = 16.0
"""The largest Open is some seconds of a device's bytes."""

_MARGIN: Final = 2.0
"""Opens are refused by name above their quota, and dropped unread only above this many times of it."""

_ANSWERS_PER_S: Final = 2.0
_ANSWERS: Final = 64.0
"""Faults and refusals of one device: as many at once as it may have drafts under way, then few."""


_Amount = Annotated[float, Field(ge=0, le=1e12)]


class KeptStanding(BaseModel):
    """What of a standing a restart of the edge does not change.

    Attributes:
        used: Of quotas, by name.
        strikes: Counted, and not forgotten yet.
        level: How often in a row the device was shut out.
        last_s: How long, the last time.
        since_s: Seconds since that was over; negative while it lasts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    used: dict[str, _Amount]
    strikes: _Amount
    level: Annotated[int, Field(ge=0, le=64)]
    last_s: _Amount
    since_s: Annotated[float, Field(ge=-1e12, le=1e12)]


@dataclass(slots=True)
class Standing:
    """One device's standing. Times are monotonic seconds.

    Attributes:
        device: Whose.
        quotas: What it may use.
        fence: When it is shut out.
        now: When it was first heard.
        own_until: This edge shuts it out until then, for its strikes.
        others_until: An administrator or another edge does, until then.
        fenced_until: The later of the two.
        dropped: Its messages that were dropped unread.
        dropped_before: Of these, those that the log knows of.
        heard: When it last sent anything that was taken.
        told: When it was last told that it is over a quota, or shut out.
        messages: Meters of what it sends, by kind of message.
        uplink: Of the bytes that it sends.
        opens: Of the sessions that it opens.
        prompts: Of the prompt tokens that it sends.
        new_tokens: Of the tokens that it writes.
        grammars: Of the seconds that its grammars take to compile.
        repeats: Of the bytes that are sent to it again.
        answers: Of the faults and refusals that it is answered with.
        strikes: Counted against it.
    """

    device: str
    quotas: Quotas
    fence: FenceSettings
    now: float
    own_until: float = 0.0
    others_until: float = 0.0
    fenced_until: float = 0.0
    dropped: int = 0
    dropped_before: int = 0
    heard: float = field(init=False)
    told: float = float("-inf")
    messages: dict[Topic, TokenBucket] = field(init=False)
    uplink: TokenBucket = field(init=False)
    opens: TokenBucket = field(init=False)
    prompts: TokenBucket = field(init=False)
    new_tokens: TokenBucket = field(init=False)
    grammars: TokenBucket = field(init=False)
    repeats: TokenBucket = field(init=False)
    answers: TokenBucket = field(init=False)
    strikes: Strikes = field(init=False)

    def __post_init__(self) -> None:
        """Begin with full meters and without a strike."""
        quotas, now = self.quotas, self.now
        self.heard = now
        opens = _MARGIN * quotas.opens_per_min
        self.messages = {
            Topic.DRAFT: _by_second(quotas.drafts_per_s, now),
            Topic.OPEN: _by_minute(opens, now, burst=_OPENS_BURST_MIN),
            Topic.CLOSE: _by_minute(opens, now, burst=_OPENS_BURST_MIN),
            Topic.STATE: _by_minute(quotas.states_per_min, now),
            Topic.TELEMETRY: _by_minute(quotas.states_per_min, now),
        }
        self.uplink = TokenBucket(quotas.uplink_bytes_per_s, _UPLINK_BURST_S * quotas.uplink_bytes_per_s, now=now)
        self.opens = _by_minute(quotas.opens_per_min, now, burst=_OPENS_BURST_MIN)
        self.prompts = TokenBucket(quotas.prompt_tokens_per_min / 60.0, quotas.prompt_tokens_per_min, now=now)
        self.new_tokens = TokenBucket(quotas.new_tokens_per_min / 60.0, quotas.new_tokens_per_min, now=now)
        self.grammars = TokenBucket(quotas.grammar_s_per_min / 60.0, quotas.grammar_s_per_min, now=now)
        self.repeats = TokenBucket(quotas.repeat_bytes_per_s, _UPLINK_BURST_S * quotas.repeat_bytes_per_s, now=now)
        self.answers = TokenBucket(_ANSWERS_PER_S, _ANSWERS, now=now)
        self.strikes = Strikes(self.fence, now)

    def kept(self, now: float) -> "KeptStanding | None":
        """Return what a restart of the edge must not change; None if that is nothing."""
        used = {name: bucket.used(now) for name, bucket in self._buckets().items()}
        strikes, since_s = self.strikes.used(now), self.strikes.since_s(now)
        forgiven = self.strikes.level == 0 or since_s > FORGIVEN * self.strikes.last_s
        if forgiven and strikes < 1.0 and all(each <= 0.0 for each in used.values()):
            return None
        return KeptStanding(
            used=used,
            strikes=strikes,
            level=0 if forgiven else self.strikes.level,
            last_s=self.strikes.last_s,
            since_s=0.0 if forgiven else since_s,
        )

    def restore(self, kept: "KeptStanding", *, ago_s: float, now: float) -> None:
        """Go on where another run of the edge ended, `ago_s` seconds ago."""
        for name, bucket in self._buckets().items():
            bucket.spend(max(0.0, kept.used.get(name, 0.0) - ago_s * bucket.rate), now)
        self.strikes.restore(
            max(0.0, kept.strikes - ago_s * self.fence.forgiven_per_s),
            level=kept.level,
            last_s=kept.last_s,
            since_s=kept.since_s + ago_s,
            now=now,
        )

    def _buckets(self) -> dict[str, TokenBucket]:
        """Return the quotas of minutes; those of seconds are full again after a restart."""
        return {
            "opens": self.opens,
            "prompts": self.prompts,
            "new_tokens": self.new_tokens,
            "grammars": self.grammars,
        }

    def fenced(self, now: float) -> bool:
        return now < self.fenced_until


def _by_second(rate: float, now: float) -> TokenBucket:
    return TokenBucket(rate, max(1.0, _BURST_S * rate), now=now)


def _by_minute(rate: float, now: float, *, burst: float = _BURST_MIN) -> TokenBucket:
    return TokenBucket(rate / 60.0, max(1.0, burst * rate), now=now)
