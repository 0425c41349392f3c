"""Packets that we write, held to those of the MQTT library."""

import io
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from fleet_common.mqtt.outbox.packets import publish_packet, publish_packet_bytes


class _Unsent(Client):
    """Keeps what it would send."""

    packet = b""

    def __init__(self) -> None:
        super().__init__(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        self._sock = cast("Any", io.BytesIO())  # any sign of a connection will do

    def _packet_queue(self, _command: Any, packet: Any, *_: Any) -> Any:
        self.packet = bytes(packet)


@given(
    topic=st.text(st.characters(exclude_characters="+#\0", exclude_categories=["Cs"]), min_size=1, max_size=200),
    payload=st.integers(0, 20_000).map(bytes),
    identifier=st.integers(0, 65_535),
    retain=st.booleans(),
    expiry_s=st.none() | st.integers(1, (1 << 32) - 1),
    content_type=st.none() | st.just("application/cbor; v=1"),
    alias=st.none() | st.integers(1, 65_535),
    known=st.booleans(),
)
def test_a_packet_is_what_the_library_would_write(
    topic: str,
    payload: bytes,
    identifier: int,
    retain: bool,
    expiry_s: int | None,
    content_type: str | None,
    alias: int | None,
    known: bool,
) -> None:
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    if expiry_s is not None:
        properties.MessageExpiryInterval = expiry_s
    if content_type is not None:
        properties.ContentType = content_type
    known = known and alias is not None
    if alias is not None:
        properties.TopicAlias = alias
    library = _Unsent()
    library._send_publish(
        identifier, b"" if known else topic.encode(), payload, min(identifier, 1), retain, properties=properties
    )
    packet = publish_packet(
        "" if known else topic,
        payload,
        identifier=identifier,
        retain=retain,
        expiry_s=expiry_s,
        content_type=content_type,
        alias=alias,
    )
    size = publish_packet_bytes(
        topic,
        payload,
        qos=min(identifier, 1),
        expiry=expiry_s is not None,
        content_type=content_type,
        alias=alias is not None,
        topic_known=known,
    )
    assert len(packet) == size == len(library.packet)
    # In which order properties stand is the writer's choice.
    assert sorted(packet) == sorted(library.packet)
    assert packet.endswith(payload)
