"""Simulated device: drafts, sends and waits as `fleet_device` does, with the pacing that the product has."""

from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

from fleet_cli.edge.advise.simulation.messages import (
    Close,
    Draft,
    Open,
    Opened,
    SimulatedText,
    ToDevice,
    ToEdge,
    Verdict,
    Write,
    Written,
)
from fleet_cli.edge.advise.simulation.scenario import Scenario
from fleet_device.pacing.contract import DraftOutcome, Pacing, Plan

if TYPE_CHECKING:
    import simpy


class Counts:
    """What devices have done.

    Attributes:
        drafts: Sent.
        drafted: Tokens of these.
        requests: To write.
        verdicts: Received.
        pieces: Received of what the edge writes by itself.
        streamed: Tokens of these.
        tested: Draft tokens that were accepted or rejected.
        accepted: Of these.
        texts: That have come to their end.
    """

    def __init__(self) -> None:
        self.drafts = self.drafted = self.requests = self.verdicts = self.pieces = self.streamed = 0
        self.tested = self.accepted = self.texts = 0


class SimulatedDevice:
    """A device that writes one text after another.

    Args:
        env: The simulation's.
        scenario: What is simulated.
        pacing: Decides; goes on learning from text to text.
        arrivals: Pause before each text (seconds), the session's number, and the text.
        send: Takes a message to the edge.
        counts: Of all devices.
    """

    def __init__(
        self,
        env: "simpy.Environment",
        scenario: Scenario,
        pacing: Pacing,
        arrivals: Iterator[tuple[float, int, SimulatedText]],
        send: Callable[[ToEdge], None],
        counts: Counts,
    ) -> None:
        self._env = env
        self._scenario = scenario
        self._pacing = pacing
        self._arrivals = arrivals
        self._send = send
        self._counts = counts
        self._events: list[ToDevice] = []
        self._arrived = env.event()
        self.texts: list[SimulatedText] = []
        env.process(self._run())

    def take(self, message: ToDevice) -> None:
        self._events.append(message)
        if not self._arrived.triggered:
            self._arrived.succeed()

    def _next(self) -> "Generator[simpy.Event, Any, ToDevice]":
        if not self._events:
            self._arrived = self._env.event()
            yield self._arrived
        return self._events.pop(0)

    def _run(self) -> "Generator[simpy.Event, Any, None]":
        for pause_s, number, text in self._arrivals:
            yield self._env.timeout(pause_s)
            text.asked_at = self._env.now
            self.texts.append(text)
            self._events.clear()
            self._send(Open(number, text))
            opened = yield from self._next()
            if isinstance(opened, Opened):
                self._pacing.note_load(opened.load)
            yield from self._write(number, text)
            text.ended_at = self._env.now
            self._counts.texts += 1
            self._send(Close(number))
            while getattr((yield from self._next()), "session", None) != number:
                pass

    def _write(self, number: int, text: SimulatedText) -> "Generator[simpy.Event, Any, None]":
        writing = _Writing(self._env, self._scenario, self._pacing, number, text, self._send, self._counts)
        while writing.committed < text.length:
            if self._events:
                writing.take(self._events.pop(0))
            elif writing.may_send:
                yield from writing.draft()
            else:
                writing.take((yield from self._next()))


class _Writing:
    """A text being written."""

    def __init__(
        self,
        env: "simpy.Environment",
        scenario: Scenario,
        pacing: Pacing,
        number: int,
        text: SimulatedText,
        send: Callable[[ToEdge], None],
        counts: Counts,
    ) -> None:
        self._env, self._scenario, self._pacing, self._number = env, scenario, pacing, number
        self._text, self._send, self._counts = text, send, counts
        self.committed = 0
        self._in_flight: list[Draft] = []
        self._building = 0
        self._draft_s = 0.0
        self._unread = 1  # tokens that the draft model has to read before it says the next one
        self._plan: Plan | None = None
        self._first = True
        self._epoch = 0
        self._request: Write | None = None
        self._asked = 0
        self._piece_at: float | None = None

    @property
    def may_send(self) -> bool:
        """Whether a draft, or a request to write, may be sent now."""
        return self._request is None and (not self._in_flight or self._in_flight[-1].more)

    @property
    def _position(self) -> int:
        return self.committed + sum(draft.tokens for draft in self._in_flight) + self._building

    def draft(self) -> "Generator[simpy.Event, Any, None]":
        """Draft a token, or send the draft that is long enough; or have the edge write."""
        limits = self._scenario.limits
        if self._plan is None:
            self._draft_s = 0.0
            self._plan = self._pacing.plan(longest=limits.max_draft, window=limits.window)
        if self._plan.stream and self._in_flight:
            self._plan = Plan(0)
        plan = self._plan
        if plan.stream:
            self._plan = None
            self._ask(plan.tokens)
            return
        longest = min(plan.tokens, limits.max_draft) - self._building
        if min(longest, self._text.length - self._position) > 0 and self._goes_on(plan):
            token_s = self._scenario.draft_s * self._unread
            self._unread = 1
            yield self._env.timeout(token_s)
            self._building += 1
            self._draft_s += token_s
            return
        self._submit(plan)

    def _goes_on(self, plan: Plan) -> bool:
        # All tokens are taken to be as sure as the draft model is on average.
        chances = (self._scenario.acceptance,) * self._building
        return not plan.may_stop or not chances or self._pacing.goes_on(chances)

    def _submit(self, plan: Plan) -> None:
        room = len(self._in_flight) + 1 < self._scenario.limits.window and self._position < self._text.length
        more = plan.ahead and self._building > 0 and room
        base = self._position - self._building
        draft = Draft(
            self._number,
            base,
            self._building,
            more,
            sent_at=self._env.now,
            draft_s=self._draft_s,
            first=self._first,
            epoch=self._epoch,
        )
        self._first, self._plan, self._building, self._draft_s = False, None, 0, 0.0
        self._in_flight.append(draft)
        self._counts.drafts += 1
        self._counts.drafted += draft.tokens
        self._send(draft)

    def _ask(self, tokens: int) -> None:
        """Have the edge write so many tokens from here on."""
        if self._request is None:
            self._piece_at = None
        self._asked = tokens
        self._request = Write(self._number, self.committed, min(tokens, self._text.length - self.committed))
        self._counts.requests += 1
        self._first = False
        self._send(self._request)

    def take(self, message: ToDevice) -> None:
        """Take what the edge has sent."""
        match message:
            case Verdict() if self._in_flight and message.draft is self._in_flight[0]:
                self._take_verdict(message)
            case Written() if self._request is not None:
                self._take_written(message)
            case _:
                pass

    def _take_verdict(self, verdict: Verdict) -> None:
        draft = self._in_flight.pop(0)
        self._pacing.note_load(verdict.load)
        self._counts.verdicts += 1
        rejected = verdict.accepted < draft.tokens
        self._counts.tested += verdict.accepted + rejected
        self._counts.accepted += verdict.accepted
        if rejected:
            self._in_flight.clear()
            self._building, self._draft_s, self._unread = 0, 0.0, 1
            self._epoch += 1
        elif verdict.drawn:
            self._unread = 2 if draft.tokens else 1  # its last token, and the edge's
        self._grow(verdict.accepted + verdict.drawn)
        self._pacing.learn(
            DraftOutcome(
                tokens=draft.tokens,
                ahead=draft.more,
                accepted=verdict.accepted,
                token_s=draft.draft_s / draft.tokens if draft.tokens else 0.0,
                answer_s=self._env.now - draft.sent_at,
                compute_s=verdict.compute_s,
                opening=draft.first,
                chances=(self._scenario.acceptance,) * draft.tokens,
                queue_s=verdict.queue_s,
                chained=verdict.chained,
            )
        )

    def _take_written(self, written: Written) -> None:
        request = self._request
        assert request is not None
        self._pacing.note_load(written.load)
        # After a request to write on, the edge begins at the place where it was made: some of it has come before.
        new = max(0, written.base + written.tokens - self.committed)
        self._counts.pieces += 1
        self._counts.streamed += new
        if new and self._piece_at is not None:
            since_s = self._env.now - self._piece_at
            self._pacing.streamed(new, since_s, step_s=written.compute_s)
        self._grow(new)
        until = request.base + request.tokens
        stops = request.tokens == 0
        if self.committed >= self._text.length:
            return
        if (stops and written.request is request) or (not stops and self.committed >= until):
            self._request, self._piece_at, self._unread = None, None, 1
            return
        if new:
            self._piece_at = self._env.now
        if not stops and until < self._text.length and (until - self.committed) * 2 <= self._asked:
            limits = self._scenario.limits
            plan = self._pacing.plan(longest=limits.max_draft, window=limits.window)
            self._ask(plan.tokens if plan.stream else 0)

    def _grow(self, tokens: int) -> None:
        if tokens:
            self.committed += tokens
            self._text.pieces.append((self._env.now, tokens))
