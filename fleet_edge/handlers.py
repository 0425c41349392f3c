"""Message handlers: what each arrived message does to the session table, on the orchestrator's thread."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta

from fleet_edge.answers.answers import Answers
from fleet_edge.answers.recorder import EndCause, Recorder
from fleet_edge.batching.scheduler import Scheduler
from fleet_edge.errors import DraftFault, OpenRefused
from fleet_edge.guard.fences import SharedFences
from fleet_edge.guard.guard import FenceBegun, Guard, OverQuota
from fleet_edge.intake import Malformed, ReceivedMessage
from fleet_edge.sessions.admission import SessionOffer, grant
from fleet_edge.sessions.constraint import Constraint
from fleet_edge.sessions.grammars import Grammars, PreparedGrammar
from fleet_edge.sessions.limits import SessionLimits
from fleet_edge.sessions.machine import EdgeSession
from fleet_edge.sessions.table import SessionTable
from fleet_edge.sessions.waiting import ReceivedDraft
from fleet_edge.store.event_codes import EventKind
from fleet_edge.store.fences import Fences
from fleet_edge.store.records.segments import LeaveReason
from fleet_edge.watch.certificates import CertificateWatch
from fleet_edge.watch.clocks import ClockWatch
from schemas.control import DeviceState, EdgeState, Presence, Telemetry
from schemas.messages import Close, Draft, Open
from schemas.reasons import Action, EndReason, FaultCode, RefusalCode
from schemas.topics import Topic

_log = logging.getLogger(__name__)

_ENDING = "The edge is shutting down; try again shortly."


@dataclass(slots=True)
class MessageHandlers:
    """Opens, admits and closes.

    Attributes:
        edge: This edge's name.
        sessions: The table.
        scheduler: Told what concerns its sessions.
        answers: Tell devices and the log.
        recorder: Logs the states of machines.
        guard: Keeps the quotas of devices.
        fences: What this edge, the others and the administrator have decided of devices.
        expiry: Remembers when the machines' certificates end.
        clock: Monotonic seconds.
        offer: Granted to every session.
        grace_s: Seconds that a device has to come back after the broker has declared it gone.
        draining: Whether new sessions are refused.
        away: Why no session can be verified, if that has lasted; new ones are refused meanwhile.
        grammars: Prepares the grammars of texts that have one.
        clocks: Of the devices.
    """

    edge: str
    sessions: SessionTable
    scheduler: Scheduler
    answers: Answers
    recorder: Recorder
    guard: Guard
    fences: SharedFences
    expiry: CertificateWatch
    clock: Callable[[], float]
    offer: SessionOffer = field(default_factory=SessionOffer)
    grace_s: float = 15.0
    draining: bool = False
    away: str = ""
    grammars: Grammars = field(default_factory=Grammars)
    clocks: ClockWatch = field(default_factory=ClockWatch)

    def receive(self, arrival: ReceivedMessage) -> None:
        self.answers.figures.uplink_bytes += arrival.size
        self.answers.figures.heard(arrival.device)
        match arrival.message:
            case Draft() as draft:
                self._draft(arrival.device, draft, arrival)
            case Open() as message:
                self._open(arrival.device, message, arrival.size)
            case Close() as message:
                self._close(arrival.device, message)
            case DeviceState() as state:
                self._state(arrival.device, state)
            case Telemetry() as told:
                self.recorder.sightings.telemetry(arrival.device, told)
            case Malformed() as malformed:
                self._malformed(arrival.device, malformed)

    def announced(self, state: EdgeState) -> None:
        """This edge has changed its own state."""
        self.recorder.sightings.own(state)
        self.expiry.note(state.edge, state.certificate_until)

    def expire(self) -> None:
        """End the sessions whose lease has run out."""
        for session in self.sessions.expired(self.clock()):
            _log.info(
                "Session %s of %s is lost: its lease ran out.",
                session.session.hex(),
                session.device,
                extra={"session": session.session.hex(), "device": session.device},
            )
            self.answers.closed(session, EndReason.LOST, cause=self._loss(session.device))
            self._forget(session)

    def flush(self) -> None:
        """Log what the open sessions have counted so far, and what was dropped unread."""
        for session in self.sessions:
            self.answers.progress(session)
        for device, number in self.guard.take_dropped().items():
            self.recorder.event(
                kind=EventKind.DROPPED,
                code=FaultCode.QUOTA.value,
                sentence="Messages were dropped unread: the device was over its quotas, or shut out.",
                device=device,
                times=number,
            )

    def look_after_guard(self) -> None:
        """Tell devices, and the log, what the guard has decided since the last look."""
        for notice in self.guard.take_notices():
            match notice:
                case OverQuota():
                    self._over_quota(notice)
                case FenceBegun():
                    self._fenced(notice)

    def apply_fences(self, fences: Fences) -> None:
        """Bring what this edge knows of fences in step with the session log."""
        for device in self.fences.apply(fences):
            _log.warning("%s is shut out: %s", device, fences.active[device].reason, extra={"device": device})
            self._end_sessions(device, fences.active[device].reason)

    def grammar_killed(self, device: str, session: bytes, digest: str) -> None:
        """Count it against a device that its grammar has ended the grammar's process, and log it."""
        sentence = (
            f"A grammar has ended the process that it was compiled or followed in; its SHA-256 is {digest}. It is "
            "refused from now on."
        )
        _log.warning("%s: %s", device, sentence, extra={"device": device, "session": session.hex()})
        self.guard.strike_grammar(device)
        self.recorder.event(kind=EventKind.GRAMMAR, code="killed", sentence=sentence, device=device, session=session)

    # By kind

    def _open(self, device: str, message: Open, size: int) -> None:
        old = self.sessions.named(device, message.session)
        if old is not None and message.attempt < old.attempt:
            return  # delivered late: the device has opened it again since
        if old is not None and message.attempt == old.attempt:
            self.answers.opened_again(old)  # delivered twice
            return
        if self.grammars.waits(device, message):
            return  # likewise, before it was granted
        try:
            limits, constraint = self._limits(device, message), None
            if message.policy.grammar is not None and (constraint := self.grammars.at_once(message)) is None:
                self.guard.admit_grammar(device)
                self.grammars.prepare(
                    device, message, lambda prepared: self._prepared(device, message, size, limits, prepared)
                )
                return
        except OpenRefused as error:
            self.answers.refused(device, message, error)
            return
        self._begin(device, message, size, limits, constraint)

    def _prepared(
        self, device: str, message: Open, size: int, limits: SessionLimits, prepared: PreparedGrammar
    ) -> None:
        """Begin the session of an Open whose grammar is prepared, or refuse it."""
        self.guard.spend_grammar(device, prepared.seconds)
        if prepared.killed:
            self.grammar_killed(device, message.session, prepared.killed)
        found = prepared.found
        if found is None:
            return
        if isinstance(found, OpenRefused):
            self.answers.refused(device, message, found)
        elif self.draining or self.away:
            self.answers.refused(device, message, OpenRefused(RefusalCode.DRAINING, _ENDING))
        else:
            self._begin(device, message, size, limits, found)

    def _begin(
        self, device: str, message: Open, size: int, limits: SessionLimits, constraint: Constraint | None
    ) -> None:
        old = self.sessions.named(device, message.session)
        try:
            if old is not None:
                self.answers.left(old, LeaveReason.RESUMED)
                self._forget(old, resumed=True)
            session = self.sessions.add(message, device=device, limits=limits, now=self.clock(), constraint=constraint)
        except OpenRefused as error:
            self.answers.refused(device, message, error)
            return
        if message.resume is None:
            self.scheduler.granted(now=self.clock())
        else:
            self._resumed(session, here=old is not None)
        self.scheduler.opened(session)
        self.answers.opened(session, message, size=size)

    def _resumed(self, session: EdgeSession, *, here: bool) -> None:
        code, where = ("resumed", "again here") if here else ("taken-over", "here, having begun elsewhere or earlier")
        self.recorder.event(
            kind=EventKind.SESSION,
            code=code,
            sentence=f"The text goes on {where}, at {session.committed} tokens.",
            device=session.device,
            session=session.session,
        )

    def _loss(self, device: str) -> EndCause:
        if self.recorder.sightings.presence(device) is Presence.OFFLINE:
            sentence = f"The broker has lost the device, and it did not come back within {self.grace_s:g} s."
            return EndCause("device-offline", sentence)
        sentence = (
            f"Nothing came of the device for {self.sessions.lease_s:g} s, though it does not say that it is gone."
        )
        return EndCause("device-silent", sentence)

    def _limits(self, device: str, message: Open) -> SessionLimits:
        if self.draining:
            raise OpenRefused(RefusalCode.DRAINING, _ENDING)
        if self.away:
            raise OpenRefused(RefusalCode.DRAINING, "The edge cannot reach its large model; try again shortly.")
        limits = grant(message, target=self.scheduler.target, offer=self.offer)
        if message.resume is None and (wait_s := self.scheduler.busy_s(now=self.clock())) > 0.0:
            raise OpenRefused(
                RefusalCode.BUSY,
                f"The edge has as many texts as it can serve in time; ask again in {math.ceil(wait_s)} s.",
                retry_s=wait_s,
            )
        self.guard.admit_open(device, message)
        return replace(
            limits,
            sample_requests=self.guard.most_sample_requests(device),
            max_draft=self.scheduler.longest_draft(device, limits.max_draft),
        )

    def _draft(self, device: str, draft: Draft, arrival: ReceivedMessage) -> None:
        session = None
        try:
            session = self.sessions.find(device=device, handle=draft.handle, now=self.clock())
            self.guard.admit_draft(device)
            arrived = ReceivedDraft(draft, arrival.at, arrival.size)
            receipt = session.admit(arrived)
        except DraftFault as error:
            self.answers.fault(device, error, session=session, draft=draft)
            return
        self.scheduler.arrived(session, at=arrival.at)
        if receipt.written:
            self.answers.written_again(session)
        elif receipt.repeat is not None:
            self.answers.verdict_again(session, draft, receipt.repeat)
        elif receipt.request:
            self.answers.more_samples(session, arrived)

    def _close(self, device: str, message: Close) -> None:
        session = self.sessions.named(device, message.session)
        if message.edge not in (None, self.edge):
            if session is not None:  # resumed at another edge since; that one answers and logs the end
                self.answers.left(session, LeaveReason.RESUMED)
                self._forget(session)
            return
        self.grammars.forget(device, message.session)
        if session is not None and message.edge is None and _is_behind(session, message):
            # A repeated Open has come here too, or it was resumed elsewhere: what this edge knows is not its end.
            self.answers.left(session, LeaveReason.RESUMED)
            self._forget(session)
            session = None
        if session is None:
            self.answers.closed_elsewhere(device, message)  # a repeat, or an edge that has restarted
            return
        session.close(message)
        self.answers.closed(session, message.reason, message=message)
        self._forget(session)

    def _state(self, device: str, state: DeviceState) -> None:
        self.recorder.sightings.device(device, state)
        self.answers.figures.heard(device, state.presence)
        self.expiry.note(device, state.certificate_until)
        if wrong := self.clocks.note(device, state, now=self.recorder.now()):
            self.recorder.event(kind=EventKind.DEVICE, code="clock-wrong", sentence=wrong, device=device)
        if state.presence is Presence.OFFLINE:
            self.sessions.shorten(device, expires=self.clock() + self.grace_s)

    def warn_certificates(self) -> None:
        """Tell of the certificates that end soon: in the session log, and to whoever reads the edge's own."""
        for ending in self.expiry.due():
            _log.warning("%s", ending.sentence)
            device = None if ending.name == self.edge else ending.name
            code = "ended" if ending.days < 0 else "ends-soon"
            self.recorder.event(
                kind=EventKind.CERTIFICATE,
                code=code,
                sentence=ending.sentence,
                device=device,
                shared=device is not None,
            )

    def _malformed(self, device: str, malformed: Malformed) -> None:
        if malformed.topic in (Topic.DRAFT, Topic.OPEN, Topic.CLOSE):
            error = DraftFault(FaultCode.MALFORMED, Action.GIVE_UP, malformed.sentence)
            self.answers.fault(device, error)
        else:
            self.guard.strike(device, FaultCode.MALFORMED)
            self.recorder.event(kind=EventKind.FAULT, code="malformed", sentence=malformed.sentence, device=device)

    def _over_quota(self, notice: OverQuota) -> None:
        sentence = f"The device sends more on {notice.topic.value} than it may; it waits {notice.retry_s:.1f} s."
        fault = DraftFault(FaultCode.QUOTA, Action.WAIT, sentence, retry_s=notice.retry_s)
        self.answers.told(notice.device, fault)

    def _fenced(self, fence: FenceBegun) -> None:
        at = self.fences.begun(fence)
        reason = "It has sent too much that is malformed, unknown or above its quotas."
        _log.warning("%s is shut out for %.0f s: %s", fence.device, fence.for_s, reason, extra={"device": fence.device})
        self.recorder.fenced(
            fence.device,
            at=at,
            until=at + timedelta(seconds=fence.for_s),
            reason=reason,
            strikes=fence.strikes,
            level=fence.level,
        )
        self._end_sessions(fence.device, reason)
        sentence = f"The device is shut out for {fence.for_s:.0f} s. {reason}"
        self.recorder.event(kind=EventKind.FENCE, code="fenced", sentence=sentence, device=fence.device)
        self.answers.told(fence.device, DraftFault(FaultCode.QUOTA, Action.GIVE_UP, sentence, retry_s=fence.for_s))

    def _end_sessions(self, device: str, reason: str) -> None:
        """End the sessions of a device that is shut out: what they hold is the others'."""
        for session in self.sessions:
            if session.device == device:
                cause = EndCause("fenced", f"The device was shut out: {reason}")
                self.answers.ended(session, EndReason.FAILED, cause=cause)
                self._forget(session)

    def _forget(self, session: EdgeSession, *, resumed: bool = False) -> None:
        self.sessions.remove(session)
        if not resumed:
            self.scheduler.ended_text(now=self.clock())
        self.scheduler.forget(session)


def _is_behind(session: EdgeSession, message: Close) -> bool:
    """Whether the device has more verified text than this edge has given it."""
    verified = message.tokens - (message.unverified or 0)
    return verified > session.committed + (message.fix is not None)
