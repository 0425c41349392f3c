"""Outcomes: what a step has decided, and when its devices are told: at once, or with what the next step decides.

A token that the edge writes by itself costs a message, which on a fast edge is more than the token does. Where the next
one is about to come, it waits for that, though not for longer than a reader would notice.
"""

import logging
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field, replace

from fleet_edge.answers.answers import Answers
from fleet_edge.batching.planning import Work
from fleet_edge.batching.timing import DraftTiming
from fleet_edge.errors import DraftFault
from fleet_edge.sessions.draft_results import DraftResult
from fleet_edge.sessions.table import SessionTable
from schemas.reasons import Action, FaultCode

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step has decided of one session.

    Attributes:
        work: The session's part of the step.
        results: What was decided on its drafts, and what that took.
        fault: Or why nothing was.
    """

    work: Work
    results: Sequence[tuple[DraftResult, DraftTiming]] = ()
    fault: DraftFault | None = None

    @property
    def written(self) -> bool:
        """Whether it is what the edge has written by itself."""
        return self.fault is None and self.work.writes


def give_up(work: Work, sentence: str) -> Outcome:
    """End a session without its text."""
    fault = DraftFault(FaultCode.INTERNAL, Action.GIVE_UP, sentence)
    work.session.fail(fault)
    return Outcome(work, fault=fault)


def without_verdict(work: Work) -> Outcome:
    """Log the exception that is being handled, and give up its session: it must not stop the service of all others."""
    session = work.session.session.hex()
    _log.exception(
        "A verdict for session %s could not be given.",
        session,
        extra={"session": session, "device": work.session.device},
    )
    return give_up(work, "The edge could not give a verdict; its log says why.")


@dataclass(slots=True)
class Outcomes:
    """Tells devices what was decided.

    Attributes:
        answers: Tell devices and the log.
        sessions: The table.
        clock: Monotonic seconds.
        piece_s: Longest time for which tokens that the edge writes by itself wait to be sent with those that follow.
    """

    answers: Answers
    sessions: SessionTable
    clock: Callable[[], float]
    piece_s: float
    _held: dict[int, Outcome] = field(default_factory=dict)  # by session, what waits

    def tell(self, outcomes: Sequence[Outcome], *, going_on: Container[int], step_s: float) -> None:
        """Tell devices what was decided, but for what waits for the next step.

        Args:
            outcomes: Of a step.
            going_on: Handles of the sessions that the next step verifies; it has begun.
            step_s: What it is likely to take.
        """
        held, self._held = self._held, {}
        for outcome in outcomes:
            handle = outcome.work.session.handle
            before = held.pop(handle, None)
            if before is not None and outcome.written:
                outcome = replace(outcome, results=[*before.results, *outcome.results])  # noqa: PLW2901
            held[handle] = outcome
        for handle, outcome in held.items():
            if handle in going_on and self._may_wait(outcome, step_s):
                self._held[handle] = outcome
            elif outcome.work.session in self.sessions:
                self._tell(outcome)

    def _may_wait(self, outcome: Outcome, step_s: float) -> bool:
        session = outcome.work.session
        stream = session.stream
        if not outcome.written or stream is None or not stream.may_wait(session.committed):
            return False
        return self.clock() + step_s - stream.sent_at < self.piece_s

    def _tell(self, outcome: Outcome) -> None:
        session = outcome.work.session
        if outcome.fault is not None:
            draft = outcome.work.chain[0].draft if outcome.work.chain else None
            self.answers.fault(session.device, outcome.fault, session=session, draft=draft)
            return
        try:
            if not outcome.written:
                for result, timing in outcome.results:
                    self.answers.verdict(session, result, timing)
            elif session.stream is not None:  # else the device asks for something else by now
                self.answers.written(session, [result for result, _ in outcome.results], outcome.results[-1][1])
        except Exception:  # noqa: BLE001 - logged with its traceback
            self._tell(without_verdict(outcome.work))
