"""A fleet in memory: a real edge and real device sessions over a broker that misbehaves, stepped by a seeded generator.

Nothing sleeps and nothing runs on a thread of its own, so a run of a thousand messages takes milliseconds and repeats
exactly.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import TypeVar

from dssd.coupling import coupled_token
from dssd.distribution import shape
from dssd.downlink import Form
from fleet_device.drafters.scripted import ScriptedDrafter
from fleet_device.session.machine import DeviceSession
from fleet_device.session.request import SessionRequest
from fleet_edge.assembly import assemble
from fleet_edge.orchestrator import Orchestrator
from fleet_edge.sessions.machine import EdgeSession
from fleet_edge.settings import EdgeSettings
from fleet_edge.store.records import Record
from fleet_edge.verifiers.scripted import ScriptedVerifier
from fleet_link.link import Message
from fleet_testing.markov import MarkovScript
from fleet_testing.memory_broker import Faults, MemoryBroker
from fleet_testing.memory_link import MemoryLink
from schemas.codec import decode_reply, decode_verdict, encode_close, encode_draft, encode_open
from schemas.messages import Closed, Draft, Fault, Opened, Refused, Verdict
from schemas.policy import Mode, SamplingPolicy
from schemas.reasons import Action
from schemas.topics import Topic, build

FLEET, EDGE = "memory", "edge-1"
END = 0
TARGET = MarkovScript(size=6, seed=7, sharpness=1.2, period=3)
TARGET._table[:, :, END] -= 2.0  # texts are to have some length
DRAFT = TARGET.perturbed(seed=8, amount=1.0)
R = TypeVar("R")
START = datetime(2026, 1, 1, tzinfo=UTC)


class Clock:
    """Time that passes only when a test says so."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds

    def now(self) -> datetime:
        return START + timedelta(seconds=self.seconds)


class Sink(list[Record]):
    """A session log in memory."""

    def put(self, record: Record) -> None:
        self.append(record)

    def of(self, kind: type[R]) -> list[R]:
        return [record for record in self if isinstance(record, kind)]


class MemoryFleet:
    """One edge, its log, and the broker.

    Args:
        rng: Decides the faults.
        faults: What goes wrong between broker and subscribers.
        form: Downlink form.
        kv_tokens: The verifier's budget; small ones force evictions.
        settings: Of the edge.
    """

    def __init__(
        self,
        *,
        rng: random.Random | None = None,
        faults: Faults | None = None,
        form: Form = Form.AUTO,
        kv_tokens: int = 1 << 20,
        max_packet_bytes: int = 1 << 20,
        settings: Mapping[str, object] = MappingProxyType({}),
    ) -> None:
        self.clock = Clock()
        self.sink = Sink()
        self.broker = MemoryBroker(
            rng=rng or random.Random(0), faults=faults, clock=self.clock, max_packet_bytes=max_packet_bytes
        )
        self.settings = EdgeSettings.model_validate({"fleet": FLEET, "edge": EDGE, "form": form, **settings})
        self.kv_tokens = kv_tokens
        self.known: dict[tuple[str, bytes, int], EdgeSession] = {}
        self.start_edge()

    @property
    def edge(self) -> Orchestrator:
        return self._edge

    def start_edge(self) -> None:
        self.verifier = ScriptedVerifier(
            TARGET, TARGET.words, context=256, budget_tokens=self.kv_tokens, end_tokens=(END,)
        )
        self._link = MemoryLink(self.broker, EDGE)
        self._edge = assemble(
            self.settings, verifier=self.verifier, link=self._link, sink=self.sink, clock=self.clock, now=self.clock.now
        )
        self._link.start(timeout_s=1.0)

    def restart_edge(self) -> None:
        """Let the edge forget everything, and lose what was on its way to it."""
        self._link.stop()
        self.start_edge()

    def step(self) -> bool:
        """Let the edge do one step; remember its sessions."""
        worked = self._edge.step()
        for session in self._edge.sessions:
            self.known[session.device, session.session, session.attempt] = session
        return worked

    def settle(self) -> None:
        """Deliver and compute until nothing moves."""
        while True:
            delivered = self.broker.pump()
            if not self.step() and not delivered:
                return


@dataclass
class Device:
    """A device session with a link and a drafter; the test's generator decides when it moves."""

    fleet: MemoryFleet
    name: str
    terms: SessionRequest
    length: int
    ahead: bool
    session: DeviceSession = field(init=False)
    closed: Closed | None = None
    refused: Refused | None = None
    faults: list[Fault] = field(default_factory=list)
    resumes: int = 0
    _events: list[Verdict | Opened | Refused | Closed | Fault] = field(default_factory=list)
    _asked: bool = False

    def __post_init__(self) -> None:
        self.session = DeviceSession(self.terms)
        self.drafter = ScriptedDrafter(DRAFT, DRAFT.words, end_tokens=(END,))
        self.link = MemoryLink(self.fleet.broker, self.name)
        self.link.subscribe(build(Topic.SESSION, fleet=FLEET, device=self.name), self._hear)
        self.link.subscribe(build(Topic.VERDICT, fleet=FLEET, device=self.name), self._hear)
        self.link.start(timeout_s=1.0)

    @property
    def done(self) -> bool:
        return self.closed is not None or self.refused is not None

    def act(self) -> bool:
        """Take what has arrived, then send what is due; return whether anything was done."""
        events, self._events = self._events, []
        for event in events:
            self._take(event)
        if self.done:
            return bool(events)
        if self.session.ended is not None:
            return self._once(self._close) or bool(events)
        if self.session.opened is None:
            return self._once(self.open) or bool(events)
        if not self.session.may_send:
            return bool(events)
        self.draft()
        return True

    def nudge(self) -> None:
        """Nothing moves any more: ask again."""
        if self.session.ended is not None:
            self._close()
        elif self.session.opened is None:
            self.open()
        else:
            for draft in self.session.unanswered():
                self._send(draft)

    def open(self) -> None:
        self._asked = True
        self._publish(Topic.OPEN, encode_open(self.session.open()))

    def resume(self) -> None:
        self.resumes += 1
        self.open()

    def draft(self) -> None:
        while self.session.room(self.length):
            self.drafter.extend((self.session.propose(self.drafter.next(self.terms.policy)),))
        self._send(self.session.send(more=self.ahead and self.session.may_promise))

    def _once(self, ask: object) -> bool:
        if self._asked:
            return False
        self._asked = True
        assert callable(ask)
        ask()
        return True

    def _take(self, event: Verdict | Opened | Refused | Closed | Fault) -> None:
        session = self.session
        match event:
            case Verdict():
                self._take_verdict(event)
            case Opened():
                if session.on_opened(event):
                    self.drafter.reset((*self.terms.prompt, *session.committed))
            case Fault() if session.opened is not None and event.handle == session.opened.handle and not session.ended:
                self.faults.append(event)
                assert event.action is Action.RESUME, event.sentence
                self.resume()
            case Closed() if session.concerns(event) and session.ended is not None:
                self.closed = self.closed or event
            case Closed() if session.concerns(event) and session.opened is not None:
                self.resume()
            case Refused():
                self.refused = event
            case _:
                pass

    def _take_verdict(self, verdict: Verdict) -> None:
        ended = self.session.ended
        for step in self.session.on_verdict(verdict):
            if step.correction is not None:
                self.drafter.truncate(len(self.terms.prompt) + step.valid)
                self.drafter.extend((step.correction,))
            if step.request is not None:
                self._send(step.request)
        if ended is None and self.session.ended is not None:
            self._asked = False

    def _send(self, draft: Draft) -> None:
        payload = encode_draft(draft)
        self.session.counters.uplink_bytes += len(payload)
        self._publish(Topic.DRAFT, payload, edge=EDGE)

    def _close(self) -> None:
        self._publish(Topic.CLOSE, encode_close(self.session.close(wall_ms=1.0)))

    def _publish(self, topic: Topic, payload: bytes, *, edge: str | None = None) -> None:
        self.link.publish(build(topic, fleet=FLEET, device=self.name, edge=edge), payload)

    def _hear(self, message: Message) -> None:
        if message.topic.endswith("verdict"):
            verdict = decode_verdict(message.payload)
            if self.session.opened is not None and verdict.handle == self.session.opened.handle:
                self.session.counters.downlink_bytes += len(message.payload)
            self._events.append(verdict)
        else:
            self._events.append(decode_reply(message.payload))


def terms(
    number: int,
    *,
    mode: Mode = Mode.RESIDUAL,
    prompt: Sequence[int] = (1, 2),
    max_new_tokens: int = 12,
    seed: int | None = None,
    temperature: float = 0.8,
    top_k: int = 5,
    top_p: float = 0.93,
) -> SessionRequest:
    """Return the terms of session number `number`."""
    policy = SamplingPolicy(
        mode=mode, temperature=temperature, top_k=top_k, top_p=top_p, seed=number if seed is None else seed
    )
    return SessionRequest(
        session=number.to_bytes(8, "big"),
        prompt=tuple(prompt),
        policy=policy,
        max_new_tokens=max_new_tokens,
        vocabulary=ScriptedDrafter(DRAFT, DRAFT.words).vocabulary,
        draft_model="toy",
        quantization="none",
    )


@dataclass(frozen=True, kw_only=True)
class Mishaps:
    """What happens besides the broker's faults, each with its probability in a move."""

    restart: float = 0.0
    resume: float = 0.0


def run(
    fleet: MemoryFleet,
    devices: Sequence[Device],
    rng: random.Random,
    *,
    mishaps: Mishaps | None = None,
    most: int = 20_000,
) -> None:
    """Let the fleet move at random until every device has had its session closed."""
    mishaps = mishaps or Mishaps()
    left = 4  # of each mishap: a fleet that is restarted for ever never ends
    restarts = resumes = left
    for _ in range(most):
        if all(device.done for device in devices):
            return
        moved = False
        for _ in range(rng.randint(0, 4)):
            moved |= fleet.broker.step()
        if rng.random() < 0.5:
            moved |= fleet.step()
        device = rng.choice(devices)
        moved |= device.act()
        if restarts and rng.random() < mishaps.restart:
            restarts -= 1
            fleet.restart_edge()
        if resumes and rng.random() < mishaps.resume and device.session.ended is None:
            resumes -= 1
            device.resume()
        # The edge first: what it answers to what has arrived shows at the broker.
        if not moved and not fleet.step() and not fleet.broker.step() and not any(device.act() for device in devices):
            fleet.clock.seconds += 1.0
            for device in devices:
                if not device.done:
                    device.nudge()
    raise AssertionError(f"not done after {most} moves: {[device.session for device in devices if not device.done]}")


def lossless_text(asked: SessionRequest) -> list[int]:
    """Return the target's own text in coupled mode, without any system in between."""
    text: list[int] = []
    while len(text) < asked.max_new_tokens and (not text or text[-1] != END):
        p = shape(TARGET.logits((*asked.prompt, *text)), asked.policy)
        text.append(coupled_token(p, asked.policy.seed, len(text)))
    return text


def possible(asked: SessionRequest, text: Sequence[int]) -> bool:
    """Whether a text is complete and each of its tokens has a positive probability under the target."""
    complete = len(text) == asked.max_new_tokens or (bool(text) and text[-1] == END)
    return (
        complete
        and END not in text[:-1]
        and all(
            shape(TARGET.logits((*asked.prompt, *text[:place])), asked.policy).probability(token) > 0.0
            for place, token in enumerate(text)
        )
    )
