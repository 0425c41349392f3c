"""A scripted edge over the memory broker, and a device's agent that has to handle it."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from fleet_common.mqtt.link import Message
from fleet_device.client.agent import Agent
from fleet_device.client.decision import RetryPolicy
from fleet_device.client.messaging import Event, Inbox
from fleet_device.drafters.without_model import ScriptedDrafter
from fleet_device.pacing.contract import FixedPacing, Pacing
from fleet_device.requests.generate import GenerateRequest, Generation, RequestContext
from fleet_device.settings import Outages
from schemas.codec import decode_close, decode_draft, decode_open, encode_reply, encode_verdict
from schemas.control import Presence, encode_json
from schemas.messages import Close, Closed, Draft, Fault, Open, Opened, Refused, Verdict
from schemas.policy import Mode, SamplingPolicy
from schemas.reasons import Action, EndReason, FaultCode, RefusalCode
from schemas.topics import Topic, build, wildcard
from tests.support.memory_broker import MemoryBroker
from tests.support.memory_fleet import DRAFT, EDGE, END, FLEET, TARGET_ID, Clock, MemoryFleet, edge_state
from tests.support.memory_link import MemoryLink

Answer = Verdict | Opened | Refused | Fault | Closed | Presence
Answers = Iterable[Answer]

DEVICE = "device-1"
PATIENCE = RetryPolicy(open_s=5.0, resume_s=30.0, verdict_s=3.0, close_s=2.0, retry_s=1.0)
BY_PATIENCE = Outages(after_s=35.0, answer_s=math.inf)  # a silent edge has the time of the policy


class TooManyMessages(BaseException):
    """The device goes on and on; no handler may swallow it."""


def opened(message: Open, **fields: object) -> Opened:
    sound = {
        "session": message.session,
        "attempt": message.attempt,
        "handle": 1,
        "edge": EDGE,
        "target": "toy",
        "target_id": TARGET_ID,
        "position": len(message.resume or ()),
        "max_new_tokens": message.max_new_tokens,
        "max_draft": 16,
        "window": 4,
        "lease_s": 60.0,
        "end_tokens": (END,),
    }
    return Opened.model_validate(sound | fields)


def closed(message: Open | Close, **fields: object) -> Closed:
    zeros = {"tokens": 0, "rounds": 0, "mean_batch": 0.0, "queue_ms": 0.0, "compute_ms": 0.0}
    sound = {"session": message.session, "attempt": getattr(message, "attempt", None), "reason": EndReason.LOST}
    return Closed.model_validate(zeros | sound | fields)


def accepted(draft: Draft, **fields: object) -> Verdict:
    """Return the verdict that accepts a draft whole, with a token behind it unless the device has drafted on."""
    sound = {"handle": draft.handle, "round": draft.round, "accepted": len(draft.tokens)}
    return Verdict.model_validate(sound | {"next": None if draft.more else 1} | fields)


def refusal(
    message: Open, code: RefusalCode = RefusalCode.QUARANTINED, retry_s: float | None = None, sentence: str = "Not now."
) -> Refused:
    return Refused(session=message.session, code=code, sentence=sentence, retry_s=retry_s)


def fault(
    draft: Draft | None,
    action: Action = Action.WAIT,
    retry_s: float | None = None,
    *,
    code: FaultCode = FaultCode.QUOTA,
    sentence: str = "Over it.",
) -> Fault:
    """Return a fault of a draft, or without one of the device's whole conduct."""
    handle, number = (draft.handle, draft.round) if draft else (None, None)
    return Fault(handle=handle, round=number, code=code, action=action, sentence=sentence, retry_s=retry_s)


class ScriptedEdge:
    """Sends scripted answers; confirms Closes, so that the end of a request is not waited for."""

    def __init__(
        self,
        broker: MemoryBroker,
        *,
        on_open: Callable[[Open], Answers] = lambda message: [opened(message)],
        on_draft: Callable[[Open, Draft], Answers] = lambda _message, _draft: (),
        name: str = EDGE,
        target_id: bytes = TARGET_ID,
        shared: bool = False,
    ) -> None:
        self.on_open = on_open
        self.on_draft = on_draft
        self.name = name
        self.target_id = target_id
        self.opens: list[Open] = []
        self.drafts: list[Draft] = []
        self.closes: list[Close] = []
        self._link = MemoryLink(broker, name)
        self._opens = f"{'$share/edges/' if shared else ''}{wildcard(Topic.OPEN, fleet=FLEET)}"
        self._link.subscribe(self._opens, self._open)
        self._link.subscribe(wildcard(Topic.DRAFT, fleet=FLEET, edge=name), self._draft)
        self._link.subscribe(wildcard(Topic.CLOSE, fleet=FLEET), self._close)
        self._link.start(timeout_s=1.0)
        self.say(Presence.ONLINE)

    @property
    def messages(self) -> int:
        return len(self.opens) + len(self.drafts)

    def stop(self) -> None:
        self._link.stop()

    def stop_opens(self) -> None:
        self._link.unsubscribe(self._opens)

    def say(self, presence: Presence, *, target_id: bytes | None = None) -> None:
        identity = (target_id or self.target_id).hex()
        state = encode_json(edge_state(presence, edge=self.name, target_id=identity))
        self._link.publish(build(Topic.EDGE_STATE, fleet=FLEET, edge=self.name), state, retain=True)

    def send(self, answers: Answers) -> None:
        for answer in answers:
            match answer:
                case Presence():
                    self.say(answer)
                case Verdict():
                    self._publish(Topic.VERDICT, encode_verdict(answer))
                case _:
                    self._publish(Topic.SESSION, encode_reply(answer))

    def _publish(self, topic: Topic, payload: bytes) -> None:
        self._link.publish(build(topic, fleet=FLEET, device=DEVICE), payload)

    def _open(self, message: Message) -> None:
        self.opens.append(decode_open(message.payload))
        self.send(self.on_open(self.opens[-1]))

    def _draft(self, message: Message) -> None:
        self.drafts.append(decode_draft(message.payload))
        self.send(self.on_draft(self.opens[-1], self.drafts[-1]))

    def _close(self, message: Message) -> None:
        self.closes.append(decode_close(message.payload))
        last = self.closes[-1]
        self.send([closed(last, reason=last.reason)])


@dataclass(slots=True)
class PassingInbox(Inbox):
    """Waiting delivers messages instead of sleeping; if none is in flight, it moves the clock."""

    step: Callable[[], bool] = lambda: False
    clock: Clock = field(default_factory=Clock)
    most: int = 50_000
    on_wait: Callable[[int], None] = lambda _number: None
    each_second: Callable[[], None] = lambda: None
    waits: int = 0
    taken: int = 0

    def get(self, *, timeout_s: float = 0.0) -> Event | None:
        event = Inbox.get(self)
        if event is not None or timeout_s <= 0.0:
            return self._count(event)
        self.on_wait(self.waits)
        self.waits += 1
        self._count(event, waited=True)
        until = self.clock.seconds + timeout_s
        while (event := Inbox.get(self)) is None:
            if self.step():
                continue
            if self.clock.seconds >= until:
                return None
            self.clock.seconds = min(until, self.clock.seconds + 1.0)
            self.each_second()
        return event

    def _count(self, event: Event | None, *, waited: bool = False) -> Event | None:
        if event is not None or waited:
            self.taken += 1
            if self.taken > self.most:
                raise TooManyMessages
        return event


class LoneDevice:
    def __init__(
        self,
        fleet: MemoryFleet | None = None,
        *,
        pacing: Pacing | None = None,
        context: int = 4096,
        most: int = 50_000,
        **given: object,
    ) -> None:
        self.clock = fleet.clock if fleet else Clock()
        self.broker = fleet.broker if fleet else MemoryBroker(clock=self.clock)
        self._fleet = fleet
        self.edge_works = True
        self.inbox = PassingInbox(step=self._step, clock=self.clock, most=most)
        self.link = MemoryLink(self.broker, DEVICE)
        self.agent = Agent(
            self.link,
            FLEET,
            DEVICE,
            ScriptedDrafter(DRAFT, DRAFT.words, end_tokens=(END,), context=context),
            pacing or FixedPacing(3),
            self.clock,
            **({"retry_policy": PATIENCE, "inbox": self.inbox} | given),  # type: ignore[arg-type]
        )
        self.agent.attach()
        self.link.start(timeout_s=1.0)

    def generate(
        self,
        *,
        mode: Mode = Mode.RESIDUAL,
        most: int = 8,
        seed: int = 6,
        prompt: Sequence[int] = (1, 2),
        context: RequestContext | None = None,
        logprobs: int | None = None,
        echo: bool = False,
    ) -> Generation:
        self.broker.pump()
        policy = SamplingPolicy(mode=mode, temperature=0.8, top_k=5, top_p=0.93, seed=seed)
        request = GenerateRequest(
            tuple(prompt),
            policy=policy,
            max_new_tokens=most,
            logprobs=logprobs,
            outages=BY_PATIENCE,
            echo=echo,
            edge_only=echo,
        )
        return self.agent.generate(request, context or RequestContext())

    def _step(self) -> bool:
        if self.broker.step():
            return True
        return self._fleet is not None and self.edge_works and (self._fleet.step() or self.broker.step())
