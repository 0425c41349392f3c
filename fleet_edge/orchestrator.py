"""Orchestrator: one thread that turns arrivals into verdicts, a batch at a time."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from dssd.judgement import Judgement
from fleet_edge.answers.answers import Answers
from fleet_edge.batching.judging import Case, judge_batch
from fleet_edge.batching.planning import Batch, Work
from fleet_edge.batching.scheduler import Scheduler
from fleet_edge.batching.timing import Step
from fleet_edge.errors import DraftFault
from fleet_edge.handlers import MessageHandlers
from fleet_edge.intake import IntakeQueue, ReceivedMessage
from fleet_edge.sessions.table import SessionTable
from fleet_edge.verifiers.contract import SequenceFailed, TargetAway, VerifierError
from schemas.reasons import Action, FaultCode

__all__ = ["Orchestrator"]

_log = logging.getLogger(__name__)

# A device that does not stop to send must not keep an edge from ending.
_LAST_TAKES: Final = 20

# While the target model is away, it is looked for this often.
_PAUSE_S: Final = 0.05


@dataclass(slots=True)
class Orchestrator:
    """Takes what has arrived, verifies what is ready, answers and logs.

    Attributes:
        inbox: What has arrived.
        handlers: What arrivals do to the sessions.
        sessions: The table.
        scheduler: Picks a step, has it computed.
        answers: Tell devices and the log.
        clock: Monotonic seconds.
    """

    inbox: IntakeQueue
    handlers: MessageHandlers
    sessions: SessionTable
    scheduler: Scheduler
    answers: Answers
    clock: Callable[[], float]
    _paused_until: float = -math.inf

    def step(self, *, wait_s: float = 0.0) -> bool:
        """Take arrivals and compute one batch.

        Args:
            wait_s: Longest wait for an arrival when there is nothing to compute.

        Returns:
            Whether anything was computed.
        """
        self._take(0.0)
        if self.scheduler.away() or self._paused_until > self.clock():
            self._take(min(wait_s, _PAUSE_S))  # what is to be computed waits, and comes again
            return False
        batch = self._next_batch()
        if not batch and wait_s > 0:
            self._take(wait_s)
            batch = self._next_batch()
        for session, draft, fault in batch.faults:
            self.answers.fault(session.device, fault, session=session, draft=draft)
        if not batch.items:
            return False
        started = self.clock()
        judgements = self._judged(batch)
        if judgements is None:
            return True
        step = Step(started, self.clock(), len(judgements))
        self.scheduler.computed(batch, step)
        for work, judgement in zip(batch.verifications, judgements, strict=True):
            if judgement is None:
                self.scheduler.evict(work.session)  # nobody is to go on from it
                self._give_up(work, "The target model's logits are not numbers.")
                continue
            try:
                self._answer(work, judgement, step)
            except Exception:  # noqa: BLE001 - logged with its traceback
                # One session must not stop the service of all others.
                _log.exception("A verdict for session %s could not be given.", work.session.session.hex())
                self._give_up(work, "The edge could not give a verdict; its log says why.")
        return True

    def _judged(self, batch: Batch) -> list[Judgement | None] | None:
        """Compute a step and decide on its drafts; return None, and see to whom that concerns, where it fails."""
        try:
            logits = self.scheduler.score(batch)
            return judge_batch(logits, [_case(work) for work in batch.verifications])
        except TargetAway as error:
            self._paused_until = self.clock() + error.retry_s
            _log.warning("A step of %d sessions waits: %s", len(batch.items), error)
        except SequenceFailed as error:
            self._failed(Batch([work for work in batch.works if work.item.sequence == error.sequence]), error)
        except (VerifierError, RuntimeError, ValueError, MemoryError) as error:
            self._failed(batch, error)
        return None

    def _answer(self, work: Work, judgement: Judgement, step: Step) -> None:
        """Let a session take what was decided of its drafts, and tell its device."""
        session = work.session
        results = session.settle(work.chain, judgement)
        self.scheduler.judged(work, committed=sum(len(result.tokens) for result in results))
        for result in results:
            timing = self.scheduler.timing(work, result.arrived, step)
            if (stream := session.stream) is not None:
                stream.due_at = step.ended
                self.answers.written(session, result, timing)
            else:
                self.answers.verdict(session, result, timing)
                self.scheduler.answered(session, at=self.clock())

    def take_last(self, *, wait_s: float) -> None:
        """Take what still arrives before the end: a device that closes meanwhile is not to be found open in the log.

        Args:
            wait_s: Of silence, after which nothing more is expected: devices that get no verdicts fall silent.
        """
        for _ in range(_LAST_TAKES):
            if not self._take(wait_s) or not len(self.sessions):
                return

    def _next_batch(self) -> Batch:
        """Return the next step, held for drafts that are about to come if that pays."""
        now = self.clock()
        until = now + self.scheduler.hold_s(self.sessions, now=now)
        while (left := until - self.clock()) > 0:
            self._take(left)
        return self.scheduler.next_batch(self.sessions, now=self.clock())

    def _take(self, wait_s: float) -> int:
        """Handle what has arrived; return how much that was."""
        entries = self.inbox.take(timeout_s=wait_s)
        for entry in entries:
            try:
                if isinstance(entry, ReceivedMessage):
                    self.handlers.receive(entry)
                else:
                    entry()
            except Exception:  # noqa: BLE001 - logged with its traceback
                # One message must not stop the service of all others.
                _log.exception("A message could not be handled; it is dropped.")
        self.handlers.look_after_guard()
        return len(entries)

    def _failed(self, batch: Batch, error: Exception) -> None:
        """A step failed as a whole: its sessions lose their keys and values, and those who wait are told."""
        _log.error("A step of %d sessions failed: %s", len(batch.items), error)
        for work in batch.works:
            self.scheduler.evict(work.session)
        # Prompts are given up only when they have failed without the drafts.
        for work in batch.verifications or batch.works:
            what = "verify the draft" if work.chain else "take the prompt"
            self._give_up(work, f"The edge could not {what}: {error}")

    def _give_up(self, work: Work, sentence: str) -> None:
        session = work.session
        draft = work.chain[0].draft if work.chain else None
        fault = DraftFault(FaultCode.INTERNAL, Action.GIVE_UP, sentence)
        session.fail(fault)
        self.answers.fault(session.device, fault, session=session, draft=draft)


def _case(work: Work) -> Case:
    """Put a session's drafts together: they are decided on as one, and told apart afterwards."""
    session, drafts = work.session, [arrived.draft for arrived in work.chain]
    counted = drafts[0].counts is not None
    return Case(
        tokens=tuple(token for draft in drafts for token in draft.tokens),
        counts=tuple(count for draft in drafts for count in draft.counts or ()) if counted else None,
        policy=session.policy,
        base=session.committed,
        bonus=session.wants_token_after(work.chain),
    )
