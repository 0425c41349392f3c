"""Orchestrator: one thread that turns arriving messages into verdicts, a batch at a time, while another computes.

Messages that arrive during a step are handled at once, and the results of the step before are sent meanwhile. So a
session may end, or its draft be given up, while it is in a step; when the step has ended, `_awaited` says whether its
result still counts. The verifier learns of opened and closed sessions between two steps.
"""

import logging
import math
from collections.abc import Callable, Container, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

from fleet_edge.answers.answers import Responder
from fleet_edge.batching.edge_draft import with_proposed
from fleet_edge.batching.judging import Case, judge_batch
from fleet_edge.batching.scheduler import Scheduler
from fleet_edge.batching.steps import Batch, DraftOrder, StepReport, StepTimes, WorkItem
from fleet_edge.errors import DraftFault
from fleet_edge.handlers import MessageHandlers
from fleet_edge.intake import IntakeQueue, ReceivedMessage
from fleet_edge.session_log.event_codes import EventKind
from fleet_edge.sessions.machine import EdgeSession
from fleet_edge.sessions.table import SessionTable
from fleet_edge.verifiers.contract import SequenceFailed, TargetAway, VerifierError
from sampling.verification import Judgement
from schemas.reasons import Action, FaultCode

_log = logging.getLogger(__name__)

_LAST_BATCHES: Final = 20
"""Batches of messages handled at the end: a device that keeps sending must not keep an edge from ending."""

_MESSAGES: Final = 256
_MESSAGES_IN_A_STEP: Final = 16
"""Messages handled in a row, between steps and during one; during a step fewer, so that its end is noticed soon."""

PIECE_S: Final = 0.1
"""Longest time that tokens of edge-only decoding wait to be sent with later ones."""

_POLL_S: Final = 1.0
"""Longest wait for messages during a step; its end wakes the thread earlier."""

PROGRESS_S: Final = 3.0
"""Wait for a verdict from which a device is notified how far its session is, and the interval between two messages."""

_PROGRESS_LOOK_S: Final = 0.5

_PAUSE_S: Final = 0.05
"""Interval of looking for a target model that is away."""


@dataclass(frozen=True, slots=True)
class ComputedStep:
    """A step, and the decisions on its drafts."""

    report: StepReport
    judgements: list[Judgement | None]


@dataclass(frozen=True, slots=True)
class RunningStep:
    batch: Batch
    future: "Future[ComputedStep | None]"  # None of a chunk of warm prompts, whose batch is empty


@dataclass(slots=True)
class Orchestrator:
    """The edge's main loop: receive messages, compute batches, send and record verdicts.

    `piece_s` is the longest time that tokens of edge-only decoding wait to be sent together with the next ones; 0 sends
    each at once.
    """

    inbox: IntakeQueue
    handlers: MessageHandlers
    sessions: SessionTable
    scheduler: Scheduler
    answers: Responder
    clock: Callable[[], float]
    piece_s: float = PIECE_S
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="computing"))
    _running: RunningStep | None = None
    _held: dict[int, WorkItem] = field(default_factory=dict)  # by session, tokens that wait to be sent
    _step_s: float = 0.0  # duration of the last step
    _paused_until: float = -math.inf
    _progress_at: float = -math.inf  # when to look at it next

    def step(self, *, wait_s: float = 0.0) -> bool:
        """Schedule, run and post-process one step; the next one runs while its verdicts are sent.

        Waits at most `wait_s` for a message when there is nothing to compute. Returns whether anything was computed.
        """
        self._receive(0.0)
        if self._running is None:
            self._run(self._next_batch(0.0 if self.scheduler.warm.left else wait_s))
        if self._running is None and not self._away:
            self._warm()
        if self._running is None:
            return False
        results = self._finish(self._running)
        self._report_progress()
        self._run(self._batch_at_once())
        self._send_results(results)
        return True

    def finish_step(self) -> None:
        """Finish a running step and send its verdicts; begin no other."""
        if self._running is not None:
            self._send_results(self._finish(self._running))

    def receive_last(self, *, wait_s: float) -> None:
        """Handle last messages before the edge ends, until `wait_s` seconds pass without any.

        A device that closes its session now should not appear as open in the log.
        """
        self.finish_step()
        for _ in range(_LAST_BATCHES):
            if not self._receive(wait_s) or not len(self.sessions):
                return

    def waiting(self) -> int:
        computing = set() if self._running is None else {work.session.handle for work in self._running.batch.works}
        return sum(session.handle not in computing and session.ready is not None for session in self.sessions)

    # Schedule

    def _next_batch(self, wait_s: float) -> Batch:
        if self._away:
            self._receive(min(wait_s, _PAUSE_S))
            return Batch()
        batch = self._held_batch()
        if not batch and wait_s > 0:
            self._receive(wait_s)
            batch = self._held_batch()
        return batch

    def _held_batch(self) -> Batch:
        """Return the next batch, after the wait for drafts that are about to arrive."""
        now = self.clock()
        until = now + self.scheduler.hold_s(self.sessions, now=now)
        while (left := until - self.clock()) > 0:
            self._receive(left)
        return self.scheduler.next_batch(self.sessions, now=self.clock())

    def _batch_at_once(self) -> Batch:
        """Return the next batch; empty if it should be held."""
        now = self.clock()
        if self._away or self.scheduler.hold_s(self.sessions, now=now) > 0.0:
            return Batch()
        return self.scheduler.next_batch(self.sessions, now=now)

    @property
    def _away(self) -> bool:
        return bool(self.scheduler.away()) or self._paused_until > self.clock()

    # Run

    def _run(self, batch: Batch) -> None:
        if batch.items:
            cases = [_case(work) for work in batch.judged]
            orders = self.scheduler.order_drafts(batch)
            self._begin(batch, partial(self._compute, batch, cases, orders))
        for session, draft, fault in batch.faults:
            self.answers.send_fault(session.device, fault, session=session, draft=draft)

    def _warm(self) -> None:
        """Compute a chunk of the prompts that are computed ahead, because no session has work."""
        chunk = self.scheduler.warm.next_chunk(brief=len(self.sessions) > 0)
        if chunk is not None:
            self._begin(Batch(), chunk)

    def _begin(self, batch: Batch, compute: Callable[[], ComputedStep | None]) -> None:
        self.scheduler.begin_step()
        future = self._pool.submit(compute)
        future.add_done_callback(lambda _: self.inbox.wake())
        self._running = RunningStep(batch, future)

    def _compute(self, batch: Batch, cases: Sequence[Case], orders: Sequence[DraftOrder]) -> ComputedStep:
        started = self.clock()
        proposed = self.scheduler.propose(orders)
        drafted = self.clock()
        if proposed:
            batch = with_proposed(batch, proposed)
            handles = [work.session.handle for work in batch.judged]
            cases = [
                replace(case, tokens=proposed.get(handle) or case.tokens)
                for handle, case in zip(handles, cases, strict=True)
            ]
        judgements = judge_batch(self.scheduler.score(batch), cases)
        times = StepTimes(started, self.clock(), len(batch.verifications), drafted - started)
        return ComputedStep(StepReport(batch, times, orders, proposed), judgements)

    # Post-process

    def _finish(self, running: RunningStep) -> list[WorkItem]:
        """Handle messages until a step has ended, and let its sessions commit; return the results to send."""
        while not running.future.done():
            self._receive(_POLL_S, most=_MESSAGES_IN_A_STEP)
        self._running = None
        self.scheduler.end_step()
        batch = running.batch
        try:
            step = running.future.result()
        except TargetAway as error:
            self._paused_until = self.clock() + error.retry_s
            _log.warning("A step of %d sessions is delayed: %s", len(batch.items), error)
            return []
        except SequenceFailed as error:
            return self._failed(Batch([work for work in batch.works if work.item.sequence == error.sequence]), error)
        except (VerifierError, RuntimeError, ValueError, MemoryError) as error:
            if not batch.works:
                self.scheduler.warm.stop()
            return self._failed(batch, error)
        if step is None:
            return []
        batch, times = step.report.batch, step.report.times
        self._step_s = times.seconds
        self.scheduler.on_step(step.report)
        self.answers.figures.on_step(
            times.seconds, sessions=times.sessions, tokens=batch.tokens, prefilled=batch.prefilled
        )
        results = []
        for work, judgement in zip(batch.judged, step.judgements, strict=True):
            if not self._awaited(work) or (judgement is None and not _is_ready(work.session)):
                continue
            if work.chain or judgement is None:
                results.append(self._commit(work, judgement, times))
            else:
                work.session.prompt_logprobs.extend(judgement.logprobs)
        self._note_grammars(batch)
        return results

    def _commit(self, work: WorkItem, judgement: Judgement | None, times: StepTimes) -> WorkItem:
        session = work.session
        if judgement is None:
            self.scheduler.evict(session)  # its keys and values may be wrong too
            failure = "" if session.constraint is None else session.constraint.failure
            return _give_up(work, failure or "The target model's logits are not numbers.")
        try:
            results = session.settle(work.chain, judgement)
            self.scheduler.on_commit(work, committed=sum(len(result.tokens) for result in results))
            if session.decode is not None:
                session.decode.due_at = times.ended
            else:
                self.scheduler.expect_draft(session, at=self.clock())
            return self.scheduler.timed(work, results, times)
        except Exception:  # noqa: BLE001 - logged with its traceback
            return _without_verdict(work)

    def _awaited(self, work: WorkItem) -> bool:
        return work.session in self.sessions and (not work.chain or work.session.awaits(work.chain))

    def _failed(self, batch: Batch, error: Exception) -> list[WorkItem]:
        """Evict the sessions of a step that has failed, and fail those that wait for it."""
        sentence = f"A step of {len(batch.items)} sessions failed: {error}"
        _log.error("%s", sentence)
        self.handlers.recorder.events.note(EventKind.TARGET, "step-failed", sentence)
        for work in batch.works:
            if work.session in self.sessions:
                self.scheduler.evict(work.session)
        # A prompt fails only if it was computed without any draft: the draft may be at fault.
        return [
            _give_up(work, f"The edge could not {'verify the draft' if work.chain else 'take the prompt'}: {error}")
            for work in batch.verifications or batch.works
            if self._awaited(work)
        ]

    def _note_grammars(self, batch: Batch) -> None:
        """Report grammars that have killed their processes; restore the sessions whose grammar is not ready."""
        for session in (work.session for work in batch.verifications):
            if session.constraint is not None and session.constraint.killed:
                self.handlers.grammar_killed(session.device, session.session, session.constraint.killed)
                session.constraint.killed = ""
            if not _is_ready(session) and session in self.sessions:
                self.handlers.restore_grammar(session)

    # Send

    def _send_results(self, results: Sequence[WorkItem]) -> None:
        """Send results to devices, except tokens that wait for those of the running step.

        A message costs more than a token on a fast edge, so tokens of edge-only decoding wait for the next ones, though
        not longer than a reader would notice.
        """
        works = [] if self._running is None else self._running.batch.verifications
        running = {work.session.handle for work in works}
        due, self._held = self._held, {}
        for result in results:
            handle = result.session.handle
            before = due.pop(handle, None)
            if before is not None and result.fault is None and result.decodes:
                due[handle] = replace(result, results=(*before.results, *result.results))
            else:
                due[handle] = result
        for handle, result in due.items():
            if self._may_wait(result, running):
                self._held[handle] = result
            elif result.session in self.sessions:
                self._answer(result)

    def _may_wait(self, result: WorkItem, running: Container[int]) -> bool:
        session, decode = result.session, result.session.decode
        if session.handle not in running or result.fault is not None or not result.decodes or decode is None:
            return False
        return decode.may_wait(session.committed) and self.clock() + self._step_s - decode.sent_at < self.piece_s

    def _answer(self, work: WorkItem) -> None:
        session = work.session
        if work.fault is not None:
            draft = work.chain[0].draft if work.chain else None
            self.answers.send_fault(session.device, work.fault, session=session, draft=draft)
            return
        try:
            if not work.decodes:
                for result in work.results:
                    self.answers.send_verdict(session, result)
            elif session.decode is not None:  # otherwise the device has asked for something else since
                self.answers.send_decoded(session, work.results)
        except Exception:  # noqa: BLE001 - logged with its traceback
            self._answer(_without_verdict(work))

    def _report_progress(self) -> None:
        """Notify sessions that wait for long how far they are; after a step, so that an edge that hangs is silent."""
        now = self.clock()
        if now < self._progress_at:
            return
        self._progress_at = now + _PROGRESS_LOOK_S
        for session, since, wait in self.scheduler.progress(self.sessions, now=now):
            is_long = now - since >= PROGRESS_S or wait.seconds >= PROGRESS_S
            if is_long and now - session.progress_at >= PROGRESS_S:
                session.progress_at = now
                self.answers.send_progress(session, wait)

    # Receive

    def _receive(self, wait_s: float, *, most: int = _MESSAGES) -> int:
        entries = self.inbox.take(timeout_s=wait_s, most=most)
        for entry in entries:
            try:
                if isinstance(entry, ReceivedMessage):
                    self.handlers.receive(entry)
                else:
                    entry()
            except Exception:  # noqa: BLE001 - logged with its traceback
                # One message must not stop the service for others.
                _log.exception("A message could not be handled; it is dropped.")
        self.handlers.report_guard()
        return len(entries)


def _case(work: WorkItem) -> Case:
    """Put a session's drafts together, which are decided on as one and split afterwards, or tokens to score."""
    session, drafts = work.session, [arrived.draft for arrived in work.chain]
    if not drafts:
        return Case(work.scored, None, session.policy, 0, bonus=False, logprobs=session.logprobs, scored=True)
    counted = drafts[0].counts is not None
    shaped_by_text = session.constraint is not None or session.policy.adjusts
    return Case(
        tokens=tuple(token for draft in drafts for token in draft.tokens),
        counts=tuple(count for draft in drafts for count in draft.counts or ()) if counted else None,
        policy=session.policy,
        base=session.committed,
        bonus=session.wants_token_after(work.chain),
        written=drafts[0].write is not None,
        logprobs=session.logprobs,
        constraint=session.constraint,
        text=session.text if shaped_by_text else (),
        prompt=session.tokens[: session.prompt_length] if session.policy.adjusts else (),
        end_tokens=session.limits.end_tokens,
    )


def _is_ready(session: EdgeSession) -> bool:
    return session.constraint is None or session.constraint.ready


def _give_up(work: WorkItem, sentence: str) -> WorkItem:
    fault = DraftFault(FaultCode.INTERNAL, Action.GIVE_UP, sentence)
    work.session.fail(fault)
    return replace(work, fault=fault)


def _without_verdict(work: WorkItem) -> WorkItem:
    """Log the exception being handled and fail its session, so that others are served on."""
    session = work.session.session.hex()
    extra = {"session": session, "device": work.session.device}
    _log.exception("Session %s: the verdict could not be computed.", session, extra=extra)
    return _give_up(work, "The edge could not compute a verdict; its log has the reason.")
