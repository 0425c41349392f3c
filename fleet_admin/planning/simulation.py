"""Simulated devices, and deterministic runs of a scenario."""

import itertools
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from fleet_admin.planning.scenario import (
    PlanningError,
    Scenario,
    SimulatedClose,
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
from fleet_admin.planning.service_level import Client, ServiceLevel, TimeWindow
from fleet_admin.planning.simulated_edge import SimulatedEdge
from fleet_device.pacing.contract import DraftOutcome, Pacing, Plan

if TYPE_CHECKING:
    import simpy


@dataclass(slots=True)
class Counts:
    drafts: int = 0
    drafted: int = 0  # tokens of the drafts
    requests: int = 0  # for edge-only decoding
    verdicts: int = 0
    pieces: int = 0  # of edge-only decoding
    streamed: int = 0  # tokens of these
    tested: int = 0
    accepted: int = 0
    texts: int = 0  # requests that have ended


@dataclass(slots=True)
class SimulatedDevice:
    """A device that generates one request after another."""

    env: "simpy.Environment"
    scenario: Scenario
    pacing: Pacing  # keeps learning from request to request
    arrivals: Iterator[tuple[float, int, SimulatedRequest]]  # seconds before each request, number of the session
    inbox: "simpy.Store"  # messages of the edge
    send: Callable[[ToEdge], None]
    counts: Counts
    texts: list[SimulatedRequest] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.env.process(self._run())

    def _run(self) -> "Generator[simpy.Event, Any, None]":
        for pause_s, number, text in self.arrivals:
            yield self.env.timeout(pause_s)
            text.asked_at = self.env.now
            self.texts.append(text)
            self.inbox.items.clear()
            self.send(SimulatedOpen(number, text))
            opened = yield self.inbox.get()
            if isinstance(opened, SimulatedOpened):
                self.pacing.note_load(opened.load)
            yield from self._write(number, text)
            text.ended_at = self.env.now
            self.counts.texts += 1
            self.send(SimulatedClose(number))
            while (yield self.inbox.get()).session != number:
                pass

    def _write(self, number: int, text: SimulatedRequest) -> "Generator[simpy.Event, Any, None]":
        writing = _Writing(self, number, text)
        while writing.committed < text.length:
            if self.inbox.items:
                writing.take(self.inbox.items.pop(0))
            elif writing.may_send:
                yield from writing.draft()
            else:
                writing.take((yield self.inbox.get()))


class _Writing:
    def __init__(self, device: SimulatedDevice, number: int, text: SimulatedRequest) -> None:
        self._env, self._scenario, self._pacing = device.env, device.scenario, device.pacing
        self._send, self._counts = device.send, device.counts
        self._number, self._text = number, text
        self.committed = 0
        self._in_flight: list[SimulatedDraft] = []
        self._building = 0
        self._draft_s = 0.0
        self._unread = 1  # tokens that the draft model has to read before it says the next one
        self._plan: Plan | None = None
        self._first = True
        self._epoch = 0
        self._request: SimulatedWrite | None = None
        self._asked = 0
        self._piece_at: float | None = None

    @property
    def may_send(self) -> bool:
        """Return whether a draft, or a request for edge-only decoding, may be sent now."""
        return self._request is None and (not self._in_flight or self._in_flight[-1].more)

    @property
    def _position(self) -> int:
        return self.committed + sum(draft.tokens for draft in self._in_flight) + self._building

    def draft(self) -> "Generator[simpy.Event, Any, None]":
        """Draft a token, send the draft if it is long enough, or ask for edge-only decoding."""
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
        # All tokens get the draft model's mean confidence.
        chances = (self._scenario.acceptance,) * self._building
        return not plan.may_stop or not chances or self._pacing.goes_on(chances)

    def _submit(self, plan: Plan) -> None:
        room = len(self._in_flight) + 1 < self._scenario.limits.window and self._position < self._text.length
        more = plan.ahead and self._building > 0 and room
        base = self._position - self._building
        draft = SimulatedDraft(
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
        if self._request is None:
            self._piece_at = None
        self._asked = tokens
        self._request = SimulatedWrite(self._number, self.committed, min(tokens, self._text.length - self.committed))
        self._counts.requests += 1
        self._first = False
        self._send(self._request)

    def take(self, message: ToDevice) -> None:
        match message:
            case SimulatedVerdict() if self._in_flight and message.draft is self._in_flight[0]:
                self._take_verdict(message)
            case SimulatedTokens() if self._request is not None:
                self._take_written(message)
            case _:
                pass

    def _take_verdict(self, verdict: SimulatedVerdict) -> None:
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

    def _take_written(self, written: SimulatedTokens) -> None:
        request = self._request
        assert request is not None
        self._pacing.note_load(written.load)
        # After a request for more tokens, the edge begins where it was made: some tokens have come before.
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


_LOOK_S = 0.02


@dataclass(frozen=True, slots=True)
class SimulationResult:
    scenario: Scenario
    devices: Sequence[Client]
    window: TimeWindow
    counts: Counts  # from the beginning
    busy: float  # share of the time in which the edge computed
    pacings: Sequence[Pacing]  # of the devices; another run may go on with them

    @property
    def tokens_per_s(self) -> float:
        return sum(device.tokens(self.window) for device in self.devices) / self.window.seconds

    @property
    def pace(self) -> float:
        """Return tokens/s during requests: the median over devices."""
        return median(device.pace(self.window) for device in self.devices)

    @property
    def gap_s(self) -> float | None:
        """Return the 95th percentile of the time between tokens: the median over devices."""
        gaps = [gap for device in self.devices if (gap := device.gap_s(self.window)) is not None]
        return median(gaps) if gaps else None

    @property
    def first_s(self) -> float:
        """Return the time to the first token: the median over requests, including waiting ones."""
        waits = [
            text.first_s(self.window.end)
            for device in self.devices
            for text in device.texts
            if text.asked_at < self.window.end
        ]
        return median(waits) if waits else 0.0

    def at_level(self, level: ServiceLevel) -> int:
        return sum(device.at_level(self.window, level) for device in self.devices)

    @property
    def tokens(self) -> int:
        return sum(text.tokens for device in self.devices for text in device.texts)

    @property
    def mean_draft(self) -> float:
        return self.counts.drafted / max(1, self.counts.drafts)


def simulate(scenario: Scenario, *, pacings: Sequence[Pacing] = ()) -> SimulationResult:
    """Simulate a scenario; `pacings` are of devices that have learned. Raises `PlanningError` without SimPy."""
    try:
        import simpy  # noqa: PLC0415 - of the extras of an edge
    except ImportError:
        raise PlanningError("The simulation needs SimPy: pip install 'dssd-fleet[edge]', or simpy alone.") from None
    env = simpy.Environment()
    counts, numbers = Counts(), itertools.count()
    one_way_s = scenario.round_trip_s / 2
    devices: list[SimulatedDevice] = []
    by_session: dict[int, SimulatedDevice] = {}

    def deliver(take: Callable[[Any], object], message: object, delay_s: float) -> None:
        def arrive(_event: object) -> None:
            take(message)

        env.timeout(delay_s).callbacks.append(arrive)

    def to_device(message: ToDevice, after_s: float) -> None:
        deliver(by_session[message.session].inbox.put, message, after_s + one_way_s)

    edge = SimulatedEdge(env, scenario, to_device)

    def sender(place: int) -> Callable[[ToEdge], None]:
        def send(message: ToEdge) -> None:
            if isinstance(message, SimulatedOpen):
                by_session[message.session] = devices[place]
            deliver(edge.take, message, one_way_s + scenario.message_s)

        return send

    known = list(pacings[: scenario.devices])
    known += [scenario.plan() for _ in range(scenario.devices - len(known))]
    for place, pacing in enumerate(known):
        arrivals = _arrivals(scenario, place, numbers)
        inbox = simpy.Store(env)
        devices.append(SimulatedDevice(env, scenario, pacing, arrivals, inbox, sender(place), counts))
    window = _run(env, scenario, devices)
    return SimulationResult(
        scenario=scenario,
        devices=[Client([*device.texts]) for device in devices],
        window=window,
        counts=counts,
        busy=edge.busy_s / env.now if env.now else 0.0,
        pacings=known,
    )


def _run(env: "simpy.Environment", scenario: Scenario, devices: Sequence[SimulatedDevice]) -> TimeWindow:
    """Run until the window is over, or until all of a fixed number of requests have ended."""
    if scenario.texts is not None:
        env.run()
        return TimeWindow(0.0, max(env.now, 1e-9))
    timing = scenario.timing
    while env.now < timing.patience_s:
        if all(device.texts and device.texts[0].pieces for device in devices):
            break
        env.run(until=env.now + max(_LOOK_S, timing.patience_s / 1000))
    served = all(device.texts and device.texts[0].pieces for device in devices)
    begin = env.now + (timing.settle_s if served else 0.0)
    env.run(until=begin + timing.window_s)
    return TimeWindow(begin, begin + timing.window_s)


def _arrivals(scenario: Scenario, place: int, numbers: Iterator[int]) -> Iterator[tuple[float, int, SimulatedRequest]]:
    """Yield pause, number and request of a device's sessions."""
    rng = random.Random(f"{scenario.seed} {place}")  # noqa: S311 - a simulation
    guesses = random.Random(f"{scenario.seed} {place} guesses")  # noqa: S311 - likewise
    rounds = itertools.count() if scenario.texts is None else range(scenario.texts)
    for _ in rounds:
        pause_s = rng.expovariate(1.0 / scenario.pause_s) if scenario.pause_s > 0.0 else 0.0
        stands = [rng.random() < scenario.acceptance for _ in range(scenario.text_tokens)]
        guessed = [guesses.random() < scenario.guess_rate for _ in stands] if scenario.guess_rate > 0.0 else []
        yield pause_s, next(numbers), SimulatedRequest(stands=stands, prompt=scenario.prompt_tokens, guessed=guessed)
