"""Quarantine: what the messages of a device that is shut out cost the edge, in shares of one core.

A real mosquitto, a real edge process over a scripted target, and one device whose quarantine lasts: it goes on sending
drafts at a rate, at QoS 0 and 1, over plain TCP and mutual TLS. In one run are measured: the edge while nothing comes,
and the edge under the flood. Takes 4 minutes.
"""

import argparse
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from benchmarks.harness import Bench, Report, at_most, number_of, table, tls_broker
from benchmarks.hostile.meters import thread_times_s
from benchmarks.processes import BenchError, Identity, scripted_edge
from broker_config.processes import ThrowAwayBroker
from schemas.codec import encode_draft
from schemas.messages import Draft
from schemas.topics import Topic, build
from tests.support.mqtt_packets import publish_packet

FLEET: Final = "home"
EDGE, DEVICE = "edge-1", "device-1"
TURN_S: Final = 0.005
ONLINE_S: Final = 60.0
SETTLE_S: Final = 3.0  # the device is shut out, and the edge has said so
QUARANTINE_S: Final = 3600.0
BOUND: Final = 0.01  # of one core
DRAFT: Final = encode_draft(
    Draft(handle=7, round=1, epoch=0, base=9, fix=1, tokens=(1, 2, 3, 4, 5), counts=(30_000,) * 5, digest=1)
)
CHUNK: Final = 1 << 16


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rate", type=number_of(float, 1.0), default=2000.0, help="messages a second")
    parser.add_argument("--seconds", type=number_of(float, 0.1), default=20.0, help="of each measurement")


def run(bench: Bench) -> Report:
    bench.fleet = FLEET
    rows: list[dict[str, Any]] = []
    with bench.broker(EDGE) as plain:
        rows += _measure(bench, plain, tls=False)
    with tls_broker(bench.folder / "broker", FLEET, [EDGE], [DEVICE]) as local:
        rows += _measure(bench, local, tls=True)
    shares = dict.fromkeys(("idle", "flooded", "added"), ".2%")
    table(rows, {"transport": "", "qos": "d", "sent_per_s": ".0f", **shares})
    return Report(
        rows, [at_most("share of a core that a quarantined device costs", max(r["added"] for r in rows), BOUND)]
    )


def _measure(bench: Bench, broker: ThrowAwayBroker, *, tls: bool) -> Iterator[dict[str, Any]]:
    seconds, lines = bench.options.seconds, ("[quarantine]", "strikes = 50", f"first_s = {QUARANTINE_S}")
    place, folder, cores = Identity.at(broker, EDGE), bench.new_folder(), bench.cores.edge
    with scripted_edge(place, fleet=FLEET, folder=folder, cores=cores, lines=lines) as edge:
        time.sleep(SETTLE_S)
        idle = _share(edge.pid, seconds)
        for qos in (0, 1):
            packet = publish_packet(build(Topic.DRAFT, fleet=FLEET, device=DEVICE, edge=EDGE), DRAFT, qos=qos)
            with _flood(Identity.at(broker, DEVICE).connect().socket, packet, bench.options.rate) as sent:
                time.sleep(SETTLE_S)
                before, began = sum(sent), time.monotonic()
                flooded = _share(edge.pid, seconds)
                sent_per_s = (sum(sent) - before) / (time.monotonic() - began)
            shares = {"idle": idle, "flooded": flooded, "added": flooded - idle}
            yield {"transport": "TLS" if tls else "plain", "qos": qos, "sent_per_s": sent_per_s, **shares}
        if not edge.lives or "quarantin" not in edge.log.read_text():
            raise BenchError(f"The edge has not shut the device out; see {edge.log}.")


def _share(pid: int, seconds: float) -> float:
    before, began = sum(thread_times_s(pid).values()), time.monotonic()
    time.sleep(seconds)
    return (sum(thread_times_s(pid).values()) - before) / (time.monotonic() - began)


@contextmanager
def _flood(sock: socket.socket, packet: bytes, rate: float) -> Iterator[list[int]]:
    """Send the same packet at a rate, on a thread; yield the numbers that were sent at a time."""
    sent: list[int] = []
    stopping = threading.Event()

    def send() -> None:
        began = time.monotonic()
        while not stopping.wait(TURN_S):
            due = int((time.monotonic() - began) * rate) - sum(sent)
            sock.settimeout(ONLINE_S)
            sock.sendall(packet * due)
            sent.append(due)
            sock.settimeout(0.0)
            with suppress(BlockingIOError, ssl.SSLWantReadError):
                while sock.recv(CHUNK):
                    pass

    thread = threading.Thread(target=send, name="flood", daemon=True)
    thread.start()
    try:
        yield sent
    finally:
        stopping.set()
        thread.join()
        sock.close()
