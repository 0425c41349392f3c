import pytest

from fleet_common.mqtt.packets import publish_packet_bytes
from tests.support.mqtt_packets import (
    PING,
    PacketType,
    WillMessage,
    connect_packet,
    puback_packet,
    publish_packet,
    split_packets,
)


@pytest.mark.parametrize("size", [0, 1, 100, 127, 128, 16_383, 16_384, 1 << 20])
@pytest.mark.parametrize("qos", [0, 1])
def test_a_publish_is_as_large_as_our_own_link_makes_it_and_reads_back(size: int, qos: int) -> None:
    packet = publish_packet("dssd/v1/home/d/up/open", bytes(size), qos=qos)
    assert len(packet) == publish_packet_bytes("dssd/v1/home/d/up/open", bytes(size), qos=qos)
    (read,) = split_packets(bytearray(packet))
    assert read.kind == PacketType.PUBLISH
    assert read.publish() == (b"dssd/v1/home/d/up/open", 1 if qos else None, bytes(size))


def test_packets_are_taken_off_the_front_and_a_part_of_one_stays() -> None:
    received = bytearray(PING + puback_packet(7) + publish_packet("topic", b"payload")[:-3])
    assert [packet.kind for packet in split_packets(received)] == [PacketType.PINGREQ, PacketType.PUBACK]
    assert list(split_packets(received)) == []
    received += b"oad"
    (last,) = split_packets(received)
    assert last.publish()[2] == b"payload"
    assert received == b""


def test_the_reason_of_an_answer_is_read() -> None:
    (connack,) = split_packets(bytearray(b"\x20\x03\x00\x97\x00"))
    (puback,) = split_packets(bytearray(b"\x40\x03\x00\x01\x10"))
    (bare,) = split_packets(bytearray(puback_packet(1)))
    (disconnect,) = split_packets(bytearray(b"\xe0\x01\x93"))
    assert [packet.reason for packet in (connack, puback, bare, disconnect)] == [0x97, 0x10, 0, 0x93]


def test_a_will_lies_between_client_id_and_end_of_the_connect() -> None:
    plain, packet = connect_packet("d"), connect_packet("d", will=WillMessage("t", b"gone", retain=True))
    assert packet.endswith(plain[-3:] + b"\x00\x00\x01t\x00\x04gone")
    assert packet[9] == 0x02 | 0x04 | 0x08 | 0x20
