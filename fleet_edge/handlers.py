"""Reception: what each arrived message does to the session table. Runs on the orchestrator's thread."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from dssd.downlink import Form, choose_form
from fleet_edge.answers import messages
from fleet_edge.answers.publisher import Publisher
from fleet_edge.answers.recorder import Measured, Recorder
from fleet_edge.batching.scheduler import Scheduler
from fleet_edge.certificates import CertificateWatch
from fleet_edge.errors import DraftFault, OpenRefused
from fleet_edge.intake import Malformed, ReceivedMessage
from fleet_edge.sessions.admission import SessionOffer, grant
from fleet_edge.sessions.draft_results import DraftResult
from fleet_edge.sessions.limits import SessionLimits
from fleet_edge.sessions.machine import EdgeSession
from fleet_edge.sessions.table import SessionTable
from fleet_edge.sessions.waiting import ReceivedDraft
from fleet_edge.store.records import LeaveReason
from schemas.codec import encode_verdict
from schemas.control import DeviceState, Presence
from schemas.messages import Close, Draft, Open, Verdict
from schemas.reasons import Action, EndReason, FaultCode, Finish, RefusalCode
from schemas.topics import Topic

__all__ = ["MessageHandlers"]

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class MessageHandlers:
    """Opens, admits and closes.

    Attributes:
        edge: This edge's name.
        sessions: The table.
        scheduler: Owner of the verifier's sequences.
        publisher: Sends answers.
        recorder: Writes the log.
        expiry: Remembers when the machines' certificates end.
        terms: Offered to every session.
        form: Downlink form of p.
        clock: Monotonic seconds.
        grace_s: Seconds that a device has to come back after the broker has declared it gone.
        draining: Whether new sessions are refused.
    """

    edge: str
    sessions: SessionTable
    scheduler: Scheduler
    publisher: Publisher
    recorder: Recorder
    expiry: CertificateWatch
    clock: Callable[[], float]
    terms: SessionOffer = field(default_factory=SessionOffer)
    form: Form = Form.AUTO
    grace_s: float = 15.0
    draining: bool = False

    def receive(self, arrival: ReceivedMessage) -> None:
        """Take one message."""
        match arrival.message:
            case Draft() as draft:
                self._draft(arrival.device, draft, arrival)
            case Open() as message:
                self._open(arrival.device, message, arrival.size)
            case Close() as message:
                self._close(arrival.device, message)
            case DeviceState() as state:
                self._state(arrival.device, state)
            case Malformed() as malformed:
                self._malformed(arrival.device, malformed)

    def fault(self, session: EdgeSession | None, device: str, draft: Draft | None, error: DraftFault) -> None:
        """Answer with a Fault, and log it."""
        reply = messages.fault(draft, error)
        self.publisher.reply(device, reply)
        self.recorder.event(
            kind="fault",
            code=reply.code.value,
            sentence=reply.sentence,
            device=device,
            session=session.session if session else None,
        )

    def expire(self) -> None:
        """End the sessions whose lease has run out."""
        for session in self.sessions.expired(self.clock()):
            reason = EndReason.LOST
            _log.info("Session %s of %s is lost: its lease ran out.", session.session.hex(), session.device)
            self.publisher.reply(session.device, messages.closed(session, reason))
            self.recorder.ended(session, reason, None)
            self._forget(session)

    def flush(self) -> None:
        """Log what the open sessions have counted so far."""
        for session in self.sessions:
            self.recorder.progress(session)

    # By kind

    def _open(self, device: str, message: Open, size: int) -> None:
        old = self.sessions.named(device, message.session)
        if old is not None and message.attempt < old.attempt:
            return  # delivered late: the device has opened it again since
        try:
            if old is not None and message.attempt == old.attempt:
                session = old  # delivered twice
            else:
                limits = self._limits(message)
                if old is not None:
                    self.recorder.left(old, LeaveReason.RESUMED)
                    self._forget(old)
                session = self.sessions.add(message, device=device, limits=limits, now=self.clock())
                self.scheduler.verifier.open(session.handle)
                self.recorder.opened(session, message, target=self.scheduler.verifier.info.name, size=size)
        except OpenRefused as error:
            reply = messages.refused(message, error)
            self.publisher.reply(device, reply)
            self.recorder.event(
                kind="refused",
                code=reply.code.value,
                sentence=reply.sentence,
                device=device,
                session=message.session,
            )
            return
        target, lease_s = self.scheduler.verifier.info.name, self.sessions.lease_s
        self.publisher.reply(device, messages.opened(session, edge=self.edge, target=target, lease_s=lease_s))

    def _limits(self, message: Open) -> SessionLimits:
        if self.draining:
            raise OpenRefused(RefusalCode.DRAINING, "The edge is shutting down; try again shortly.")
        return grant(message, target=self.scheduler.verifier.info, terms=self.terms)

    def _draft(self, device: str, draft: Draft, arrival: ReceivedMessage) -> None:
        session = None
        try:
            session = self.sessions.find(device=device, handle=draft.handle, now=self.clock())
            session.counters.uplink_bytes += arrival.size
            arrived = ReceivedDraft(draft, arrival.at, arrival.size)
            admission = session.admit(arrived)
            self.scheduler.gathering.arrived(session.handle, at=arrival.at)
        except DraftFault as error:
            self.fault(session, device, draft, error)
            return
        if admission.repeat is not None:
            session.counters.downlink_bytes += len(admission.repeat)
            self.publisher.verdict(device, admission.repeat)
        elif admission.request:
            self._more_samples(session, arrived)

    def _more_samples(self, session: EdgeSession, arrived: ReceivedDraft) -> None:
        """Answer from memory: the target's distribution at the last rejection is kept until it is corrected."""
        draft = arrived.draft
        assert session.rejected is not None
        assert draft.tried is not None
        following = choose_form(
            session.rejected,
            policy=session.policy,
            position=session.committed,
            vocabulary_size=session.limits.vocabulary,
            max_bytes=self.publisher.max_form_bytes,
            form=self.form,
            tried=draft.tried,
        )
        payload = encode_verdict(Verdict(handle=draft.handle, round=draft.round, accepted=0, next=following))
        session.counters.rounds += 1
        session.remember(draft.round, payload)
        self.publisher.verdict(session.device, payload)
        settled = DraftResult(arrived, 0, 0, None, session.rejected, Finish.NO)
        queue_ms = (self.clock() - arrived.at) * 1e3
        self.recorder.judged(session, settled, Measured(0, arrived.size, len(payload), queue_ms, 0.0, following.kind))

    def _close(self, device: str, message: Close) -> None:
        session = self.sessions.named(device, message.session)
        if message.edge not in (None, self.edge):
            if session is not None:  # resumed at another edge since; that one answers and logs the end
                self.recorder.left(session, LeaveReason.RESUMED)
                self._forget(session)
            return
        if session is None:
            # A repeat, or an edge that has restarted: the device's own counters are the record.
            self.recorder.ended_elsewhere(message)
            self.publisher.reply(device, messages.closed_elsewhere(message))
            return
        session.close(message)
        self.publisher.reply(device, messages.closed(session, message.reason))
        self.recorder.ended(session, message.reason, message)
        self._forget(session)

    def _state(self, device: str, state: DeviceState) -> None:
        self.recorder.device_seen(device, state)
        self.expiry.note(device, state.certificate_until)
        if state.presence is Presence.OFFLINE:
            self.sessions.shorten(device, expires=self.clock() + self.grace_s)

    def warn_certificates(self) -> None:
        """Tell of the certificates that end soon: in the session log, and to whoever reads the edge's own."""
        for ending in self.expiry.due():
            _log.warning("%s", ending.sentence)
            device = None if ending.name == self.edge else ending.name
            self.recorder.event(kind="certificate", code="ends-soon", sentence=ending.sentence, device=device)

    def _malformed(self, device: str, malformed: Malformed) -> None:
        if malformed.topic in (Topic.DRAFT, Topic.OPEN, Topic.CLOSE):
            error = DraftFault(FaultCode.MALFORMED, Action.GIVE_UP, malformed.sentence)
            self.fault(None, device, None, error)
        else:
            self.recorder.event(kind="fault", code="malformed", sentence=malformed.sentence, device=device)

    def _forget(self, session: EdgeSession) -> None:
        self.sessions.remove(session)
        self.scheduler.forget(session)
