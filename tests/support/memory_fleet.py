"""A fleet in memory: a real edge and real device sessions over a faulty broker, stepped by a seeded generator.

Nothing sleeps and there are no threads, so a run of a thousand messages takes milliseconds and repeats exactly.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from types import MappingProxyType, SimpleNamespace

from fleet_device.client.decision import EdgeAvailability, RetryPolicy, RetryState
from fleet_device.client.drafting import Drafting, DraftSequence, SessionPacing
from fleet_device.client.driver import SessionDriver
from fleet_device.client.messaging import ConnectionChanged, Event, Inbox, Outbound, ReceivedVerdict
from fleet_device.drafters.contract import Prospect
from fleet_device.drafters.suffix import SuffixDrafter
from fleet_device.drafters.without_model import ScriptedDrafter
from fleet_device.errors import SessionRefused
from fleet_device.pacing.contract import Choice, FixedPacing, Pacing, Plan
from fleet_device.session.machine import DeviceSession
from fleet_device.session.sequence import session_request
from fleet_device.session.states import SessionCounters
from fleet_device.settings import OfflinePolicy, Outages
from fleet_edge.assembly import assemble
from fleet_edge.orchestrator import Orchestrator
from fleet_edge.session_log.counters import SEGMENT_COUNTERS
from fleet_edge.session_log.records import Record
from fleet_edge.sessions.machine import EdgeSession
from fleet_edge.settings import EdgeSettings
from sampling.distribution import shape
from sampling.downlink import FormName
from schemas.control import EdgeState, Presence
from schemas.messages import Closed, Fault, Open, Opened, Refused, Verdict
from schemas.policy import Mode, SamplingPolicy
from schemas.reasons import EndReason
from schemas.topics import Topic, build
from schemas.vocabulary import Vocabulary
from tests.support.log_records import of_kind
from tests.support.markov import MarkovScript, coupled_text
from tests.support.memory_broker import Faults, MemoryBroker
from tests.support.memory_link import MemoryLink
from tests.support.scripted_verifier import ScriptedVerifier
from tests.support.tuning import tune, without_tuning

FLEET, EDGE = "memory", "edge-1"
END = 0
TARGET = MarkovScript(size=6, seed=7, sharpness=1.2, period=3).shifted(END, -2.0)  # outputs must have some length
TARGET_ID = ScriptedVerifier(TARGET, TARGET.words, end_tokens=(END,)).info.target_id
OTHER_TARGET = MarkovScript(size=6, seed=17, sharpness=1.2, period=3).shifted(END, -2.0)
DRAFT = TARGET.perturbed(seed=8, amount=1.0)
DRAFT_TOKENS = 1 << 20
COUNTED_ALIKE = tuple(field.name for field in fields(SessionCounters) if field.name in SEGMENT_COUNTERS)
"""Counters of both ends, which are equal while nothing is lost."""
START = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(slots=True)
class Clock:
    seconds: float = 100.0

    def __call__(self) -> float:
        return self.seconds

    def now(self) -> datetime:
        return START + timedelta(seconds=self.seconds)


def edge_state(presence: Presence = Presence.ONLINE, **given: object) -> EdgeState:
    vocabulary = str(Vocabulary.of(DRAFT.words))
    fields = {"software": "9.9", "edge": EDGE, "target": "toy-target", "vocabulary": vocabulary, "since": START}
    return EdgeState.model_validate({"presence": presence, "target_id": TARGET_ID.hex(), **fields, **given})


class Sink(list[Record]):
    def __init__(self) -> None:
        super().__init__()
        self.crashing = False

    def put(self, record: Record, *, urgent: bool = False, then: Callable[[], None] | None = None) -> None:
        del urgent
        if self.crashing:
            return
        self.append(record)
        if then is not None:
            then()

    def of(self, kind: str) -> list[SimpleNamespace]:
        return of_kind(self, kind)


class MemoryFleet:
    def __init__(
        self,
        *,
        rng: random.Random | None = None,
        faults: Faults | None = None,
        form: FormName = FormName.AUTO,
        kv_tokens: int = 1 << 20,
        max_packet_bytes: int = 1 << 20,
        settings: Mapping[str, object] = MappingProxyType({}),
        draft: MarkovScript | None = None,
    ) -> None:
        self.draft = draft
        self.clock = Clock()
        self.sink = Sink()
        self.broker = MemoryBroker(
            rng=rng or random.Random(0), faults=faults, clock=self.clock, max_packet_bytes=max_packet_bytes
        )
        # The clock may not move, so no quota recovers; requests follow each other all the same.
        quotas = {"opens_per_min": 6000.0}
        self.settings = EdgeSettings.model_validate(
            {"fleet": FLEET, "edge": EDGE, "form": form, "quotas": quotas, **without_tuning(settings)}
        )
        self._options = settings
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
        drafting = None
        if self.draft is not None:
            drafting = ScriptedVerifier(self.draft, TARGET.words, context=256, budget_tokens=DRAFT_TOKENS)
        self._link = MemoryLink(self.broker, EDGE)
        self._edge = assemble(
            self.settings,
            verifier=self.verifier,
            draft_verifier=drafting,
            link=self._link,
            sink=self.sink,
            clock=self.clock,
            now=self.clock.now,
        )
        tune(self._edge, self._options)
        self._link.start(timeout_s=1.0)

    def restart_edge(self) -> None:
        """Let the edge lose its state and the messages in flight to it."""
        self._link.stop()
        self.start_edge()

    def step(self) -> bool:
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


Message = Verdict | Opened | Refused | Closed | Fault


@dataclass(slots=True)
class RecordingInbox(Inbox):
    messages: list[Message] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    connections: int = 0

    def put(self, event: Event, *, size: int = 0) -> None:
        match event:
            case ConnectionChanged():
                self.connections += 1
                if self.connections == 1:
                    return  # the connection that the session begins on
            case ReceivedVerdict(verdict=verdict):
                self.messages.append(verdict)
            case Verdict() | Opened() | Refused() | Closed() | Fault():
                self.messages.append(event)
        Inbox.put(self, event, size=size)

    def get(self, *, timeout_s: float = 0.0) -> Event | None:
        event = Inbox.get(self, timeout_s=timeout_s)
        match event:
            case ReceivedVerdict() | Opened() | Refused() | Closed() | Fault():
                self.messages.pop(0)
        if isinstance(event, Fault):
            self.faults.append(event)
        return event


NEVER_S = 1e9


@dataclass(frozen=True, slots=True)
class ChangingPacing(FixedPacing):
    """Switches at random between drafting, drafting ahead and edge-only decoding."""

    rng: random.Random = field(default_factory=random.Random)

    def plan(self, *, longest: int, window: int) -> Plan:
        del longest, window
        if self.rng.random() < 0.5:
            return Plan(self.rng.randint(0, 6), edge_only=True)
        return Plan(self.rng.randint(0, 8), ahead=self.rng.random() < 0.5, may_stop=self.rng.random() < 0.5)

    def weigh(self, plan: Plan, prospect: Prospect, *, longest: int, window: int) -> Plan:
        del prospect, longest, window
        return replace(plan, repeats=not plan.edge_only and self.rng.random() < 0.5)

    def goes_on(self, chances: Sequence[float]) -> bool:
        return self.rng.random() < chances[-1]

    def choice(self) -> Choice:
        return Choice("draft", "It is drawn by lot.")


@dataclass
class Device:
    """A device's session driver over a memory link; the test's generator decides when it moves."""

    fleet: MemoryFleet
    name: str
    terms: Open
    length: int
    ahead: bool
    padding: int = 0
    pacing: Pacing | None = None
    refused: SessionRefused | None = None
    _started: bool = False

    def __post_init__(self) -> None:
        self.session = DeviceSession(self.terms)
        self.link = MemoryLink(self.fleet.broker, self.name)
        self.inbox = RecordingInbox()
        self.inbox.subscribe(self.link, fleet=FLEET, device=self.name)
        self.link.start(timeout_s=1.0)
        clock = self.fleet.clock
        # It never gives up, nor leaves an edge; it repeats a request when the test says that nothing moves.
        policy = RetryPolicy(NEVER_S, NEVER_S, verdict_s=NEVER_S, close_s=NEVER_S, retry_s=NEVER_S)
        outbound = Outbound(self.link, FLEET, self.name, self.inbox, self.padding)
        waiting = Outages(policy=OfflinePolicy.WAIT)
        model = ScriptedDrafter(DRAFT, DRAFT.words, end_tokens=(END,))
        drafter = SuffixDrafter.before(model, None) if isinstance(self.pacing, ChangingPacing) else model
        drafts = DraftSequence(self.session, drafter, clock)
        pacing = SessionPacing(
            self.session, self.pacing or FixedPacing(self.length, self.ahead), clock, source=drafts.source
        )
        self.driver = SessionDriver(
            session=self.session,
            drafting=Drafting(self.session, drafts, pacing),
            outbound=outbound,
            inbox=self.inbox,
            retry=RetryState(policy, waiting, clock()),
            availability=EdgeAvailability(clock, self.inbox.edges, lambda: outbound.connected),
        )

    @property
    def closed(self) -> Closed | None:
        return self.driver.closing.answer

    @property
    def faults(self) -> list[Fault]:
        return self.inbox.faults

    @property
    def messages(self) -> list[Message]:
        return self.inbox.messages

    @property
    def resumes(self) -> int:
        return self.driver.resumes

    @property
    def done(self) -> bool:
        return self.driver.done or self.refused is not None

    def act(self) -> bool:
        """Take what has arrived and do what is due, up to one message or the end; return whether anything was done."""
        if not self._started:
            self.open()
            return True
        before, moved = self._progress, False
        while not self.done and self._progress == before and self._step():
            moved = True
        return moved

    def nudge(self) -> None:
        if self.session.ended is not None:
            self.driver.closing.send_close()
        else:
            self.driver.retry.note_repeat_due()
            self.driver.on_quiet()

    def open(self) -> None:
        self._started = True
        self.driver.start()

    def resume(self) -> None:
        self.driver.resume()

    def publish(self, topic: Topic, payload: bytes, *, edge: str | None = None) -> None:
        self.link.publish(build(topic, fleet=FLEET, device=self.name, edge=edge), payload)

    @property
    def _progress(self) -> tuple[int, EndReason | None]:
        return self.link.counters.sent, self.session.ended

    def _step(self) -> bool:
        try:
            return self.driver.step()
        except SessionRefused as error:
            self.refused = error
            return True


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
) -> Open:
    policy = SamplingPolicy(
        mode=mode, temperature=temperature, top_k=top_k, top_p=top_p, seed=number if seed is None else seed
    )
    return session_request(
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
    """Faults in addition to the broker's, each with its probability per move."""

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
    """Move the fleet at random until every device has had its session closed."""
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
        # The edge first: its answers then appear at the broker.
        if not moved and not fleet.step() and not fleet.broker.step() and not any(device.act() for device in devices):
            fleet.clock.seconds += 1.0
            for device in devices:
                if not device.done:
                    device.nudge()
    raise AssertionError(f"not done after {most} moves: {[device.session for device in devices if not device.done]}")


def lossless_text(asked: Open, target: MarkovScript = TARGET) -> list[int]:
    """Return the target's own output in coupled mode, without the rest of the system."""
    return coupled_text(target, asked.prompt, asked.policy, asked.max_new_tokens, ends=(END,))


def possible(asked: Open, text: Sequence[int]) -> bool:
    """Return whether an output is complete and each of its tokens has a positive probability under the target."""
    complete = len(text) == asked.max_new_tokens or (bool(text) and text[-1] == END)
    return (
        complete
        and END not in text[:-1]
        and all(
            shape(TARGET.logits((*asked.prompt, *text[:place])), asked.policy).probability(token) > 0.0
            for place, token in enumerate(text)
        )
    )
