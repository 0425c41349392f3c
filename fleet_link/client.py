"""A paho client that is set up as every connection of ours needs it."""

import socket
import ssl
from typing import Any

from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from fleet_link.settings import LinkSettings

__all__ = ["make_client"]


def make_client(settings: LinkSettings, context: ssl.SSLContext | None = None) -> Client:
    """Return a client that has not connected yet, with no callbacks but the socket's.

    Args:
        settings: Where to and who we are.
        context: For TLS.
    """
    client = Client(
        CallbackAPIVersion.VERSION2,
        client_id=settings.client_id,
        protocol=MQTTProtocolVersion.MQTTv5,
        reconnect_on_failure=False,
    )
    client.suppress_exceptions = True  # ours are guarded; this is for what nobody has thought of
    client.connect_timeout = settings.connect_timeout_s
    client.max_inflight_messages_set(0)  # the window is the outbox's business
    if settings.username is not None:
        client.username_pw_set(settings.username, settings.password)
    if settings.will is not None:
        client.will_set(settings.will.topic, settings.will.payload, qos=1, retain=True)
    if context is not None:
        client.tls_set_context(context)
    if settings.no_delay:
        client.on_socket_open = _send_at_once
    return client


def _send_at_once(_client: Client, _userdata: object, sock: Any) -> None:  # noqa: ANN401 - plain or TLS
    # Without it a QoS 1 round trip waits for the peer's delayed acknowledgement: 40 ms, not one.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
