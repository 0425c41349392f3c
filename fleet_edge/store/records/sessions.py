"""Session records: what an edge has granted, and how it ended.

A session is known by its id and its device together: what one device sends can neither make, change nor end what
belongs to another, whatever id it names. It may be served in several *segments*, one for each time that an edge opened
or resumed it. What an edge counts belongs to the segment; a restarted edge starts a new one from zero, and totals are
sums.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Self

from schemas.policy import Mode
from schemas.reasons import EndReason

if TYPE_CHECKING:
    from schemas.messages import Close


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
        unverified: Of the tokens, those at the end that do not follow the target's law: the device has written on
            without an edge, or an edge behind that.
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
    unverified: int

    @classmethod
    def of(cls, close: "Close") -> Self:
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
            unverified=close.unverified or 0,
        )


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
        app: Application of the device that it is for, if the device says so.
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
    app: str | None = None


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
        device: As opened.
        code: Why it ended so, as programs read it, where that is more than the reason says.
        sentence: The same for a person.
    """

    session: str
    segment: int
    device: str
    reason: EndReason
    tokens: int
    counters: DeviceCounters | None
    at: datetime
    code: str | None = None
    sentence: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseReported:
    """A device closed a session that the edge does not serve: the edge has restarted, or there never was one.

    It ends the device's session of that id for good, if one was granted. Until then it waits in a table of its own,
    where it makes no session; but a text that the device has written without an edge is one of its own.

    Attributes:
        session: 16 lower-case hexadecimal characters, as the device says.
        device: Whose word it is.
        reason: How the session ended, as the device says.
        tokens: Committed in the whole session, as the device says.
        counters: The device's own.
        at: When the Close came, or when the text ended if the device has told that later (UTC, aware). Of several the
            latest wins.
        code: Why it ended so, as the device says.
        sentence: The same for a person.
        app: The device's application that the text was for, of one that no edge has opened.
    """

    session: str
    device: str
    reason: EndReason
    tokens: int
    counters: DeviceCounters
    at: datetime
    code: str | None = None
    sentence: str | None = None
    app: str | None = None
