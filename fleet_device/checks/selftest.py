"""Self-test of a device, which a rollout asks before it goes on to the next one."""

import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from fleet_common.mqtt.errors import PublishRejected
from fleet_common.mqtt.link import Link, Outcome
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import LinkSettings
from fleet_device.checks.checklist import Check, Checklist, CheckReport, check_online
from fleet_device.client.request import GenerateRequest
from fleet_device.drafters.contract import Drafter
from fleet_device.drafters.registry import load_drafter
from fleet_device.errors import SessionFailed
from fleet_device.service import DeviceService
from fleet_device.settings import AUTO, DeviceSettings
from fleet_device.texts.chat import ChatMessage, encode_chat
from schemas.policy import SamplingPolicy
from schemas.reasons import EndReason

PROBE_POLICY: Final = SamplingPolicy(temperature=0.0, seed=0)

_PROMPT: Final = "Count from one to ten in words."
_DRAFTED: Final = 8


def probe_prompt(drafter: Drafter) -> list[int]:
    """Return the token ids of a short prompt that any model can answer."""
    codec = drafter.codec
    if codec.chat_template is None:
        return codec.encode(_PROMPT)
    return encode_chat(codec, [ChatMessage("user", _PROMPT)])


def check_drafting(drafter: Drafter, clock: Callable[[], float]) -> str:
    """Draft some tokens, and return what drafts them, and how long one takes.

    Args:
        drafter: Loaded.
        clock: Monotonic seconds.

    Raises:
        DrafterError: It cannot draft.
    """
    what = f"{drafter.name} ({drafter.quantization}, {drafter.vocabulary}, context {drafter.context:,} tokens)"
    drafter.reset(probe_prompt(drafter))
    drafter.next(PROBE_POLICY)  # the prompt
    times = []
    for _ in range(_DRAFTED):
        started = clock()
        q = drafter.next(PROBE_POLICY)
        if q is None:
            return f"{what} is loaded; it has nothing to draft here."
        drafter.extend((int(q.ids[0]),))
        times.append((clock() - started) * 1e3)
    return f"{what} drafts a token in {statistics.median(times):.1f} ms."


_DRAFT: Final = 4  # tokens of a draft in the text that is written
_NEW_TOKENS: Final = 24
_ECHOES: Final = 5
_WAIT_S: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Report(CheckReport):
    """What the self-test found.

    Attributes:
        device: Whose.
        acceptance: Of the text that was written; None if there was none, or no draft in it.
        tokens_per_s: Likewise.
    """

    device: str
    acceptance: float | None
    tokens_per_s: float | None


@dataclass(slots=True)
class SelfTest:
    """One run of all checks.

    The device must not run as a service meanwhile: the broker keeps one connection for each name, so the two
    would throw each other out. The API's port tells.

    Attributes:
        settings: The configuration.
        load: Loads the draft model.
        make_link: Makes the link to the broker.
        clock: Monotonic seconds.
        on_check: Told of every check as it ends.
    """

    settings: DeviceSettings
    load: Callable[[DeviceSettings], Drafter] = load_drafter
    make_link: Callable[[LinkSettings], Link] = PahoLink
    clock: Callable[[], float] = time.monotonic
    on_check: Callable[[Check], None] = lambda _check: None
    _acceptance: float | None = None
    _tokens_per_s: float | None = None

    def run(self) -> Report:
        """Check everything; what cannot be tried after a failure is reported as failed."""
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
        return Report(
            device=self.settings.device,
            checks=checks.finish(),
            acceptance=self._acceptance,
            tokens_per_s=self._tokens_per_s,
        )

    def _configuration(self) -> str:
        settings = self.settings
        if settings.api_port:
            from fleet_device.api.server import listen  # noqa: PLC0415 - a web server, only where there is to be one

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
            # A device that chooses begins with what its edge writes by itself; here the draft model is to be tried.
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
        echoes = [self._echo(service) for _ in range(_ECHOES)]
        return (
            f"Connected in {(connected - started) * 1e3:.0f} ms; "
            f"a message is acknowledged in {statistics.median(echoes):.1f} ms."
        )

    def _echo(self, service: DeviceService) -> float:
        """Publish the state and return the milliseconds until the broker's answer."""
        answered, outcomes = threading.Event(), list[Outcome]()

        def listen_to(outcome: Outcome) -> None:
            outcomes.append(outcome)
            answered.set()

        started = self.clock()
        service.announce(on_outcome=listen_to)
        if not answered.wait(_WAIT_S):
            raise PublishRejected(topic=service.state_topic, reason=None)
        if not outcomes[0].accepted:
            raise PublishRejected(topic=service.state_topic, reason=outcomes[0].reason)
        return (self.clock() - started) * 1e3

    def _edge(self, service: DeviceService) -> str:
        return check_online(service.edges, self.settings.fleet, wait_s=_WAIT_S)

    def _generation(self, service: DeviceService) -> str:
        order = GenerateRequest(tuple(probe_prompt(service.drafter)), self.settings.policy(), _NEW_TOKENS)
        text = service.write(order)
        generation = text.generation
        if text.reason not in (EndReason.STOP, EndReason.LENGTH):
            raise SessionFailed(f"The text was ended by {text.reason.value}.")
        tokens = len(generation.tokens)
        self._acceptance = generation.counters.acceptance
        self._tokens_per_s = tokens / (generation.wall_ms / 1e3) if generation.wall_ms else None
        accepted = "no draft was tested" if self._acceptance is None else f"acceptance {self._acceptance:.2f}"
        return f"{tokens} tokens at {self._tokens_per_s or 0.0:.1f} tokens/s, {accepted}."


_NAMES: Final = ("configuration", "model", "broker", "edge", "generation")
