"""Simulated edge: steps that take all that waits, within the limits of the settings, each as long as the curve says.

It follows `fleet_edge`: verification comes first, the oldest first; what is left of a step goes to prompts, a chunk at
most while anybody is verified; the next step begins before devices are told of the last; a step is held for drafts that
are about to come where that pays; tokens that the edge writes by itself wait for those that follow.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from fleet_cli.edge.advise.simulation.messages import (
    Close,
    Closed,
    Draft,
    Open,
    Opened,
    ToDevice,
    ToEdge,
    Verdict,
    Write,
    Written,
)
from fleet_cli.edge.advise.simulation.scenario import Scenario
from fleet_cli.edge.advise.simulation.session import Session
from fleet_device.pacing.contract import ReportedLoad
from fleet_edge.batching.step_cost import RunningRequests, StepCost
from fleet_edge.batching.timing import BatchingDelay
from fleet_edge.sessions.statistics import AcceptanceByModel

if TYPE_CHECKING:
    import simpy

_REPEATS: Final = "llama.cpp"
_LEAST: Final = 2
"""The engine whose texts are computed in no fewer tokens where they are to repeat, to the bit, as coupled ones are."""

_MODEL: Final = "the draft model that all devices have"


@dataclass(frozen=True, slots=True)
class Work:
    """One session's part of a step.

    Attributes:
        session: Whose.
        prompt: Tokens of its prompt.
        verified: Tokens that are verified, the last committed one counted in; 0 for none.
        chain: The drafts; none where the edge writes by itself.
        guesses: Tokens that it has guessed then.
    """

    session: Session
    prompt: int
    verified: int = 0
    chain: list[Draft] = field(default_factory=list)
    guesses: int = 0


class SimulatedEdge:
    """An edge.

    Args:
        env: The simulation's.
        scenario: What is simulated.
        send: Takes a message to a device, and after how many seconds it leaves.
    """

    def __init__(self, env: "simpy.Environment", scenario: Scenario, send: Callable[[ToDevice, float], None]) -> None:
        self._env = env
        self._scenario = scenario
        self._send = send
        self._sessions: dict[int, Session] = {}
        self._delay = BatchingDelay(scenario.limits.gather_share)
        repeats = scenario.curve.engine == _REPEATS and scenario.curve.mode == "coupled"
        self._cost = StepCost(_LEAST if repeats else 1, max_guess=scenario.limits.max_guess)
        self._wake = env.event()
        self._acceptance = AcceptanceByModel()
        self._last_step_s = 0.0
        self._present = RunningRequests()
        self._held: dict[int, Session] = {}
        self._messages = 0  # since the last step began
        self._steps = 0
        self.busy_s = 0.0
        self.verified = 0
        self.steps = 0
        env.process(self._run())

    def take(self, message: ToEdge) -> None:
        now = self._env.now
        self._messages += 1
        match message:
            case Open():
                self._sessions[message.session] = Session(message.session, message.text)
                self._present.opened(message.session)
                self._tell(Opened(message.session, self._load()))
            case Close():
                self._sessions.pop(message.session, None)
                self._held.pop(message.session, None)
                self._delay.forget(message.session)
                self._present.forget(message.session)
                self._tell(Closed(message.session))
            case Draft():
                if (session := self._sessions.get(message.session)) is not None:
                    session.take_draft(message, at=now)
                    self._delay.arrived(message.session, at=now)
            case Write():
                if (session := self._sessions.get(message.session)) is not None:
                    session.take_write(message, at=now)
                    if not session.streams:  # else what the device lacks comes with what is about to be written
                        self._tell_written(session)
        if not self._wake.triggered:
            self._wake.succeed()

    def _run(self) -> "Generator[simpy.Event, None, None]":
        works: list[Work] = []
        while True:
            if not works:
                works = yield from self._begin()
            step_s = self._step_s(works)
            began = self._env.now
            yield self._env.timeout(step_s)
            self.busy_s += step_s
            outcomes = self._settle(works, began=began)
            works = [] if self._hold_s() else self._plan()
            self._tell_outcomes(outcomes, works)

    def _begin(self) -> "Generator[simpy.Event, None, list[Work]]":
        """Wait until there is something to compute, and for drafts that are about to come if that pays."""
        while True:
            if (hold_s := self._hold_s()) > 0.0:
                yield self._env.timeout(hold_s)
            if works := self._plan():
                return works
            self._wake = self._env.event()
            yield self._wake
            self._messages = 0  # they were handled while nothing was computed

    def _hold_s(self) -> float:
        if not self._delay.expects:
            return 0.0
        ready = sum(session.ready_at is not None for session in self._sessions.values())
        return self._delay.hold_s(ready, now=self._env.now)

    def _plan(self) -> list[Work]:
        """Return the next step; empty if there is nothing to do."""
        limits, left = self._scenario.limits, self._scenario.limits.step_tokens
        self._steps += 1
        works: list[Work] = []
        ready = sorted((at, each.key) for each in self._sessions.values() if (at := each.ready_at) is not None)
        share = limits.step_tokens if len(ready) == 1 else max(1, limits.step_tokens // 2)
        for _, key in ready:
            allowance = min(left, share)
            if allowance <= 0:
                break
            work = self._verification(self._sessions[key], allowance)
            works.append(work)
            left -= work.prompt + work.verified
        chunk = min(left, limits.prefill_chunk) if any(work.verified for work in works) else left
        planned = {work.session.key for work in works}
        behind = [
            each
            for each in self._sessions.values()
            if each.ready_at is None and each.backlog and not each.finished and each.key not in planned
        ]
        for session in sorted(behind, key=lambda each: each.used):
            if chunk <= 0:
                break
            works.append(Work(session, prompt=min(chunk, session.backlog)))
            chunk -= works[-1].prompt
        for work in works:
            work.session.used = self._steps
        return works

    def _verification(self, session: Session, allowance: int) -> Work:
        chain = session.chain(allowance)
        guesses = 0 if chain else self._guesses(session)
        verified = 1 + guesses + sum(draft.tokens for draft in chain)
        if session.backlog + verified <= max(allowance, verified):
            return Work(session, prompt=session.backlog, verified=verified, chain=chain, guesses=guesses)
        return Work(session, prompt=min(allowance, session.backlog))

    def _guesses(self, session: Session) -> int:
        """Return how many tokens the edge guesses of what it writes by itself."""
        if session.stream is None or not session.text.guessed:
            return 0
        room = min(session.stream.until, session.text.length) - session.committed - 1
        return max(0, min(room, self._cost.guesses(self._scenario.guess_rate, stable=False)))

    def _step_s(self, works: list[Work]) -> float:
        verifying = [work.verified for work in works if work.verified]
        prompt = sum(work.prompt for work in works)
        step_ms = self._scenario.curve.mixed_ms(verifying, prefill=prompt)
        # What the edge does for messages meanwhile takes from what computes.
        messages, self._messages = self._messages, 0
        return step_ms / 1e3 + messages * self._scenario.message_s

    def _settle(self, works: list[Work], *, began: float) -> list[tuple[Session, list[Verdict]]]:
        """Let sessions take what was decided; return what their devices are to be told."""
        now = self._env.now
        outcomes = []
        verified = committed = 0
        self._last_step_s = now - began
        self._present.stepped((work.session.key for work in works), step_s=now - began, at=now)
        load = self._load()
        for work in works:
            session = work.session
            if session.key not in self._sessions:
                continue
            if not work.verified:
                session.computed += work.prompt
                continue
            verified += 1
            session.computed += work.prompt
            if not self._awaited(session, work.chain):
                continue
            before = session.committed
            verdicts = session.settle(work.chain, guesses=work.guesses, at=now, compute_s=now - began, load=load)
            for verdict in verdicts:
                tested = min(verdict.draft.tokens, verdict.accepted + 1)
                self._acceptance.count(_MODEL, str(session.key), tested=tested, accepted=verdict.accepted)
            outcomes.append((session, verdicts))
            committed += session.committed - before
            if work.chain and not session.finished:
                self._delay.answered(session.key, at=now)
        if verified:
            self._delay.stepped(now - began)
            if not any(work.prompt for work in works):
                further = sum(max(0, work.verified - self._cost.least) for work in works)
                verifies = any(work.chain for work in works)
                self._cost.stepped(now - began, texts=len(works), further=further, verifies=verifies)
                self._cost.committed(committed)
            self.verified += verified
            self.steps += 1
        return outcomes

    @staticmethod
    def _awaited(session: Session, chain: list[Draft]) -> bool:
        """Whether what was computed still decides something, whatever has arrived since."""
        if not chain:
            return session.streams and session.committed not in session.waiting
        return all(session.waiting.get(draft.base, (None,))[0] is draft for draft in chain)

    def _tell_outcomes(self, outcomes: list[tuple[Session, list[Verdict]]], works: list[Work]) -> None:
        going_on = {work.session.key for work in works if work.verified}
        step_s = self._scenario.curve.step_ms(max(1, len(going_on)), 1.0) / 1e3
        held, self._held = self._held, {}
        due: dict[int, tuple[Session, list[Verdict]]] = {key: (session, []) for key, session in held.items()}
        due |= {session.key: (session, verdicts) for session, verdicts in outcomes}
        for place, (key, (session, verdicts)) in enumerate(due.items(), start=1):
            if verdicts:
                for verdict in verdicts:
                    self._tell(verdict, place=place)
            elif key in going_on and self._may_wait(session, step_s):
                self._held[key] = session
            elif key in self._sessions:
                self._tell_written(session, place=place)

    def _may_wait(self, session: Session, step_s: float) -> bool:
        stream = session.stream
        if stream is None or not stream.may_wait(session.committed):
            return False
        return self._env.now + step_s - stream.sent_at < self._scenario.limits.piece_s

    def _tell_written(self, session: Session, *, place: int = 1) -> None:
        stream = session.stream
        if stream is None:
            return
        base, stream.sent, stream.sent_at = stream.sent, session.committed, self._env.now
        written = Written(session.key, base, session.committed - base, stream.request, self._last_step_s, self._load())
        self._tell(written, place=place)

    def _load(self) -> ReportedLoad:
        texts = max(1, self._present.count)
        parts = self._cost.parts(texts)
        return ReportedLoad(
            texts=texts,
            writing_s=parts.writing_s,
            step_s=parts.step_s,
            text_s=parts.text_s,
            token_s=parts.token_s,
            acceptance=self._acceptance.share(_MODEL),
            free=self._cost.least - 1,
        )

    def _tell(self, message: ToDevice, *, place: int = 1) -> None:
        self._messages += 1
        self._send(message, place * self._scenario.message_s)
