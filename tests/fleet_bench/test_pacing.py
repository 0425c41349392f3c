import socket
import threading
import time

import pytest

from fleet_bench.pacing import CHOSEN, FIXED, USUAL, Column, Row
from fleet_testing.distant_relay import DistantRelay


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
            DistantRelay(server.getsockname()[1], round_trip_s=round_trip_s) as relay,
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
    # Were each piece to wait for the one before it, it would be twenty times as long.
    assert round_trip_s <= took_s < 5 * round_trip_s


def test_the_chosen_plans_are_held_against_the_best_and_the_usual_one() -> None:
    column = Column("Q4_0", 50, {plan: Row([10, 10], [2.0, 2.0]) for plan in (*FIXED, CHOSEN)})
    column.rows[CHOSEN] = Row([10, 30], [4.0, 2.0])
    column.rows["8"] = Row([20, 20], [2.0, 2.0])
    assert column.against_usual() == pytest.approx((40 / 6) / 5)
    assert column.against_best() == pytest.approx((40 / 6) / 10)
    assert column.against_best(after=1) == pytest.approx(15 / 10)
    assert USUAL in FIXED
