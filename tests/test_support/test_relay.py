import socket
import struct
import threading
import time

import pytest

from fleet_common.mqtt.connection import has_arrived
from tests.support.relay import Relay


@pytest.mark.parametrize("first", ["client", "server"])
@pytest.mark.timeout(20)
def test_the_relay_passes_on_and_ends_whichever_end_goes_first(first: str) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        Relay(listener.getsockname()[1], round_trip_s=0.002) as relay,
    ):
        client = socket.create_connection(("127.0.0.1", relay.port))
        server, _ = listener.accept()
        client.sendall(b"there")
        assert server.recv(16) == b"there"
        server.sendall(b"and back")
        assert client.recv(16) == b"and back"
        ends = {"client": client, "server": server}
        leaving = ends.pop(first)
        leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # it leaves without a goodbye
        leaving.close()
        (other,) = ends.values()
        assert other.recv(16) == b""
        other.close()


def test_what_goes_through_the_relay_is_late_by_the_round_trip_and_in_order() -> None:
    round_trip_s = 0.06
    with socket.create_server(("127.0.0.1", 0)) as server:

        def echo() -> None:
            connection, _ = server.accept()
            with connection:
                while data := connection.recv(1 << 16):
                    connection.sendall(data)

        thread = threading.Thread(target=echo)
        thread.start()
        with (
            Relay(server.getsockname()[1], round_trip_s=round_trip_s) as relay,
            socket.create_connection(("127.0.0.1", relay.port)) as client,
        ):
            started, received = time.monotonic(), b""
            for number in range(20):
                client.sendall(bytes([number]))
            while len(received) < 20:
                received += client.recv(64)
            took_s = time.monotonic() - started
            client.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert received == bytes(range(20))
    # If each piece waited for the previous one, it would take twenty times as long.
    assert round_trip_s <= took_s < 5 * round_trip_s


def test_bytes_are_counted_each_way() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, Relay(listener.getsockname()[1]) as relay:
        with socket.create_connection(("127.0.0.1", relay.port)) as client:
            server, _ = listener.accept()
            with server:
                client.sendall(b"12345")
                assert server.recv(16) == b"12345"
                server.sendall(b"123")
                assert client.recv(16) == b"123"
        assert (relay.up, relay.down) == (5, 3)


def test_a_stalled_line_passes_nothing_either_way_and_all_of_it_when_it_is_released() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, Relay(listener.getsockname()[1]) as relay:
        client = socket.create_connection(("127.0.0.1", relay.port))
        server, _ = listener.accept()
        client.sendall(b"before")
        assert server.recv(16) == b"before"
        relay.stall()
        client.sendall(b"up")
        server.sendall(b"down")
        for each in (client, server):
            each.settimeout(0.05)
            with pytest.raises(TimeoutError):
                each.recv(16)
            each.settimeout(10.0)
        relay.release()
        assert (server.recv(16), client.recv(16)) == (b"up", b"down")
        client.close()
        server.close()


def test_a_lossy_line_brings_everything_in_order_and_later() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, Relay(listener.getsockname()[1]) as relay:
        client = socket.create_connection(("127.0.0.1", relay.port))
        server, _ = listener.accept()
        relay.loss = 1.0
        client.sendall(b"lost once")
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.recv(16)
        relay.loss = 0.0
        client.sendall(b", then more")
        server.settimeout(10.0)
        received = b""
        while len(received) < 20:
            received += server.recv(64)
        assert received == b"lost once, then more"
        client.close()
        server.close()


def test_a_slow_line_brings_pieces_one_behind_the_other_and_no_faster_than_it_is() -> None:
    """2,000 bytes at 10,000 bytes per second; any further delay is the machine's."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        Relay(listener.getsockname()[1], bytes_per_s=10_000.0) as relay,
        socket.create_connection(("127.0.0.1", relay.port)) as client,
    ):
        server, _ = listener.accept()
        with server:
            started = time.monotonic()
            for number in range(4):
                client.sendall(bytes([number]) * 500)
            received = b""
            while len(received) < 2000:
                received += server.recv(1 << 16)
            assert time.monotonic() - started >= 0.2
            assert received == b"".join(bytes([number]) * 500 for number in range(4))


def test_a_narrow_line_acknowledges_what_it_has_had_time_for() -> None:
    """The sender of a large message sees its progress, and does not take the broker for silent."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        Relay(listener.getsockname()[1], bytes_per_s=20_000.0) as relay,
        socket.create_connection(("127.0.0.1", relay.port)) as client,
    ):
        server, _ = listener.accept()
        with server:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
            client.sendall(bytes(60_000))
            time.sleep(0.3)
            assert not has_arrived(client)
            received = 0
            while received < 60_000:
                received += len(server.recv(1 << 16))
            assert has_arrived(client)
