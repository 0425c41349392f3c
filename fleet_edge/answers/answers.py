"""Answers to devices: the one way from an edge's decisions to the topics of its devices and to the session log.

Whatever a session's device is told is made, counted, published and recorded here, in this order; only the end of a
session is recorded first, and told when no crash can undo the record.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from dssd.distribution import Dist
from dssd.downlink import FormName, choose_form
from fleet_edge.answers import messages
from fleet_edge.answers.publisher import Publisher
from fleet_edge.answers.recorder import EndCause, Recorder
from fleet_edge.answers.told_loads import ToldLoads
from fleet_edge.batching.timing import DraftTiming
from fleet_edge.counters import SegmentCounters
from fleet_edge.errors import DraftFault, OpenRefused
from fleet_edge.guard.guard import Guard
from fleet_edge.metrics.figures import Figures
from fleet_edge.sessions.acceptance import AcceptanceByModel
from fleet_edge.sessions.draft_results import DraftResult
from fleet_edge.sessions.machine import EdgeSession
from fleet_edge.sessions.stream import Stream
from fleet_edge.sessions.waiting import ReceivedDraft
from fleet_edge.store.event_codes import EventKind
from fleet_edge.store.records.segments import LeaveReason
from schemas.codec import encode_verdict
from schemas.downlink import DownlinkForm
from schemas.fields import MAX_TOKENS, EdgeLoad, Logprobs, TokenLogprobs
from schemas.messages import Close, Draft, Open, Verdict
from schemas.reasons import Action, EndReason, FaultCode, Finish

_log = logging.getLogger(__name__)

_VERDICT_BYTES: Final = 256
"""Of a verdict beside what it carries of the text, at most."""

_ID_BYTES: Final = 4

_TOKEN: Final = "token"  # noqa: S105 - how the log calls a verdict's `next` that is no form of p
_WRITTEN: Final = "written"
_AGAIN: Final = "again"
_NOTHING: Final = "none"
"""Of what else the bytes of verdicts are counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Tells devices and the log what has become of opens, drafts and sessions.

    Attributes:
        edge: This edge's name.
        target: The target model's name.
        lease_s: Seconds of silence after which a session is lost.
        publisher: Sends to devices.
        recorder: Writes the log.
        clock: Monotonic seconds.
        guard: Keeps the quotas: of what a device is told of its faults, and of what it is sent again.
        figures: Count, for the metrics.
        form: Downlink form of p; by default the smallest for each p.
        padding: Verdicts are filled up to a multiple of so many bytes; 0 leaves them as they are.
        load: Asked what the edge does at present.
        acceptance: Of each draft model.
        loads: What devices are told of the edge's load.
    """

    edge: str
    target: str
    lease_s: float
    publisher: Publisher
    recorder: Recorder
    clock: Callable[[], float]
    guard: Guard
    figures: Figures
    form: FormName = FormName.AUTO
    padding: int = 0
    load: Callable[[], EdgeLoad] = lambda: EdgeLoad(texts=1)
    acceptance: AcceptanceByModel = field(default_factory=AcceptanceByModel)
    loads: ToldLoads = field(default_factory=ToldLoads)

    # Opens

    def opened(self, session: EdgeSession, message: Open, *, size: int) -> None:
        """Grant a session, and log that it begins or goes on here.

        Args:
            session: As it begins.
            message: The Open that it answers.
            size: Its payload bytes.
        """
        session.times.begin(committed=session.committed, at=self.clock())
        self.recorder.opened(session, message, target=self.target, size=size)
        self.figures.opened(session, resumed=message.resume is not None)
        self.opened_again(session)

    def opened_again(self, session: EdgeSession) -> None:
        """Give the same grant again to an Open that was delivered twice; nothing new begins."""
        session.told_load = self.loads.of(session, self.load(), self.acceptance)
        granted = messages.opened(
            session,
            edge=self.edge,
            target=self.target,
            lease_s=self.lease_s,
            load=session.told_load,
        )
        self.publisher.reply(session.device, granted)

    def refused(self, device: str, message: Open, error: OpenRefused) -> None:
        """Refuse an Open, and log it. A device that is refused all the time is told so now and then."""
        reply = messages.refused(message, error)
        self.figures.refusals[reply.code.value] += 1
        if self.guard.may_answer(device):
            self.publisher.reply(device, reply, qos=0)
        self.recorder.event(
            kind=EventKind.REFUSED,
            code=reply.code.value,
            sentence=reply.sentence,
            device=device,
            session=message.session,
        )

    # Drafts

    def verdict(self, session: EdgeSession, result: DraftResult, timing: DraftTiming) -> None:
        """Give a verdict on a draft.

        Args:
            session: Whose; it has taken the result.
            result: The decision.
            timing: What it took.
        """
        form = None if result.p is None else self._choose_form(session, result.p)
        payload = self._answer(session, result, form, timing)
        self.guard.spend(session.device, len(result.tokens))
        session.times.grew(committed=session.committed, at=self.clock())
        self.figures.judged(session, result, timing)
        self.acceptance.count(session.draft_model, session.device, tested=result.tested, accepted=result.accepted)
        self.publisher.verdict(session.device, payload, form=_kind(result, form) or _NOTHING)
        if session.recent.collapsed:
            sentence = (
                f"Of this session's latest drafts {session.recent.share:.0%} is accepted: the draft model does not "
                "know such text, or the text is made so. Long drafts wait for those of others."
            )
            self.recorder.event(
                kind=EventKind.ACCEPTANCE,
                code="acceptance-collapsed",
                sentence=sentence,
                device=session.device,
                session=session.session,
            )

    def written(self, session: EdgeSession, results: Sequence[DraftResult], timing: DraftTiming) -> None:
        """Send what the edge has just written by itself, with what else the device was not sent.

        Args:
            session: Whose; it has a stream, and has taken the results.
            results: What was written, token by token.
            timing: What the last of them took.
        """
        stream = session.stream
        assert stream is not None
        self.guard.spend(session.device, sum(len(result.tokens) for result in results))
        # If the device has asked again meanwhile, it was sent this in answer.
        payloads = [] if stream.sent >= session.committed else self._pieces(session, timing)
        session.counters += SegmentCounters(
            queue_ms=timing.queue_ms,
            compute_ms=timing.compute_ms,
            batch_sum=timing.batch,
            prefill_ms=timing.prefill_ms,
        )
        session.times.grew(committed=session.committed, at=self.clock())
        self.figures.written(session, timing)
        for payload in payloads:
            self.publisher.verdict(session.device, payload, form=_WRITTEN)
        if payloads and not stream.logged:
            stream.logged = True
            self.recorder.written(session, stream, timing, downlink_bytes=sum(map(len, payloads)))

    def written_again(self, session: EdgeSession) -> None:
        """Send what a device lacks of a text that the edge writes no further."""
        stream = session.stream
        assert stream is not None
        for payload in self._pieces(session, DraftTiming()):
            self._send_more(session, stream.request, payload)

    def more_samples(self, session: EdgeSession, arrived: ReceivedDraft) -> None:
        """Send further samples of the last rejection from memory, where p is kept until the device has corrected it."""
        p, tried = session.rejected, arrived.draft.tried
        assert p is not None
        assert tried is not None
        told = session.rejected_logprobs
        result = DraftResult(arrived, accepted=0, tested=0, token=None, p=p, finish=Finish.NO, logprobs=told)
        timing = DraftTiming(queue_ms=max(0.0, self.clock() - arrived.at) * 1e3)
        payload = self._answer(session, result, self._choose_form(session, p, tried=tried), timing)
        session.counters += SegmentCounters(resampled=1)
        self._send_more(session, arrived.draft, payload)

    def verdict_again(self, session: EdgeSession, draft: Draft, payload: bytes) -> None:
        """Give the bytes of its verdict again to a draft that has come again."""
        session.counters += SegmentCounters(downlink_bytes=len(payload))
        self._send_more(session, draft, payload)

    def fault(
        self, device: str, error: DraftFault, *, session: EdgeSession | None = None, draft: Draft | None = None
    ) -> None:
        """Tell that a draft cannot be judged, or a message not be read, count it against the device, and log it.

        A device that does so all the time is told now and then.

        Args:
            device: Whose.
            error: Why.
            session: That it belongs to, if it belongs to any.
            draft: If it could be read.
        """
        reply = messages.fault(draft, error)
        self.figures.faults[reply.code.value] += 1
        self.guard.strike(device, error.code)
        if self.guard.may_answer(device):
            self.publisher.reply(device, reply, qos=0)
        self.recorder.event(
            kind=EventKind.FAULT,
            code=reply.code.value,
            sentence=reply.sentence,
            device=device,
            session=session.session if session else None,
        )

    def told(self, device: str, fault: DraftFault) -> None:
        """Tell a device what the guard has decided of all that it sends, and log it."""
        reply = messages.fault(None, fault)
        self.figures.faults[reply.code.value] += 1
        self.publisher.reply(device, reply, qos=0)
        self.recorder.event(kind=EventKind.QUOTA, code=reply.code.value, sentence=reply.sentence, device=device)

    # Ends

    def closed(
        self, session: EdgeSession, reason: EndReason, *, message: Close | None = None, cause: EndCause | None = None
    ) -> None:
        """Log the end of a session, and when that cannot be lost any more, confirm it to its device or tell of it.

        A device that is not told keeps its Close and says it again, so that the log ends as the device does.

        Args:
            session: Which.
            reason: How.
            message: The device's Close, if it sent one.
            cause: Why, if the edge knows more than device and session do.
        """
        reply = messages.closed(session, reason)
        self._over(session, reason)
        cause = cause or _cause(session, reason, message)
        self.recorder.ended(
            session, reason, message, cause=cause, then=lambda: self.publisher.reply(session.device, reply)
        )

    def closed_elsewhere(self, device: str, message: Close) -> None:
        """Confirm the end of a session that this edge does not know: the device's own counters are the record."""
        if not message.unverified:  # what was written without an edge, none can know; the recorder bounds its number
            self.guard.strike(device, FaultCode.UNKNOWN_SESSION)
            if not self.guard.may_answer(device):
                return
        reply = messages.closed_elsewhere(message)
        self.recorder.ended_elsewhere(device, message, then=lambda: self.publisher.reply(device, reply))

    def ended(self, session: EdgeSession, reason: EndReason, *, cause: EndCause | None = None) -> None:
        """Log the end of a session whose device knows of it."""
        self._over(session, reason)
        self.recorder.ended(session, reason, None, cause=cause or _cause(session, reason, None))

    def left(self, session: EdgeSession, reason: LeaveReason) -> None:
        """Log that a session goes on elsewhere, or under another handle."""
        self.figures.left(session)
        self.recorder.left(session, reason)

    def progress(self, session: EdgeSession) -> None:
        """Log what has been counted so far."""
        self.recorder.progress(session)

    # Within

    def _over(self, session: EdgeSession, reason: EndReason) -> None:
        """Count a session that has ended, and say so in the edge's own log."""
        self.figures.closed(session, reason.value)
        counted = session.counters
        _log.info(
            "Session %s of %s has ended (%s): %d tokens, %d of %d draft tokens accepted, %d rounds.",
            session.session.hex(),
            session.device,
            reason.value,
            session.committed,
            counted.accepted,
            counted.tested,
            counted.rounds,
            extra={
                "session": session.session.hex(),
                "device": session.device,
                "reason": reason.value,
                "tokens": session.committed,
                "accepted": counted.accepted,
                "tested": counted.tested,
                "rounds": counted.rounds,
            },
        )

    def _answer(
        self, session: EdgeSession, result: DraftResult, form: DownlinkForm | None, timing: DraftTiming
    ) -> bytes:
        """Make a verdict, and remember, count and record it."""
        draft = result.arrived.draft
        payload = encode_verdict(
            Verdict(
                handle=draft.handle,
                round=draft.round,
                accepted=result.accepted,
                next=result.token if form is None else form,
                finish=result.finish,
                queue_ms=timing.queue_ms,
                compute_ms=timing.compute_ms,
                logprobs=_told(result.logprobs),
                load=self._load_news(session),
                chained=timing.chained or None,
            ),
            padding=self.padding,
            most=self.publisher.max_verdict_bytes,
        )
        session.remember(draft.round, payload)
        session.counters += SegmentCounters(
            rounds=1,
            downlink_bytes=len(payload),
            queue_ms=timing.queue_ms,
            compute_ms=timing.compute_ms,
            batch_sum=timing.batch,
            prefill_ms=timing.prefill_ms,
        )
        self.recorder.judged(session, result, timing, form=_kind(result, form), downlink_bytes=len(payload))
        return payload

    def _load_news(self, session: EdgeSession) -> EdgeLoad | None:
        """Return what the edge does at present, if its device was told otherwise.

        Where verdicts are filled up to one size, an Opened alone tells: it would make some of them longer.
        """
        if self.padding:
            return None
        load = self.loads.of(session, self.load(), self.acceptance)
        if load is session.told_load:
            return None
        session.told_load = load
        return load

    def _pieces(self, session: EdgeSession, timing: DraftTiming) -> list[bytes]:
        """Make a verdict of what a stream's device was not sent; several where log-probabilities fill a packet."""
        stream = session.stream
        assert stream is not None
        if session.logprobs is None:
            return [self._piece(session, stream, timing, most=MAX_TOKENS)]
        room = self.publisher.max_verdict_bytes - _VERDICT_BYTES
        most = max(1, room // (_ID_BYTES + session.logprobs_bytes))
        pieces = [self._piece(session, stream, timing, most=most)]
        while stream.sent < session.committed:
            pieces.append(self._piece(session, stream, timing, most=most))
        return pieces

    def _piece(self, session: EdgeSession, stream: Stream, timing: DraftTiming, *, most: int) -> bytes:
        base, sent = stream.sent, session.sent
        written = session.take_written(stream, at=self.clock(), most=most)
        payload = encode_verdict(
            Verdict(
                handle=session.handle,
                round=stream.request.round,
                accepted=0,
                finish=session.finish if stream.sent >= session.committed else Finish.NO,
                queue_ms=timing.queue_ms,
                compute_ms=timing.compute_ms,
                base=base,
                written=written,
                logprobs=_told(session.logprobs_from(base, len(written))),
                load=self._load_news(session),
                chained=timing.chained or None,
            ),
            padding=self.padding,
            most=self.publisher.max_verdict_bytes,
        )
        # As the device counts: a piece in which nothing is new to it is no round, whatever it answers.
        session.counters += SegmentCounters(rounds=int(session.sent > sent), downlink_bytes=len(payload))
        return payload

    def _send_more(self, session: EdgeSession, draft: Draft, payload: bytes) -> None:
        """Send what a device could ask for without end, as far as its quota goes."""
        if self.guard.may_repeat(session.device, len(payload)):
            self.publisher.verdict(session.device, payload, form=_AGAIN)
            return
        sentence = "The device asks for verdicts again faster than it may; it waits a second."
        fault = DraftFault(FaultCode.QUOTA, Action.WAIT, sentence, retry_s=1.0)
        self.fault(session.device, fault, session=session, draft=draft)

    def _choose_form(self, session: EdgeSession, p: Dist, *, tried: int = 0) -> DownlinkForm:
        return choose_form(
            p,
            policy=session.policy,
            position=session.committed,
            vocabulary_size=session.limits.vocabulary,
            max_bytes=self.publisher.max_form_bytes - (session.limits.max_draft + 1) * session.logprobs_bytes,
            form=self.form,
            tried=tried,
        )


def _kind(result: DraftResult, form: DownlinkForm | None) -> str | None:
    """Return how the log calls what a verdict carries beside the number of tokens accepted; None for nothing."""
    if form is not None:
        return form.kind
    return None if result.token is None else _TOKEN


def _told(logprobs: Sequence[TokenLogprobs]) -> Logprobs | None:
    return Logprobs.of(logprobs) if logprobs else None


def _cause(session: EdgeSession, reason: EndReason, message: Close | None) -> EndCause | None:
    """Return why a session has failed, as its device says, or else as the edge has told it."""
    if reason is not EndReason.FAILED:
        return None
    if message is not None and message.sentence:
        return EndCause(message.code or "device", message.sentence)
    if session.failure is not None:
        return EndCause(session.failure.code.value, str(session.failure))
    return None if message is None else EndCause("device", "The device gave the text up, and did not say why.")
