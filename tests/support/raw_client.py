"""MQTT over one socket: the caller decides what is sent, and when messages are read and acknowledged."""

import socket
import ssl
from contextlib import suppress

from fleet_common.closing import Closing
from fleet_common.mqtt.settings import TlsSettings
from tests.support.mqtt_packets import (
    IncomingPacket,
    PacketType,
    WillMessage,
    connect_packet,
    puback_packet,
    publish_packet,
    split_packets,
    subscribe_packet,
)
from tests.support.waiting import PATIENCE_S

HOST = "127.0.0.1"
CHUNK = 1 << 16


def tls_context(tls: TlsSettings) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(tls.ca))
    if tls.certificate is not None:
        context.load_cert_chain(str(tls.certificate), None if tls.key is None else str(tls.key))
    return context


def open_socket(
    port: int, context: ssl.SSLContext | None, *, host: str = HOST, receive_buffer: int | None = None
) -> socket.socket:
    """Connect, over TLS with a context; the socket is in blocking mode. Raises `OSError`."""
    plain = socket.create_connection((host, port), timeout=PATIENCE_S)
    try:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if receive_buffer is not None:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        return plain if context is None else context.wrap_socket(plain, server_hostname=host)
    except BaseException:
        plain.close()
        raise


class RawClient(Closing):
    """A client, connected on return; without TLS its name is the user name. Raises `ConnectionRefusedError`."""

    def __init__(
        self,
        port: int,
        tls: TlsSettings | ssl.SSLContext | None,
        name: str,
        *,
        host: str = HOST,
        will: WillMessage | None = None,
        keepalive_s: int = 60,
        receive_buffer: int | None = CHUNK,  # what the system's buffers hold is not in the broker's queue
    ) -> None:
        context = tls_context(tls) if isinstance(tls, TlsSettings) else tls
        self.socket = open_socket(port, context, host=host, receive_buffer=receive_buffer)
        self._received = bytearray()
        self._packets: list[IncomingPacket] = []
        username = name if context is None else None
        self.send(connect_packet(name, keepalive_s=keepalive_s, username=username, will=will))
        if reason := self.wait_for(PacketType.CONNACK).reason:
            self.close()
            raise ConnectionRefusedError(f"The broker refuses {name} with reason code {reason}.")

    def close(self) -> None:
        with suppress(OSError):
            self.socket.close()

    def send(self, packets: bytes) -> None:
        self.socket.sendall(packets)

    def subscribe(self, *filters: str, qos: int = 1) -> None:
        self.send(subscribe_packet(filters, qos=qos))
        self.wait_for(PacketType.SUBACK)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> int:
        """Publish at QoS 1 and return the broker's reason code: it has processed everything sent before."""
        self.send(publish_packet(topic, payload, retain=retain))
        return self.wait_for(PacketType.PUBACK).reason

    def wait_for(self, kind: int) -> IncomingPacket:
        """Return the next packet of this type, acknowledging what is delivered before it.

        Raises:
            ConnectionError: The broker has hung up.
            TimeoutError: It does not come.
        """
        while True:
            while self._packets:
                packet = self._packets.pop(0)
                self._acknowledge(packet)
                if packet.kind == kind:
                    return packet
            self._receive()

    def read(self) -> list[IncomingPacket]:
        self._receive()
        packets, self._packets = self._packets, []
        for packet in packets:
            self._acknowledge(packet)
        return packets

    def _receive(self) -> None:
        data = self.socket.recv(CHUNK)
        if not data:
            raise ConnectionError("The broker has hung up.")
        self._received += data
        self._packets += split_packets(self._received)

    def _acknowledge(self, packet: IncomingPacket) -> None:
        if packet.kind == PacketType.PUBLISH and (identifier := packet.publish()[1]) is not None:
            self.send(puback_packet(identifier))
