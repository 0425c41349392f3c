import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fleet_common.mqtt.connection import has_arrived
from tests.support.relay import Relay


@contextmanager
def line(
    *, round_trip_s: float = 0.0, bytes_per_s: float = 0.0
) -> Iterator[tuple[Relay, socket.socket, socket.socket]]:
    """Yield a relay with one connection through it, from a client to a server."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        Relay(listener.getsockname()[1], round_trip_s=round_trip_s, bytes_per_s=bytes_per_s) as relay,
        socket.create_connection(("127.0.0.1", relay.port), timeout=10.0) as client,
        listener.accept()[0] as server,
    ):
        server.settimeout(10.0)
        yield relay, client, server


def received(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += sock.recv(1 << 16)
    return data


def nothing_comes(sock: socket.socket) -> None:
    sock.settimeout(0.1)
    with pytest.raises(TimeoutError):
        sock.recv(16)
    sock.settimeout(10.0)


@pytest.mark.parametrize("first", ["client", "server"])
@pytest.mark.timeout(20)
def test_the_relay_passes_on_counts_and_ends_whichever_end_goes_first(first: str) -> None:
    with line(round_trip_s=0.002) as (relay, client, server):
        client.sendall(b"there")
        assert server.recv(16) == b"there"
        server.sendall(b"and back")
        assert client.recv(16) == b"and back"
        assert (relay.up, relay.down) == (5, 8)
        ends = {"client": client, "server": server}
        leaving = ends.pop(first)
        leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # it leaves without a goodbye
        leaving.close()
        (other,) = ends.values()
        assert other.recv(16) == b""


def test_what_goes_through_the_relay_is_late_by_the_round_trip_and_in_order() -> None:
    round_trip_s = 0.06
    with line(round_trip_s=round_trip_s) as (_, client, server):

        def echo() -> None:
            while data := server.recv(1 << 16):
                server.sendall(data)

        thread = threading.Thread(target=echo)
        thread.start()
        started = time.monotonic()
        for number in range(20):
            client.sendall(bytes([number]))
        assert received(client, 20) == bytes(range(20))
        took_s = time.monotonic() - started
        client.shutdown(socket.SHUT_RDWR)
        thread.join()
    # If each piece waited for the previous one, it would take twenty times as long.
    assert round_trip_s <= took_s < 5 * round_trip_s


def test_a_stalled_line_passes_nothing_either_way_and_all_of_it_when_it_is_released() -> None:
    with line() as (relay, client, server):
        client.sendall(b"before")
        assert server.recv(16) == b"before"
        relay.stall()
        client.sendall(b"up")
        server.sendall(b"down")
        nothing_comes(client)
        nothing_comes(server)
        relay.release()
        assert (server.recv(16), client.recv(16)) == (b"up", b"down")


def test_a_lossy_line_brings_everything_in_order_and_later() -> None:
    with line() as (relay, client, server):
        relay.loss = 1.0
        client.sendall(b"lost once")
        nothing_comes(server)
        relay.loss = 0.0
        client.sendall(b", then more")
        assert received(server, 20) == b"lost once, then more"


def test_a_narrow_line_acknowledges_what_it_has_had_time_for() -> None:
    """The sender of a large message sees its progress, and does not take the broker for silent."""
    with line(bytes_per_s=60_000.0) as (_, client, server):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
        client.sendall(bytes(60_000))
        time.sleep(0.3)
        assert not has_arrived(client)
        assert received(server, 60_000) == bytes(60_000)
        assert has_arrived(client)
