"""Device service: link, retained state, telemetry, drafter and agent, started and stopped in order."""

import logging
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Self

from fleet_common.host import give_back_free_memory
from fleet_common.mqtt.errors import ConnectFailed, LinkError, LinkFault
from fleet_common.mqtt.link import Link, OutcomeHandler, Will
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import LinkSettings
from fleet_common.mqtt.tls import certificate_end
from fleet_device.client.agent import Agent
from fleet_device.client.chat_formats import ChatFormats
from fleet_device.client.decision import RetryPolicy
from fleet_device.client.messaging import EdgePresences, Inbox
from fleet_device.client.reports import UnverifiedReports
from fleet_device.drafters.contract import Drafter, TextCodec, sequences_of
from fleet_device.errors import EdgeUnavailable
from fleet_device.pacing.adaptive import make_pacing
from fleet_device.pacing.contract import Pacing, RoundTrips
from fleet_device.power import EnergyMeter, HeatSensor
from fleet_device.requests.chat import ConversationCodec
from fleet_device.requests.generate import GeneratedText, GenerateRequest, Generation, RequestContext, generate_text
from fleet_device.settings import DeviceSettings
from schemas.control import DeviceState, Presence, Telemetry, encode_json
from schemas.fields import MAX_SENTENCE
from schemas.names import VERSION
from schemas.topics import Topic, build

# Weight of one draft in the smoothed round trip: about the last thirty count.
_DRAFT_WEIGHT: Final = 1 / 32


@dataclass(slots=True)
class DeviceTotals:
    """Sums over ended sessions since the start; added to by one thread at a time."""

    sessions: int = 0
    tokens: int = 0
    latest: Telemetry = field(default_factory=lambda: Telemetry(sessions=0, tokens=0))
    _tested: int = 0
    _accepted: int = 0
    _edge_only: int = 0
    _unverified: int = 0
    _drafted: int = 0
    _drafts: int = 0
    _draft_ms: float = 0.0
    _round_trip_ms: float | None = None
    _joules: float | None = None

    def add(self, generation: Generation, *, temperature_c: float | None = None) -> Telemetry:
        counters, choice = generation.counters, generation.choice
        self.sessions += 1
        self.tokens += len(generation.tokens)
        self._tested += counters.tested
        self._accepted += counters.accepted
        self._edge_only += counters.edge_only
        self._unverified += generation.unverified
        self._drafted += counters.drafted
        self._drafts += generation.drafts
        self._draft_ms += counters.draft_ms
        if generation.joules is not None:
            self._joules = (self._joules or 0.0) + generation.joules
        self._smooth(generation.round_trips)
        self.latest = Telemetry(
            sessions=self.sessions,
            tokens=self.tokens,
            acceptance=self._accepted / self._tested if self._tested else None,
            mean_draft=self._drafted / self._drafts if self._drafts else None,
            draft_ms_per_token=self._draft_ms / self._drafted if self._drafted else None,
            round_trip_ms=self._round_trip_ms,
            edge_only=self._edge_only,
            unverified=self._unverified or None,
            plan=choice and choice.plan,
            plan_reason=choice and choice.reason[:MAX_SENTENCE],
            temperature_c=temperature_c,
            joules_per_token=self._joules / self.tokens if self._joules is not None and self.tokens else None,
        )
        return self.latest

    def _smooth(self, new: RoundTrips) -> None:
        if new.mean_ms is None:
            return
        before_ms = new.mean_ms if self._round_trip_ms is None else self._round_trip_ms
        kept = (1.0 - _DRAFT_WEIGHT) ** new.count
        self._round_trip_ms = kept * before_ms + (1.0 - kept) * new.mean_ms


_log = logging.getLogger(__name__)

# For a command that a person waits for: long enough for a broker that is just starting.
_CONNECT_S: Final = 5.0

# The edge confirms within milliseconds, or its machine is gone.
_CLOSE_S: Final = 2.0

_TIDY_S: Final = 60.0  # minimum interval at which free memory is released
_AGAIN_S: Final = 5.0  # between the attempts of a device that waits for its network

_PACING: Final = frozenset({"draft_length", "ahead", "edge_only", "goal"})


@dataclass(slots=True)
class DeviceService:
    """One device. Use it as a context manager, which connects or fails; or `start_patiently`, and `stop`.

    Attributes:
        now: The wall clock (UTC).
        codec: Encodes prompts; the draft model's, with a memory for conversations.
        requests_at_once: As the settings say, or as many as the drafter has sequences where edge-only decoding is not
            allowed.
    """

    settings: DeviceSettings
    drafter: Drafter
    make_link: Callable[[LinkSettings], Link] = PahoLink
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    tally: DeviceTotals = field(default_factory=DeviceTotals)
    heat: HeatSensor = field(default_factory=HeatSensor)
    meter: EnergyMeter = field(init=False)
    agent: Agent = field(init=False)
    codec: ConversationCodec = field(init=False)
    since: datetime = field(init=False)
    requests_at_once: int = field(init=False)
    link: Link = field(init=False)
    formats: ChatFormats = field(init=False)
    _counting: threading.Lock = field(default_factory=threading.Lock)
    reports: UnverifiedReports = field(init=False)
    _presence: Presence = Presence.ONLINE
    _stopping: threading.Event = field(default_factory=threading.Event)
    _connecting: threading.Thread | None = None
    _tidied: float = 0.0  # when free memory was last released

    def __post_init__(self) -> None:
        settings = self.settings
        self.since = self.now()
        self.meter = EnergyMeter(settings.power, self.clock)
        self.heat.on_change = self.announce
        self.reports = UnverifiedReports(settings.state_file(".unverified") or Path("fleet-unverified"))
        self.codec = ConversationCodec(self.drafter.codec)
        will = Will(self._topic(Topic.STATE), encode_json(self._state(Presence.OFFLINE)))
        further = sequences_of(self.drafter, settings.draft_sequences)[1:]
        edge_only = 0 if settings.edge_only is False else settings.requests_at_once - 1 - len(further)
        self.requests_at_once = 1 + len(further) + edge_only
        self.link = self.make_link(settings.broker.link(settings.fleet, settings.device, will=will))
        self.agent = Agent(
            self.link,
            settings.fleet,
            settings.device,
            self.drafter,
            self._pacing(),
            self.clock,
            retry_policy(settings),
            Inbox(),
            padding=settings.padding,
            further=[(drafter, self._pacing()) for drafter in further],
            edge_only=edge_only,
            edge_only_allowed=settings.edge_only is not False,
            reports=self.reports,
        )
        self.formats = ChatFormats(
            self.link,
            settings.fleet,
            self.edges,
            self.drafter.codec,
            self.drafter.vocabulary,
            settings.state_file(".chat"),
        )
        self.agent.attach()
        # Again after every reconnect: meanwhile the broker has published our will.
        self.link.on_connection(lambda up: self.announce() if up else None)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _pacing(self) -> Pacing:
        return make_pacing(self.settings, lambda: self.heat.throttled)

    @property
    def edges(self) -> EdgePresences:
        return self.agent.inbox.edges

    def start(self) -> None:
        """Connect, and announce that this device is online; raise ConnectFailed if the broker cannot be reached."""
        self.reports.start()
        self.heat.start()
        try:
            self.link.start(timeout_s=_CONNECT_S)
        except BaseException:
            self.stop()
            raise
        self._release_memory()

    def start_patiently(self) -> None:
        """Connect as soon as the broker can be reached, on a thread: a gateway may boot before its network."""
        self.reports.start()
        self.heat.start()
        self._connecting = threading.Thread(target=self._connect, name="connect", daemon=True)
        self._connecting.start()

    def stop(self, presence: Presence = Presence.OFFLINE) -> None:
        """Stop; `presence` says whether the device is missed until it is back (offline), or not (closed)."""
        self._presence = presence
        self._stopping.set()
        self.heat.stop()
        try:
            if self.link.connected:
                self.announce()
        finally:
            self.link.stop()
            if self._connecting is not None:
                self._connecting.join()
                self.link.stop()  # it may have started in between
            self.reports.stop()
            self.agent.close()
            self.drafter.close()

    def drain(self) -> None:
        self._presence = Presence.DRAINING
        self.announce()

    def resume(self) -> None:
        self._presence = Presence.ONLINE
        self.announce()

    def take_settings(self, changed: Collection[str]) -> None:
        """Apply the named settings, which have changed; running requests keep the old ones."""
        settings, agent = self.settings, self.agent
        if not _PACING.isdisjoint(changed):
            agent.repace(self._pacing)
        agent.edge_only_allowed = settings.edge_only is not False
        agent.retry_policy = retry_policy(settings)
        agent.padding = settings.padding

    def absence(self, *, for_s: float = 0.0) -> EdgeUnavailable | None:
        """Return why no request can be served now; None if one can, or after an absence of less than `for_s`."""
        if self.agent.absent_s() < for_s:
            return None
        if not self.link.connected:
            broker, failure = self.settings.broker, self.link.failure
            if failure is not None and failure.refused:
                return EdgeUnavailable(f"{failure} The device keeps trying.", code=failure.fault)
            return EdgeUnavailable(
                f"The broker at {broker.host}:{broker.port} cannot be reached now; the device keeps trying.",
                code=LinkFault.UNREACHABLE,
            )
        if not self.edges.online():
            if self.agent.inbox.rejected is not None:
                return EdgeUnavailable(str(self.agent.inbox.rejected), code=LinkFault.NOT_AUTHORIZED)
            return EdgeUnavailable(self.edges.absence(self.settings.fleet))
        return None

    def encode(
        self, prepare: Callable[[TextCodec], GenerateRequest], target: str = "", *, any_name: bool = False
    ) -> GenerateRequest:
        """Return a request whose prompt is rendered with the chat template of a target that can serve it.

        It may wait some seconds for the template. With the name of a target, only its edges serve the request;
        `any_name` is explained at `ChatFormats.codec`.
        """
        codec = self.formats.codec(self.codec, target, any_name=any_name)
        return replace(prepare(codec), target_id=codec.target_id, end_tokens=codec.end_tokens)

    def generate(self, request: GenerateRequest, context: RequestContext | None = None) -> GeneratedText:
        """Run a request and count it; see `generate_text`. More than `requests_at_once` threads wait for each other."""
        with self.meter.running() as joules:
            text = generate_text(self.agent, self.drafter, request, context)
        text = replace(text, generation=replace(text.generation, joules=joules(text.generation)))
        self.codec.remember(request.prompt, text.text, text.tokens)
        with self._counting:
            telemetry = self.tally.add(text.generation, temperature_c=self.heat.temperature_c)
            self._publish(Topic.TELEMETRY, encode_json(telemetry), qos=0)
            if self.clock() - self._tidied >= _TIDY_S:
                self._release_memory()
        return text

    def _release_memory(self) -> None:
        """Return memory to the system that loading a model or a long prompt has freed."""
        give_back_free_memory()
        self._tidied = self.clock()

    def announce(self) -> None:
        """Publish the retained state."""
        state = encode_json(self._state(self._presence))
        self._publish(Topic.STATE, state, retain=True, on_outcome=self.agent.inbox.note)

    def _connect(self) -> None:
        said = ""
        while not self._stopping.is_set():
            try:
                self.link.start(timeout_s=_CONNECT_S)
            except ConnectFailed as error:
                # Once for each reason: a gateway may be without its network for days.
                _log.log(logging.DEBUG if str(error) == said else logging.WARNING, "%s Trying again.", error)
                said = str(error)
                self._stopping.wait(_AGAIN_S)
            else:
                _log.info("Connected to %s:%s.", self.settings.broker.host, self.settings.broker.port)
                self._release_memory()
                return

    def _topic(self, topic: Topic) -> str:
        return build(topic, fleet=self.settings.fleet, device=self.settings.device)

    def _state(self, presence: Presence) -> DeviceState:
        return DeviceState(
            presence=presence,
            software=VERSION,
            draft_model=self.drafter.name,
            quantization=self.drafter.quantization,
            since=self.since,
            certificate_until=certificate_end(self.settings.broker.certificate),
            throttled=self.heat.throttled,
        )

    def _publish(
        self,
        topic: Topic,
        payload: bytes,
        *,
        qos: int = 1,
        retain: bool = False,
        on_outcome: OutcomeHandler | None = None,
    ) -> None:
        try:
            self.link.publish(
                self._topic(topic),
                payload,
                qos=qos,
                retain=retain,
                content_type="application/json",
                on_outcome=on_outcome,
            )
        except LinkError:
            return  # states are published again after the reconnect, telemetry is not worth keeping


def retry_policy(settings: DeviceSettings) -> RetryPolicy:
    return RetryPolicy(open_s=settings.answer_s, verdict_s=settings.answer_s / 2, close_s=_CLOSE_S)
