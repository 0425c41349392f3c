"""A client that speaks MQTT over TLS by hand: it reads when it is told to, and sends as fast as the broker takes it."""

import socket
import ssl
from contextlib import suppress
from types import TracebackType
from typing import Self

from fleet_common.mqtt.settings import TlsSettings
from tests.support.mqtt_packets import (
    IncomingPacket,
    PacketType,
    connect_packet,
    puback_packet,
    publish_packet,
    split_packets,
    subscribe_packet,
)

HOST = "127.0.0.1"
PATIENCE_S = 10.0
CHUNK = 1 << 16


class RawClient:
    """A client with a certificate, connected on return.

    Args:
        port: Of the broker, on this machine.
        tls: Its files.
        name: Its client id.
    """

    def __init__(self, port: int, tls: TlsSettings, name: str) -> None:
        context = ssl.create_default_context(cafile=str(tls.ca))
        context.load_cert_chain(str(tls.certificate), None if tls.key is None else str(tls.key))
        plain = socket.create_connection((HOST, port), timeout=PATIENCE_S)
        # What the system's buffers hold is not in the broker's queue.
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, CHUNK)
        self._socket = context.wrap_socket(plain, server_hostname=HOST)
        self._received = bytearray()
        self._packets: list[IncomingPacket] = []
        self.send(connect_packet(name))
        self.wait_for(PacketType.CONNACK)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        with suppress(OSError):
            self._socket.close()

    def send(self, packets: bytes) -> None:
        """Write packets; waits while the broker takes none."""
        self._socket.sendall(packets)

    def subscribe(self, *filters: str) -> None:
        """Subscribe at QoS 1, and return when the broker has answered."""
        self.send(subscribe_packet(filters))
        self.wait_for(PacketType.SUBACK)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> int:
        """Publish at QoS 1 and return the broker's reason code: it has dealt with all that was sent before."""
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
            data = self._socket.recv(CHUNK)
            if not data:
                raise ConnectionError("The broker has hung up.")
            self._received += data
            self._packets += split_packets(self._received)

    def _acknowledge(self, packet: IncomingPacket) -> None:
        if packet.kind == PacketType.PUBLISH and (identifier := packet.publish()[1]) is not None:
            self.send(puback_packet(identifier))
