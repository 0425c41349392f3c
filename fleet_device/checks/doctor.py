"""Doctor: looks at all that a device needs, from its memory to the edge's vocabulary, and says what to do.

It changes nothing at the broker: no state is announced and no text is logged, but for one token where an edge is asked
whether it answers. Beside a device that runs it asks that one, in place of the broker.
"""

import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from fleet_device.checks.certificate_check import check_certificate, check_clock, moments_of
from fleet_device.checks.checklist import Check, Checklist, CheckReport
from fleet_device.checks.edges import check_online, check_vocabulary
from fleet_device.checks.machine_check import check_memory, check_threads
from fleet_device.checks.model_check import PROBE_POLICY, check_drafting, probe_prompt
from fleet_device.checks.running_device import RunningDevice, running_device
from fleet_device.client.agent import Agent
from fleet_device.client.inbox import Inbox
from fleet_device.client.retry import Timeouts
from fleet_device.drafters.contract import Drafter
from fleet_device.drafters.registry import load_drafter
from fleet_device.errors import ConfigurationError, EdgeUnavailable, SessionRefused
from fleet_device.pacing.contract import FixedPacing
from fleet_device.settings import DeviceSettings
from fleet_link.errors import PublishRejected
from fleet_link.link import Link, Outcome
from fleet_link.paho_link import PahoLink
from fleet_link.settings import LinkSettings
from fleet_link.tls.certificate import certificate_name
from fleet_runtime.available_memory import available_memory
from schemas.control import Telemetry, encode_json
from schemas.reasons import RefusalCode
from schemas.topics import Topic, build

__all__ = ["CHECKS", "Diagnosis", "Doctor"]

CHECKS: Final = ("memory", "threads", "model", "broker", "certificate", "clock", "edge", "vocabulary")

_CONNECT_S: Final = 5.0
_WAIT_S: Final = 5.0
_STATES_S: Final = 1.0  # retained states come with the connection
_ECHOES: Final = 5
_TIMEOUTS: Final = Timeouts(open_s=10.0, resume_s=10.0, verdict_s=10.0, close_s=2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis(CheckReport):
    """What the doctor found.

    Attributes:
        device: Whose.
    """

    device: str


@dataclass(slots=True)
class Doctor:
    """One run of all checks. Those that need nothing of a failed one are made all the same.

    Attributes:
        settings: The configuration.
        load: Loads the draft model.
        make_link: Makes the link to the broker.
        running: Returns what a device that runs under this name says of itself; None if none does.
        clock: Monotonic seconds.
        now: The wall clock (UTC).
        available: Returns the bytes of memory that this process may still take.
        on_check: Told of every check as it ends.
    """

    settings: DeviceSettings
    load: Callable[[DeviceSettings], Drafter] = load_drafter
    make_link: Callable[[LinkSettings], Link] = PahoLink
    running: Callable[[int, str], RunningDevice | None] = running_device
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    available: Callable[[], int | None] = available_memory
    on_check: Callable[[Check], None] = lambda _check: None
    _drafter: Drafter | None = None
    _link: Link | None = None
    _agent: Agent | None = None
    _inbox: Inbox = field(default_factory=Inbox)
    _running: RunningDevice | None = None
    _refusal: SessionRefused | None = None

    def run(self) -> Diagnosis:
        """Check everything. What needs something that has failed is not tried, and counts as failed."""
        settings = self.settings
        self._running = self.running(settings.api_port, settings.device)
        checks = Checklist(CHECKS, self.on_check, self.clock)
        try:
            checks.check(self._memory, needs=())
            checks.check(lambda: check_threads(settings), needs=())
            checks.check(self._model, needs=("memory",))
            checks.check(self._broker, needs=())
            checks.check(lambda: check_certificate(settings.broker, settings.device, self.now()), needs=())
            checks.check(self._clock, needs=())
            checks.check(self._edge, needs=("broker",))
            checks.check(self._vocabulary, needs=("model", "broker", "edge"))
        finally:
            if self._link is not None:
                self._link.stop()
            if self._drafter is not None:
                self._drafter.close()
        return Diagnosis(device=settings.device, checks=checks.finish())

    def _memory(self) -> str:
        if self._running is not None:
            free = self.available()
            known = "The system does not say how much memory is free" if free is None else f"{free / 1e6:,.0f} MB free"
            return f"{known} beside {self.settings.device}, which runs."
        return check_memory(self.settings, self.available)

    def _model(self) -> str:
        if self._running is not None:
            drafter = self._running.drafter
            return (
                f"{drafter.name} ({drafter.quantization}) with a context of {drafter.context:,} tokens is "
                f"loaded by {self.settings.device}, which runs."
            )
        self._drafter = self.load(self.settings)
        return check_drafting(self._drafter, self.clock)

    def _broker(self) -> str:
        settings = self.settings
        where = f"{settings.broker.host}:{settings.broker.port}"
        if self._running is not None:
            if not self._running.broker.connected:
                raise EdgeUnavailable(str(self._running.reason))
            return f"{settings.device}, which runs, is connected to {where}."
        if (name := certificate_name(settings.broker.certificate)) not in (None, settings.device):
            raise ConfigurationError(
                f"Not connected to {where}: the broker would take this device for {name!r}, whose certificate it has, "
                f"and send that one away; correct 'device', or enrol {settings.device!r}."
            )
        link = self._link = self.make_link(settings.broker.link(settings.device, will=None))
        if self._drafter is None:
            self._inbox.subscribe(link, fleet=settings.fleet, device=settings.device)
        else:
            self._agent = Agent(
                link,
                settings.fleet,
                settings.device,
                self._drafter,
                FixedPacing(1),
                self.clock,
                _TIMEOUTS,
                self._inbox,
            )
            self._agent.attach()
        started = self.clock()
        link.start(timeout_s=_CONNECT_S)
        connected = self.clock()
        echoes = [self._echo(link) for _ in range(_ECHOES)]
        return (
            f"Connected to {where} as {settings.device} in {(connected - started) * 1e3:.0f} ms; a message is "
            f"acknowledged in {statistics.median(echoes):.1f} ms."
        )

    def _echo(self, link: Link) -> float:
        """Publish telemetry that says that nothing was written, and return the milliseconds until the answer."""
        topic = build(Topic.TELEMETRY, fleet=self.settings.fleet, device=self.settings.device)
        answered, outcomes = threading.Event(), list[Outcome]()

        def listen(outcome: Outcome) -> None:
            outcomes.append(outcome)
            answered.set()

        started = self.clock()
        link.publish(topic, encode_json(Telemetry(sessions=0, tokens=0)), on_outcome=listen)
        if not answered.wait(_WAIT_S):
            raise PublishRejected(topic=topic, reason=None)
        if not outcomes[0].accepted:
            raise PublishRejected(topic=topic, reason=outcomes[0].reason)
        return (self.clock() - started) * 1e3

    def _clock(self) -> str:
        self._inbox.edges.wait_online(_STATES_S if self._link is not None and self._link.connected else 0.0)
        return check_clock(self.now(), moments_of(self.settings.broker, self._inbox.edges.online()))

    def _edge(self) -> str:
        if self._running is not None:
            return self._edge_of_running(self._running)
        online = check_online(self._inbox.edges, self.settings.fleet, wait_s=_WAIT_S)
        if self._agent is None or self._drafter is None:
            return online
        try:
            text = self._agent.generate(probe_prompt(self._drafter), policy=PROBE_POLICY, max_new_tokens=1)
        except SessionRefused as error:
            if error.code is not RefusalCode.VOCABULARY:
                raise
            self._refusal = error  # it answers, and that is all that is asked here
            return online
        first = "no token" if text.first_ms is None else f"a first token after {text.first_ms:.0f} ms"
        return f"{online} {text.edge or 'The edge'} has written {first}."

    def _edge_of_running(self, running: RunningDevice) -> str:
        online = [f"{each.edge} with {each.target}" for each in running.online]
        if not online:
            raise EdgeUnavailable(str(running.reason))
        return f"Online, as {self.settings.device} sees it, which runs: {'; '.join(online)}."

    def _vocabulary(self) -> str:
        if self._running is not None:
            drafter = self._running.drafter
            return check_vocabulary(drafter.vocabulary, self._running.online, drafter=drafter.name)
        assert self._drafter is not None
        found = check_vocabulary(str(self._drafter.vocabulary), self._inbox.edges.online(), drafter=self._drafter.name)
        if self._refusal is not None:
            raise self._refusal
        return found
