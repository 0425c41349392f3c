"""Answers: make, count, publish and record everything that is sent to devices.

Happens in this order, except that the end of a session is recorded first and sent once no crash can undo the record.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from fleet_edge.answers.publisher import Publisher
from fleet_edge.answers.recorder import EndCause, Recorder
from fleet_edge.batching.prompt_wait import PromptWait
from fleet_edge.errors import DraftFault, OpenRefused
from fleet_edge.guard import DeviceGuard
from fleet_edge.metrics import Figures
from fleet_edge.session_log.event_codes import EventKind
from fleet_edge.session_log.records import LeaveReason
from fleet_edge.sessions.drafts import DraftResult, ReceivedDraft
from fleet_edge.sessions.machine import DecodeRequest, EdgeSession
from fleet_edge.sessions.statistics import AcceptanceByModel
from fleet_edge.verifiers.contract import TargetInfo
from sampling.distribution import Dist
from sampling.downlink import FormName, choose_form
from schemas.codec import encode_verdict
from schemas.downlink import DownlinkForm
from schemas.fields import MAX_LABEL, MAX_SENTENCE, MAX_TOKENS, EdgeLoad, Logprobs, TokenLogprobs
from schemas.messages import Close, Closed, Draft, Fault, Open, Opened, Progress, Refused, Verdict
from schemas.reasons import Action, EndReason, FaultCode, Finish

_MOST: Final = 128
"""Draft models remembered, the most recent ones; bounded, because devices choose their names."""


@dataclass(slots=True)
class ReportedLoads:
    """The load to report to devices, by draft model and by whether generations are to be reproducible.

    It stays the same object until it has changed enough to be worth reporting.
    """

    _known: OrderedDict[tuple[str, bool], tuple[EdgeLoad, EdgeLoad]] = field(default_factory=OrderedDict)

    def of(self, session: EdgeSession, load: EdgeLoad, acceptance: AcceptanceByModel) -> EdgeLoad:
        key = session.draft_model, session.policy.repeats
        known = self._known.get(key)
        if known is not None and known[0] is load:
            return known[1]
        share = acceptance.share(session.draft_model)
        reported = load.model_copy(
            update={
                "acceptance": None if share is None else round(share, 3),
                "free": load.free if session.policy.repeats else 0,
            }
        )
        if known is not None and not reported.differs(known[1]):
            reported = known[1]
        self._known[key] = load, reported
        self._known.move_to_end(key)
        if len(self._known) > _MOST:
            self._known.popitem(last=False)
        return reported


_log = logging.getLogger(__name__)

_VERDICT_BYTES: Final = 256
"""Most bytes of a verdict without tokens and log-probabilities."""

_ID_BYTES, _FLOAT_BYTES = 4, 4

_TOKEN: Final = "token"  # noqa: S105 - how the log calls a verdict's `next` that is no form of p
_WRITTEN: Final = "written"
_AGAIN: Final = "again"
_NOTHING: Final = "none"
"""Labels of verdict bytes that carry no form of p."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Responder:
    """Sends to devices and records what has become of Opens, drafts and sessions.

    Attributes:
        form: Downlink form of p; by default the smallest for each p.
        padding: Verdicts are padded to a multiple of this many bytes; 0 for no padding.
    """

    edge: str
    target: TargetInfo
    lease_s: float
    publisher: Publisher
    recorder: Recorder
    clock: Callable[[], float]
    guard: DeviceGuard
    figures: Figures
    form: FormName = FormName.AUTO
    padding: int = 0
    load: Callable[[], EdgeLoad] = lambda: EdgeLoad(requests=1)
    acceptance: AcceptanceByModel = field(default_factory=AcceptanceByModel)
    loads: ReportedLoads = field(default_factory=ReportedLoads)

    # Opens

    def grant(self, session: EdgeSession, message: Open, *, size: int) -> None:
        """Grant a session, and record that it begins or goes on here."""
        session.times.begin(committed=session.committed, at=self.clock())
        self.recorder.record_open(session, message, target=self.target, size=size)
        self.figures.on_open(session, resumed=message.resume is not None)
        self.repeat_grant(session)

    def repeat_grant(self, session: EdgeSession) -> None:
        """Repeat the grant for an Open that was delivered twice."""
        session.reported_load = self.loads.of(session, self.load(), self.acceptance)
        granted = Opened(
            session=session.session,
            attempt=session.attempt,
            handle=session.handle,
            edge=self.edge,
            target=self.target.name[:MAX_LABEL],
            target_id=self.target.target_id,
            position=session.committed,
            max_new_tokens=session.limits.max_new_tokens,
            max_draft=session.limits.max_draft,
            window=session.limits.window,
            lease_s=self.lease_s,
            end_tokens=tuple(sorted(session.limits.end_tokens)),
            logprobs=session.logprobs,
            load=session.reported_load,
        )
        self.publisher.reply(session.device, granted)

    def refuse(self, device: str, message: Open, error: OpenRefused) -> None:
        """Refuse an Open, and record it. Replies to a device are rate-limited."""
        sentence = str(error)[:MAX_SENTENCE]
        reply = Refused(session=message.session, code=error.code, sentence=sentence, retry_s=error.retry_s)
        self.figures.refusals[reply.code.value] += 1
        if self.guard.may_answer(device):
            self.publisher.reply(device, reply, qos=0)
        self.recorder.events.note(EventKind.REFUSED, reply.code, sentence, device, session=message.session)

    # Drafts

    def send_progress(self, session: EdgeSession, wait: PromptWait) -> None:
        """Notify a device how far its session is. A lost message matters little: others follow."""
        progress = Progress(
            handle=session.handle,
            computed=len(session.tokens) - wait.left,
            tokens=len(session.tokens),
            ahead=wait.ahead,
            tokens_per_s=None if wait.tokens_per_s is None else float(f"{wait.tokens_per_s:.3g}"),
        )
        self.publisher.reply(session.device, progress, qos=0)

    def send_verdict(self, session: EdgeSession, result: DraftResult) -> None:
        form = None if result.p is None else self._choose_form(session, result.p)
        payload = self._answer(session, result, form)
        self.guard.spend(session.device, len(result.tokens))
        session.times.add_tokens(committed=session.committed, at=self.clock())
        self.figures.on_verdict(session, result)
        self.acceptance.count(session.draft_model, session.device, tested=result.tested, accepted=result.accepted)
        self.publisher.verdict(session.device, payload, form=_kind(result, form) or _NOTHING)
        if session.recent.collapsed:
            sentence = (
                f"Only {session.recent.share:.0%} of this session's latest draft tokens are accepted: the draft model "
                "does not suit this request. Its long drafts are verified after those of other sessions."
            )
            self.recorder.events.note(
                EventKind.ACCEPTANCE, "acceptance-collapsed", sentence, session.device, session=session.session
            )

    def send_decoded(self, session: EdgeSession, results: Sequence[DraftResult]) -> None:
        """Send new tokens of edge-only decoding, with others that were not sent yet."""
        decode, last = session.decode, results[-1]
        assert decode is not None
        self.guard.spend(session.device, sum(len(result.tokens) for result in results))
        # If the device has asked again meanwhile, it has already received these tokens.
        payloads = [] if decode.sent >= session.committed else self._pieces(session, last)
        last.add_times_to(session.counters)
        session.times.add_tokens(committed=session.committed, at=self.clock())
        self.figures.on_decoded(session, last)
        for payload in payloads:
            self.publisher.verdict(session.device, payload, form=_WRITTEN)
        if payloads and not decode.logged:
            decode.logged = True
            self.recorder.record_decoded(session, decode, last, downlink_bytes=sum(map(len, payloads)))

    def send_missing(self, session: EdgeSession) -> None:
        """Send missing tokens of a generation whose edge-only decoding is complete."""
        decode = session.decode
        assert decode is not None
        for payload in self._pieces(session):
            self._send_more(session, decode.request, payload)

    def send_samples(self, session: EdgeSession, arrived: ReceivedDraft) -> None:
        rejection, tried = session.rejection, arrived.draft.tried
        assert rejection is not None
        assert tried is not None
        p = rejection.p
        queue_ms = max(0.0, self.clock() - arrived.at) * 1e3
        result = DraftResult(arrived, 0, 0, None, p, Finish.NO, rejection.logprobs, queue_ms=queue_ms)
        payload = self._answer(session, result, self._choose_form(session, p, tried=tried))
        session.counters.resampled += 1
        self._send_more(session, arrived.draft, payload)

    def repeat_verdict(self, session: EdgeSession, draft: Draft, payload: bytes) -> None:
        session.counters.downlink_bytes += len(payload)
        self._send_more(session, draft, payload)

    def send_fault(
        self, device: str, error: DraftFault, *, session: EdgeSession | None = None, draft: Draft | None = None
    ) -> None:
        """Send a fault for a draft or an unreadable message, count strikes, and record it; replies are rate-limited."""
        reply = fault_reply(draft, error)
        self.figures.faults[reply.code.value] += 1
        self.guard.strike(device, error.code)
        if self.guard.may_answer(device):
            self.publisher.reply(device, reply, qos=0)
        name = session.session if session else None
        self.recorder.events.note(EventKind.FAULT, reply.code, reply.sentence, device, session=name)

    def notify(self, device: str, fault: DraftFault) -> None:
        """Send a decision of the guard to a device, and record it."""
        reply = fault_reply(None, fault)
        self.figures.faults[reply.code.value] += 1
        self.publisher.reply(device, reply, qos=0)
        self.recorder.events.note(EventKind.QUOTA, reply.code, reply.sentence, device)

    # Ends

    def confirm_end(
        self, session: EdgeSession, reason: EndReason, *, message: Close | None = None, cause: EndCause | None = None
    ) -> None:
        """Record the end of a session, and confirm it to its device once the record cannot be lost.

        A device without a confirmation repeats its Close, so the log ends as the device does.
        """
        counters = session.counters
        reply = Closed(
            session=session.session,
            attempt=session.attempt,
            reason=reason,
            tokens=session.committed,
            rounds=counters.rounds,
            mean_batch=counters.mean_batch or 0.0,
            queue_ms=counters.queue_ms,
            compute_ms=counters.compute_ms,
            reused=counters.reused_tokens,
        )
        self._over(session, reason)
        cause = cause or _cause(session, reason, message)
        self.recorder.record_end(
            session, reason, message, cause=cause, then=lambda: self.publisher.reply(session.device, reply)
        )

    def confirm_unknown_end(self, device: str, message: Close) -> None:
        """Confirm the end of a session that this edge does not know; the device's counters are the record."""
        if not message.unverified:  # not for generations made without an edge; the recorder limits those
            self.guard.strike(device, FaultCode.UNKNOWN_SESSION)
            if not self.guard.may_answer(device):
                return
        reply = Closed(
            session=message.session,
            reason=message.reason,
            tokens=message.tokens,
            rounds=0,
            mean_batch=0.0,
            queue_ms=0.0,
            compute_ms=0.0,
        )
        self.recorder.record_unknown_end(device, message, then=lambda: self.publisher.reply(device, reply))

    def record_end(self, session: EdgeSession, reason: EndReason, *, cause: EndCause | None = None) -> None:
        """Record the end of a session whose device knows about it."""
        self._over(session, reason)
        self.recorder.record_end(session, reason, None, cause=cause or _cause(session, reason, None))

    def record_leave(self, session: EdgeSession, reason: LeaveReason) -> None:
        """Record that a session goes on elsewhere, or under another handle."""
        self.figures.on_leave(session)
        self.recorder.record_leave(session, reason)

    # Internal

    def _over(self, session: EdgeSession, reason: EndReason) -> None:
        self.figures.on_close(session, reason.value)
        counted = session.counters
        fields = {
            "session": session.session.hex(),
            "device": session.device,
            "reason": reason.value,
            "tokens": session.committed,
            "accepted": counted.accepted,
            "tested": counted.tested,
            "rounds": counted.rounds,
        }
        sentence = (
            "Session %(session)s of %(device)s has ended (%(reason)s): %(tokens)d tokens, %(accepted)d of %(tested)d "
            "draft tokens accepted, %(rounds)d rounds."
        )
        _log.info(sentence, fields, extra=fields)

    def _answer(self, session: EdgeSession, result: DraftResult, form: DownlinkForm | None) -> bytes:
        draft = result.arrived.draft
        payload = self._encode(
            session,
            draft,
            result.logprobs,
            result,
            accepted=result.accepted,
            next=result.token if form is None else form,
            finish=result.finish,
        )
        session.remember(draft.round, payload)
        result.add_times_to(session.counters)
        session.counters.rounds += 1
        session.counters.downlink_bytes += len(payload)
        self.recorder.record_verdict(session, result, form=_kind(result, form), downlink_bytes=len(payload))
        return payload

    def _encode(
        self,
        session: EdgeSession,
        draft: Draft,
        logprobs: Sequence[TokenLogprobs],
        timed: DraftResult | None,
        **fields: Any,  # noqa: ANN401 - of a verdict
    ) -> bytes:
        verdict = Verdict(
            handle=session.handle,
            round=draft.round,
            queue_ms=0.0 if timed is None else timed.queue_ms,
            compute_ms=0.0 if timed is None else timed.compute_ms,
            logprobs=Logprobs.of(logprobs) if logprobs else None,
            load=self._load_news(session),
            chained=None if timed is None else timed.chained or None,
            **fields,
        )
        return encode_verdict(verdict, padding=self.padding, most=self.publisher.max_verdict_bytes)

    def _load_news(self, session: EdgeSession) -> EdgeLoad | None:
        """Return the present load if the device was last sent another.

        With padding only Opened reports it, because some verdicts would become longer.
        """
        if self.padding:
            return None
        load = self.loads.of(session, self.load(), self.acceptance)
        if load is session.reported_load:
            return None
        session.reported_load = load
        return load

    def _pieces(self, session: EdgeSession, timed: DraftResult | None = None) -> list[bytes]:
        """Make a verdict of the tokens not sent yet; several where log-probabilities fill a packet."""
        decode = session.decode
        assert decode is not None
        if session.logprobs is None:
            return [self._piece(session, decode, timed, most=MAX_TOKENS)]
        room = self.publisher.max_verdict_bytes - _VERDICT_BYTES
        if session.echo:
            room -= session.prompt_length * session.logprobs_bytes
        most = max(1, room // (_ID_BYTES + session.logprobs_bytes))
        pieces = [self._piece(session, decode, timed, most=most)]
        while decode.sent < session.committed:
            pieces.append(self._piece(session, decode, timed, most=most))
        return pieces

    def _piece(self, session: EdgeSession, decode: DecodeRequest, timed: DraftResult | None, *, most: int) -> bytes:
        base, sent = decode.sent, session.sent
        written = session.take_unsent(decode, at=self.clock(), most=most)
        prompt = session.prompt_logprobs if written and base == 0 else ()
        payload = self._encode(
            session,
            decode.request,
            session.logprobs_from(base, len(written)),
            timed,
            accepted=0,
            finish=session.finish if decode.sent >= session.committed else Finish.NO,
            base=base,
            written=written,
            prompt=Logprobs.of(prompt) if prompt else None,
        )
        # As on the device: a piece without new tokens is no round.
        session.counters.rounds += session.sent > sent
        session.counters.downlink_bytes += len(payload)
        return payload

    def _send_more(self, session: EdgeSession, draft: Draft, payload: bytes) -> None:
        """Send what a device could request without end, within its quota."""
        if self.guard.may_repeat(session.device, len(payload)):
            self.publisher.verdict(session.device, payload, form=_AGAIN)
            return
        sentence = "The device requests repeated verdicts too fast; it waits a second."
        fault = DraftFault(FaultCode.QUOTA, Action.WAIT, sentence, retry_s=1.0)
        self.send_fault(session.device, fault, session=session, draft=draft)

    def can_send_prompt(self, number: int, *, most: int) -> bool:
        """Compare the size of a prompt's log-probabilities, `most` at each position, with that of a verdict."""
        each = _FLOAT_BYTES + (_ID_BYTES + _FLOAT_BYTES) * most
        return (number + 1) * each + _ID_BYTES <= self.publisher.max_verdict_bytes - _VERDICT_BYTES

    def _choose_form(self, session: EdgeSession, p: Dist, *, tried: int = 0) -> DownlinkForm:
        max_bytes = self.publisher.max_form_bytes - (session.limits.max_draft + 1) * session.logprobs_bytes
        return choose_form(
            p,
            policy=session.policy,
            position=session.committed,
            vocabulary_size=session.limits.vocabulary,
            max_bytes=max_bytes,
            form=self.form,
            tried=tried,
        )


def _kind(result: DraftResult, form: DownlinkForm | None) -> str | None:
    """Return the log's name for what a verdict carries; None for nothing."""
    if form is not None:
        return form.kind
    return None if result.token is None else _TOKEN


def _cause(session: EdgeSession, reason: EndReason, message: Close | None) -> EndCause | None:
    """Return why a session has failed, as reported by its device or decided by the edge."""
    if reason is not EndReason.FAILED:
        return None
    if message is not None and message.sentence:
        return EndCause(message.code or "device", message.sentence)
    if session.failure is not None:
        return EndCause(session.failure.code.value, str(session.failure))
    return None if message is None else EndCause("device", "The device gave up without a reason.")


def fault_reply(draft: Draft | None, error: DraftFault) -> Fault:
    return Fault(
        handle=draft.handle if draft else None,
        round=draft.round if draft else None,
        code=error.code,
        action=error.action,
        sentence=str(error)[:MAX_SENTENCE],
        retry_s=error.retry_s,
    )
