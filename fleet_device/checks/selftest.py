"""Checklist, and the self-test that a rollout runs before it goes on to the next device."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Protocol

from fleet_common.mqtt.link import Link, OutcomeHandler, await_outcome
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import LinkSettings
from fleet_device.checks.edge_check import Check, Checklist, CheckReport
from fleet_device.client.messaging import EdgePresences
from fleet_device.drafters.contract import Drafter
from fleet_device.drafters.model_file import load_drafter
from fleet_device.errors import EdgeUnavailable, SessionFailed
from fleet_device.requests.chat import encode_chat
from fleet_device.requests.generate import GeneratedText, GenerateRequest, RequestContext
from fleet_device.requests.structured import ChatMessage
from fleet_device.service import DeviceService
from fleet_device.settings import AUTO, DeviceSettings
from schemas.names import VERSION
from schemas.policy import SamplingPolicy
from schemas.reasons import EndReason


class EdgeVocabulary(Protocol):
    @property
    def edge(self) -> str: ...

    @property
    def target(self) -> str: ...

    @property
    def vocabulary(self) -> str | None: ...


def check_online(edges: EdgePresences, fleet: str, *, wait_s: float) -> str:
    """Return which edges are online within `wait_s`; raise EdgeUnavailable if none is."""
    if not edges.wait_online(wait_s):
        raise EdgeUnavailable(edges.absence(fleet))
    online = [f"{state.edge} with {state.target}, software {state.software}" for state in edges.online()]
    return f"Online: {'; '.join(online)}. This device has software {VERSION}."


def check_vocabulary(ours: str, edges: Sequence[EdgeVocabulary], *, drafter: str) -> str:
    """Return which edges have the vocabulary `ours` (size and head of the fingerprint), or raise EdgeUnavailable."""
    for state in edges:
        if state.vocabulary != ours:
            raise EdgeUnavailable(
                f"Edge {state.edge} has the vocabulary of {state.target} ({state.vocabulary}), and the draft model "
                f"{drafter} has {ours}: use a draft model of the target's family, or set 'target_vocabulary' to a file "
                "made by `fleet models vocabulary`."
            )
    return f"{ours}, at {', '.join(state.edge for state in edges)} too."


PROBE_POLICY: Final = SamplingPolicy(temperature=0.0, seed=0)

_PROMPT: Final = "Count from one to ten in words."
_DRAFTED: Final = 8


def probe_prompt(drafter: Drafter) -> list[int]:
    codec = drafter.codec
    if codec.chat_template is None:
        return codec.encode(_PROMPT)
    return encode_chat(codec, [ChatMessage("user", _PROMPT)])


def check_drafting(drafter: Drafter, clock: Callable[[], float]) -> str:
    """Draft some tokens, and return what drafts them and the time per token; raise DrafterError."""
    what = f"{drafter.name} ({drafter.quantization}, {drafter.vocabulary}, context {drafter.context:,} tokens)"
    drafter.reset(probe_prompt(drafter))
    drafter.next(PROBE_POLICY)  # computes the prompt
    times = []
    for _ in range(_DRAFTED):
        started = clock()
        q = drafter.next(PROBE_POLICY)
        if q is None:
            return f"{what} is loaded; it has nothing to draft with here."
        drafter.extend((int(q.ids[0]),))
        times.append((clock() - started) * 1e3)
    return f"{what} drafts a token in {statistics.median(times):.1f} ms."


_DRAFT: Final = 4  # tokens of a draft
_NEW_TOKENS: Final = 24
_ECHOES: Final = 5
_WAIT_S: Final = 5.0


def check_broker(
    connect: Callable[[], None],
    publish: Callable[[OutcomeHandler], None],
    topic: str,
    clock: Callable[[], float],
    *,
    to: str = "",
) -> str:
    """Connect, publish some messages, and return how long the broker took; raise LinkError."""
    times = [clock()]
    connect()
    times.append(clock())
    for _ in range(_ECHOES):
        await_outcome(publish, topic, timeout_s=_WAIT_S)
        times.append(clock())
    connected_ms, *echoes_ms = ((end - start) * 1e3 for start, end in pairwise(times))
    echo_ms = statistics.median(echoes_ms)
    return f"Connected{to} in {connected_ms:.0f} ms; a message is acknowledged in {echo_ms:.1f} ms."


def generate_probe(service: DeviceService, context: RequestContext | None = None) -> GeneratedText:
    """Generate a short text through the edge; raise SessionFailed if something else than its end has ended it."""
    order = GenerateRequest(tuple(probe_prompt(service.drafter)), service.settings.policy(), _NEW_TOKENS)
    text = service.generate(order, context)
    if text.reason not in (EndReason.STOP, EndReason.LENGTH):
        raise SessionFailed(f"The generation was ended by {text.reason.value}.")
    return text


def speed_of(text: GeneratedText, *, by: str = "") -> str:
    acceptance = text.generation.counters.acceptance
    tested = "no draft was tested" if acceptance is None else f"acceptance {acceptance:.2f}"
    return f"{len(text.tokens)} tokens at {text.tokens_per_s:.1f} tokens/s{by}, {tested}."


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTestReport(CheckReport):
    device: str
    acceptance: float | None
    tokens_per_s: float | None


@dataclass(slots=True)
class SelfTest:
    """One run of all checks.

    The device must not run as a service meanwhile: the broker keeps one connection for each name, so the two would
    disconnect each other. The API's port shows whether it runs.
    """

    settings: DeviceSettings
    load: Callable[[DeviceSettings], Drafter] = load_drafter
    make_link: Callable[[LinkSettings], Link] = PahoLink
    clock: Callable[[], float] = time.monotonic
    on_check: Callable[[Check], None] = lambda _check: None
    _drafter: Drafter | None = None
    _acceptance: float | None = None
    _tokens_per_s: float | None = None

    def run(self) -> SelfTestReport:
        checks = Checklist(_NAMES, self.on_check, self.clock)
        checks.check(self._configuration)
        checks.check(self._model, needs=())
        if self._drafter is not None:
            try:
                if checks.ok:
                    self._with_broker(self._drafter, checks)
            finally:
                self._drafter.close()
        return SelfTestReport(
            device=self.settings.device,
            checks=checks.finish(),
            acceptance=self._acceptance,
            tokens_per_s=self._tokens_per_s,
        )

    def _configuration(self) -> str:
        settings = self.settings
        if settings.api_listen:
            from fleet_device.api.listening import listen_as, release  # noqa: PLC0415 - a web server, only where needed

            release(listen_as(settings))
        broker = settings.broker
        return f"Device {settings.device} of fleet {settings.fleet}, broker {broker.host}:{broker.port}."

    def _model(self) -> str:
        self._drafter = self.load(self.settings)
        return check_drafting(self._drafter, self.clock)

    def _with_broker(self, drafter: Drafter, checks: Checklist) -> None:
        settings = self.settings
        if settings.draft_length == AUTO and settings.stream == AUTO:
            # Adaptive pacing begins with edge-only decoding; this check is about the draft model.
            settings = settings.model_copy(update={"draft_length": _DRAFT})
        service = DeviceService(settings, drafter, self.make_link, self.clock)
        try:
            checks.check(
                lambda: check_broker(
                    service.start,
                    lambda listen: service.announce(on_outcome=listen),
                    service.state_topic,
                    self.clock,
                )
            )
            checks.check(lambda: self._edge(service))
            checks.check(lambda: self._generation(service))
        finally:
            service.stop()

    def _edge(self, service: DeviceService) -> str:
        return check_online(service.edges, self.settings.fleet, wait_s=_WAIT_S)

    def _generation(self, service: DeviceService) -> str:
        text = generate_probe(service)
        self._acceptance = text.generation.counters.acceptance
        self._tokens_per_s = text.tokens_per_s if text.generation.wall_ms else None
        return speed_of(text)


_NAMES: Final = ("configuration", "model", "broker", "edge", "generation")
