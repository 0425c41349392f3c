"""Limits of one device: quotas, strikes against it, and its quarantine."""

import fnmatch
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

from pydantic import BaseModel, Field

from fleet_common.limits import TokenBucket
from fleet_common.settings import setting
from schemas.names import Name
from schemas.topics import Topic

_MOST: Final = 1e9


def _rate(default: float, meaning: str, unit: str) -> Any:  # noqa: ANN401 - as `setting`
    return setting(default, meaning, unit=unit, in_flags=False, gt=0, le=_MOST)


class Quotas(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Limits of one device. Rates are averages: a device that was idle may briefly exceed them."""

    drafts_per_s: float = _rate(200.0, "Maximum drafts per device.", "drafts per second")
    opens_per_min: float = _rate(
        120.0, "Maximum sessions opened per device, three quarters of them at once.", "sessions per minute"
    )
    uplink_bytes_per_s: float = _rate(262_144.0, "Maximum bytes sent per device, as packets.", "bytes per second")
    prompt_s_per_min: float = _rate(
        60.0,
        "Maximum time for computing prompts and resumed sessions per device; reused tokens take none.",
        "seconds per minute",
    )
    new_tokens_per_min: float = _rate(12_000.0, "Maximum tokens generated per device.", "tokens per minute")
    kv_share: float = setting(
        0.5,
        "Maximum share of the memory for keys and values per device while others need some.",
        in_flags=False,
        gt=0,
        le=1,
    )


class LabelSettings(Quotas):
    """Quotas of the devices with a label, which override the general ones."""

    devices: Annotated[tuple[str, ...], Field(min_length=1)]

    def concerns(self, device: str) -> bool:
        """A device has the label if `devices` lists its name, or a pattern that matches (`press-*`)."""
        return any(fnmatch.fnmatchcase(device, pattern) for pattern in self.devices)


class QuotaSettings(Quotas):
    """The section `[quotas]`: general quotas, and those of labels."""

    labels: dict[Name, LabelSettings] = setting(
        dict,
        "Quotas of some devices: `[quotas.labels.NAME]` with `devices` (names or patterns) and quotas.",
        in_flags=False,
    )

    def of(self, device: str) -> Quotas:
        """Return a device's quotas: those of its first label, completed by the general ones."""
        everybody = self.model_dump(exclude={"labels"})
        for label in self.labels.values():
            if label.concerns(device):
                return Quotas(**everybody | label.model_dump(exclude_unset=True, exclude={"devices"}))
        return Quotas(**everybody)


_FORGIVEN_PER_S: Final = 10.0
"""Strikes that expire in a second."""

_FIRST_S: Final = 10.0
_LONGEST_S: Final = 3600.0
"""Seconds of the first quarantine, twice as many of each further one, and of the longest."""

_SLOWED: Final = 0.5
FORGIVEN: Final = 3.0
"""Multiple of the last quarantine without offence after which the next one is as short as the first."""


class QuarantineSettings(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """The section `[quarantine]`."""

    strikes: float = setting(
        300.0, "Strikes after which a device is quarantined.", unit="strikes", in_flags=False, ge=1, le=1e9
    )


@dataclass(slots=True)
class Strikes:
    """Strikes of one device, and its quarantines: `level` in a row, the last of `last_s` seconds, `until` a time.

    A strike is what a sound device does rarely, and a hostile or broken one all the time: a malformed message, an
    unknown session, a message above a quota. Strikes expire at a rate, so their frequency counts. From half of the
    limit on, each message of the device weighs as much as several.
    """

    settings: QuarantineSettings
    now: float
    level: int = 0
    last_s: float = 0.0
    until: float = 0.0
    _left: TokenBucket = field(init=False)

    def __post_init__(self) -> None:
        self._forget(self.now)

    def add(self, weight: float, now: float) -> float:
        """Count a strike; return the seconds of the quarantine that it causes, 0.0 for none."""
        self._left.spend(weight, now)
        if self._left.wait_s(0.0, now) == 0.0:
            return 0.0
        if now - self.until > FORGIVEN * self.last_s:
            self.level = 0
        self.last_s = min(_FIRST_S * 2.0**self.level, _LONGEST_S)
        self.level = min(self.level + 1, 64)
        self.until = now + self.last_s
        self._forget(self.until)
        return self.last_s

    def used(self, now: float) -> float:
        return self._left.used(now)

    def restore(self, strikes: float, *, level: int, last_s: float, since_s: float, now: float) -> None:
        self._forget(now)
        self._left.spend(strikes, now)
        self.level, self.last_s, self.until = level, last_s, now - since_s

    def slowed(self, now: float) -> bool:
        """The device has half of the strikes for a quarantine."""
        return self._left.wait_s(_SLOWED * self.settings.strikes, now) > 0.0

    def _forget(self, now: float) -> None:
        self._left = TokenBucket(_FORGIVEN_PER_S, self.settings.strikes, now=now)


GRAMMAR_S_PER_MIN: Final = 10.0
"""Time for compiling grammars of a device."""

_STATES_PER_MIN: Final = 120.0
"""Largest mean rate of states and telemetry of a device."""

_BURST_S: Final = 2.0
"""Burst of a rate per second, in seconds."""

_BURST_MIN: Final = 0.25
"""Burst of a rate per minute, in minutes."""

_OPENS_BURST_MIN: Final = 0.75
"""The same for Opens: a device opens few sessions an hour, and then some at once."""

_UPLINK_BURST_S: Final = 16.0
"""Burst of bytes in seconds: the largest Open is some seconds of a device's bytes."""

_MARGIN: Final = 2.0
"""Above their quota Opens are refused with a reason, above this multiple they are dropped unread."""

_ANSWERS_PER_S: Final = 2.0
_ANSWERS: Final = 64.0
"""Faults and refusals sent to a device: at once as many as it may have drafts in flight, then few."""


_Amount = Annotated[float, Field(ge=0, le=1e12)]


class KeptStanding(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """State of a device that survives a restart of the edge: amounts used of quotas, strikes, and quarantines.

    `since_s` are the seconds since the end of the last quarantine, negative while it lasts.
    """

    used: dict[str, _Amount]
    strikes: _Amount
    level: Annotated[int, Field(ge=0, le=64)]
    last_s: _Amount
    since_s: Annotated[float, Field(ge=-1e12, le=1e12)]


@dataclass(slots=True)
class Standing:
    """State of one device. Times are monotonic seconds.

    `quarantined_until` is the later of `own_until` and `others_until` (an administrator or another edge). Of the
    dropped messages `dropped_before` are already logged. `notified` is when the device last learned that it is over a
    quota, or quarantined. `repeats` is a bucket of bytes sent again, `answers` one of faults and refusals.
    """

    device: str
    quotas: Quotas
    quarantine: QuarantineSettings
    now: float
    own_until: float = 0.0
    others_until: float = 0.0
    quarantined_until: float = 0.0
    dropped: int = 0
    dropped_before: int = 0
    heard: float = field(init=False)
    notified: float = float("-inf")
    messages: dict[Topic, TokenBucket] = field(init=False)
    uplink: TokenBucket = field(init=False)
    opens: TokenBucket = field(init=False)
    prompt_s: TokenBucket = field(init=False)
    new_tokens: TokenBucket = field(init=False)
    grammars: TokenBucket = field(init=False)
    repeats: TokenBucket = field(init=False)
    answers: TokenBucket = field(init=False)
    strikes: Strikes = field(init=False)

    def __post_init__(self) -> None:
        quotas, now = self.quotas, self.now
        self.heard = now
        opens = _MARGIN * quotas.opens_per_min
        self.messages = {
            Topic.DRAFT: TokenBucket(quotas.drafts_per_s, max(1.0, _BURST_S * quotas.drafts_per_s), now=now),
            Topic.OPEN: _by_minute(opens, now, burst=_OPENS_BURST_MIN),
            Topic.CLOSE: _by_minute(opens, now, burst=_OPENS_BURST_MIN),
            Topic.STATE: _by_minute(_STATES_PER_MIN, now),
            Topic.TELEMETRY: _by_minute(_STATES_PER_MIN, now),
        }
        self.uplink = TokenBucket(quotas.uplink_bytes_per_s, _UPLINK_BURST_S * quotas.uplink_bytes_per_s, now=now)
        self.opens = _by_minute(quotas.opens_per_min, now, burst=_OPENS_BURST_MIN)
        self.prompt_s = TokenBucket(quotas.prompt_s_per_min / 60.0, quotas.prompt_s_per_min, now=now)
        self.new_tokens = TokenBucket(quotas.new_tokens_per_min / 60.0, quotas.new_tokens_per_min, now=now)
        self.grammars = TokenBucket(GRAMMAR_S_PER_MIN / 60.0, GRAMMAR_S_PER_MIN, now=now)
        self.repeats = TokenBucket(quotas.uplink_bytes_per_s, _UPLINK_BURST_S * quotas.uplink_bytes_per_s, now=now)
        self.answers = TokenBucket(_ANSWERS_PER_S, _ANSWERS, now=now)
        self.strikes = Strikes(self.quarantine, now)

    def kept(self, now: float) -> KeptStanding | None:
        """Return the state that must survive a restart; None if there is none."""
        used = {name: bucket.used(now) for name, bucket in self._buckets().items()}
        strikes, since_s = self.strikes.used(now), now - self.strikes.until
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

    def restore(self, kept: KeptStanding, *, ago_s: float, now: float) -> None:
        for name, bucket in self._buckets().items():
            bucket.spend(max(0.0, kept.used.get(name, 0.0) - ago_s * bucket.rate), now)
        self.strikes.restore(
            max(0.0, kept.strikes - ago_s * _FORGIVEN_PER_S),
            level=kept.level,
            last_s=kept.last_s,
            since_s=kept.since_s + ago_s,
            now=now,
        )

    def _buckets(self) -> dict[str, TokenBucket]:
        """Return the buckets per minute; those per second are full again after a restart."""
        return {name: getattr(self, name) for name in ("opens", "prompt_s", "new_tokens", "grammars")}

    def quarantined(self, now: float) -> bool:
        return now < self.quarantined_until


def _by_minute(rate: float, now: float, *, burst: float = _BURST_MIN) -> TokenBucket:
    return TokenBucket(rate / 60.0, max(1.0, burst * rate), now=now)
