"""Round-trip benchmark: QoS 1 through mosquitto, with and without TCP_NODELAY in one run.

A device publishes on its draft topic, the edge echoes the payload on the verdict topic, both at QoS 1 with topic alias
and expiry, as hot messages are. Without TCP_NODELAY a small packet waits for the acknowledgement of the one before it,
which the peer delays by 40 ms; the figure is here so that nobody takes the option for decoration.
"""

import argparse
import dataclasses
import json
import queue
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from broker_config.broker import Broker
from broker_config.errors import BrokerError
from broker_config.processes.runner import MosquittoProcess
from fleet_link.errors import LinkError
from fleet_link.link import Message
from fleet_link.paho_link import PahoLink
from fleet_link.settings import LinkSettings
from schemas.topics import Topic, build, wildcard

__all__ = ["EchoTimes", "main", "measure"]

FLEET, EDGE, DEVICE = "home", "edge-1", "device-1"
DRAFT_BYTES = 40  # a five-token draft
EXPIRY_S = 30
TIMEOUT_S = 10.0
WARM_UP = 20
BOUND_MS = 10.0


@dataclasses.dataclass(frozen=True, slots=True)
class EchoTimes:
    """What was measured.

    Attributes:
        no_delay: Whether both links sent small packets at once.
        count: Round trips.
        p50_ms: Median.
        p99_ms: 99th percentile.
        max_ms: Longest.
    """

    no_delay: bool
    count: int
    p50_ms: float
    p99_ms: float
    max_ms: float

    @classmethod
    def of(cls, times_ms: Sequence[float], *, no_delay: bool) -> Self:
        """Summarize two or more measured times."""
        percentiles = statistics.quantiles(times_ms, n=100, method="inclusive")
        return cls(
            no_delay=no_delay,
            count=len(times_ms),
            p50_ms=round(percentiles[49], 3),
            p99_ms=round(percentiles[98], 3),
            max_ms=round(max(times_ms), 3),
        )


def measure(port: int, *, count: int, no_delay: bool) -> EchoTimes:
    """Time `count` echoes, one after the other, through the broker on a loopback port.

    Raises:
        LinkError: The broker is not there.
        TimeoutError: An echo did not come.
    """
    draft = build(Topic.DRAFT, fleet=FLEET, device=DEVICE, edge=EDGE)
    verdict = build(Topic.VERDICT, fleet=FLEET, device=DEVICE)
    device, edge = (
        PahoLink(LinkSettings(client_id=name, username=name, port=port, no_delay=no_delay)) for name in (DEVICE, EDGE)
    )
    echoes: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def echo(message: Message) -> None:
        edge.publish(verdict, message.payload, alias=True, expiry_s=EXPIRY_S)

    edge.subscribe(wildcard(Topic.DRAFT, fleet=FLEET, edge=EDGE), echo)
    device.subscribe(verdict, lambda message: echoes.put(message.payload))
    times_ms = []
    try:
        edge.start(timeout_s=TIMEOUT_S)
        device.start(timeout_s=TIMEOUT_S)
        for number in range(WARM_UP + count):
            payload = number.to_bytes(DRAFT_BYTES, "little")
            began = time.perf_counter()
            device.publish(draft, payload, alias=True, expiry_s=EXPIRY_S)
            try:
                received = echoes.get(timeout=TIMEOUT_S)
            except queue.Empty:
                raise TimeoutError(f"Echo {number} did not come within {TIMEOUT_S} s.") from None
            assert received == payload
            if number >= WARM_UP:
                times_ms.append(1000 * (time.perf_counter() - began))
    finally:
        device.stop()
        edge.stop()
    return EchoTimes.of(times_ms, no_delay=no_delay)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 if the median with TCP_NODELAY is below 10 ms, 1 if not, 2 if it could not run."""
    parser = argparse.ArgumentParser(prog="benchmarks round-trip", description="QoS 1 round trips through mosquitto.")
    parser.add_argument("--count", type=int, default=1000, help="round trips with TCP_NODELAY (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    arguments = parser.parse_args(argv)
    if arguments.count < 2:
        parser.error("--count must be at least 2")
    try:
        with MosquittoProcess(Broker(fleet=FLEET, edges=(EDGE,))) as broker:
            # The slow half gets fewer, or it would take all the time there is.
            results = [
                measure(broker.port, count=arguments.count, no_delay=True),
                measure(broker.port, count=max(2, arguments.count // 10), no_delay=False),
            ]
    except (BrokerError, LinkError, TimeoutError) as error:
        print(error, file=sys.stderr)
        return 2
    print("TCP_NODELAY  round trips   p50 ms   p99 ms   max ms")
    for result in results:
        name = "set" if result.no_delay else "not set"
        print(f"{name:11}  {result.count:11}  {result.p50_ms:7.2f}  {result.p99_ms:7.2f}  {result.max_ms:7.2f}")
    if arguments.json is not None:
        report = {"round_trips": [dataclasses.asdict(result) for result in results]}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if results[0].p50_ms < BOUND_MS else 1


if __name__ == "__main__":
    sys.exit(main())
