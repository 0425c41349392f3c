"""Records: what the edge writes to the session log.

Every record is applied as a merge that neither order nor repetition can disturb (see `merge`): a counter is
absolute, a state carries its time, a round has its key. So a record can be spooled and replayed freely.

A session is known by its id and its device together: what one device sends can neither make, change nor end what
belongs to another, whatever id it names. It may be served in several *segments*, one for each time that an edge opened
or resumed it. What an edge counts belongs to the segment; a restarted edge starts a new one from zero, and totals are
sums. A segment's number is the instant of its Open, in UTC microseconds: it orders, dates and keys at once.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Final, Self

from fleet_edge.counters import SegmentCounters
from schemas.control import Presence
from schemas.messages import Close
from schemas.policy import Mode
from schemas.reasons import EndReason

__all__ = [
    "ADMINISTRATOR",
    "CloseReported",
    "DeviceCounters",
    "DeviceFenced",
    "DeviceSeen",
    "EdgeSeen",
    "EventLogged",
    "FenceLifted",
    "LeaveReason",
    "Record",
    "RoundJudged",
    "SegmentLeft",
    "SegmentProgress",
    "SessionClosed",
    "SessionOpened",
    "segment_number",
    "segment_time",
]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)

ADMINISTRATOR: Final = "the administrator"
"""Who fences or lifts, where it is no edge. Its spaces keep it apart from the name of any edge."""


def segment_number(at: datetime) -> int:
    """Return a segment's number: UTC microseconds at its Open."""
    return (at - _EPOCH) // _MICROSECOND


def segment_time(segment: int) -> datetime:
    """Return when a segment was opened (UTC)."""
    return _EPOCH + segment * _MICROSECOND


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCounters:
    """What the device itself counted over the whole session, all segments together, from its Close.

    Attributes:
        tokens: Committed.
        rounds: Drafts judged.
        drafted: Tokens proposed.
        tested: Of these, accepted or rejected.
        accepted: Of these, accepted.
        uplink_bytes: Payload of all drafts sent, repeats counted in.
        downlink_bytes: Payload of all verdicts received, repeats counted in.
        draft_ms: Spent in the draft model.
        wait_ms: Spent waiting for verdicts.
        wall_ms: From Open to Close.
    """

    tokens: int
    rounds: int
    drafted: int
    tested: int
    accepted: int
    uplink_bytes: int
    downlink_bytes: int
    draft_ms: float
    wait_ms: float
    wall_ms: float

    @classmethod
    def of(cls, close: Close) -> Self:
        """Take the counters out of a device's Close."""
        return cls(
            tokens=close.tokens,
            rounds=close.rounds,
            drafted=close.drafted,
            tested=close.tested,
            accepted=close.accepted,
            uplink_bytes=close.uplink_bytes,
            downlink_bytes=close.downlink_bytes,
            draft_ms=close.draft_ms,
            wait_ms=close.wait_ms,
            wall_ms=close.wall_ms,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSeen:
    """A device's state, as retained at the broker.

    Attributes:
        device: Its name.
        presence: Online, draining or offline.
        software: Version that it runs.
        draft_model: Name of its draft model.
        quantization: Of its weights.
        at: When the edge saw it (UTC, aware). The latest wins.
    """

    device: str
    presence: Presence
    software: str
    draft_model: str
    quantization: str
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeSeen:
    """An edge's state, as retained at the broker.

    Attributes:
        edge: Its name.
        presence: Online, draining or offline.
        software: Version that it runs.
        target: Name of its target model.
        vocabulary: Size and head of the fingerprint, for the reader's eye.
        at: When it was so (UTC, aware). The latest wins.
    """

    edge: str
    presence: Presence
    software: str
    target: str
    vocabulary: str
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOpened:
    """An edge granted an Open or a resume: a segment begins.

    Attributes:
        session: 16 lower-case hexadecimal characters of the 8-byte id.
        segment: `segment_number` of the Open.
        device: Who asked.
        edge: Who granted.
        draft_model: Name of the draft model.
        quantization: Of its weights.
        target: Name of the target model.
        mode: How drafts are verified.
        temperature: Of the policy.
        top_k: Of the policy.
        top_p: Of the policy.
        seed: Of the policy, 0 to 2^64 - 1.
        prompt_tokens: Length of the prompt.
        max_new_tokens: Granted.
        resumed_tokens: Committed before this segment.
        open_bytes: Payload of the Open.
        at: When (UTC, aware).
    """

    session: str
    segment: int
    device: str
    edge: str
    draft_model: str
    quantization: str
    target: str
    mode: Mode
    temperature: float
    top_k: int
    top_p: float
    seed: int
    prompt_tokens: int
    max_new_tokens: int
    resumed_tokens: int
    open_bytes: int
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentProgress(SegmentCounters):
    """What the edge has counted in a segment so far. Absolute values that never fall.

    Attributes:
        session: As opened.
        segment: As opened.
        at: When this was so (UTC, aware).
        device: As opened; None in what was spooled before records told it.
    """

    session: str
    segment: int
    at: datetime
    device: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundJudged:
    """One verdict, for traced sessions only.

    Attributes:
        session: As opened.
        segment: As opened.
        round: Number of the draft.
        base: Tokens committed before it.
        drafted: Tokens in the draft.
        tested: Of these, accepted or rejected.
        accepted: Of these, accepted.
        batch: Sessions verified in the same step, this one counted in.
        uplink_bytes: Payload of the draft.
        downlink_bytes: Payload of the verdict.
        form: What `next` of the verdict was: `token`, `sparse`, `samples`, `dense`, or None for nothing.
        queue_ms: From arrival to the step, less `prefill_ms`.
        compute_ms: Of the step.
        at: When (UTC, aware).
        prefill_ms: From arrival to the step, spent in steps that computed the session's own prompt or text.
        device: As opened; None in what was spooled before records told it.
    """

    session: str
    segment: int
    round: int
    base: int
    drafted: int
    tested: int
    accepted: int
    batch: int
    uplink_bytes: int
    downlink_bytes: int
    form: str | None
    queue_ms: float
    compute_ms: float
    at: datetime
    prefill_ms: float = 0.0  # what was spooled before it existed has none
    device: str | None = None


class LeaveReason(StrEnum):
    """Why a segment ended although its session did not."""

    HANDED_OVER = "handed-over"  # the edge shut down; the device resumes elsewhere, or here when the edge is back
    RESUMED = "resumed"  # the device has opened the session again


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentLeft:
    """A segment ended, and the session goes on: it stays open until a later segment closes it.

    Attributes:
        session: As opened.
        segment: As opened.
        reason: Why.
        at: When (UTC, aware). Of several ends of one segment the latest wins.
        device: As opened; None in what was spooled before records told it.
    """

    session: str
    segment: int
    reason: LeaveReason
    at: datetime
    device: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionClosed:
    """A segment ended, and the session with it unless a later segment exists; if its device closed it, in any case.

    Attributes:
        session: As opened.
        segment: As opened.
        reason: How it ended.
        tokens: Of the text in the whole session, those resumed from counted in: as its device closed it, without what
            was verified beyond; if no Close came, as the edge has committed it.
        counters: The device's own, or None if no Close came (a lost device).
        at: When (UTC, aware). Of several ends of one segment the latest wins.
        device: As opened; None in what was spooled before records told it.
    """

    session: str
    segment: int
    reason: EndReason
    tokens: int
    counters: DeviceCounters | None
    at: datetime
    device: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseReported:
    """A device closed a session that the edge does not serve: the edge has restarted, or there never was one.

    It ends the device's session of that id for good, if one was granted. Until then it waits in a table of its own,
    where it makes no session.

    Attributes:
        session: 16 lower-case hexadecimal characters, as the device says.
        device: Whose word it is.
        reason: How the session ended, as the device says.
        tokens: Committed in the whole session, as the device says.
        counters: The device's own.
        at: When the Close came (UTC, aware). Of several the latest wins.
    """

    session: str
    device: str
    reason: EndReason
    tokens: int
    counters: DeviceCounters
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class EventLogged:
    """Something worth a line, and how often it happened: a refusal, a fault, a restart.

    Attributes:
        id: Unique for good, so that a replay adds nothing, e.g. a random UUID's hexadecimal form. All records of one id
            are alike but for `count` and `last_at`, of which the greatest hold.
        edge: Who logs it.
        device: Whom it concerns, if anyone.
        session: Which session it concerns, if any; of several, the first.
        kind: Class of event: `refused`, `fault`, `edge`.
        code: Machine-readable cause.
        sentence: The same for a person, as it was said the first time.
        at: When it first happened (UTC, aware).
        count: How often it has happened so far.
        last_at: When it last happened (UTC, aware); None: at `at`.
    """

    id: str
    edge: str
    device: str | None
    session: str | None
    kind: str
    code: str
    sentence: str
    at: datetime
    count: int = 1  # what was spooled before it existed happened once
    last_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFenced:
    """A device is shut out for a while: edges drop what it sends.

    Attributes:
        device: Which.
        by: The edge that fenced it, or `ADMINISTRATOR`. Of several fences by one of them the latest holds; of fences
            by several, the one that ends last.
        at: Since when (UTC, aware).
        until: Until when (UTC, aware); None: until it is lifted.
        reason: Why, in a sentence.
        strikes: That led to it; 0 if none did.
        level: How often the time has doubled.
    """

    device: str
    by: str
    at: datetime
    until: datetime | None
    reason: str
    strikes: int
    level: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FenceLifted:
    """All fences of a device, by whomever, that begin at `at` or before are over.

    Attributes:
        device: Which.
        by: Who lifted them: an edge or `ADMINISTRATOR`.
        at: When (UTC, aware).
    """

    device: str
    by: str
    at: datetime


Record = (
    DeviceSeen
    | EdgeSeen
    | SessionOpened
    | SegmentProgress
    | RoundJudged
    | SegmentLeft
    | SessionClosed
    | CloseReported
    | EventLogged
    | DeviceFenced
    | FenceLifted
)
