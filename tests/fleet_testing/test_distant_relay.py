import socket
import struct

import pytest

from fleet_testing.distant_relay import DistantRelay


@pytest.mark.parametrize("first", ["client", "server"])
@pytest.mark.timeout(20)
def test_the_relay_passes_on_and_ends_whichever_end_goes_first(first: str) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        DistantRelay(listener.getsockname()[1], round_trip_s=0.002) as relay,
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
