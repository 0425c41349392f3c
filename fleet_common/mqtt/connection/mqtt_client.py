"""Paho client of one connection: its set-up, and its session's lifetime at the broker.

Normally the broker keeps no session after a connection: the protocol above asks again, and a session that is kept for a
client that crashed would make it look like one that still listens. A planned handover is the exception: within the
seconds that it takes, nothing may be lost. MQTT lets a goodbye lengthen a session's life only if its beginning gave it
any (3.14.2.2.2), hence the one second.
"""

import socket
from typing import Any, Final

from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from fleet_common.mqtt.connection.screen import Screen
from fleet_common.mqtt.connection.screened_socket import ScreenedSocket
from fleet_common.mqtt.settings import LinkSettings
from fleet_common.mqtt.tls.context import LinkContext
from fleet_common.mqtt.tls.stream import TlsStream


class _ScreenedClient(Client):
    """A client that reads from a `ScreenedSocket`, as paho's own reads from its wrapper for WebSockets."""

    screen: Screen
    context: LinkContext | None
    handshake_s: float

    def _create_socket(self) -> Any:  # noqa: ANN401 - as paho's
        sock: Any = super()._create_socket()
        if self.context is not None:
            stream = TlsStream(sock, self.context, self._host)
            stream.shake_hands(timeout_s=self.handshake_s)  # somebody is there: it may take longer than the connecting
            sock = stream
        return ScreenedSocket(sock, self.screen)


def make_client(settings: LinkSettings, context: LinkContext | None = None, *, screen: Screen | None = None) -> Client:
    """Return a client that has not connected yet, with no callbacks but the socket's.

    Args:
        settings: Where to and who we are.
        context: For TLS.
        screen: Drops messages before the client sees them.
    """
    client = _ScreenedClient(
        CallbackAPIVersion.VERSION2,
        client_id=settings.client_id,
        protocol=MQTTProtocolVersion.MQTTv5,
        reconnect_on_failure=False,
    )
    client.screen = screen if screen is not None else Screen(max_packet_bytes=settings.packet_bytes)
    client.suppress_exceptions = True  # ours are guarded; this is for what nobody has thought of
    client.context = context
    client.connect_timeout = settings.connect_timeout_s
    client.handshake_s = settings.handshake_s
    client.max_inflight_messages_set(0)  # the window is the outbox's business
    if settings.username is not None:
        client.username_pw_set(settings.username, settings.password)
    if settings.will is not None:
        client.will_set(settings.will.topic, settings.will.payload, qos=1, retain=True)
    if settings.no_delay:
        client.on_socket_open = _send_at_once
    return client


def _send_at_once(_client: Client, _userdata: object, sock: Any) -> None:  # noqa: ANN401 - plain or TLS
    # Without it a QoS 1 round trip waits for the peer's delayed acknowledgement: 40 ms, not one.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


LINGER_S: Final = 1
HANDOVER_S: Final = 30


def connect_properties(settings: LinkSettings) -> Properties:
    """Return the properties of a CONNECT."""
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    properties.MaximumPacketSize = settings.packet_bytes
    if _may_hand_over(settings):
        properties.SessionExpiryInterval = LINGER_S
    return properties


def goodbye_properties(settings: LinkSettings, *, hand_over: bool) -> Properties | None:
    """Return the properties of a DISCONNECT.

    Args:
        settings: As at the CONNECT.
        hand_over: Whether another connection is to go on with the session.
    """
    if not _may_hand_over(settings):
        return None
    properties = Properties(PacketTypes.DISCONNECT)  # type: ignore[no-untyped-call]
    properties.SessionExpiryInterval = HANDOVER_S if hand_over else 0
    return properties


def _may_hand_over(settings: LinkSettings) -> bool:
    return settings.tls is not None and settings.tls.certificate is not None
