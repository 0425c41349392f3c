"""Doctor: checks all that a device needs, from its memory to a request at the edge, and reports what to do.

It changes nothing at the broker, and announces no state. If a device of this name runs, it asks that one over its local
API, because a broker keeps one connection for each name.
"""

import http.client
import ipaddress
import os
import socket
import ssl
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ValidationError

from fleet_common.checks import Check, Checklist, NotApplicable
from fleet_common.host import available_memory
from fleet_common.mqtt.link import Link, publish_confirmed
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import BrokerSettings, LinkSettings, TlsSettings
from fleet_common.mqtt.tls import certificate_end, certificate_in, certificate_name, tls_context
from fleet_common.validation import in_words
from fleet_device.client.agent import Agent
from fleet_device.client.decision import RetryPolicy
from fleet_device.client.messaging import Inbox
from fleet_device.drafters.contract import Drafter, DrafterError
from fleet_device.drafters.model_file import load_drafter, locate_model
from fleet_device.errors import ConfigurationError, EdgeUnavailable, SessionFailed
from fleet_device.pacing.contract import FixedPacing
from fleet_device.requests.chat import chat_prompt
from fleet_device.requests.generate import GenerateRequest, Generation
from fleet_device.requests.structured import ChatMessage
from fleet_device.settings import AUTO, MODEL_DRAFTER, DeviceSettings
from schemas.control import EdgeState, Presence, Telemetry, encode_json
from schemas.names import VERSION
from schemas.policy import SamplingPolicy
from schemas.reasons import EndReason
from schemas.topics import Topic, build

_HTTP_WAIT_S: Final = 2.0
_MAX_BYTES: Final = 1 << 20


class _Drafter(BaseModel):
    name: str
    quantization: str
    vocabulary: str


class _Broker(BaseModel):
    host: str
    port: int


class _Edge(BaseModel):
    edge: str
    presence: str
    target: str
    vocabulary: str | None = None


class RunningDevice(BaseModel):
    """Part of `GET /healthz` that checks read; `reason` says why no request can be served now."""

    device: str
    fleet: str
    reason: str | None
    drafter: _Drafter
    broker: _Broker
    edges: tuple[_Edge, ...]

    @property
    def online(self) -> tuple[_Edge, ...]:
        return tuple(each for each in self.edges if each.presence == Presence.ONLINE)


def running_device(settings: DeviceSettings) -> RunningDevice | None:
    """Return the device of this name that serves the API at this address, None if there is none."""
    connection = http.client.HTTPConnection("localhost", timeout=_HTTP_WAIT_S)
    try:
        if (sock := _connect(settings)) is None:
            return None
        connection.sock = sock
        connection.request("GET", "/healthz")
        found = RunningDevice.model_validate_json(connection.getresponse().read(_MAX_BYTES))
    except (OSError, ValidationError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    return found if found.device == settings.device else None


def _connect(settings: DeviceSettings) -> socket.socket | None:
    """Connect to the API; return None if it is turned off, raise OSError if nothing listens there."""
    match settings.api_address:
        case None:
            return None
        case Path() as path:
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(_HTTP_WAIT_S)
            try:
                sock.connect(str(path))
            except OSError:
                sock.close()
                raise
            return sock
        case address:
            here = address.host != "localhost" and ipaddress.ip_address(address.host).is_unspecified
            sock = socket.create_connection(("localhost" if here else address.host, address.port), _HTTP_WAIT_S)
    if settings.api_certificate is None:
        return sock
    # Nothing secret is sent, and the certificate names the host that other machines use.
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(sock)


def refuse_beside_running(settings: DeviceSettings) -> None:
    """Raise ConfigurationError if the device runs: it must not be disconnected."""
    if running_device(settings) is not None:
        raise ConfigurationError(
            f"Device {settings.device} runs already, and serves applications at {settings.api_listen}: the broker "
            "keeps one connection for each name, so stop it first, or give this one a name of its own with --device."
        )


def require_alike(running: RunningDevice, settings: DeviceSettings) -> None:
    """Raise ConfigurationError if a device of this name runs with another configuration than this one."""
    broker, own = running.broker, settings.broker
    if (running.fleet, broker.host, broker.port) != (settings.fleet, own.host, own.port):
        raise ConfigurationError(
            f"Device {running.device} runs here (API at {settings.api_listen}) in fleet {running.fleet!r} at "
            f"{broker.host}:{broker.port}, and this configuration has fleet {settings.fleet!r} at {own.host}:"
            f"{own.port}: name the configuration of the service with --config, or set another 'device' or 'api_listen'."
        )


_SOON: Final = timedelta(days=14)
_TOLERANCE: Final = timedelta(seconds=5)
"""Clocks that are set over the network differ by less."""


def check_certificate(broker: BrokerSettings, device: str, now: datetime) -> str:
    """Return until when the device's certificate is valid; raise NotApplicable without one."""
    if broker.ca is None:
        raise NotApplicable("TLS is off, since the setting 'broker.ca' is left out: everybody on the way can read.")
    tls_context(TlsSettings(broker.ca, broker.certificate, broker.key), now=now)
    if broker.certificate is None:
        raise NotApplicable("The device has no certificate of its own; the broker's is checked by 'broker.ca'.")
    name, end = certificate_name(broker.certificate), certificate_end(broker.certificate)
    assert end is not None
    if name != device:
        raise ConfigurationError(
            f"The certificate {broker.certificate} is that of {name!r}, and this device is {device!r}: set 'device' to "
            f"{name!r}, or enrol this one with `fleet device enroll {device}`."
        )
    left = end - now
    renew = "; have it renewed soon, with `fleet broker renew`" if left < _SOON else ""
    return f"That of {name}, valid for {in_words(left)} more, until {end:%Y-%m-%d %H:%M} UTC{renew}."


def moments_of(broker: BrokerSettings, edges: Sequence[EdgeState]) -> list[tuple[datetime, str]]:
    """Return past events that a correct clock is behind: certificates issued, and connections of edges."""
    moments = [
        (found.not_valid_before_utc, f"the certificate {path.name} became valid")
        for path in (broker.ca, broker.certificate)
        if path is not None and (found := certificate_in(path)) is not None
    ]
    return moments + [(each.since, f"edge {each.edge} connected") for each in edges]


def check_clock(now: datetime, moments: Sequence[tuple[datetime, str]]) -> str:
    if not moments:
        raise NotApplicable(f"{now:%Y-%m-%d %H:%M:%S} UTC; there is neither a certificate nor an edge to compare with.")
    at, what = max(moments)
    if at - now > _TOLERANCE:
        raise ConfigurationError(
            f"It is {now:%Y-%m-%d %H:%M:%S} UTC by this machine's clock, and {what} at {at:%Y-%m-%d %H:%M:%S}: the "
            f"clock is behind by {in_words(at - now)} at least; set it (systemd: `timedatectl set-ntp true`), or the "
            "other machine's if that one is wrong."
        )
    return f"{now:%Y-%m-%d %H:%M:%S} UTC; {what} {in_words(max(now - at, timedelta()))} ago."


_MEGA: Final = 1_000_000

_WORKING_BYTES: Final = 100 * _MEGA
"""Memory of the program and llama.cpp in addition to the model's file, without keys and values."""


def check_memory(settings: DeviceSettings, available: Callable[[], int | None] = available_memory) -> str:
    free = available()
    known = "The system does not say how much memory is free" if free is None else f"{free / _MEGA:,.0f} MB are free"
    if settings.drafter != MODEL_DRAFTER:
        return f"{known}; the drafter {settings.drafter} reads no weights."
    try:
        size = locate_model(settings.model, folder=settings.models_dir).path.stat().st_size
    except (DrafterError, OSError):
        return f"{known}; what the model takes is not known, since it was not found."
    budget = "half of what is left then"
    if settings.memory_mb != AUTO:
        budget = f"at most {settings.memory_mb:,} MB (setting 'memory_mb')"
    needed = size + _WORKING_BYTES
    if free is not None and needed > free:
        raise ConfigurationError(
            f"The draft model takes {needed / _MEGA:,.0f} MB ({size / _MEGA:,.0f} MB its file), and "
            f"{free / _MEGA:,.0f} MB are free: end other programs, or set 'model' to a smaller one."
        )
    return (
        f"{known}; the draft model takes {needed / _MEGA:,.0f} MB ({size / _MEGA:,.0f} MB its file), and "
        f"{budget} for keys, values and buffers of {settings.draft_sequences} sequences of up to "
        f"{settings.context:,} tokens."
    )


def check_threads(settings: DeviceSettings) -> str:
    there = len(os.sched_getaffinity(0))
    if settings.threads > there:
        raise ConfigurationError(
            f"The setting 'threads' is {settings.threads} and this program may use {there} processor "
            f"core{'s' * (there != 1)}: several threads on one core make drafting many times slower; "
            f"set {there} or fewer."
        )
    return (
        f"{settings.threads} thread{'s' * (settings.threads != 1)} for drafting on {there} core{'s' * (there != 1)}; "
        f"the load of the last minute is {os.getloadavg()[0]:.1f}."
    )


def check_api(settings: DeviceSettings) -> str:
    if not settings.api_listen:
        raise NotApplicable("The setting 'api_listen' is empty: applications use this device in Python only.")
    from fleet_device.api.listening import listen_as, release  # noqa: PLC0415 - a web server, only where needed

    release(listen_as(settings))
    return f"Applications can be served at {settings.api_listen}."


_PROMPT: Final = "Count from one to ten in words."
_NEW_TOKENS: Final = 24
_DRAFTED: Final = 8


def probe_request(drafter: Drafter, policy: SamplingPolicy) -> GenerateRequest:
    """Return a short request that any model can serve."""
    codec = drafter.codec
    chat = codec.chat_template is not None
    prompt = chat_prompt(codec, [ChatMessage("user", _PROMPT)]).tokens if chat else codec.encode(_PROMPT)
    return GenerateRequest(tuple(prompt), policy, _NEW_TOKENS)


def check_generation(generation: Generation) -> str:
    """Return how fast a request was; raise SessionFailed if something else than its end has ended it."""
    if generation.reason not in (EndReason.STOP, EndReason.LENGTH):
        raise SessionFailed(f"The generation was ended by {generation.reason.value}.")
    acceptance, first_ms = generation.counters.acceptance, generation.first_ms
    tested = "no draft was tested" if acceptance is None else f"acceptance {acceptance:.2f}"
    first = "" if first_ms is None else f", the first after {first_ms:.0f} ms"
    speed = len(generation.tokens) / (generation.wall_ms / 1e3) if generation.wall_ms else 0.0
    return f"{len(generation.tokens)} tokens by {generation.edge} at {speed:.1f} tokens/s{first}; {tested}."


def check_drafting(drafter: Drafter, clock: Callable[[], float]) -> str:
    """Draft some tokens, and return what drafts them and the time per token; raise DrafterError."""
    what = f"{drafter.name} ({drafter.quantization}, {drafter.vocabulary}, context {drafter.context:,} tokens)"
    policy = SamplingPolicy(temperature=0.0, seed=0)
    drafter.reset(probe_request(drafter, policy).prompt)
    drafter.next(policy)  # computes the prompt
    times = []
    for _ in range(_DRAFTED):
        started = clock()
        q = drafter.next(policy)
        if q is None:
            return f"{what} is loaded; it has nothing to draft with here."
        drafter.extend((int(q.ids[0]),))
        times.append((clock() - started) * 1e3)
    return f"{what} drafts a token in {statistics.median(times):.1f} ms."


def check_vocabulary(ours: str, edges: Sequence[EdgeState | _Edge], *, drafter: str) -> str:
    """Return which edges have the vocabulary `ours` (size and head of the fingerprint), or raise EdgeUnavailable."""
    for state in edges:
        if state.vocabulary != ours:
            raise EdgeUnavailable(
                f"Edge {state.edge} has the vocabulary of {state.target} ({state.vocabulary}), and the draft model "
                f"{drafter} has {ours}: use a draft model of the target's family, or set 'target_vocabulary' to a file "
                "made by `fleet models vocabulary`."
            )
    return f"{ours}, at {', '.join(state.edge for state in edges)} too."


def check_service(running: RunningDevice, settings: DeviceSettings) -> str:
    """Return the state of a running device of this name; raise EdgeUnavailable if it can serve no request."""
    if running.reason is not None:
        raise EdgeUnavailable(running.reason)
    drafter, edges = running.drafter, ", ".join(f"{each.edge} with {each.target}" for each in running.online)
    return (
        f"{running.device} runs and serves applications at {settings.api_listen}, with {drafter.name} "
        f"({drafter.quantization}); online: {edges}."
    )


_CONNECT_S: Final = 5.0
_WAIT_S: Final = 5.0
_STATES_S: Final = 1.0  # retained states come with the connection
_RETRY_POLICY: Final = RetryPolicy(open_s=10.0, resume_s=10.0, verdict_s=10.0, close_s=2.0)
_ECHOES: Final = 5
_DRAFT: Final = 4  # tokens; adaptive pacing begins with edge-only decoding, and the draft model is to be tested


@dataclass(slots=True)
class Doctor:
    settings: DeviceSettings
    on_check: Callable[[Check], None] = lambda _check: None
    load: Callable[[DeviceSettings], Drafter] = load_drafter
    make_link: Callable[[LinkSettings], Link] = PahoLink
    running: Callable[[DeviceSettings], RunningDevice | None] = running_device
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    available: Callable[[], int | None] = available_memory
    _drafter: Drafter | None = None
    _link: Link | None = None
    _agent: Agent | None = None
    _inbox: Inbox = field(default_factory=Inbox)

    def run(self) -> list[Check]:
        """Run all checks; raise ConfigurationError if a device of this name runs with another configuration."""
        settings = self.settings
        running = self.running(settings)
        if running is not None:
            require_alike(running, settings)
        checks = Checklist(self.on_check)
        checks.run("threads", lambda: check_threads(settings), needs=())
        checks.run("certificate", lambda: check_certificate(settings.broker, settings.device, self.now()), needs=())
        if running is not None:
            ours = running.drafter
            checks.run("service", lambda: check_service(running, settings), needs=())
            checks.run("clock", self._clock, needs=())
            checks.run(
                "vocabulary",
                lambda: check_vocabulary(ours.vocabulary, running.online, drafter=ours.name),
                needs=("service",),
            )
            return checks.done
        try:
            checks.run("memory", lambda: check_memory(settings, self.available), needs=())
            checks.run("model", self._model, needs=("memory",))
            checks.run("api", lambda: check_api(settings), needs=())
            # What uses the API's address may be this device, which a second connection would disconnect.
            checks.run("broker", self._broker, needs=("api",))
            checks.run("clock", self._clock, needs=())
            checks.run("edge", self._edge, needs=("api", "broker"))
            checks.run("vocabulary", self._vocabulary, needs=("memory", "model", "api", "broker", "edge"))
            checks.run("generation", self._generation, needs=("memory", "model", "api", "broker", "edge", "vocabulary"))
        finally:
            if self._link is not None:
                self._link.stop()
            if self._drafter is not None:
                self._drafter.close()
        return checks.done

    def _model(self) -> str:
        self._drafter = self.load(self.settings)
        return check_drafting(self._drafter, self.clock)

    def _broker(self) -> str:
        settings = self.settings
        where = f"{settings.broker.host}:{settings.broker.port}"
        if (name := certificate_name(settings.broker.certificate)) not in (None, settings.device):
            raise ConfigurationError(
                f"Not connected to {where}: the broker would take this device for {name!r}, whose certificate it has, "
                f"and send that one away; correct 'device', or enrol {settings.device!r}."
            )
        link = self._link = self.make_link(settings.broker.link(settings.fleet, settings.device, will=None))
        if self._drafter is None:
            self._inbox.subscribe(link, fleet=settings.fleet, device=settings.device)
        else:
            self._agent = Agent(
                link,
                settings.fleet,
                settings.device,
                self._drafter,
                FixedPacing(_DRAFT),
                self.clock,
                _RETRY_POLICY,
                self._inbox,
            )
            self._agent.attach()
        topic = build(Topic.TELEMETRY, fleet=settings.fleet, device=settings.device)
        empty = encode_json(Telemetry(sessions=0, tokens=0))
        times = [self.clock()]
        link.start(timeout_s=_CONNECT_S)
        for _ in range(_ECHOES):
            times.append(self.clock())
            publish_confirmed(link, topic, empty, timeout_s=_WAIT_S)
        times.append(self.clock())
        connected_ms, *echoes_ms = ((end - start) * 1e3 for start, end in pairwise(times))
        return (
            f"Connected to {where} as {settings.device} in {connected_ms:.0f} ms; a message is acknowledged in "
            f"{statistics.median(echoes_ms):.1f} ms."
        )

    def _clock(self) -> str:
        self._inbox.edges.wait_online(_STATES_S if self._link is not None and self._link.connected else 0.0)
        return check_clock(self.now(), moments_of(self.settings.broker, self._inbox.edges.online()))

    def _edge(self) -> str:
        edges = self._inbox.edges
        if not edges.wait_online(_WAIT_S):
            raise EdgeUnavailable(edges.absence(self.settings.fleet))
        online = [f"{state.edge} with {state.target}, software {state.software}" for state in edges.online()]
        return f"Online: {'; '.join(online)}. This device has software {VERSION}."

    def _vocabulary(self) -> str:
        assert self._drafter is not None
        return check_vocabulary(str(self._drafter.vocabulary), self._inbox.edges.online(), drafter=self._drafter.name)

    def _generation(self) -> str:
        assert self._drafter is not None
        assert self._agent is not None
        return check_generation(self._agent.generate(probe_request(self._drafter, self.settings.policy())))
