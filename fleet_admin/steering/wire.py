"""MQTT side of steering: what a monitor receives from devices and sends to them, over one link."""

import json
import logging
import secrets
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Final, TypeVar

from fleet_admin.steering.clients import CONNECTED, GONE, LOG_TOPIC, NUMBER_TOPIC, BrokerClient, BrokerClients
from fleet_admin.steering.planning import SteeringError
from fleet_common.mqtt.errors import LinkError
from fleet_common.mqtt.link import Link, Message, PublishOutcome
from schemas.control import (
    CommandRequest,
    CommandResponse,
    DesiredSettings,
    DeviceState,
    EdgeState,
    ReportedSettings,
    decode_json,
    encode_json,
)
from schemas.errors import CodecError, TopicError
from schemas.topics import COMMAND_EXPIRY_S, TREE, Topic, build, parse, wildcard

_log = logging.getLogger(__name__)

T = TypeVar("T")

_CONNECT_S: Final = 10.0
_MAX_LINE: Final = 500  # bytes of a line of the broker's log
_RETAINED: Final = "By the state that the broker retains."
_MAX_DEVICES: Final = 100_000
"""Most remembered devices; only the fleet's own publish, and they are limited too."""

_RULES: Final = {rule.topic: rule for rule in TREE}


class SteeringWire:
    """What devices have published, updated on the link's thread. Thread-safe."""

    def __init__(self, link: Link, *, fleet: str, name: str) -> None:
        self._link = link
        self._fleet = fleet
        self._name = name
        self._changed = threading.Condition()
        self._states: dict[str, DeviceState] = {}
        self._desired: dict[str, DesiredSettings] = {}
        self._sent: dict[str, DesiredSettings] = {}
        self._reported: dict[str, ReportedSettings] = {}
        self._answers: dict[str, Callable[[CommandResponse], None]] = {}
        self._marks: set[str] = set()
        self._rejected: dict[str, int] = {}
        self._edges: dict[str, EdgeState] = {}
        self._clients = BrokerClients()
        for topic, qos in (
            # Retained messages of thousands of devices arrive at once: at QoS 1 some brokers drop some of them.
            (Topic.STATE, 0),
            (Topic.CONFIG_DESIRED, 0),
            (Topic.CONFIG_REPORTED, 0),
            (Topic.COMMAND_RESPONSE, 1),
            (Topic.EDGE_STATE, 0),
        ):
            link.subscribe(wildcard(topic, fleet=fleet), self._hear, qos=qos)
        link.subscribe(NUMBER_TOPIC, lambda message: self._clients.read_number(message.payload), qos=0)
        link.subscribe(LOG_TOPIC, self._read_log)
        link.on_connection(lambda connected: None if connected else self._clients.forget())

    def start(self) -> None:
        """Connect, and return when all that the broker retains has arrived.

        Raises `ConnectFailed` if the broker cannot be reached, `SteeringError` if this monitor may not publish there.
        """
        self._link.start(timeout_s=_CONNECT_S)
        # A message to itself arrives after all retained ones.
        mark = secrets.token_hex(8)
        topic = build(Topic.CONFIG_DESIRED, fleet=self._fleet, device=self._name)
        self._publish(topic, json.dumps({"mark": mark}).encode(), retain=False)
        with self._changed:
            self._changed.wait_for(lambda: mark in self._marks or topic in self._rejected, _CONNECT_S)
            if topic in self._rejected:
                raise SteeringError(
                    f"The broker does not let {self._name!r} write settings; give the identity of a monitor of this "
                    "fleet (--name, --broker-certificate)."
                )
            if mark not in self._marks:
                raise SteeringError(
                    f"What {self._name!r} says does not come back from the broker within {_CONNECT_S:.0f} s; see that "
                    "the name is one of the broker's monitors, and that no other program uses it."
                )
            self._marks.clear()

    def stop(self) -> None:
        self._link.stop()

    @property
    def connected(self) -> bool:
        return self._link.connected

    def states(self) -> Mapping[str, DeviceState]:
        with self._changed:
            return dict(self._states)

    def clients(self) -> tuple[list[BrokerClient], int | None]:
        """Return the clients as the broker's log and its retained states name them, and their number as it counts."""
        named = self._clients.named()
        with self._changed:
            edges = {name: state.presence for name, state in self._edges.items()}
            seen = {name: state.presence for name, state in self._states.items()} | edges
        for name, presence in seen.items():
            state = GONE if presence.gone else CONNECTED
            named.setdefault(name, BrokerClient(client=name, state=state, sentence=_RETAINED))
        named.setdefault(self._name, BrokerClient(client=self._name, state=CONNECTED, sentence="This program."))
        return [named[name] for name in sorted(named)], self._clients.number

    def desired(self) -> Mapping[str, DesiredSettings]:
        """Return the desired settings that the broker retains or is about to, by device."""
        with self._changed:
            return {**self._desired, **self._sent}

    def reported(self) -> Mapping[str, ReportedSettings]:
        with self._changed:
            return dict(self._reported)

    def wait(self, ready: Callable[[], T], timeout_s: float) -> T:
        """Return `ready()` once it is true, or after the time limit; evaluated after each message."""
        with self._changed:
            return self._changed.wait_for(ready, timeout_s)

    def want(self, device: str, settings: DesiredSettings) -> None:
        """Publish desired settings, retained; raises `SteeringError` if they exceed a message or the link is full."""
        topic = build(Topic.CONFIG_DESIRED, fleet=self._fleet, device=device)
        with self._changed:
            self._sent[device] = settings
        try:
            self._publish(topic, encode_json(settings), retain=True)
        except SteeringError:
            with self._changed:
                self._sent.pop(device, None)
            raise

    def forget(self, device: str) -> None:
        """Delete the wanted settings that the broker retains for a device."""
        self._publish(build(Topic.CONFIG_DESIRED, fleet=self._fleet, device=device), b"", retain=True)
        with self._changed:
            self._desired.pop(device, None)
            self._sent.pop(device, None)

    def rejected(self, device: str) -> bool:
        return build(Topic.CONFIG_DESIRED, fleet=self._fleet, device=device) in self._rejected

    def command(self, device: str, request: CommandRequest, answer: Callable[[CommandResponse], None]) -> None:
        """Send a command; `answer` is called on the link's thread with each part of the answer."""
        with self._changed:
            self._answers[f"{device}/{request.id}"] = answer
        topic = build(Topic.COMMAND_REQUEST, fleet=self._fleet, device=device)
        self._publish(topic, encode_json(request), retain=False, expiry_s=COMMAND_EXPIRY_S)

    def end_command(self, device: str, command: str) -> None:
        with self._changed:
            self._answers.pop(f"{device}/{command}", None)

    def _publish(self, topic: str, payload: bytes, *, retain: bool, expiry_s: int | None = None) -> None:
        try:
            self._link.publish(
                topic,
                payload,
                retain=retain,
                expiry_s=expiry_s,
                content_type="application/json",
                on_outcome=self._note,
            )
        except LinkError as error:
            raise SteeringError(f"The broker cannot be reached now: {error}") from error

    def _note(self, outcome: PublishOutcome) -> None:
        if not outcome.accepted:
            with self._changed:
                self._rejected[outcome.topic] = outcome.reason
                self._sent.pop(parse(outcome.topic).device or "", None)
                self._changed.notify_all()

    def _read_log(self, message: Message) -> None:
        self._clients.read_line(message.payload[:_MAX_LINE].decode(errors="replace"), now=datetime.now(UTC))

    def _hear(self, message: Message) -> None:
        try:
            address = parse(message.topic)
        except TopicError:
            return
        device = address.device or address.edge
        if device is None or address.fleet != self._fleet:
            return
        with self._changed:
            try:
                self._update(address.topic, device, message)
            except CodecError as error:
                _log.debug("A message of %s is not looked at: %s", device, error)
            self._changed.notify_all()

    def _update(self, topic: Topic, device: str, message: Message) -> None:
        payload = message.payload
        match topic:
            case Topic.STATE:
                _keep(self._states, device, decode_json(DeviceState, payload) if payload else None)
            case Topic.EDGE_STATE:
                _keep(self._edges, device, decode_json(EdgeState, payload) if payload else None)
            case Topic.CONFIG_DESIRED if device == self._name:
                self._marks.add(_mark_of(payload))
            case Topic.CONFIG_DESIRED:
                desired = decode_json(DesiredSettings, payload) if payload else None
                _keep(self._desired, device, desired)
                # Until its own settings come back, what arrives is older than these.
                sent = self._sent.get(device)
                if message.retained or (sent is not None and desired is not None and desired.id == sent.id):
                    self._sent.pop(device, None)
            case Topic.CONFIG_REPORTED:
                _keep(self._reported, device, decode_json(ReportedSettings, payload) if payload else None)
            case Topic.COMMAND_RESPONSE:
                response = decode_json(CommandResponse, payload)
                if (answer := self._answers.get(f"{device}/{response.id}")) is not None:
                    answer(response)
            case _:
                return


def _keep(known: dict[str, T], device: str, value: T | None) -> None:
    if value is None:
        known.pop(device, None)
    elif device in known or len(known) < _MAX_DEVICES:
        known[device] = value


def _mark_of(payload: bytes) -> str:
    try:
        found = json.loads(payload)
    except (ValueError, RecursionError):
        return ""
    return str(found.get("mark", ""))[:32] if isinstance(found, dict) else ""
