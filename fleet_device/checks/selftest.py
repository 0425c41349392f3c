"""Checklist, and the self-test that a rollout runs before it goes on to the next device."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

from fleet_common.mqtt.link import Link, OutcomeHandler, await_outcome
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import LinkSettings
from fleet_device.checks.edge_check import Check, Checklist, CheckReport
from fleet_device.client.messaging import EdgePresences
from fleet_device.drafters.contract import Drafter
from fleet_device.drafters.model_file import load_drafter
from fleet_device.errors import EdgeUnavailable, SessionFailed
from fleet_device.requests.chat import ChatMessage, encode_chat
from fleet_device.requests.generate import GenerateRequest
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
        known = [f"{state.edge} is {state.presence.value}" for state in edges.known()]
        heard = f"edge {', '.join(known)}" if known else "none has been heard of"
        raise EdgeUnavailable(f"No edge of fleet {fleet!r} is online ({heard}); start one with `fleet edge run`.")
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
            return f"{what} is loaded; it has nothing to draft here."
        drafter.extend((int(q.ids[0]),))
        times.append((clock() - started) * 1e3)
    return f"{what} drafts a token in {statistics.median(times):.1f} ms."


_DRAFT: Final = 4  # tokens of a draft
_NEW_TOKENS: Final = 24
_ECHOES: Final = 5
_WAIT_S: Final = 5.0


def echo_ms(
    publish: Callable[[OutcomeHandler], None], topic: str, clock: Callable[[], float], *, wait_s: float
) -> float:
    """Publish a message, and return the milliseconds until the broker's answer, else raise PublishRejected."""
    started = clock()
    await_outcome(publish, topic, timeout_s=wait_s)
    return (clock() - started) * 1e3


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
    _acceptance: float | None = None
    _tokens_per_s: float | None = None

    def run(self) -> SelfTestReport:
        checks = Checklist(_NAMES, self.on_check, self.clock)
        checks.check(self._configuration)
        drafter: list[Drafter] = []
        checks.check(lambda: self._model(drafter), needs=())
        try:
            if checks.ok:
                self._with_broker(drafter[0], checks)
        finally:
            for each in drafter:
                each.close()
        return SelfTestReport(
            device=self.settings.device,
            checks=checks.finish(),
            acceptance=self._acceptance,
            tokens_per_s=self._tokens_per_s,
        )

    def _configuration(self) -> str:
        settings = self.settings
        if settings.api_port:
            from fleet_device.api.app import listen  # noqa: PLC0415 - a web server, only where there is to be one

            listen(settings.api_port).close()
        broker = settings.broker
        return f"Device {settings.device} of fleet {settings.fleet}, broker {broker.host}:{broker.port}."

    def _model(self, loaded: list[Drafter]) -> str:
        drafter = self.load(self.settings)
        loaded.append(drafter)
        return check_drafting(drafter, self.clock)

    def _with_broker(self, drafter: Drafter, checks: Checklist) -> None:
        settings = self.settings
        if settings.draft_length == AUTO and settings.stream == AUTO:
            # Adaptive pacing begins with edge-only decoding; this check is about the draft model.
            settings = settings.model_copy(update={"draft_length": _DRAFT})
        service = DeviceService(settings, drafter, self.make_link, self.clock)
        try:
            checks.check(lambda: self._broker(service))
            checks.check(lambda: self._edge(service))
            checks.check(lambda: self._generation(service))
        finally:
            service.stop()

    def _broker(self, service: DeviceService) -> str:
        started = self.clock()
        service.start()
        connected = self.clock()
        echo = partial(
            echo_ms, lambda listen: service.announce(on_outcome=listen), service.state_topic, self.clock, wait_s=_WAIT_S
        )
        echoes = [echo() for _ in range(_ECHOES)]
        return (
            f"Connected in {(connected - started) * 1e3:.0f} ms; "
            f"a message is acknowledged in {statistics.median(echoes):.1f} ms."
        )

    def _edge(self, service: DeviceService) -> str:
        return check_online(service.edges, self.settings.fleet, wait_s=_WAIT_S)

    def _generation(self, service: DeviceService) -> str:
        order = GenerateRequest(tuple(probe_prompt(service.drafter)), self.settings.policy(), _NEW_TOKENS)
        text = service.generate(order)
        generation = text.generation
        if text.reason not in (EndReason.STOP, EndReason.LENGTH):
            raise SessionFailed(f"The generation was ended by {text.reason.value}.")
        tokens = len(generation.tokens)
        self._acceptance = generation.counters.acceptance
        self._tokens_per_s = tokens / (generation.wall_ms / 1e3) if generation.wall_ms else None
        accepted = "no draft was tested" if self._acceptance is None else f"acceptance {self._acceptance:.2f}"
        return f"{tokens} tokens at {self._tokens_per_s or 0.0:.1f} tokens/s, {accepted}."


_NAMES: Final = ("configuration", "model", "broker", "edge", "generation")
