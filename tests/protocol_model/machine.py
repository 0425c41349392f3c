"""The model: edges and devices over a broker whose messages are lost, repeated, delayed and overtaken as rules say.

Every rule is one thing that happens to a fleet. After each of them, and once all is quiet again, what the protocol
promises must hold.
"""

import logging
import random
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fleet_device.errors import EdgeUnavailable, ProtocolViolation, SessionFailed, SessionRefused
from fleet_device.pacing.contract import FixedPacing
from fleet_edge.session_log.quarantines import Quarantines
from fleet_edge.session_log.views import QuarantineView
from sampling.downlink import FormName
from schemas.codec import encode_close, encode_draft, encode_open
from schemas.messages import Draft
from schemas.policy import Mode
from schemas.reasons import EndReason, RefusalCode
from schemas.topics import Topic, build, parse
from tests.protocol_model.devices import ModelDevice, Text
from tests.protocol_model.edges import Life, ModelEdge
from tests.protocol_model.ledger import Ledger
from tests.protocol_model.network import SteeredBroker, TappedLink
from tests.support.drafts import close
from tests.support.memory_fleet import FLEET, OTHER_TARGET, TARGET, ChangingPacing, Clock, terms

EDGES, DEVICES, HOSTILE = ("edge-1", "edge-2"), ("device-1", "device-2"), "hostile"
MOMENT_S = 0.01  # that each thing takes
LEASE_S = 60.0
HOT = (Topic.DRAFT, Topic.VERDICT)
PLENTY = 12_000.0  # new tokens a minute
SESSIONS = 8  # of a device, where they are not few
MAX_RESUMES = 20  # in a row that bring nothing, before a device gives up
WAITS = 600  # seconds in which a fleet without faults ends its requests
MESSAGES = 60  # that it needs at most for a text, and
MESSAGES_A_TOKEN = 12
places = st.integers(0, 7)
moves = st.integers(0, 6)


@dataclass(frozen=True, slots=True)
class Wish:
    mode: Mode
    tokens: int
    prompt: tuple[int, ...]
    temperature: float
    top_k: int
    length: int
    ahead: bool
    turns: int | None = None  # seed of the alternation of drafts and edge-only decoding
    any_target: bool = False  # whether another target may continue it


wishes = st.builds(
    Wish,
    mode=st.sampled_from(Mode),
    tokens=st.sampled_from((1, 3, 8, 20, 40)),
    prompt=st.tuples(st.integers(0, 5)),
    temperature=st.sampled_from((0.8, 0.0, 1.5)),
    top_k=st.sampled_from((5, 0)),
    length=st.sampled_from((2, 1, 4, 0)),
    ahead=st.sampled_from((True, True, False)),
    turns=st.sampled_from((None, None, 1, 2)),
    any_target=st.sampled_from((False, False, True)),
)


class _Errors(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class ProtocolModel(RuleBasedStateMachine):
    """A fleet of two edges, two honest devices and a hostile one; the edges have one target, or two."""

    seen: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.clock = WallClock()
        self.ledger = Ledger()
        self.quarantines: dict[str, QuarantineView] = {}
        self.lifted: dict[str, datetime] = {}
        self.number = self.crashes = 0
        self.harsh = True  # or nothing worse happens than that messages are repeated, and come late
        self.edges: list[ModelEdge] = []
        self.devices: list[ModelDevice] = []
        self.errors = _Errors()
        logging.getLogger().addHandler(self.errors)

    @initialize(
        window=st.sampled_from((4, 2, 1)),
        form=st.sampled_from(FormName),
        kv_tokens=st.sampled_from((1 << 20, 60)),
        packet=st.sampled_from((1 << 20, 540)),
        step_tokens=st.sampled_from((512, 16, 4)),
        new_tokens=st.sampled_from((PLENTY, PLENTY, PLENTY, 40.0)),
        sessions=st.sampled_from((SESSIONS, SESSIONS, SESSIONS, 2)),
        two_targets=st.sampled_from((False, True)),
        first=wishes,
        harsh=st.booleans(),
    )
    def begin(self, first: Wish, harsh: bool, **scene: Any) -> None:
        self.harsh = harsh
        self.start(**scene)
        for device in self.devices:
            self.write_text(device, first)

    def start(
        self,
        *,
        window: int = 4,
        form: FormName = FormName.AUTO,
        kv_tokens: int = 1 << 20,
        packet: int = 1 << 20,
        step_tokens: int = 512,
        new_tokens: float = PLENTY,
        sessions: int = SESSIONS,
        two_targets: bool = False,
    ) -> None:
        self.broker = SteeredBroker(clock=self.clock, max_packet_bytes=packet)
        self.options = {
            "window": window,
            "max_draft": 4,
            "form": form,
            "step_tokens": step_tokens,
            "prefill_chunk": 2,
            "lease_s": LEASE_S,
            "max_sessions_per_device": sessions,
            "quarantine": {"strikes": 100},
            "quotas": {"new_tokens_per_min": new_tokens},
        }
        self.scarce = new_tokens < 100.0
        self.crowded = sessions < SESSIONS
        self.targets = dict(zip(EDGES, (TARGET, OTHER_TARGET if two_targets else TARGET), strict=True))
        self.edges = [
            ModelEdge(name, self.broker, self.clock, self.options, kv_tokens, self.ledger.from_edge, target)
            for name, target in self.targets.items()
        ]
        self.devices = [
            ModelDevice(name, self.broker, self.clock, self.ledger.from_device, self.ledger.target_of)
            for name in DEVICES
        ]
        for each in (*self.edges, *self.devices):
            each.start()
        self.hostile = TappedLink(self.broker, HOSTILE, lambda _topic, _payload: None)
        self.hostile.start(timeout_s=1.0)
        self.broker.pump()
        while self.broker.waiting:
            self.broker.arrive(0)

    # Texts

    @precondition(lambda self: self._idle())
    @rule(moves=moves, wish=wishes)
    def write(self, moves: int, wish: Wish) -> None:
        idle = self._idle()[0]
        self._go_on(moves)
        if idle.text is None or idle.text.over:
            self.write_text(idle, wish)

    @rule(moves=moves, which=st.integers(0, 1))
    def cancel(self, moves: int, which: int) -> None:
        self._go_on(moves)
        self.devices[which].cancel()

    # Network faults, each after a number of moves of the fleet

    @rule(moves=moves, place=places)
    def arrive(self, moves: int, place: int) -> None:
        self._go_on(moves)
        if self.broker.waiting:
            self.broker.arrive(place % len(self.broker.waiting))

    @rule(moves=moves, place=places)
    def repeat(self, moves: int, place: int) -> None:
        self._go_on(moves)
        if self.broker.waiting:
            self.broker.repeat(place % len(self.broker.waiting))

    @rule(moves=moves, place=places, copy=st.booleans(), hot=st.sampled_from((True, True, False)))
    def hold(self, moves: int, place: int, copy: bool, hot: bool) -> None:
        """Delay a message, or a copy of it, as long as possible; most are drafts and verdicts."""
        self._go_on(moves)
        waiting = self.broker.waiting
        some = [at for at, parcel in enumerate(waiting) if not hot or parse(parcel.topic).topic in HOT]
        if some:
            self.broker.hold(some[place % len(some)], copy=copy)

    @precondition(lambda self: self.broker.held)
    @rule(moves=moves, place=places, keep=st.booleans())
    def release(self, moves: int, place: int, keep: bool) -> None:
        self._go_on(moves)
        if self.broker.held:
            self.broker.release(place % len(self.broker.held), keep=keep)

    @precondition(lambda self: self.harsh)
    @rule(moves=moves, place=places)
    def lose(self, moves: int, place: int) -> None:
        self._go_on(moves)
        if self.broker.waiting:
            self._harm()
            self.broker.lose(place % len(self.broker.waiting))

    @rule(which=st.integers(0, 3))
    def work(self, which: int) -> None:
        (*self.edges, *self.devices)[which].work()

    @rule(moves=moves, which=st.integers(0, 1), place=places)
    def compute(self, moves: int, which: int, place: int) -> None:
        """Let an edge compute while a message arrives."""
        self._go_on(moves)
        self.edges[which].compute()
        if self.broker.waiting:
            self.broker.arrive(place % len(self.broker.waiting))

    @precondition(lambda self: self.harsh)
    @rule(moves=moves, seconds=st.sampled_from((0.1, 1.0, 2.0, 11.0, 16.0, 61.0)))
    def wait(self, moves: int, seconds: float) -> None:
        self._go_on(moves)
        self._harm()
        self.clock.seconds += seconds
        self._look_after()

    @precondition(lambda self: self.harsh)
    @rule()
    def recover(self) -> None:
        """Bring everything back up; what is lost stays lost."""
        self._harm()
        self._recover()

    # Faults of connections and machines

    @precondition(lambda self: self.harsh)
    @rule(
        moves=moves,
        what=st.sampled_from(("cut", "reunite", "stop", "forget", "start", "set-clock")),
        which=st.integers(0, 3),
    )
    def shake_network(self, moves: int, what: str, which: int) -> None:
        self._go_on(moves)
        self._harm()
        broker, name = self.broker, (*EDGES, *DEVICES)[which]
        if what == "cut" and broker.connected(name):
            broker.kill(name)  # its client lives on
        elif what == "reunite" and broker.up and broker.cut(name):
            broker.revive(name)
        elif what in ("stop", "forget") and broker.up:
            broker.go_down(forget_retained=what == "forget")
        elif what == "start" and not broker.up:
            broker.come_up()
        elif what == "set-clock":
            self.clock.off_s += (-3600.0, -60.0, 60.0, 3600.0)[which]
        broker.pump()

    @precondition(lambda self: self.harsh)
    @rule(
        moves=moves,
        what=st.sampled_from(("crash", "drain", "end", "restart", "exchange", "start")),
        which=st.integers(0, 1),
    )
    def shake_edge(self, moves: int, what: str, which: int) -> None:
        self._go_on(moves)
        self._harm()
        edge = self.edges[which]
        connected = edge.life is not None and self.broker.connected(edge.name)
        if what in ("crash", "restart", "exchange") and edge.life is not None:
            edge.crash()
        elif what == "drain" and connected:
            edge.drain()
        elif what == "end" and connected:
            edge.end()
        if what == "exchange":  # under its old name
            edge.target = next(target for name, target in self.targets.items() if name != edge.name)
        if what in ("start", "restart", "exchange") and edge.life is None and self.broker.up:
            edge.start()
        self.broker.pump()

    @precondition(lambda self: self.harsh)
    @rule(moves=moves, what=st.sampled_from(("restart", "quarantine", "lift")), which=st.integers(0, 1))
    def shake_device(self, moves: int, what: str, which: int) -> None:
        self._go_on(moves)
        self._harm()
        device = self.devices[which]
        if what == "restart" and self.broker.up:
            device.crash()
            device.start()
            self.ledger.sessions.pop(device.name, None)
            self.crashes += 1
        elif what == "quarantine":
            self._quarantine(device)
        elif what == "lift":
            self._lift(device.name)

    # A hostile device, under its own name: sessions of others, invalid messages, floods

    @rule(
        edge=st.sampled_from(EDGES),
        handle=st.integers(0, 3),
        round_=st.integers(0, 5),
        times=st.sampled_from((1, 120)),
    )
    def forge_drafts(self, edge: str, handle: int, round_: int, times: int) -> None:
        handle += next(each.first_handle for each in self.edges if each.name == edge)
        draft = Draft(handle=handle, round=round_, epoch=0, base=0, tokens=(1,), counts=(9,), digest=0)
        self._forge(Topic.DRAFT, encode_draft(draft), edge=edge, times=times)

    @rule(
        which=st.integers(0, 1),
        what=st.sampled_from(("open", "resume", "close", "bytes")),
        edge=st.sampled_from((None, *EDGES)),
    )
    def forge(self, which: int, what: str, edge: str | None) -> None:
        text = self.devices[which].text
        if what == "bytes" or text is None:
            self._forge(Topic.DRAFT, b"\x80", edge=EDGES[which])
        elif what == "close":
            name = text.session.request.session
            self._forge(Topic.CLOSE, encode_close(close(session=name, handle=0, edge=edge, reason=EndReason.FAILED)))
        else:
            committed = tuple(text.session.committed)
            again = {"attempt": 3, "resume": committed} if what == "resume" else {"resume": committed or None}
            message = text.session.request.model_copy(update=again)
            self._forge(Topic.OPEN, encode_open(message))

    # Invariants

    @invariant()
    def step(self) -> None:
        self.seen["steps"] += 1
        if self.devices:
            self.holds()

    def holds(self) -> None:
        self.clock.seconds += MOMENT_S
        for device in self.devices:
            device.check()
            if device.text is not None:
                self._check_end(device.text)
        for edge in self.edges:
            if edge.life is not None:
                self._check_edge(edge, edge.life)
        assert not self.errors.records, [record.getMessage() for record in self.errors.records]

    def _go_on(self, moves: int) -> None:
        for _ in range(moves):
            self.go_on_once()

    def go_on_once(self) -> None:
        if self.broker.waiting:
            self.broker.arrive(0)
        self._work()

    def teardown(self) -> None:
        try:
            if self.devices and not self.errors.records:
                self._calm()
                self._check_log()
                self._count()
        finally:
            self.close()

    def close(self) -> None:
        logging.getLogger().removeHandler(self.errors)

    def _check_edge(self, edge: ModelEdge, life: Life) -> None:
        orchestrator, sessions = life.orchestrator, life.orchestrator.sessions
        handles = {session.handle for session in sessions}
        assert len(sessions) == len(sessions._by_name) == len(handles)
        if not edge.computing:  # it is notified after computing
            cache = orchestrator.scheduler._verifier
            assert set(cache._open) == handles, "keys and values are kept of sessions that are over"
            assert set(life.verifier._table.lengths) == set(cache._held)
            assert len(cache._held) == len(handles) + len(cache._retained)
        scheduler = orchestrator.scheduler
        assert set(orchestrator.handlers.recorder._segments) == handles
        for kept in (scheduler._used, scheduler._evicted, scheduler._delay._answered, scheduler._prefill_log._steps):
            assert set(kept) <= handles, "something is kept of sessions that are over"
        assert len(orchestrator.inbox._messages) <= len(self.broker.waiting) + 2000
        for session in sessions:
            window = session.limits.window
            assert len(session._waiting) <= window
            assert len(session._rounds._verdicts) <= 2 * window
            assert len(session._rounds._counted) <= 2 * window
            self._check_agreement(life, edge.name, session)
        for device in self.devices:
            standing = orchestrator.handlers.guard._standings.get(device.name)
            assert standing is None or standing.own_until == 0.0, f"{edge.name} has quarantined an honest device"

    def _check_agreement(self, life: Life, edge: str, session: object) -> None:
        """Check that both ends of a session have the same tokens, as far as both go."""
        text = next((d.text for d in self.devices if d.text is not None and d.name == session.device), None)
        if text is None or session.session != text.session.request.session:
            return
        opened = text.session.opened
        if opened is None or (opened.edge, opened.attempt, opened.handle) != (edge, session.attempt, session.handle):
            return
        if (session.session, session.attempt) in life.astray:
            return
        theirs, ours = session.tokens[session.prompt_length :], text.session.committed
        both = min(len(theirs), len(ours))
        assert theirs[:both] == ours[:both], f"{edge} has {theirs}, {session.device} has {ours}"
        if session._epoch == text.session._epoch and session._digest == text.session.sequence.digest:
            assert theirs == ours

    def _check_end(self, text: Text) -> None:
        assert text.harmed or text.driver.resumes == 0, "repetition and disorder alone made a text be resumed"
        error, resumes = text.error, text.driver.resumes
        if error is None:
            return
        self.seen[f"error {type(error).__name__} {getattr(error, 'code', '')}"] += 1
        assert not isinstance(error, ProtocolViolation | EdgeUnavailable), repr(error)
        if text.quarantined:
            return
        if isinstance(error, SessionRefused):
            allowed = {RefusalCode.BUSY: self.crowded or self.crashes >= SESSIONS - 1}
            assert allowed.get(error.code, False), repr(error)
        elif isinstance(error, SessionFailed):
            assert resumes >= MAX_RESUMES, repr(error)

    def _check_log(self) -> None:
        closed: dict[str, int] = {}
        for edge in self.edges:
            for record in edge.sink.of("closed"):
                if record.reason in (EndReason.STOP, EndReason.LENGTH) and record.counters is not None:
                    assert closed.setdefault(record.session, record.tokens) == record.tokens
        for session, tokens in closed.items():
            assert self.ledger.ends[bytes.fromhex(session)][0] == tokens, "the log has another length than the device"

    # Within

    def _calm(self) -> None:
        """Stop all faults: every request ends, after a bounded number of messages."""
        self._recover()
        for device in self.devices:
            self._lift(device.name)
        under_way = [d.text for d in self.devices if d.text is not None and not d.text.over]
        most = sum(MESSAGES + MESSAGES_A_TOKEN * text.session.request.max_new_tokens for text in under_way)
        before = self.ledger.messages
        while self.broker.held:
            self.broker.release(0)
        self.broker.retained_again()
        for _ in range(WAITS):
            while self.broker.waiting:
                self.broker.arrive(0)
                self._work()
                self.holds()
                assert self.ledger.messages - before <= most + 40, "a text needs too many messages"
            self._work()
            if self.broker.waiting:
                continue
            if all(d.text is None or d.text.over for d in self.devices):
                break
            self.clock.seconds += 1.0
            self._look_after()
        for device in self.devices:
            text = device.text
            assert text is None or text.over, f"{device.name} has not ended: {text}"
            if text is not None and text.error is None:
                assert text.session.ended is not None
        self.clock.seconds += LEASE_S + 1.0
        self._look_after()
        self.holds()
        for edge in self.edges:
            assert edge.life is not None
            assert len(edge.life.orchestrator.sessions) == 0, "sessions outlive their lease"

    def _recover(self) -> None:
        if not self.broker.up:
            self.broker.come_up()
        for name in (*EDGES, *DEVICES):
            if self.broker.cut(name):
                self.broker.revive(name)
        self.broker.pump()
        for edge in self.edges:
            if edge.life is not None and edge.draining:
                edge.end()
            edge.target = self.targets[edge.name]
            if edge.life is not None and edge.life.target is not edge.target:
                edge.crash()
            if edge.life is None:
                edge.start()

    def write_text(self, device: ModelDevice, wish: Wish) -> None:
        self.number += 1
        request = terms(
            self.number,
            mode=wish.mode,
            prompt=(1, *wish.prompt),
            max_new_tokens=wish.tokens,
            temperature=wish.temperature,
            top_k=wish.top_k,
        )
        sound = self._sound()
        turns = None if wish.turns is None else ChangingPacing(rng=random.Random(wish.turns))
        pacing = turns or FixedPacing(wish.length, wish.ahead)
        device.write(request, pacing=pacing, note=self.ledger.sessions, any_target=wish.any_target)
        self.seen["texts"] += 1
        assert device.text is not None
        device.text.harmed, device.text.quarantined = not sound, device.name in self.quarantines

    def _count(self) -> None:
        self.seen["messages"] += self.ledger.messages
        self.seen["decisions"] += len(self.ledger.decisions)

    def _harm(self) -> None:
        """Note that a session may have to resume: more has happened than repetition and reordering."""
        for device in self.devices:
            if device.text is not None:
                device.text.harmed = True

    def _sound(self) -> bool:
        """Return whether everything is up and no older message is in flight."""
        on_their_way = (*self.broker.waiting, *self.broker.held)
        return (
            not self.quarantines
            and all(edge.life is not None and not edge.draining for edge in self.edges)
            and all(self.broker.connected(name) for name in (*EDGES, *DEVICES))
            and not any(parse(parcel.topic).topic is Topic.EDGE_STATE for parcel in on_their_way)
        )

    def _work(self) -> None:
        for each in (*self.edges, *self.devices):
            each.work()

    def _look_after(self) -> None:
        quarantines = Quarantines(self.clock.now(), dict(self.quarantines), dict(self.lifted))
        for edge in self.edges:
            edge.look_after(quarantines)
        for device in self.devices:
            device.wait()

    def _lift(self, device: str) -> None:
        if self.quarantines.pop(device, None) is not None:
            self.lifted[device] = self.clock.now()
        self._look_after()

    def _quarantine(self, device: ModelDevice) -> None:
        self.quarantines[device.name] = QuarantineView(
            device=device.name, since_at=self.clock.now(), until_at=None, by="admin", reason="-", strikes=0, level=0
        )
        if device.text is not None:
            device.text.quarantined = True
        self._look_after()

    def _forge(self, topic: Topic, payload: bytes, *, edge: str | None = None, times: int = 1) -> None:
        """Let the hostile device send something; a flood arrives at once."""
        if not self.hostile.connected:
            return
        for _ in range(times):
            before = len(self.broker.waiting)
            self.hostile.publish(build(topic, fleet=FLEET, device=HOSTILE, edge=edge), payload)
            if times > 1 and len(self.broker.waiting) > before:
                self.broker.arrive(before)

    def _idle(self) -> list[ModelDevice]:
        return [device for device in self.devices if device.text is None or device.text.over]


@dataclass(slots=True)
class WallClock(Clock):
    off_s: float = 0.0

    def now(self) -> datetime:
        return Clock.now(self) + timedelta(seconds=self.off_s)
