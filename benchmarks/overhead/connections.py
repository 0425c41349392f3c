"""Connections: a QoS 1 round through mosquitto, without TCP_NODELAY and over mutual TLS (milliseconds and bytes).

A round is what the main job does most: a residual draft of five tokens and a verdict, with alias and expiry, and the
two acknowledgements. Without TCP_NODELAY a small packet waits for the acknowledgement of the one before it, which the
peer delays by 40 ms. Bytes are counted on the device's connection by a relay, without the heads of TCP; round trips
are timed without the relay, in turns. Takes a minute.
"""

import argparse
import queue
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Any, Final

import numpy as np

from benchmarks.harness import Bench, Report, at_most, number_of, table, tls_broker
from fleet_common.mqtt.link import Message
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import LinkSettings, TlsSettings
from schemas.codec import encode_draft, encode_verdict
from schemas.messages import Draft, Verdict
from schemas.topics import Topic, build, wildcard
from tests.support.relay import Relay

_EDGE, _DEVICE = "edge-1", "device-1"
_TOKENS, _COUNTS = (101, 20_202, 30_303, 404, 45_505), (30_000, 1_000, 65_536, 20_000, 9_000)
DRAFT: Final = encode_draft(
    Draft(handle=1, round=200, epoch=20, base=900, fix=17_000, tokens=_TOKENS, counts=_COUNTS, digest=0x1234_5678)
)
VERDICT: Final = encode_verdict(Verdict(handle=1, round=200, accepted=5, next=33_000, queue_ms=1.5, compute_ms=42.25))
_EXPIRY_S: Final = 30
_TIMEOUT_S: Final = 10.0
_WARM_UP, _BLOCK = 20, 50
_PLAIN_MS, _TLS_MS = 10.0, 5.0
"""Goals: TCP_NODELAY is set on both sides; TLS is a small part of a round."""


class Pair:
    def __init__(self, fleet: str, device: LinkSettings, edge: LinkSettings) -> None:
        self._draft = build(Topic.DRAFT, fleet=fleet, device=_DEVICE, edge=_EDGE)
        verdict = build(Topic.VERDICT, fleet=fleet, device=_DEVICE)
        self._arrived: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._device, self._edge = PahoLink(device), PahoLink(edge)

        def answer(_: Message) -> None:
            self._edge.publish(verdict, VERDICT, alias=True, expiry_s=_EXPIRY_S)

        self._edge.subscribe(wildcard(Topic.DRAFT, fleet=fleet, edge=_EDGE), answer)
        self._device.subscribe(verdict, lambda message: self._arrived.put(message.payload))
        self._edge.start(timeout_s=_TIMEOUT_S)
        self._device.start(timeout_s=_TIMEOUT_S)

    def close(self) -> None:
        self._device.stop()
        self._edge.stop()

    def rounds(self, number: int) -> list[float]:
        """Return the milliseconds of each round."""
        times_ms = []
        for _ in range(number):
            began = time.perf_counter()
            self._device.publish(self._draft, DRAFT, alias=True, expiry_s=_EXPIRY_S)
            try:
                self._arrived.get(timeout=_TIMEOUT_S)
            except queue.Empty:
                raise TimeoutError(f"A verdict did not come within {_TIMEOUT_S} s.") from None
            times_ms.append(1000 * (time.perf_counter() - began))
        return times_ms


Settings = Callable[[str, int], LinkSettings]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=number_of(int, 2), default=1000, help="timed rounds of each kind")


def run(bench: Bench) -> Report:
    with (
        bench.broker(_EDGE) as plain,
        tls_broker(bench.folder / "broker", bench.fleet, [_EDGE], [_DEVICE]) as local,
        ExitStack() as stack,
    ):

        def tls(name: str, port: int) -> LinkSettings:
            files = local.identity(name)
            return LinkSettings(client_id=name, port=port, tls=TlsSettings(files.ca, files.certificate, files.key))

        kinds: dict[str, tuple[int, Settings]] = {
            "plain": (plain.port, lambda name, port: LinkSettings(client_id=name, username=name, port=port)),
            "tls": (local.port, tls),
        }
        counted = {kind: _count(bench.fleet, port, settings) for kind, (port, settings) in kinds.items()}
        slow = stack.enter_context(closing(_pair(bench.fleet, plain.port, plain.port, _delayed)))
        times = {"plain, no TCP_NODELAY": slow.rounds(max(2, bench.options.count // 20))}
        slow.close()
        pairs = {
            kind: stack.enter_context(closing(_pair(bench.fleet, port, port, settings)))
            for kind, (port, settings) in kinds.items()
        }
        for pair in pairs.values():
            pair.rounds(_WARM_UP)
        for _ in range(max(1, bench.options.count // _BLOCK)):
            for kind, pair in pairs.items():
                times[kind] = times.get(kind, []) + pair.rounds(_BLOCK)
    rows = [{"kind": kind, **_summary(own), **counted.get(kind, {})} for kind, own in times.items()]
    sizes = {"connect_up": "d", "connect_down": "d", "round_up": ".1f", "round_down": ".1f"}
    table(rows, {"kind": "", "p50_ms": ".2f", "p99_ms": ".2f", **sizes})
    by_kind = {row["kind"]: row for row in rows}
    extra = sum(by_kind["tls"][key] - by_kind["plain"][key] for key in ("round_up", "round_down"))
    ratio = by_kind["tls"]["p50_ms"] / by_kind["plain"]["p50_ms"]
    print(f"payload: draft {len(DRAFT)} bytes, verdict {len(VERDICT)} bytes")
    print(f"TLS adds {extra:.0f} bytes to a round; its round trip is {ratio:.2f} times the plain one.")
    goals = [
        at_most("milliseconds of a plain round (median)", by_kind["plain"]["p50_ms"], _PLAIN_MS),
        at_most("milliseconds of a round over TLS (median)", by_kind["tls"]["p50_ms"], _TLS_MS),
    ]
    return Report(rows, goals)


def _delayed(name: str, port: int) -> LinkSettings:
    return LinkSettings(client_id=name, username=name, port=port, no_delay=False)


def _pair(fleet: str, device_port: int, edge_port: int, settings: Settings) -> Pair:
    return Pair(fleet, settings(_DEVICE, device_port), settings(_EDGE, edge_port))


def _count(fleet: str, port: int, settings: Settings) -> dict[str, Any]:
    """Return the bytes of a connection until it can draft, and those of a round."""
    with Relay(port) as relay, closing(_pair(fleet, relay.port, port, settings)) as pair:
        pair.rounds(_WARM_UP)  # sets the aliases
        before = relay.up, relay.down
        pair.rounds(_BLOCK)
        up, down = ((now - then) / _BLOCK for now, then in zip((relay.up, relay.down), before, strict=True))
    with Relay(port) as relay, closing(_pair(fleet, relay.port, port, settings)):
        connected = relay.up, relay.down
    return {"connect_up": connected[0], "connect_down": connected[1], "round_up": up, "round_down": down}


def _summary(times_ms: list[float]) -> dict[str, Any]:
    p50, p99 = np.percentile(times_ms, [50, 99])
    return {"rounds": len(times_ms), "p50_ms": float(p50), "p99_ms": float(p99)}
