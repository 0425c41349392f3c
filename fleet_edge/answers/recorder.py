"""Recorder: turn what happens to sessions into records of the session log.

Reads sessions without changing them. Never blocks: the writer has its own thread.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final, Protocol

from fleet_edge.answers.device_log import EventCounts, StateRecorder
from fleet_edge.session_log.counters import SEGMENT_COUNTERS
from fleet_edge.session_log.event_codes import EventKind
from fleet_edge.session_log.records import (
    LeaveReason,
    Record,
    close_record,
    minute_of,
    open_record,
    quarantine_record,
    report_record,
    segment_number,
)
from fleet_edge.session_log.views import DeviceCounters, QuarantineView
from fleet_edge.sessions.drafts import DraftResult
from fleet_edge.sessions.machine import DecodeRequest, EdgeSession
from fleet_edge.verifiers.contract import TargetInfo
from schemas.messages import Close, Draft, Open
from schemas.names import is_probe
from schemas.reasons import EndReason


@dataclass(slots=True)
class DeviceRates:
    """Admits a bounded number of events of each device per minute; starts again with each minute."""

    most: int
    _current: int = -1
    _admitted: Counter[str] = field(default_factory=Counter)

    def admit(self, device: str, at: datetime) -> bool:
        current = minute_of(at)
        if current != self._current:  # also if the clock was set back
            self._current = current
            self._admitted.clear()
        if self._admitted[device] >= self.most:
            return False
        self._admitted[device] += 1
        return True


# Per minute; also the default limit of open sessions: a device that returns to a restarted edge closes them all.
_REPORTS: Final = 8

# Per minute: generations made without an edge and reported later. The device reports the rest later still.
_UNVERIFIED: Final = 30
_WORTH_AN_EVENT: Final = frozenset({EndReason.LOST, EndReason.FAILED})
_LONGEST_AGE_S: Final = 366 * 86_400.0

# Rounds logged per minute and device. Twenty a second are more than a device drafts. Further samples are rare, and of
# rarely accepted drafts a sample is enough.
_ROUNDS: Final = 1200
_SELDOM: Final = 30

_WRITTEN: Final = "written"


@dataclass(frozen=True, slots=True)
class EndCause:
    """Why a session ended, where that is more than the reason says."""

    code: str
    sentence: str


class Sink(Protocol):
    """Destination of records."""

    def put(self, record: Record, *, urgent: bool = False, then: Callable[[], None] | None = None) -> None:
        """Take a record. MUST NOT block or raise.

        An urgent record is written without waiting for others. `then` is called on any thread once the record will
        survive this process; never if it will not.
        """


@dataclass(slots=True)
class Recorder:
    """Writes the session log of one edge."""

    sink: Sink
    edge: str
    now: Callable[[], datetime]
    events: EventCounts = field(init=False)
    sightings: StateRecorder = field(init=False)
    _segments: dict[int, int] = field(default_factory=dict)  # segment numbers by handle
    _reported: DeviceRates = field(default_factory=lambda: DeviceRates(_REPORTS))
    _unverified: DeviceRates = field(default_factory=lambda: DeviceRates(_UNVERIFIED))
    _rounds: DeviceRates = field(default_factory=lambda: DeviceRates(_ROUNDS))
    _seldom: DeviceRates = field(default_factory=lambda: DeviceRates(_SELDOM))

    def __post_init__(self) -> None:
        self.events = EventCounts(self.sink.put, self.edge, self.now)
        self.sightings = StateRecorder(self.sink.put, self.edge, self.now, self.events)

    def flush(self) -> None:
        """Write held-back event counts. Call it every few seconds, and at the end."""
        self.events.flush()

    def _put(
        self, device: str, record: Record, *, urgent: bool = False, then: Callable[[], None] | None = None
    ) -> None:
        """Write a record, unless it is of a self-test, which is neither a device nor usage."""
        if not is_probe(device):
            self.sink.put(record, urgent=urgent, then=then)
        elif then is not None:
            then()

    def record_open(self, session: EdgeSession, message: Open, *, target: TargetInfo, size: int) -> None:
        at = self.now()
        self._segments[session.handle] = segment_number(at)
        policy = session.policy.model_dump(include={"mode", "temperature", "top_k", "top_p", "seed"})
        # Urgent: a session may close within the time that a record waits for others, and a Close counts only for a
        # session known to be open.
        self._put(
            session.device,
            open_record(
                self._key(session),
                at,
                **policy,
                edge=self.edge,
                app=message.app,
                draft_model=message.draft_model,
                quantization=message.quantization,
                target=target.name,
                target_id=target.target_id.hex(),
                prompt_tokens=session.prompt_length,
                max_new_tokens=session.limits.max_new_tokens,
                resumed_tokens=session.committed,
                open_bytes=size,
            ),
            urgent=True,
        )

    def record_verdict(
        self, session: EdgeSession, result: DraftResult, *, form: str | None, downlink_bytes: int
    ) -> None:
        """Log a verdict, unless the device has had too many within a minute."""
        draft = result.arrived.draft
        ordinary = not result.background and (result.tested or draft.tokens)
        self._round(
            session,
            draft,
            result,
            self._rounds if ordinary else self._seldom,
            drafted=len(draft.tokens),
            tested=result.tested,
            accepted=result.accepted,
            uplink_bytes=result.arrived.size,
            downlink_bytes=downlink_bytes,
            form=form,
        )

    def record_decoded(
        self, session: EdgeSession, decode: DecodeRequest, result: DraftResult, *, downlink_bytes: int
    ) -> None:
        counted = {"drafted": 0, "tested": 0, "accepted": 0, "uplink_bytes": decode.size}
        counted["downlink_bytes"] = downlink_bytes
        self._round(session, decode.request, result, self._rounds, form=_WRITTEN, **counted)

    def record_progress(self, session: EdgeSession) -> None:
        """Log a session's counters; absolute values, so that it may be called at any time."""
        values = {name: getattr(session.counters, name) for name in SEGMENT_COUNTERS}
        values |= {"first_token_ms": session.times.first_token_ms, "gap_p95_ms": session.times.gap_p95_ms}
        self._put(session.device, Record(self.now(), {"segments": self._key(session) | values}))

    def record_end(
        self,
        session: EdgeSession,
        reason: EndReason,
        message: Close | None,
        *,
        cause: EndCause | None = None,
        then: Callable[[], None] | None = None,
    ) -> None:
        """Log the end of a session, by the device's Close or by its lease.

        `then` is called on any thread once the record cannot be lost.
        """
        self.record_progress(session)
        tokens = session.committed
        if message is not None:
            # Without this edge the device may have decoded more; one that ends early has not received all verdicts.
            tokens = message.tokens if message.unverified else min(session.committed, message.tokens)
        counters = DeviceCounters.of(message) if message else None
        why: dict[str, Any] = {} if cause is None else {"code": cause.code, "sentence": cause.sentence}
        record = close_record(self._key(session), self.now(), reason=reason, tokens=tokens, counters=counters, **why)
        self._put(session.device, record, then=then)
        del self._segments[session.handle]
        if cause is not None and reason in _WORTH_AN_EVENT:
            sentence = f"{cause.sentence} ({cause.code}; {session.committed} tokens were committed.)"
            self.events.note(EventKind.SESSION, reason, sentence, session.device, session=session.session)

    def record_leave(self, session: EdgeSession, reason: LeaveReason) -> None:
        """Complete the segment of a session that goes on elsewhere or under another handle."""
        self.record_progress(session)
        at = self.now()
        self._put(session.device, Record(at, {"segments": self._key(session) | {"reason": reason, "closed_at": at}}))
        del self._segments[session.handle]
        if reason is LeaveReason.HANDED_OVER:
            sentence = f"The session left this edge at {session.committed} tokens and continues at another edge."
            self.events.note(EventKind.SESSION, "handed-over", sentence, session.device, session=session.session)

    def record_unknown_end(self, device: str, message: Close, *, then: Callable[[], None]) -> None:
        """Log the Close of a session that this edge does not know, having restarted, or that never existed.

        Beyond a rate only one event a minute is logged. `then` is called on any thread once the record cannot be lost,
        or is not kept.
        """
        at = self.now()
        if not (self._unverified if message.unverified else self._reported).admit(device, at):
            sentence = "The device closes more unknown sessions than it can have opened."
            self.events.note(EventKind.CLOSE, "unknown-session", sentence, device, session=message.session)
            if not message.unverified:  # the device keeps those and reports them again
                then()
            return
        self._put(
            device,
            report_record(
                message.session.hex(),
                device,
                at - timedelta(seconds=min(message.age_s or 0.0, _LONGEST_AGE_S)),
                reason=message.reason,
                tokens=message.tokens,
                counters=DeviceCounters.of(message),
                code=message.code if message.sentence else None,
                sentence=message.sentence,
                app=message.app,
            ),
            then=then,
        )

    def record_quarantine(
        self, device: str, *, at: datetime, until: datetime, reason: str, strikes: float, level: int
    ) -> None:
        self.sink.put(
            quarantine_record(
                QuarantineView(
                    device=device,
                    by=self.edge,
                    since_at=at,
                    until_at=until,
                    reason=reason,
                    strikes=round(strikes),
                    level=level,
                )
            )
        )

    def _round(
        self,
        session: EdgeSession,
        draft: Draft,
        result: DraftResult,
        rates: DeviceRates,
        **fields: Any,  # noqa: ANN401
    ) -> None:
        at = self.now()
        if rates.admit(session.device, at):
            own = {name: getattr(result, name) for name in ("batch", "queue_ms", "prefill_ms", "compute_ms")}
            row = self._key(session) | {"round": draft.round, "base": draft.base, "at": at, **own, **fields}
            self._put(session.device, Record(at, {"rounds": row}))

    def _key(self, session: EdgeSession) -> dict[str, Any]:
        """Return the key of an open session's segment."""
        segment = self._segments[session.handle]
        return {"session": session.session.hex(), "segment": segment, "device": session.device}
