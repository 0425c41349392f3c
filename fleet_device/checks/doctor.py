"""Doctor: checks all that a device needs, from its memory to the edge's vocabulary, and reports what to do.

It changes nothing at the broker: it announces no state, and generates one token at most, where it asks an edge. If a
device of this name runs, it asks that one over its local API, because a broker keeps one connection for each name.
"""

import http.client
import ipaddress
import os
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ValidationError

from fleet_common.host import available_memory
from fleet_common.mqtt.link import Link
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import BrokerSettings, LinkSettings, TlsSettings
from fleet_common.mqtt.tls import certificate_end, certificate_in, certificate_name, tls_context
from fleet_device.checks.edge_check import Check, Checklist, CheckReport, NotApplicable
from fleet_device.checks.selftest import (
    PROBE_POLICY,
    check_broker,
    check_drafting,
    check_online,
    check_vocabulary,
    probe_prompt,
)
from fleet_device.client.agent import Agent
from fleet_device.client.messaging import Inbox
from fleet_device.client.retry import RetryPolicy
from fleet_device.drafters.contract import Drafter, DrafterError
from fleet_device.drafters.model_file import load_drafter, locate_model
from fleet_device.errors import ConfigurationError, EdgeUnavailable, SessionRefused
from fleet_device.pacing.contract import FixedPacing
from fleet_device.requests.generate import GenerateRequest
from fleet_device.settings import AUTO, DeviceSettings
from schemas.control import EdgeState, Presence, Telemetry, encode_json
from schemas.reasons import RefusalCode
from schemas.topics import Topic, build

_HTTP_WAIT_S: Final = 2.0
_MOST_BYTES: Final = 1 << 20


class _Drafter(BaseModel):
    name: str
    quantization: str
    context: int
    vocabulary: str


class _Broker(BaseModel):
    host: str
    port: int
    connected: bool


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
        found = RunningDevice.model_validate_json(connection.getresponse().read(_MOST_BYTES))
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


@dataclass(frozen=True, slots=True)
class Moment:
    """A past event that a correct clock is behind; `what` is a clause: `edge edge-1 has connected`."""

    what: str
    at: datetime


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
    return f"That of {name}, valid for {_span(left)} more, until {end:%Y-%m-%d %H:%M} UTC{renew}."


def moments_of(broker: BrokerSettings, edges: Sequence[EdgeState]) -> list[Moment]:
    """Return what a clock can be compared with: certificates issued, and connections of edges."""
    moments = [
        Moment(f"the certificate {path.name} became valid", found.not_valid_before_utc)
        for path in (broker.ca, broker.certificate)
        if path is not None and (found := certificate_in(path)) is not None
    ]
    return moments + [Moment(f"edge {each.edge} connected", each.since) for each in edges]


def check_clock(now: datetime, moments: Sequence[Moment]) -> str:
    if not moments:
        raise NotApplicable(f"{now:%Y-%m-%d %H:%M:%S} UTC; there is neither a certificate nor an edge to compare with.")
    latest = max(moments, key=lambda moment: moment.at)
    if latest.at - now > _TOLERANCE:
        raise ConfigurationError(
            f"It is {now:%Y-%m-%d %H:%M:%S} UTC by this machine's clock, and {latest.what} at "
            f"{latest.at:%Y-%m-%d %H:%M:%S}: the clock is behind by {_span(latest.at - now)} at least; set it (with "
            "systemd: `timedatectl set-ntp true`), or the other machine's if that one is wrong."
        )
    return f"{now:%Y-%m-%d %H:%M:%S} UTC; {latest.what} {_span(max(now - latest.at, timedelta()))} ago."


def _span(span: timedelta) -> str:
    seconds = int(span.total_seconds())
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size:,} {unit}"
    return f"{seconds} s"


_MEGA: Final = 1_000_000

_WORKING_BYTES: Final = 100 * _MEGA
"""Memory of the program and llama.cpp in addition to the model's file, without keys and values."""

_READS_WEIGHTS: Final = "llama.cpp"


def check_memory(settings: DeviceSettings, available: Callable[[], int | None] = available_memory) -> str:
    free = available()
    known = "The system does not say how much memory is free" if free is None else f"{free / _MEGA:,.0f} MB are free"
    if settings.drafter != _READS_WEIGHTS:
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


CHECKS: Final = ("memory", "threads", "model", "broker", "certificate", "clock", "edge", "vocabulary")

_CONNECT_S: Final = 5.0
_WAIT_S: Final = 5.0
_STATES_S: Final = 1.0  # retained states come with the connection
_RETRY_POLICY: Final = RetryPolicy(open_s=10.0, resume_s=10.0, verdict_s=10.0, close_s=2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis(CheckReport):
    device: str


@dataclass(slots=True)
class Doctor:
    settings: DeviceSettings
    load: Callable[[DeviceSettings], Drafter] = load_drafter
    make_link: Callable[[LinkSettings], Link] = PahoLink
    running: Callable[[DeviceSettings], RunningDevice | None] = running_device
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
        """Run all checks. A check that needs a failed one is skipped, and counts as failed.

        Raise ConfigurationError if a device of this name runs with another configuration.
        """
        settings = self.settings
        self._running = self.running(settings)
        if self._running is not None:
            require_alike(self._running, settings)
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
            return f"{known} next to {self.settings.device}, which runs."
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
        link = self._link = self.make_link(settings.broker.link(settings.fleet, settings.device, will=None))
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
                _RETRY_POLICY,
                self._inbox,
            )
            self._agent.attach()
        topic = build(Topic.TELEMETRY, fleet=settings.fleet, device=settings.device)
        empty = encode_json(Telemetry(sessions=0, tokens=0))
        return check_broker(
            lambda: link.start(timeout_s=_CONNECT_S),
            lambda listen: link.publish(topic, empty, on_outcome=listen),
            topic,
            self.clock,
            to=f" to {where} as {settings.device}",
        )

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
            text = self._agent.generate(
                GenerateRequest(tuple(probe_prompt(self._drafter)), policy=PROBE_POLICY, max_new_tokens=1)
            )
        except SessionRefused as error:
            if error.code is not RefusalCode.VOCABULARY:
                raise
            self._refusal = error  # it answers, and that is all that is asked here
            return online
        first = "no token" if text.first_ms is None else f"a first token after {text.first_ms:.0f} ms"
        return f"{online} {text.edge or 'The edge'} has generated {first}."

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
