"""The device as one service: link, retained state, drafter and agent, put together and taken down in order."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Self

from fleet_device.agent import Agent, Generation, Patience
from fleet_device.drafter import Drafter
from fleet_device.llama_cpp_drafter import LlamaCppDrafter, LlamaCppSettings
from fleet_device.model_source import locate_model
from fleet_device.pacing import FixedPacing
from fleet_device.prompt_lookup import Lookup, PromptLookupDrafter
from fleet_device.settings import DeviceSettings
from fleet_link.errors import LinkError
from fleet_link.link import Link, Will
from fleet_link.paho_link import PahoLink
from schemas.control import DeviceState, Presence, Telemetry, encode_json
from schemas.topics import Topic, build
from schemas.version import VERSION

__all__ = ["DeviceService", "load_drafter"]

_CONNECT_S = 10.0


def load_drafter(settings: DeviceSettings) -> Drafter:
    """Load the draft model that the settings name.

    Raises:
        DrafterError: It cannot be found or loaded.
    """
    located = locate_model(settings.model, folder=settings.models)
    if settings.drafter == "prompt-lookup":
        return PromptLookupDrafter.from_gguf(located.path, Lookup(context=settings.context))
    return LlamaCppDrafter(
        LlamaCppSettings(
            path=located.path,
            name=located.name,
            threads=settings.threads,
            context=settings.context,
            gpu_layers=settings.gpu_layers,
        )
    )


@dataclass(slots=True)
class DeviceService:
    """One device. Use it as a context manager.

    Attributes:
        settings: The configuration.
        drafter: The draft model, loaded; closed with the service.
        clock: Monotonic seconds.
        now: The wall clock (UTC).
        agent: Writes texts.
    """

    settings: DeviceSettings
    drafter: Drafter
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    agent: Agent = field(init=False)
    _link: Link = field(init=False)
    _since: datetime = field(init=False)
    _sessions: int = 0
    _tokens: int = 0
    _tested: int = 0
    _accepted: int = 0
    _draft_ms: float = 0.0
    _drafted: int = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Connect, and say that this device is online.

        Raises:
            ConnectFailed: The broker cannot be reached.
        """
        settings = self.settings
        self._since = self.now()
        will = Will(self._topic(Topic.STATE), encode_json(self._state(Presence.OFFLINE)))
        self._link = PahoLink(settings.broker.link(settings.device, will=will), clock=self.clock)
        self.agent = Agent(
            self._link,
            settings.fleet,
            settings.device,
            self.drafter,
            FixedPacing(settings.draft_length, settings.ahead),
            self.clock,
            Patience(open_s=settings.open_s, resume_s=settings.resume_s, verdict_s=settings.verdict_s),
        )
        self.agent.attach()
        # Said anew after every reconnect: meanwhile the broker has said for us that we are gone.
        self._link.on_connection(lambda up: self._announce() if up else None)
        self._link.start(timeout_s=_CONNECT_S)

    def stop(self) -> None:
        """Say goodbye and release everything."""
        try:
            self._publish(Topic.STATE, encode_json(self._state(Presence.OFFLINE)), retain=True)
        finally:
            self._link.stop()
            self.drafter.close()

    def record(self, generation: Generation) -> None:
        """Count an ended session and publish the totals."""
        counters = generation.counters
        self._sessions += 1
        self._tokens += len(generation.tokens)
        self._tested += counters.tested
        self._accepted += counters.accepted
        self._draft_ms += counters.draft_ms
        self._drafted += counters.drafted
        telemetry = Telemetry(
            sessions=self._sessions,
            tokens=self._tokens,
            acceptance=self._accepted / self._tested if self._tested else None,
            draft_ms_per_token=self._draft_ms / self._drafted if self._drafted else None,
            round_trip_ms=counters.wait_ms / counters.rounds if counters.rounds else None,
        )
        self._publish(Topic.TELEMETRY, encode_json(telemetry), qos=0)

    def _topic(self, topic: Topic) -> str:
        return build(topic, fleet=self.settings.fleet, device=self.settings.device)

    def _state(self, presence: Presence) -> DeviceState:
        return DeviceState(
            presence=presence,
            software=VERSION,
            draft_model=self.drafter.name,
            quantization=self.drafter.quantization,
            since=self._since,
        )

    def _announce(self) -> None:
        self._publish(Topic.STATE, encode_json(self._state(Presence.ONLINE)), retain=True)

    def _publish(self, topic: Topic, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        try:
            self._link.publish(
                self._topic(topic), payload, qos=qos, retain=retain, content_type="application/json"
            )
        except LinkError:
            return  # states are said again after the reconnect, telemetry is not worth keeping
