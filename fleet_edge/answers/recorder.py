"""Recorder: turns what happens to sessions into records of the session log.

Reads sessions and changes nothing of them. Never blocks: the writer takes the records in its own thread.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final, Protocol

from fleet_edge.answers.device_rates import DeviceRates
from fleet_edge.answers.event_counts import EventCounts
from fleet_edge.answers.sightings import Sightings
from fleet_edge.answers.texts import Texts
from fleet_edge.batching.timing import DraftTiming
from fleet_edge.counters import SEGMENT_COUNTERS
from fleet_edge.sessions.draft_results import DraftResult
from fleet_edge.sessions.machine import EdgeSession
from fleet_edge.sessions.stream import Stream
from fleet_edge.store.event_codes import EventKind, Severity
from fleet_edge.store.records.fences import DeviceFenced
from fleet_edge.store.records.record import Record
from fleet_edge.store.records.segments import LeaveReason, RoundJudged, SegmentLeft, SegmentProgress, segment_number
from fleet_edge.store.records.sessions import CloseReported, DeviceCounters, SessionClosed, SessionOpened
from schemas.messages import Close, Open
from schemas.reasons import EndReason

# Each minute, and what a device has open at most, by default: one that came back to a restarted edge closes them all.
_REPORTS: Final = 8

# Each minute: texts that a device has written without an edge, of which it tells when one is back. Those that are over
# it tells later.
_UNVERIFIED: Final = 30
_WORTH_AN_EVENT: Final = frozenset({EndReason.LOST, EndReason.FAILED})
_LONGEST_AGE_S: Final = 366 * 86_400.0

# Of a device, logged each minute. Twenty rounds a second are more than a device drafts; further samples are rare, and
# of drafts that are hardly ever accepted a sample is enough.
_ROUNDS: Final = 1200
_SELDOM: Final = 30

_WRITTEN: Final = "written"


@dataclass(frozen=True, slots=True)
class EndCause:
    """Why a session ended as it did, where that is more than the reason says.

    Attributes:
        code: As programs read it.
        sentence: As people do.
    """

    code: str
    sentence: str


class Sink(Protocol):
    """Where records go."""

    def put(self, record: Record, *, urgent: bool = False, then: Callable[[], None] | None = None) -> None:
        """Take a record. MUST NOT block or raise.

        Args:
            record: The record.
            urgent: Whether it should not wait for others.
            then: Called, on any thread, once the record will outlive this process; if it never will, never.
        """


@dataclass(slots=True)
class Recorder:
    """Writes the session log of one edge.

    Attributes:
        sink: The store's writer.
        edge: This edge's name.
        now: The wall clock (UTC).
        trace_share: Fraction of sessions whose every round is logged.
        texts: Stores what the settings have stored of texts.
        events: Counts what `event` is told.
        sightings: Writes how devices and this edge are.
    """

    sink: Sink
    edge: str
    now: Callable[[], datetime]
    trace_share: float = 1.0
    texts: Texts = field(default_factory=lambda: Texts(lambda _record: None))
    events: EventCounts = field(init=False)
    sightings: Sightings = field(init=False)
    _segments: dict[int, int] = field(default_factory=dict)  # by handle: of the log
    _reported: DeviceRates = field(default_factory=lambda: DeviceRates(_REPORTS))
    _unverified: DeviceRates = field(default_factory=lambda: DeviceRates(_UNVERIFIED))
    _rounds: DeviceRates = field(default_factory=lambda: DeviceRates(_ROUNDS))
    _seldom: DeviceRates = field(default_factory=lambda: DeviceRates(_SELDOM))

    def __post_init__(self) -> None:
        self.events = EventCounts(self.sink.put, self.edge, self.now)
        self.sightings = Sightings(self.sink.put, self.edge, self.now, self.events)

    def flush(self) -> None:
        """Write what was held back: counts of events, states of devices. Call it every few seconds, and at the end."""
        self.events.flush()
        self.sightings.flush()

    def opened(self, session: EdgeSession, message: Open, *, target: str, size: int) -> None:
        """A session was opened or resumed."""
        at = self.now()
        # Urgent: a text may be written and closed within the time that a record waits for others, and what is closed
        # counts only if it is known to have been opened.
        self._segments[session.handle] = segment_number(at)
        policy = session.policy
        self.sink.put(
            SessionOpened(
                session=session.session.hex(),
                segment=segment_number(at),
                device=session.device,
                edge=self.edge,
                app=message.app,
                draft_model=message.draft_model,
                quantization=message.quantization,
                target=target,
                mode=policy.mode,
                temperature=policy.temperature,
                top_k=policy.top_k,
                top_p=policy.top_p,
                seed=policy.seed,
                prompt_tokens=session.prompt_length,
                max_new_tokens=session.limits.max_new_tokens,
                resumed_tokens=session.committed,
                open_bytes=size,
                at=at,
            ),
            urgent=True,
        )

    def judged(
        self, session: EdgeSession, result: DraftResult, timing: DraftTiming, *, form: str | None, downlink_bytes: int
    ) -> None:
        """A verdict was given; logged for traced sessions, unless the device has had too many within a minute.

        Args:
            session: Whose.
            result: What the verdict said.
            timing: What it took.
            form: What it carried.
            downlink_bytes: Its payload.
        """
        draft, at = result.arrived.draft, self.now()
        ordinary = not timing.background and (result.tested or draft.tokens)
        rates = self._rounds if ordinary else self._seldom
        if not self._traced(session) or not rates.admit(session.device, at):
            return
        self._round(
            session,
            timing,
            at=at,
            round=draft.round,
            base=draft.base,
            drafted=len(draft.tokens),
            tested=result.tested,
            accepted=result.accepted,
            uplink_bytes=result.arrived.size,
            downlink_bytes=downlink_bytes,
            form=form,
        )

    def written(self, session: EdgeSession, stream: Stream, timing: DraftTiming, *, downlink_bytes: int) -> None:
        """The first piece was sent of what a device has asked the edge to write; logged as the verdict of that round.

        Args:
            session: Whose.
            stream: The request.
            timing: What the piece's last token took.
            downlink_bytes: Its payload.
        """
        at = self.now()
        if not self._traced(session) or not self._rounds.admit(session.device, at):
            return
        self._round(
            session,
            timing,
            at=at,
            round=stream.request.round,
            base=stream.request.base,
            drafted=0,
            tested=0,
            accepted=0,
            uplink_bytes=stream.size,
            downlink_bytes=downlink_bytes,
            form=_WRITTEN,
        )

    def progress(self, session: EdgeSession) -> None:
        """What the session has counted so far; absolute, so that it may be written at any time."""
        self.texts.grew(session, segment=self._segments[session.handle], at=self.now())
        self.sink.put(
            SegmentProgress(
                session=session.session.hex(),
                segment=self._segments[session.handle],
                at=self.now(),
                device=session.device,
                first_token_ms=session.times.first_token_ms,
                gap_p95_ms=session.times.gap_p95_ms,
                **{name: getattr(session.counters, name) for name in SEGMENT_COUNTERS},
            )
        )

    def ended(
        self,
        session: EdgeSession,
        reason: EndReason,
        message: Close | None,
        *,
        cause: EndCause | None = None,
        then: Callable[[], None] | None = None,
    ) -> None:
        """A session ended, at the device's word or by its lease.

        Args:
            session: Which.
            reason: How.
            message: The device's Close, if it sent one.
            cause: Why, where that is more than the reason says.
            then: Called, on any thread, once this cannot be lost any more.
        """
        self.progress(session)
        tokens = session.committed if message is None else _final_tokens(session, message)
        self.texts.ended(session, tokens=tokens, segment=self._segments[session.handle], at=self.now())
        self.sink.put(
            SessionClosed(
                session=session.session.hex(),
                segment=self._segments.pop(session.handle),
                reason=reason,
                tokens=tokens,
                counters=DeviceCounters.of(message) if message else None,
                at=self.now(),
                device=session.device,
                code=None if cause is None else cause.code,
                sentence=None if cause is None else cause.sentence,
            ),
            then=then,
        )
        if cause is not None and reason in _WORTH_AN_EVENT:
            sentence = f"{cause.sentence} ({cause.code}; {session.committed} tokens were committed.)"
            self.event(
                kind=EventKind.SESSION,
                code=reason.value,
                sentence=sentence,
                device=session.device,
                session=session.session,
            )

    def left(self, session: EdgeSession, reason: LeaveReason) -> None:
        """A session goes on, but not here or under another handle: its segment is complete."""
        self.progress(session)
        segment = self._segments[session.handle]
        self.texts.ended(session, tokens=session.committed, segment=segment, at=self.now())
        self.sink.put(
            SegmentLeft(
                session=session.session.hex(),
                segment=self._segments.pop(session.handle),
                reason=reason,
                at=self.now(),
                device=session.device,
            )
        )
        if reason is LeaveReason.HANDED_OVER:
            self.event(
                kind=EventKind.SESSION,
                code="handed-over",
                sentence=f"The edge gave the text up at {session.committed} tokens; it goes on elsewhere.",
                device=session.device,
                session=session.session,
            )

    def ended_elsewhere(self, device: str, message: Close, *, then: Callable[[], None]) -> None:
        """A device closed a session that this edge does not know, having restarted; or one that never was.

        Of the latter nothing but one event a minute is left behind, however many there are.

        Args:
            device: Which.
            message: Its Close.
            then: Called, on any thread, once this cannot be lost any more, or is not to be kept.
        """
        at = self.now()
        if not (self._unverified if message.unverified else self._reported).admit(device, at):
            sentence = "The device closes more sessions that this edge does not know than it can have had."
            self.event(
                kind=EventKind.CLOSE, code="unknown-session", sentence=sentence, device=device, session=message.session
            )
            if not message.unverified:  # which its device keeps, and says again until it is confirmed
                then()
            return
        self.sink.put(
            CloseReported(
                session=message.session.hex(),
                device=device,
                reason=message.reason,
                tokens=message.tokens,
                counters=DeviceCounters.of(message),
                code=message.code if message.sentence else None,
                sentence=message.sentence,
                app=message.app,
                at=at - timedelta(seconds=min(message.age_s or 0.0, _LONGEST_AGE_S)),
            ),
            then=then,
        )

    def event(
        self,
        *,
        kind: str,
        code: str,
        sentence: str,
        device: str | None,
        session: bytes | None = None,
        times: int = 1,
        severity: Severity | None = None,
        shared: bool = False,
    ) -> None:
        """Something worth a line happened; `EventCounts.note` says what is what. Callable from any thread."""
        self.events.note(
            kind=kind,
            code=code,
            sentence=sentence,
            device=device,
            session=session,
            times=times,
            severity=severity,
            shared=shared,
        )

    def fenced(self, device: str, *, at: datetime, until: datetime, reason: str, strikes: float, level: int) -> None:
        """This edge has shut a device out."""
        self.sink.put(
            DeviceFenced(
                device=device, by=self.edge, at=at, until=until, reason=reason, strikes=round(strikes), level=level
            )
        )

    def _round(self, session: EdgeSession, timing: DraftTiming, *, at: datetime, **fields: Any) -> None:  # noqa: ANN401
        self.sink.put(
            RoundJudged(
                session=session.session.hex(),
                segment=self._segments[session.handle],
                batch=timing.batch,
                queue_ms=timing.queue_ms,
                prefill_ms=timing.prefill_ms,
                compute_ms=timing.compute_ms,
                at=at,
                device=session.device,
                **fields,
            )
        )

    def _traced(self, session: EdgeSession) -> bool:
        # By the session's own random name, so that it is traced in every segment or in none.
        return int.from_bytes(session.session[:4], "big") < self.trace_share * (1 << 32)


def _final_tokens(session: EdgeSession, message: Close) -> int:
    """Return the tokens of a text that its device has ended."""
    if message.unverified:  # the edge cannot know of them
        return message.tokens
    # A device that ends a text early does so before it has heard of all that is verified of it.
    return min(session.committed, message.tokens)
