"""Simulated edge.

It follows `fleet_edge`: the oldest sessions are verified first, prompts get the rest of a step, and the next step
begins before devices are notified of the last. A step waits for drafts that are about to come where that pays, and
tokens of edge-only decoding wait for the following ones. The step-time curve says how long each step takes.
"""

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from fleet_admin.planning.scenario import (
    Scenario,
    SimulatedClose,
    SimulatedClosed,
    SimulatedDraft,
    SimulatedOpen,
    SimulatedOpened,
    SimulatedRequest,
    SimulatedTokens,
    SimulatedVerdict,
    SimulatedWrite,
    ToDevice,
    ToEdge,
)
from fleet_device.pacing.contract import ReportedLoad
from fleet_edge.batching.step_cost import RunningRequests, StepCost
from fleet_edge.batching.timing import BatchingDelay
from fleet_edge.sessions.statistics import AcceptanceByModel

if TYPE_CHECKING:
    import simpy


@dataclass(slots=True)
class SimulatedStream:
    request: SimulatedWrite
    until: int  # position
    sent: int  # position up to which the device has the tokens
    due_at: float  # since when the next token is due
    sent_at: float = -math.inf

    def may_wait(self, committed: int) -> bool:
        """Return whether the device can wait for the latest tokens: it asks for more when it has half."""
        half = self.until - self.request.tokens // 2
        return committed < self.until and not self.sent < half <= committed


@dataclass(slots=True)
class SimulatedSession:
    key: int
    text: SimulatedRequest
    committed: int = 0  # tokens that are final
    computed: int = 0  # tokens of prompt and output with stored keys and values
    # undecided drafts by position, with their arrival
    waiting: dict[int, tuple[SimulatedDraft, float]] = field(default_factory=dict)
    stream: SimulatedStream | None = None
    used: int = 0  # number of the last step with it
    epoch: int = 0  # number of rejections so far

    @property
    def finished(self) -> bool:
        return self.committed >= self.text.length

    @property
    def backlog(self) -> int:
        """Return the tokens to compute before the last, which comes with a draft."""
        return max(0, self.text.prompt + self.committed - 1 - self.computed)

    @property
    def streams(self) -> bool:
        return self.stream is not None and not self.finished and self.committed < self.stream.until

    @property
    def ready_at(self) -> float | None:
        """Return since when there is something to verify."""
        if self.finished:
            return None
        if (waiting := self.waiting.get(self.committed)) is not None:
            return waiting[1]
        return self.stream.due_at if self.streams and self.stream is not None else None

    def chain(self, most: int) -> list[SimulatedDraft]:
        """Return the drafts that can be verified together; none in edge-only decoding."""
        chain, base, left = list[SimulatedDraft](), self.committed, most
        while (waiting := self.waiting.get(base)) is not None:
            draft = waiting[0]
            if chain and draft.tokens > left:
                break
            chain.append(draft)
            left -= draft.tokens
            base += draft.tokens
            if not draft.more or not draft.tokens:
                break
        return chain

    def take_draft(self, draft: SimulatedDraft, *, at: float) -> None:
        """Take a draft, unless a rejection has voided it."""
        if draft.epoch == self.epoch:
            self.stream = None
            self.waiting[draft.base] = (draft, at)

    def take_write(self, request: SimulatedWrite, *, at: float) -> None:
        self.waiting.clear()
        until = min(request.base + request.tokens, self.text.length)
        sent_at = -math.inf if self.stream is None else self.stream.sent_at
        self.stream = SimulatedStream(request, until=until, sent=request.base, due_at=at, sent_at=sent_at)

    def settle(
        self, chain: list[SimulatedDraft], *, guesses: int, at: float, compute_s: float, load: ReportedLoad
    ) -> list[SimulatedVerdict]:
        """Commit the accepted tokens of drafts, or those of edge-only decoding; return the verdicts on drafts."""
        before, drafted = self.committed, guesses + sum(draft.tokens for draft in chain)
        verdicts = []
        if not chain:
            right = self.text.guessed[before : before + guesses]
            self.committed += 1 + next((place for place, each in enumerate(right) if not each), len(right))
            if self.stream is not None:
                self.stream.due_at = at
        for draft in chain:
            _, came_at = self.waiting.pop(draft.base)
            stands = self.text.stands[draft.base : draft.base + draft.tokens]
            accepted = next((place for place, each in enumerate(stands) if not each), draft.tokens)
            self.committed += accepted
            rejected = accepted < draft.tokens
            drawn = int(rejected or (not draft.more and not self.finished))
            self.committed += drawn
            chained = drafted - draft.tokens
            queue_s = max(0.0, at - compute_s - came_at)
            verdicts.append(SimulatedVerdict(self.key, draft, accepted, drawn, compute_s, load, queue_s, chained))
            if rejected:
                self.waiting.clear()
                self.epoch += 1
                break
        # Rejected tokens are dropped; the last committed token is computed again.
        self.computed = min(self.text.prompt + before + drafted, self.text.prompt + self.committed - 1)
        return verdicts


_REPEATS: Final = "llama.cpp"
_LEAST: Final = 2
"""llama.cpp computes at least this many tokens of a sequence at once if it must be bit-identical (coupled mode)."""

_MODEL: Final = "the draft model that all devices have"


@dataclass(frozen=True, slots=True)
class Work:
    session: SimulatedSession
    prompt: int  # tokens
    verified: int = 0  # tokens, with the last committed one; 0 for none
    chain: list[SimulatedDraft] = field(default_factory=list)  # empty in edge-only decoding
    guesses: int = 0  # tokens of n-gram speculation


class SimulatedEdge:
    """An edge; `send` takes a message to a device, and the seconds after which it leaves."""

    def __init__(self, env: "simpy.Environment", scenario: Scenario, send: Callable[[ToDevice, float], None]) -> None:
        self._env = env
        self._scenario = scenario
        self._send = send
        self._sessions: dict[int, SimulatedSession] = {}
        self._delay = BatchingDelay(scenario.limits.gather_share)
        repeats = scenario.curve.engine == _REPEATS and scenario.curve.mode == "coupled"
        self._cost = StepCost(_LEAST if repeats else 1, max_guess=scenario.limits.max_guess)
        self._wake = env.event()
        self._acceptance = AcceptanceByModel()
        self._last_step_s = 0.0
        self._present = RunningRequests()
        self._held: dict[int, SimulatedSession] = {}
        self._messages = 0  # since the last step began
        self._steps = 0
        self.busy_s = 0.0
        env.process(self._run())

    def take(self, message: ToEdge) -> None:
        now = self._env.now
        self._messages += 1
        match message:
            case SimulatedOpen():
                self._sessions[message.session] = SimulatedSession(message.session, message.text)
                self._present.opened(message.session)
                self._tell(SimulatedOpened(message.session, self._load()))
            case SimulatedClose():
                self._sessions.pop(message.session, None)
                self._held.pop(message.session, None)
                self._delay.forget(message.session)
                self._present.forget(message.session)
                self._tell(SimulatedClosed(message.session))
            case SimulatedDraft():
                if (session := self._sessions.get(message.session)) is not None:
                    session.take_draft(message, at=now)
                    self._delay.arrived(message.session, at=now)
            case SimulatedWrite():
                if (session := self._sessions.get(message.session)) is not None:
                    session.take_write(message, at=now)
                    if not session.streams:  # else the missing tokens come with the next ones
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
        """Wait for work, and for drafts that are about to come if that pays."""
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
        """Plan the next step; empty if there is nothing to do."""
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

    def _verification(self, session: SimulatedSession, allowance: int) -> Work:
        chain = session.chain(allowance)
        guesses = 0 if chain else self._guesses(session)
        verified = 1 + guesses + sum(draft.tokens for draft in chain)
        if session.backlog + verified <= max(allowance, verified):
            return Work(session, prompt=session.backlog, verified=verified, chain=chain, guesses=guesses)
        return Work(session, prompt=min(allowance, session.backlog))

    def _guesses(self, session: SimulatedSession) -> int:
        """Return the number of speculated n-gram tokens in edge-only decoding."""
        if session.stream is None or not session.text.guessed:
            return 0
        room = min(session.stream.until, session.text.length) - session.committed - 1
        return max(0, min(room, self._cost.guesses(self._scenario.guess_rate, stable=False)))

    def _step_s(self, works: list[Work]) -> float:
        verifying = [work.verified for work in works if work.verified]
        prompt = sum(work.prompt for work in works)
        step_ms = self._scenario.curve.mixed_ms(verifying, prefill=prompt)
        # Handling messages meanwhile takes time from computing.
        messages, self._messages = self._messages, 0
        return step_ms / 1e3 + messages * self._scenario.message_s

    def _settle(self, works: list[Work], *, began: float) -> list[tuple[SimulatedSession, list[SimulatedVerdict]]]:
        """Commit what was computed; return the verdicts by session."""
        now = self._env.now
        outcomes = []
        verified, committed = False, 0
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
            verified = True
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
        return outcomes

    @staticmethod
    def _awaited(session: SimulatedSession, chain: list[SimulatedDraft]) -> bool:
        """Return whether the result is still needed after what arrived during the step."""
        if not chain:
            return session.streams and session.committed not in session.waiting
        return all(session.waiting.get(draft.base, (None,))[0] is draft for draft in chain)

    def _tell_outcomes(
        self, outcomes: list[tuple[SimulatedSession, list[SimulatedVerdict]]], works: list[Work]
    ) -> None:
        going_on = {work.session.key for work in works if work.verified}
        step_s = self._scenario.curve.step_ms(max(1, len(going_on)), 1.0) / 1e3
        held, self._held = self._held, {}
        due: dict[int, tuple[SimulatedSession, list[SimulatedVerdict]]] = {
            key: (session, []) for key, session in held.items()
        }
        due |= {session.key: (session, verdicts) for session, verdicts in outcomes}
        for place, (key, (session, verdicts)) in enumerate(due.items(), start=1):
            if verdicts:
                for verdict in verdicts:
                    self._tell(verdict, place=place)
            elif key in going_on and self._may_wait(session, step_s):
                self._held[key] = session
            elif key in self._sessions:
                self._tell_written(session, place=place)

    def _may_wait(self, session: SimulatedSession, step_s: float) -> bool:
        stream = session.stream
        if stream is None or not stream.may_wait(session.committed):
            return False
        return self._env.now + step_s - stream.sent_at < self._scenario.limits.piece_s

    def _tell_written(self, session: SimulatedSession, *, place: int = 1) -> None:
        stream = session.stream
        if stream is None:
            return
        base, stream.sent, stream.sent_at = stream.sent, session.committed, self._env.now
        written = SimulatedTokens(
            session.key, base, session.committed - base, stream.request, self._last_step_s, self._load()
        )
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
