"""A device over a memory broker with a scripted edge, and a device without either, for tests of the upper layers."""

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fleet_device.drafters.contract import TextCodec
from fleet_device.drafters.without_model import ScriptedDrafter, WordCodec
from fleet_device.errors import EdgeUnavailable, SessionRefused
from fleet_device.power import HeatSensor
from fleet_device.requests.generate import GeneratedText, GenerateRequest, Generation, RequestContext, generate_text
from fleet_device.requests.queue import Listener, RequestQueue, Ticket
from fleet_device.service import DeviceService
from fleet_device.session.sequence import CommittedTokens, TokenOrigin
from fleet_device.session.states import SessionCounters
from fleet_device.settings import DeviceSettings, Outages
from schemas.control import Presence, encode_json
from schemas.fields import TokenLogprobs
from schemas.policy import Grammar
from schemas.reasons import EndReason, RefusalCode
from schemas.topics import Topic, build
from tests.support.device_status import device_status
from tests.support.memory_fleet import DRAFT, END, FLEET, START, MemoryFleet, edge_state
from tests.support.memory_link import MemoryLink
from tests.support.waiting import PATIENCE_S

SESSION = bytes(range(8))


class TalkingCodec(WordCodec):
    """Encodes any text: a word of the language becomes its token, any other word token 1."""

    @property
    def chat_template(self) -> str | None:
        return "{% for message in messages %}{{ message.role }}: {{ message.content }} {% endfor %}"

    def encode(self, text: str, *, special: bool = False) -> list[int]:  # noqa: ARG002
        return [self._ids.get(word, 1) for word in text.split()]

    def piece(self, token: int) -> bytes:
        """Return the word, or the number of a token that the small language lacks and a request for many shows."""
        return super().piece(token) if token < len(self._words) else b"%d " % token


class TalkingDrafter(ScriptedDrafter):
    def __init__(self, context: int = 4096, words: Sequence[str] = DRAFT.words) -> None:
        super().__init__(DRAFT, words, context=context, end_tokens=(END,), name="toy")
        self.codec = TalkingCodec(words, (END,))
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


def announce_edge(fleet: MemoryFleet, presence: Presence = Presence.ONLINE, **given: object) -> None:
    link = MemoryLink(fleet.broker, "announcer")
    link.start(timeout_s=1.0)
    state = edge_state(presence, **given)
    link.publish(build(Topic.EDGE_STATE, fleet=FLEET, edge=state.edge), encode_json(state), retain=True)
    link.stop()


@contextmanager
def at_work(fleet: MemoryFleet) -> Iterator[None]:
    with fleet.broker.running(), edge_at_work(fleet):
        yield


@contextmanager
def edge_at_work(fleet: MemoryFleet) -> Iterator[None]:
    stopping = threading.Event()

    def verify() -> None:
        while not stopping.is_set():
            fleet.edge.step(wait_s=0.01)

    thread = threading.Thread(target=verify, name="edge", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()


def settings(**given: Any) -> DeviceSettings:
    return DeviceSettings.model_validate(
        {"fleet": FLEET, "device": "device-1", "seed": 5, "api_listen": "", "requests_at_once": 1, **given}
    )


def memory_service(
    fleet: MemoryFleet, drafter: TalkingDrafter | None = None, heat: HeatSensor | None = None, **given: Any
) -> DeviceService:
    return DeviceService(
        settings(**given),
        drafter or TalkingDrafter(),
        make_link=lambda link: MemoryLink(fleet.broker, link.client_id, will=link.will),
        heat=heat or HeatSensor(Path("/nowhere")),
    )


def committed(batch: Sequence[int], *, logprobs: int | None = None) -> CommittedTokens:
    """Return tokens as a verdict commits them: all but the last of several are drafted.

    With `logprobs`, each has that of itself and of this many first tokens of the vocabulary.
    """
    last = (TokenOrigin.BONUS,) if len(batch) > 1 else ()
    told = CommittedTokens(tuple(batch), (TokenOrigin.DRAFTED,) * (len(batch) - len(last)) + last)
    if logprobs is None:
        return told
    values = tuple(-1.0 - place for place in range(logprobs))
    known = TokenLogprobs(logprob=-0.5, ids=tuple(range(logprobs)), values=values)
    return replace(told, logprobs=(known,) * len(batch))


@dataclass
class ScriptedAgent:
    """Generates scripted batches, each at its time."""

    batches: Sequence[Sequence[int]] = ((1, 2), (3,))
    error: BaseException | None = None
    reason: EndReason = EndReason.STOP
    gate: threading.Semaphore | None = None
    late: str | None = None
    alone: Collection[int] = ()
    outages: list[Outages] = field(default_factory=list)
    started: threading.Event = field(default_factory=threading.Event)
    asked: list[dict[str, Any]] = field(default_factory=list)
    ended: list[EndReason] = field(default_factory=list)
    apps: list[str | None] = field(default_factory=list)
    edge_only: list[bool] = field(default_factory=list)

    def generate(self, request: GenerateRequest, context: RequestContext) -> Generation:
        prompt, outages = request.prompt, request.outages
        asked = {"prompt": tuple(prompt), "policy": request.policy, "max_new_tokens": request.max_new_tokens}
        self.asked.append(asked)
        self.outages.append(outages)
        self.apps.append(request.app)
        self.edge_only.append(request.edge_only)
        self.started.set()
        tokens: list[int] = []
        verified: int | None = None
        reason = self.reason
        cancellation = context.cancellation
        with cancellation.waking(self._wake):
            if self.late is not None:
                context.on_wait(self.late)
            for number, batch in enumerate(self.batches):
                if self.gate is not None:
                    assert self.gate.acquire(timeout=PATIENCE_S)
                if cancellation.requested:
                    reason = EndReason.CANCELLED
                    break
                if number in self.alone and verified is None:
                    verified = len(tokens)
                tokens.extend(batch)
                told = committed(batch, logprobs=request.logprobs)
                if verified is not None:
                    told = replace(told, origins=(TokenOrigin.UNVERIFIED,) * len(batch))
                if context.on_tokens(told):
                    reason = EndReason.STOP
                    break
        if self.error is not None:
            raise self.error
        self.ended.append(reason)
        counters = SessionCounters(drafted=4, tested=4, accepted=3, rounds=2, uplink_bytes=50, downlink_bytes=20)
        unverified = 0 if verified is None else len(tokens) - verified
        scores = committed(prompt[1:], logprobs=request.logprobs).logprobs if request.echo else ()
        return Generation(
            SESSION, tuple(tokens), reason, counters, None, 100.0, 10.0, 0, 1,
            unverified=unverified, prompt_logprobs=scores,
        )  # fmt: skip

    def _wake(self) -> None:
        if self.gate is not None:
            self.gate.release()


class ScriptedBackend:
    def __init__(self, agent: ScriptedAgent, drafter: TalkingDrafter, *, waiting: int = 2) -> None:
        self.agent = agent
        self.drafter = drafter
        self.missing: str | None = None
        self.unusable = False  # whatever grammar is asked for
        self.since = START
        self.cancelled: list[Ticket] = []
        self.targeted: list[str] = []
        self.queue = RequestQueue(self._write, waiting=waiting)
        self.queue.start()

    def close(self) -> None:
        self.queue.abandon()
        self.queue.join()

    def submit(self, prepare: Callable[[Any], GenerateRequest], listener: Listener, *, target: str = "") -> Ticket:
        self.targeted.append(target)
        return self.queue.submit(lambda: prepare(self.drafter.codec), listener)

    def cancel(self, ticket: Ticket) -> None:
        self.cancelled.append(ticket)
        self.queue.cancel(ticket)

    def check_grammar(self, _grammar: Grammar) -> None:
        if self.unusable:
            raise SessionRefused(RefusalCode.GRAMMAR, "It cannot be used.")

    @property
    def codec(self) -> TextCodec:
        return self.drafter.codec

    @property
    def draft_model(self) -> str:
        return self.drafter.name

    @property
    def context(self) -> int:
        return self.drafter.context

    def targets(self, *, online: bool = True) -> tuple[str, ...]:  # noqa: ARG002 - as the device has it
        return () if self.missing else ("toy-target",)

    def absence(self, *, for_s: float = 0.0) -> EdgeUnavailable | None:  # noqa: ARG002
        return EdgeUnavailable(self.missing) if self.missing else None

    def await_edge(self) -> None: ...

    def health(self) -> dict[str, Any]:
        return {"status": "waiting" if self.missing else "ok", "reason": self.missing}

    def status(self) -> dict[str, Any]:
        return device_status()

    def _write(self, request: GenerateRequest, context: RequestContext) -> GeneratedText:
        return generate_text(self.agent, self.drafter, request, context)
