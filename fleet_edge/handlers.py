"""Message handlers: what each arrived message does to the sessions, on the orchestrator's thread."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta

from fleet_edge.answers.answers import Responder
from fleet_edge.answers.recorder import EndCause, Recorder
from fleet_edge.batching.scheduler import Scheduler
from fleet_edge.errors import DraftFault, OpenRefused
from fleet_edge.guard import DeviceGuard, OverQuota, QuarantineBegun, SharedQuarantines
from fleet_edge.intake import Malformed, ReceivedMessage
from fleet_edge.session_log.event_codes import EventKind
from fleet_edge.session_log.quarantines import Quarantines
from fleet_edge.session_log.records import LeaveReason
from fleet_edge.sessions.admission import SessionLimits, SessionOffer, grant
from fleet_edge.sessions.drafts import ReceivedDraft
from fleet_edge.sessions.grammars import Constraint, Grammars, PreparedGrammar
from fleet_edge.sessions.machine import EdgeSession
from fleet_edge.sessions.table import SessionTable
from schemas.control import DeviceState, Telemetry
from schemas.messages import Close, Draft, Open
from schemas.reasons import Action, EndReason, FaultCode, RefusalCode
from schemas.topics import Topic

_log = logging.getLogger(__name__)

_ENDING = "The edge is shutting down; try again shortly."


@dataclass(slots=True)
class MessageHandlers:
    """Handles messages: opens, drafts, closes and states.

    A device has `grace_s` seconds to come back after the broker reports it offline. New sessions are refused while
    `draining`, or while `away` says why the target model is unavailable.
    """

    edge: str
    sessions: SessionTable
    scheduler: Scheduler
    answers: Responder
    recorder: Recorder
    guard: DeviceGuard
    quarantines: SharedQuarantines
    clock: Callable[[], float]
    offer: SessionOffer = field(default_factory=SessionOffer)
    grace_s: float = 15.0
    draining: bool = False
    away: str = ""
    grammars: Grammars = field(default_factory=Grammars)

    def receive(self, arrival: ReceivedMessage) -> None:
        self.answers.figures.uplink_bytes += arrival.size
        self.answers.figures.heard(arrival.device)
        match arrival.message:
            case Draft() as draft:
                self._on_draft(arrival.device, draft, arrival)
            case Open() as message:
                self._on_open(arrival.device, message, arrival.size)
            case Close() as message:
                self._on_close(arrival.device, message)
            case DeviceState() as state:
                self._on_state(arrival.device, state)
            case Telemetry() as telemetry:
                self.recorder.sightings.telemetry(arrival.device, telemetry)
            case Malformed() as malformed:
                self._on_malformed(arrival.device, malformed)

    def expire(self) -> None:
        for session in self.sessions.expired(self.clock()):
            if session.ready is not None and not self._gone(session.device):
                self.sessions.renew(session, now=self.clock())  # its device waits for this edge
                continue
            fields = {"session": session.session.hex(), "device": session.device}
            _log.info("Session %(session)s of %(device)s is lost: its lease ran out.", fields, extra=fields)
            self.answers.confirm_end(session, EndReason.LOST, cause=self._loss(session.device))
            self._forget(session)
        self.scheduler.expire_prefixes()

    def flush(self) -> None:
        """Log the counters of open sessions, and messages that were dropped unread."""
        for session in self.sessions:
            self.recorder.record_progress(session)
        for device, number in self.guard.take_dropped().items():
            sentence = "Messages were dropped unread: the device was over its quotas, or quarantined."
            self.recorder.events.note(EventKind.DROPPED, FaultCode.QUOTA, sentence, device, times=number)

    def report_guard(self) -> None:
        for notice in self.guard.take_notices():
            match notice:
                case OverQuota():
                    sentence = f"The device exceeds its quota on {notice.topic.value}; it waits {notice.retry_s:.1f} s."
                    fault = DraftFault(FaultCode.QUOTA, Action.WAIT, sentence, retry_s=notice.retry_s)
                    self.answers.notify(notice.device, fault)
                case QuarantineBegun():
                    self._quarantined(notice)

    def apply_quarantines(self, quarantines: Quarantines) -> None:
        for device in self.quarantines.apply(quarantines):
            _log.warning("%s is quarantined: %s", device, quarantines.active[device].reason, extra={"device": device})
            self._end_sessions(device, quarantines.active[device].reason)

    def restore_grammar(self, session: EdgeSession) -> None:
        """Restore a session's output in the grammar worker; its drafts wait meanwhile."""
        if (constraint := session.constraint) is not None and not session.finished:
            self.grammars.restore(session.device, constraint, tuple(session.text))

    def grammar_killed(self, device: str, session: bytes, report: str) -> None:
        """Strike a device whose grammar has killed its processes, and log it."""
        _log.warning("%s: %s", device, report, extra={"device": device, "session": session.hex()})
        self.guard.strike_grammar(device)
        self.recorder.events.note(EventKind.GRAMMAR, "killed", report, device, session=session)

    # By kind

    def _on_open(self, device: str, message: Open, size: int) -> None:
        old = self.sessions.by_name(device, message.session)
        if old is not None and message.attempt < old.attempt:
            return  # delivered late: the device has opened it again
        if old is not None and message.attempt == old.attempt:
            self.answers.repeat_grant(old)  # delivered twice
            return
        if self.grammars.waits(device, message):
            return  # delivered twice, before it was granted
        try:
            limits, constraint = self._limits(device, message), None
            if message.policy.grammar is not None and (constraint := self.grammars.at_once(device, message)) is None:
                self.guard.admit_grammar(device)
                self.grammars.prepare(
                    device, message, lambda prepared: self._prepared(device, message, size, limits, prepared)
                )
                return
        except OpenRefused as error:
            self.answers.refuse(device, message, error)
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
            self.answers.refuse(device, message, found)
        elif self.draining or self.away:
            self.answers.refuse(device, message, OpenRefused(RefusalCode.DRAINING, _ENDING))
        else:
            self._begin(device, message, size, limits, found, compile_s=prepared.seconds)

    def _begin(
        self,
        device: str,
        message: Open,
        size: int,
        limits: SessionLimits,
        constraint: Constraint | None,
        *,
        compile_s: float = 0.0,
    ) -> None:
        old = self.sessions.by_name(device, message.session)
        try:
            if old is not None:
                self.answers.record_leave(old, LeaveReason.RESUMED)
                self._forget(old)
            session = self.sessions.add(message, device=device, limits=limits, now=self.clock(), constraint=constraint)
        except OpenRefused as error:
            self.answers.refuse(device, message, error)
            return
        session.counters.grammar_ms += compile_s * 1e3
        if message.resume is not None:
            self._resumed(session, here=old is not None)
        self.scheduler.on_open(session)
        self.answers.grant(session, message, size=size)

    def _resumed(self, session: EdgeSession, *, here: bool) -> None:
        code, where = ("resumed", "again here") if here else ("taken-over", "here, having begun elsewhere or earlier")
        sentence = f"The session goes on {where}, at {session.committed} tokens."
        self.recorder.events.note(EventKind.SESSION, code, sentence, session.device, session=session.session)

    def _gone(self, device: str) -> bool:
        presence = self.recorder.sightings.presence(device)
        return presence is not None and presence.gone

    def _loss(self, device: str) -> EndCause:
        if self._gone(device):
            sentence = (
                "The broker lost the connection of the device, and the device did not "
                f"reconnect within {self.grace_s:g} s."
            )
            return EndCause("device-offline", sentence)
        sentence = f"The device sent nothing for {self.sessions.lease_s:g} s, though it is not offline."
        return EndCause("device-silent", sentence)

    def _limits(self, device: str, message: Open) -> SessionLimits:
        if self.draining:
            raise OpenRefused(RefusalCode.DRAINING, _ENDING)
        if self.away:
            raise OpenRefused(RefusalCode.DRAINING, "The edge cannot reach its large model; try again shortly.")
        limits = grant(message, target=self.scheduler.target, offer=self.offer)
        if message.echo and not self.answers.can_send_prompt(len(message.prompt), most=message.logprobs or 0):
            raise OpenRefused(
                RefusalCode.LOGPROBS,
                f"The log-probabilities of a prompt of {len(message.prompt)} tokens do not fit in a message; ask for "
                "fewer tokens at each position, or shorten the prompt.",
            )
        self.guard.admit_open(device, message)
        self._check_wait(device, message)
        return replace(limits, max_draft=self.scheduler.longest_draft(device, limits.max_draft))

    def _check_wait(self, device: str, message: Open) -> None:
        """Refuse an Open whose first token would come after the application has stopped waiting."""
        if message.wait_s is None:
            return
        tokens = (*message.prompt, *(message.resume or ()))
        wait = self.scheduler.wait_of_new(
            self.sessions, device, tokens, stable=message.policy.repeats, now=self.clock()
        )
        expected_s = wait.seconds
        if (late_s := expected_s - message.wait_s) > 0.0:
            raise OpenRefused(
                RefusalCode.TOO_LATE,
                f"The first token would come after about {expected_s:.0f} s, and the request ends in "
                f"{message.wait_s:.0f} s; allow it more time, or shorten the prompt.",
                retry_s=late_s,
            )

    def _on_draft(self, device: str, draft: Draft, arrival: ReceivedMessage) -> None:
        session = None
        try:
            session = self.sessions.find(device=device, handle=draft.handle, now=self.clock())
            self.guard.admit_draft(device)
            arrived = ReceivedDraft(draft, arrival.at, arrival.size)
            receipt = session.admit(arrived)
        except DraftFault as error:
            self.answers.send_fault(device, error, session=session, draft=draft)
            return
        self.scheduler.on_draft(session, at=arrival.at)
        if receipt.written:
            self.answers.send_missing(session)
        elif receipt.repeat is not None:
            self.answers.repeat_verdict(session, draft, receipt.repeat)
        elif receipt.request:
            self.answers.send_samples(session, arrived)

    def _on_close(self, device: str, message: Close) -> None:
        session = self.sessions.by_name(device, message.session)
        if message.edge not in (None, self.edge):
            if session is not None:  # resumed at another edge, which answers and logs the end
                self.answers.record_leave(session, LeaveReason.RESUMED)
                self._forget(session)
            return
        self.grammars.forget(device, message.session)
        if session is not None and message.edge is None and _is_behind(session, message):
            # A repeated Open came here too, or it was resumed elsewhere: this edge does not know its end.
            self.answers.record_leave(session, LeaveReason.RESUMED)
            self._forget(session)
            session = None
        if session is None:
            self.answers.confirm_unknown_end(device, message)  # a repeat, or an edge that has restarted
            return
        session.close(message)
        self.answers.confirm_end(session, message.reason, message=message)
        self._forget(session)

    def _on_state(self, device: str, state: DeviceState) -> None:
        self.recorder.sightings.device(device, state)
        self.answers.figures.heard(device, state.presence)
        if state.presence.gone:
            self.sessions.shorten(device, expires=self.clock() + self.grace_s)

    def _on_malformed(self, device: str, malformed: Malformed) -> None:
        if malformed.topic in (Topic.DRAFT, Topic.OPEN, Topic.CLOSE):
            error = DraftFault(FaultCode.MALFORMED, Action.GIVE_UP, malformed.sentence)
            self.answers.send_fault(device, error)
        else:
            self.guard.strike(device, FaultCode.MALFORMED)
            self.recorder.events.note(EventKind.FAULT, "malformed", malformed.sentence, device)

    def _quarantined(self, quarantine: QuarantineBegun) -> None:
        at = self.quarantines.begun(quarantine)
        reason = "The device sent too many malformed, unknown or excessive messages."
        device, for_s = quarantine.device, quarantine.for_s
        _log.warning("%s is quarantined for %.0f s: %s", device, for_s, reason, extra={"device": device})
        until, strikes = at + timedelta(seconds=for_s), quarantine.strikes
        self.recorder.record_quarantine(
            device, at=at, until=until, reason=reason, strikes=strikes, level=quarantine.level
        )
        self._end_sessions(device, reason)
        sentence = f"The device is quarantined for {for_s:.0f} s. {reason}"
        self.recorder.events.note(EventKind.QUARANTINE, "begun", sentence, device)
        self.answers.notify(device, DraftFault(FaultCode.QUOTA, Action.GIVE_UP, sentence, retry_s=for_s))

    def _end_sessions(self, device: str, reason: str) -> None:
        for session in self.sessions:
            if session.device == device:
                cause = EndCause("quarantined", f"The device was quarantined: {reason}")
                self.answers.record_end(session, EndReason.FAILED, cause=cause)
                self._forget(session)

    def _forget(self, session: EdgeSession) -> None:
        self.sessions.remove(session)
        self.scheduler.forget(session)


def _is_behind(session: EdgeSession, message: Close) -> bool:
    """The device has more verified tokens than this edge has sent."""
    verified = message.tokens - (message.unverified or 0)
    return verified > (session.committed if message.fix is None else session.longest_committed)
