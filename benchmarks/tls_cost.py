"""TLS benchmark: mutual TLS beside plain TCP in one run; bytes a round, bytes to connect, round trip.

A round is what the main job does most: a residual draft of five tokens at QoS 1 and a verdict with a bonus token, both
with alias and expiry, and the two acknowledgements. Bytes are counted on the device's connection by a relay: all that
TCP carries, without its own heads. Round trips are timed without the relay, in turns, so that the machine's moods hit
both.
"""

import argparse
import contextlib
import dataclasses
import json
import queue
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from broker_config.broker import Broker
from broker_config.errors import BrokerError
from broker_config.processes.local import LocalBroker
from broker_config.processes.runner import MosquittoProcess
from fleet_cli.broker.init import make_local_broker
from fleet_link.errors import LinkError
from fleet_link.link import Message
from fleet_link.paho_link import PahoLink
from fleet_link.settings import LinkSettings, TlsSettings
from schemas.codec import encode_draft, encode_verdict
from schemas.messages import Draft, Verdict
from schemas.topics import Topic, build, wildcard
from tests.support.relay import Relay

__all__ = ["Cost", "main"]

FLEET, EDGE, DEVICE = "home", "edge-1", "device-1"
DRAFT = encode_draft(
    Draft(
        handle=1,
        round=200,
        epoch=20,
        base=900,
        fix=17_000,
        tokens=(101, 20_202, 30_303, 404, 45_505),
        counts=(30_000, 1_000, 65_536, 20_000, 9_000),
        digest=0x1234_5678,
    )
)
VERDICT = encode_verdict(Verdict(handle=1, round=200, accepted=5, next=33_000, queue_ms=1.5, compute_ms=42.25))
EXPIRY_S = 30
TIMEOUT_S = 10.0
WARM_UP = 20
BLOCK = 50
# TLS must stay a small part of a round, whose verification alone takes tens of milliseconds.
BOUND_MS = 5.0


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
    """What one kind of connection costs.

    Attributes:
        kind: `plain` or `tls`.
        connect_up: Bytes from the device until it can draft.
        connect_down: Bytes to it.
        round_up: Bytes from the device in one round.
        round_down: Bytes to it.
        p50_ms: Median round trip.
        p99_ms: 99th percentile.
    """

    kind: str
    connect_up: int
    connect_down: int
    round_up: float
    round_down: float
    p50_ms: float
    p99_ms: float


class _Pair:
    """A device and an edge that answers each of its drafts."""

    def __init__(self, device: LinkSettings, edge: LinkSettings) -> None:
        self._draft = build(Topic.DRAFT, fleet=FLEET, device=DEVICE, edge=EDGE)
        verdict = build(Topic.VERDICT, fleet=FLEET, device=DEVICE)
        self._arrived: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._device, self._edge = PahoLink(device), PahoLink(edge)

        def answer(_: Message) -> None:
            self._edge.publish(verdict, VERDICT, alias=True, expiry_s=EXPIRY_S)

        self._edge.subscribe(wildcard(Topic.DRAFT, fleet=FLEET, edge=EDGE), answer)
        self._device.subscribe(verdict, lambda message: self._arrived.put(message.payload))

    def start(self) -> None:
        self._edge.start(timeout_s=TIMEOUT_S)
        self._device.start(timeout_s=TIMEOUT_S)

    def stop(self) -> None:
        self._device.stop()
        self._edge.stop()

    def rounds(self, count: int) -> list[float]:
        """Return the milliseconds of each of `count` rounds.

        Raises:
            TimeoutError: A verdict did not come.
        """
        times_ms = []
        for _ in range(count):
            began = time.perf_counter()
            self._device.publish(self._draft, DRAFT, alias=True, expiry_s=EXPIRY_S)
            try:
                self._arrived.get(timeout=TIMEOUT_S)
            except queue.Empty:
                raise TimeoutError(f"A verdict did not come within {TIMEOUT_S} s.") from None
            times_ms.append(1000 * (time.perf_counter() - began))
        return times_ms


Settings = Callable[[str, int], LinkSettings]


def _bytes(port: int, settings: Settings, rounds: int) -> tuple[int, int, float, float]:
    with Relay(port) as relay:
        pair = _Pair(settings(DEVICE, relay.port), settings(EDGE, port))
        pair.start()
        try:
            pair.rounds(WARM_UP)  # sets the aliases
            before = relay.up, relay.down
            pair.rounds(rounds)
            after = relay.up, relay.down
        finally:
            pair.stop()
    with Relay(port) as relay:
        pair = _Pair(settings(DEVICE, relay.port), settings(EDGE, port))
        pair.start()
        connected = relay.up, relay.down
        pair.stop()
    return *connected, (after[0] - before[0]) / rounds, (after[1] - before[1]) / rounds


@contextlib.contextmanager
def _brokers(folder: Path) -> Iterator[dict[str, tuple[int, Settings]]]:
    make_local_broker(folder, fleet=FLEET, edges=[EDGE], devices=[DEVICE], port=1)
    with MosquittoProcess(Broker(fleet=FLEET, edges=(EDGE,))) as plain, LocalBroker(folder, port=0) as local:

        def with_tls(name: str, port: int) -> LinkSettings:
            files = local.identity(name)
            tls = TlsSettings(files.ca, files.certificate, files.key)
            return LinkSettings(client_id=name, port=port, tls=tls)

        def without(name: str, port: int) -> LinkSettings:
            return LinkSettings(client_id=name, username=name, port=port)

        yield {"plain": (plain.port, without), "tls": (local.port, with_tls)}


def _measure(count: int, folder: Path) -> list[Cost]:
    with _brokers(folder) as brokers, contextlib.ExitStack() as stack:
        counted = {kind: _bytes(port, settings, BLOCK) for kind, (port, settings) in brokers.items()}
        pairs = {kind: _Pair(make(DEVICE, port), make(EDGE, port)) for kind, (port, make) in brokers.items()}
        times_ms: dict[str, list[float]] = {kind: [] for kind in pairs}
        for pair in pairs.values():
            stack.callback(pair.stop)
            pair.start()
            pair.rounds(WARM_UP)
        for _ in range(max(1, count // BLOCK)):
            for kind, pair in pairs.items():
                times_ms[kind] += pair.rounds(BLOCK)
    costs = []
    for kind, (connect_up, connect_down, round_up, round_down) in counted.items():
        percentiles = statistics.quantiles(times_ms[kind], n=100, method="inclusive")
        p50_ms, p99_ms = round(percentiles[49], 3), round(percentiles[98], 3)
        costs.append(Cost(kind, connect_up, connect_down, round_up, round_down, p50_ms, p99_ms))
    return costs


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 if a round over TLS takes less than 5 ms (median), 1 if not, 2 if it could not run."""
    parser = argparse.ArgumentParser(prog="benchmarks tls-cost", description="Mutual TLS beside plain TCP.")
    parser.add_argument("--count", type=int, default=1000, help="timed rounds of each kind (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    arguments = parser.parse_args(argv)
    if arguments.count < 1:
        parser.error("--count must be at least 1")
    try:
        with tempfile.TemporaryDirectory(prefix="fleet-tls-") as folder:
            plain, tls = _measure(arguments.count, Path(folder) / "broker")
    except (BrokerError, LinkError, TimeoutError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"payload: draft {len(DRAFT)} bytes, verdict {len(VERDICT)} bytes")
    print("        connect up  down   round up   down   p50 ms   p99 ms")
    for cost in (plain, tls):
        counted = f"{cost.connect_up:10}  {cost.connect_down:4}  {cost.round_up:9.1f}  {cost.round_down:5.1f}"
        print(f"{cost.kind:8}{counted}  {cost.p50_ms:7.2f}  {cost.p99_ms:7.2f}")
    extra = tls.round_up + tls.round_down - plain.round_up - plain.round_down
    print(
        f"TLS adds {extra:.0f} bytes to a round; its round trip is {tls.p50_ms / plain.p50_ms:.2f} times the plain one."
    )
    if arguments.json is not None:
        report = {"costs": [dataclasses.asdict(cost) for cost in (plain, tls)]}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if tls.p50_ms < BOUND_MS else 1


if __name__ == "__main__":
    sys.exit(main())
