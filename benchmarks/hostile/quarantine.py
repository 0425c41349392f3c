"""Quarantine: what the messages of a device that is shut out cost the edge, in shares of one core.

A real mosquitto, a real edge process over a scripted target, and one device whose quarantine lasts: it goes on sending
drafts at a rate, at QoS 0 and 1, over plain TCP and mutual TLS. In one run are measured: the edge while nothing comes;
the edge under the flood; and a bare reader that takes the same flood from the broker and looks at none of it, the
least that it costs to be sent it. Takes 5 minutes.
"""

import argparse
import contextlib
import json
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Final, Self

from benchmarks.harness import Bench, Report, at_most, number_of, table, tls_broker
from benchmarks.hostile.meters import thread_times_s
from benchmarks.processes import BenchError, Identity, Program, scripted_edge
from broker_config.processes import ThrowAwayBroker
from schemas.codec import encode_draft
from schemas.messages import Draft
from schemas.topics import Topic, build, wildcard
from tests.support.mqtt_packets import publish_packet

FLEET: Final = "home"
EDGE, READER, DEVICE = "edge-1", "edge-reader", "device-1"
TURN_S: Final = 0.005
ONLINE_S: Final = 60.0
SETTLE_S: Final = 3.0  # the device is shut out, and the edge has said so
QUARANTINE_S: Final = 3600.0
BOUND: Final = 0.01  # of one core
DRAFT: Final = encode_draft(
    Draft(handle=7, round=1, epoch=0, base=9, fix=1, tokens=(1, 2, 3, 4, 5), counts=(30_000,) * 5, digest=1)
)
CHUNK: Final = 1 << 16
_PAUSE_S: Final = 0.008  # as the link reads where most of what comes is dropped


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rate", type=number_of(float, 1.0), default=2000.0, help="messages a second")
    parser.add_argument("--seconds", type=number_of(float, 0.1), default=20.0, help="of each measurement")


def run(bench: Bench) -> Report:
    bench.fleet = FLEET
    rows: list[dict[str, Any]] = []
    with bench.broker(EDGE, READER) as plain:
        rows += _measure(bench, plain, tls=False)
    with tls_broker(bench.folder / "broker", FLEET, [EDGE, READER], [DEVICE]) as local:
        rows += _measure(bench, local, tls=True)
    shares = dict.fromkeys(("idle", "flooded", "added", "bare_reader"), ".2%")
    table(rows, {"transport": "", "qos": "d", "sent_per_s": ".0f", **shares})
    return Report(
        rows, [at_most("share of a core that a quarantined device costs", max(r["added"] for r in rows), BOUND)]
    )


def _measure(bench: Bench, broker: ThrowAwayBroker, *, tls: bool) -> Iterator[dict[str, Any]]:
    rate, seconds, cores, folder = bench.options.rate, bench.options.seconds, bench.cores, bench.new_folder()
    with contextlib.ExitStack() as stack:
        device = Identity.at(broker, DEVICE)
        to_reader = publish_packet(build(Topic.DRAFT, fleet=FLEET, device=DEVICE, edge=READER), DRAFT, qos=0)
        reader = stack.enter_context(
            Program("benchmarks.hostile.quarantine", cores=cores.edge, log=folder / "reader.log")
        )
        reader_filter = wildcard(Topic.DRAFT, fleet=FLEET, edge=READER)
        reader.tell(json.dumps({"reader": asdict(Identity.at(broker, READER)), "filter": reader_filter}))
        reader.wait_for("reading", timeout_s=ONLINE_S)
        with _Flood(device, to_reader, rate=rate):
            bare = _share(reader.pid, seconds)
        reader.end()
        place, lines = Identity.at(broker, EDGE), ("[quarantine]", "strikes = 50", f"first_s = {QUARANTINE_S}")
        edge = stack.enter_context(scripted_edge(place, fleet=FLEET, folder=folder, cores=cores.edge, lines=lines))
        time.sleep(SETTLE_S)
        idle = _share(edge.pid, seconds)
        for qos in (0, 1):
            packet = publish_packet(build(Topic.DRAFT, fleet=FLEET, device=DEVICE, edge=EDGE), DRAFT, qos=qos)
            with _Flood(device, packet, rate=rate) as flood:
                time.sleep(SETTLE_S)
                sent, began = flood.sent, time.monotonic()
                flooded = _share(edge.pid, seconds)
                sent_per_s = (flood.sent - sent) / (time.monotonic() - began)
            shares = {"idle": idle, "flooded": flooded, "added": flooded - idle, "bare_reader": bare}
            yield {"transport": "TLS" if tls else "plain", "qos": qos, "sent_per_s": sent_per_s, **shares}
        if not edge.lives or "quarantin" not in edge.log.read_text():
            raise BenchError(f"The edge has not shut the device out; see {edge.log}.")


def _share(pid: int, seconds: float) -> float:
    before, began = sum(thread_times_s(pid).values()), time.monotonic()
    time.sleep(seconds)
    return (sum(thread_times_s(pid).values()) - before) / (time.monotonic() - began)


class _Flood:
    """One device that sends the same packet at a rate, on a thread; a context manager."""

    def __init__(self, device: Identity, packet: bytes, *, rate: float) -> None:
        self.sent = 0
        self._sock = device.connect().socket
        self._packet = packet
        self._rate = rate
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._send, name="flood", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        self._sock.close()

    def _send(self) -> None:
        began = time.monotonic()
        while not self._stopping.wait(TURN_S):
            due = int((time.monotonic() - began) * self._rate) - self.sent
            self._sock.settimeout(ONLINE_S)
            self._sock.sendall(self._packet * due)
            self.sent += due
            self._sock.settimeout(0.0)
            drain(self._sock)


def drain(sock: socket.socket) -> int:
    size = 0
    while True:
        try:
            piece = sock.recv(CHUNK)
        except (BlockingIOError, ssl.SSLWantReadError):
            return size
        if not piece:
            raise BenchError("The broker has ended a connection of the benchmark.")
        size += len(piece)


def main() -> None:
    """Read what a broker sends, without decoding, until SIGTERM."""
    task = json.loads(sys.stdin.readline())
    client = Identity(**task["reader"]).connect()
    client.subscribe(task["filter"], qos=0)
    sock = client.socket
    print("reading", flush=True)
    sock.setblocking(False)  # noqa: FBT003 - the standard library's
    while True:
        time.sleep(_PAUSE_S)
        drain(sock)


if __name__ == "__main__":
    main()
