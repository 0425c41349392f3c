"""Orchestrator: one thread that turns arrivals into verdicts, a batch at a time, while another computes.

What arrives while a step is computed is handled at once, and what the step before it has decided is told meanwhile. So
a session may end, or its draft be given up, while it is in a step: whether what was computed still decides something is
asked when the step has ended. The verifier is told of sessions that come and go between two steps.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from dssd.verification import Judgement
from fleet_edge.answers.answers import Answers
from fleet_edge.answers.outcomes import Outcome, Outcomes, give_up, without_verdict
from fleet_edge.batching.computing import ComputingThread, RunningStep
from fleet_edge.batching.judging import Case
from fleet_edge.batching.planning import Batch, Work
from fleet_edge.batching.scheduler import Scheduler
from fleet_edge.batching.timing import Step
from fleet_edge.handlers import MessageHandlers
from fleet_edge.intake import IntakeQueue, ReceivedMessage
from fleet_edge.sessions.table import SessionTable
from fleet_edge.store.event_codes import EventKind
from fleet_edge.verifiers.contract import SequenceFailed, TargetAway, VerifierError

_log = logging.getLogger(__name__)

# A device that does not stop to send must not keep an edge from ending.
_LAST_TAKES: Final = 20

# Messages handled in a row: between steps, and while one is computed, whose end is then to be noticed soon.
_TAKEN: Final = 256
_TAKEN_MEANWHILE: Final = 16

# The end of a step wakes whoever waits for it; this is no more than a look in between.
_LOOK_S: Final = 1.0

# While the target model is away, it is looked for this often.
_PAUSE_S: Final = 0.05


@dataclass(slots=True)
class Orchestrator:
    """Takes what has arrived, verifies what is ready, answers and logs.

    Attributes:
        inbox: What has arrived.
        handlers: What arrivals do to the sessions.
        sessions: The table.
        scheduler: Picks a step, and knows what it took.
        answers: Tell devices and the log.
        clock: Monotonic seconds.
        piece_s: Longest time for which tokens that the edge writes by itself wait to be sent with those that follow.
    """

    inbox: IntakeQueue
    handlers: MessageHandlers
    sessions: SessionTable
    scheduler: Scheduler
    answers: Answers
    clock: Callable[[], float]
    piece_s: float = 0.0
    _computing: ComputingThread = field(init=False)
    _outcomes: Outcomes = field(init=False)
    _running: RunningStep | None = None
    _step_s: float = 0.0  # what the last step took
    _paused_until: float = -math.inf

    def __post_init__(self) -> None:
        """Make the thread that computes; it starts with the first step."""
        self._outcomes = Outcomes(self.answers, self.sessions, self.clock, self.piece_s)
        self._computing = ComputingThread(self.scheduler.score, self.clock, on_end=self.inbox.wake)

    def step(self, *, wait_s: float = 0.0) -> bool:
        """Take arrivals, see one step to its end, begin the next if there is one, and tell what was decided.

        Args:
            wait_s: Longest wait for an arrival when there is nothing to compute.

        Returns:
            Whether anything was computed.
        """
        self._take(0.0)
        if self._running is None:
            self._begin(wait_s)
        if self._running is None:
            return False
        answers = self._end(self._running)
        self._go_on()  # before anybody is told: devices have their answers a little later, and the engine does not wait
        self._tell(answers)
        return True

    def waiting(self) -> int:
        """Return how many sessions have something to be computed that is not under way."""
        computing = set() if self._running is None else {work.session.handle for work in self._running.batch.works}
        return sum(session.handle not in computing and session.ready is not None for session in self.sessions)

    def rest(self) -> None:
        """See a step that has begun to its end, tell what was decided, and begin no other."""
        if self._running is not None:
            self._tell(self._end(self._running))

    def _begin(self, wait_s: float) -> None:
        """Have the next step computed, held for drafts that are about to come if that pays; if none is due, wait."""
        if self._away:
            self._take(min(wait_s, _PAUSE_S))  # what is to be computed waits, and comes again
            return
        batch = self._next_batch()
        if not batch and wait_s > 0:
            self._take(wait_s)
            batch = self._next_batch()
        self._start(batch)

    def _go_on(self) -> None:
        """Have the next step computed, unless it is to be held."""
        now = self.clock()
        if not self._away and self.scheduler.hold_s(self.sessions, now=now) == 0.0:
            self._start(self.scheduler.next_batch(self.sessions, now=now))

    def _start(self, batch: Batch) -> None:
        if batch.items:
            cases = [_case(work) for work in batch.verifications]
            self.scheduler.began()
            self._running = self._computing.start(batch, cases)
        for session, draft, fault in batch.faults:
            self.answers.fault(session.device, fault, session=session, draft=draft)

    def _end(self, running: RunningStep) -> list[Outcome]:
        """Handle what arrives until a step is over, and let its sessions take what was decided.

        Returns:
            What their devices are to be told.
        """
        while not running.ended:
            self._take(_LOOK_S, most=_TAKEN_MEANWHILE)
        self._running = None
        self.scheduler.ended()
        try:
            judged = running.result()
        except TargetAway as error:
            self._paused_until = self.clock() + error.retry_s
            _log.warning("A step of %d sessions waits: %s", len(running.batch.items), error)
            return []
        except SequenceFailed as error:
            works = [work for work in running.batch.works if work.item.sequence == error.sequence]
            return self._failed(Batch(works), error)
        except (VerifierError, RuntimeError, ValueError, MemoryError) as error:
            return self._failed(running.batch, error)
        self._step_s = judged.times.ended - judged.times.started
        self.scheduler.computed(running.batch, judged.times)
        self.answers.figures.stepped(
            self._step_s,
            sessions=judged.times.sessions,
            tokens=sum(len(work.item.tokens) for work in running.batch.works),
            prefilled=sum(work.prefilled for work in running.batch.works),
        )
        self._note_killed(running.batch)
        return [
            self._settle(work, judgement, judged.times)
            for work, judgement in zip(running.batch.verifications, judged.judgements, strict=True)
            if self._awaited(work)
        ]

    def _note_killed(self, batch: Batch) -> None:
        """Note the grammars that have ended their processes in a step."""
        for session in (work.session for work in batch.verifications):
            if session.constraint is not None and session.constraint.killed:
                self.handlers.grammar_killed(session.device, session.session, session.constraint.killed)
                session.constraint.killed = ""

    def _settle(self, work: Work, judgement: Judgement | None, step: Step) -> Outcome:
        """Let a session take what was decided of its drafts; return what its device is to be told."""
        session = work.session
        if judgement is None:
            self.scheduler.evict(session)  # nobody is to go on from it
            failure = "" if session.constraint is None else session.constraint.failure
            return give_up(work, failure or "The target model's logits are not numbers.")
        try:
            results = session.settle(work.chain, judgement)
            self.scheduler.judged(work, committed=sum(len(result.tokens) for result in results))
            if session.stream is not None:
                session.stream.due_at = step.ended
            else:
                self.scheduler.answered(session, at=self.clock())
            return Outcome(work, [(result, self.scheduler.timing(work, result.arrived, step)) for result in results])
        except Exception:  # noqa: BLE001 - logged with its traceback
            return without_verdict(work)

    def _tell(self, outcomes: Sequence[Outcome]) -> None:
        """Tell devices what a step has decided, while the next one is computed."""
        works = [] if self._running is None else self._running.batch.verifications
        self._outcomes.tell(outcomes, going_on={work.session.handle for work in works}, step_s=self._step_s)

    def take_last(self, *, wait_s: float) -> None:
        """Take what still arrives before the end: a device that closes meanwhile is not to be found open in the log.

        Args:
            wait_s: Of silence, after which nothing more is expected: devices that get no verdicts fall silent.
        """
        self.rest()
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

    @property
    def _away(self) -> bool:
        return bool(self.scheduler.away()) or self._paused_until > self.clock()

    def _awaited(self, work: Work) -> bool:
        """Whether a part of a step that has ended still decides something."""
        return work.session in self.sessions and (not work.chain or work.session.awaits(work.chain))

    def _take(self, wait_s: float, *, most: int = _TAKEN) -> int:
        """Handle what has arrived; return how much that was."""
        entries = self.inbox.take(timeout_s=wait_s, most=most)
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

    def _failed(self, batch: Batch, error: Exception) -> list[Outcome]:
        """A step failed as a whole: its sessions lose their keys and values, and those who wait are to be told."""
        _log.error("A step of %d sessions failed: %s", len(batch.items), error)
        sentence = f"A step of {len(batch.items)} sessions failed: {error}"
        self.handlers.recorder.event(kind=EventKind.TARGET, code="step-failed", sentence=sentence, device=None)
        for work in batch.works:
            if work.session in self.sessions:
                self.scheduler.evict(work.session)
        # Prompts are given up only when they have failed without the drafts.
        return [
            give_up(work, f"The edge could not {'verify the draft' if work.chain else 'take the prompt'}: {error}")
            for work in batch.verifications or batch.works
            if self._awaited(work)
        ]


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
        written=drafts[0].write is not None,
        logprobs=session.logprobs,
        constraint=session.constraint,
        text=() if session.constraint is None else session.text,
    )
