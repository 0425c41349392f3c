"""Reconnect: how soon a broker that is back is found, and what a whole fleet that finds it does to it (seconds).

Simulated, with the back-off that the link uses and a clock of its own: a fleet that loses its broker for a while. Once
where the machine answers that nobody listens, once where it is silent, so that each attempt waits for TCP to give up.
The broker works the connects off one by one, as mosquitto does; a device that waits too long gives up and comes again.
With `--real` links over mutual TLS to a mosquitto that is killed and started again and again, and the processor time
that a connect costs it. Takes a minute, with `--real` five.
"""

import argparse
import contextlib
import heapq
import random
import statistics
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from benchmarks.harness import Bench, Report, at_most, cpu_s, number_of, table, tls_broker
from broker_config.processes import LocalBroker
from fleet_common.mqtt.paho_link import Backoff, PahoLink
from fleet_common.mqtt.settings import LinkSettings, TlsSettings

DEFAULTS: Final = LinkSettings(client_id="device-1")
OUTAGES_S: Final = (0.0, 1.0, 60.0, 3600.0)
SYN_AT_S: Final = (0.0, 1.0, 3.0, 7.0, 15.0)  # when Linux sends a connect that nobody answers, and again
FLEET, EDGE, NEWCOMER = "home", "edge-1", "newcomer"
START_S: Final = 20.0
LONGEST_OUTAGE_S: Final = 10.0
MEDIAN_S, P95_S = 2.0, 5.0  # what is promised


def simulate(
    *,
    devices: int,
    outage_s: float,
    rng: random.Random,
    silent: bool = False,
    connects_per_s: float = float("inf"),
    settings: LinkSettings = DEFAULTS,
) -> dict[str, Any]:
    """Return the figures of an outage; seconds are counted from the broker's return."""
    backoffs = [
        Backoff(
            minimum_s=settings.min_backoff_s,
            maximum_s=settings.max_backoff_s,
            refused_s=settings.refused_backoff_s,
            rng=rng,
        )
        for _ in range(devices)
    ]
    attempts = [(backoff.next_delay_s(), device) for device, backoff in enumerate(backoffs)]
    heapq.heapify(attempts)
    found_s: dict[int, float] = {}
    knocks: Counter[int] = Counter()
    connects: Counter[int] = Counter()
    free_at = outage_s  # when the broker has worked off all that has come
    given_up, back_s = 0, 0.0
    while attempts:
        at, device = heapq.heappop(attempts)
        knocks[int(at)] += 1
        reached = _reached(at, outage_s, timeout_s=settings.connect_timeout_s if silent else 0.0)
        if reached is None:
            rest_s = settings.connect_timeout_s if silent else 0.0
            heapq.heappush(attempts, (at + rest_s + backoffs[device].next_delay_s(), device))
            continue
        found_s.setdefault(device, reached - outage_s)
        connects[int(reached - outage_s)] += 1
        free_at = max(free_at, reached) + 1 / connects_per_s
        if free_at - reached <= settings.handshake_s:
            back_s = max(back_s, free_at - outage_s)
            continue
        given_up += 1  # the broker does its work all the same
        heapq.heappush(attempts, (reached + settings.handshake_s + backoffs[device].next_delay_s(), device))
    last = max(1, min(60, int(outage_s)))
    during = [knocks[second] for second in range(int(outage_s) - last, int(outage_s))]
    percentiles = statistics.quantiles(found_s.values(), n=20, method="inclusive")
    return {
        "outage_s": outage_s,
        "silent": silent,
        "p50_s": round(percentiles[9], 2),
        "p95_s": round(percentiles[18], 2),
        "attempts_per_s": round(statistics.mean(during), 1) if outage_s else 0.0,
        "peak_per_s": max(connects.values()),
        "all_back_s": round(back_s, 1),
        "given_up": given_up,
    }


def _reached(at: float, outage_s: float, *, timeout_s: float) -> float | None:
    """Return when a connect that begins at `at` reaches the broker; None if it fails."""
    if timeout_s:
        return next((at + syn for syn in SYN_AT_S if syn <= timeout_s and at + syn >= outage_s), None)
    return at if at >= outage_s else None


@dataclass(slots=True)
class _Watch:
    back: threading.Event
    at: float = 0.0

    def __call__(self, online: bool) -> None:
        if online:
            self.at = time.monotonic()
            self.back.set()


def _measure(links: int, kills: int, rng: random.Random, folder: Path) -> dict[str, float]:
    """Kill a real broker repeatedly; return the cost of its return for the links and the broker."""
    names = [f"device-{number}" for number in range(1, links + 1)]
    waited_s: list[float] = []
    with tls_broker(folder, FLEET, [EDGE], [*names, NEWCOMER]) as local, contextlib.ExitStack() as stack:
        watches = []
        for name in names:
            files = local.identity(name)
            tls = TlsSettings(files.ca, files.certificate, files.key)
            link = PahoLink(LinkSettings(client_id=name, port=local.port, tls=tls))
            watches.append(_Watch(threading.Event()))
            link.on_connection(watches[-1])
            stack.callback(link.stop)
            link.start(timeout_s=START_S)
        for number in range(kills):
            for watch in watches:
                watch.back.clear()
            local.kill()
            time.sleep(rng.uniform(0.0, LONGEST_OUTAGE_S))
            local.start()
            listening = time.monotonic()
            for watch in watches:
                if not watch.back.wait(START_S):
                    raise TimeoutError(f"After kill {number + 1} a link was not back within {START_S:.0f} s.")
                waited_s.append(max(0.0, watch.at - listening))
        connect_s = _cpu_of_a_connect(local)
    percentiles = statistics.quantiles(waited_s, n=20, method="inclusive")
    return {
        "links": links,
        "kills": kills,
        "p50_s": round(percentiles[9], 2),
        "p95_s": round(percentiles[18], 2),
        "max_s": round(max(waited_s), 2),
        "broker_ms_per_connect": round(1000 * connect_s, 2),
    }


def _cpu_of_a_connect(local: LocalBroker, count: int = 200) -> float:
    """Return the broker's processor seconds for one connect over mutual TLS."""
    process = psutil.Process(local.pid)
    files = local.identity(NEWCOMER)
    settings = LinkSettings(
        client_id=NEWCOMER, port=local.port, tls=TlsSettings(files.ca, files.certificate, files.key)
    )
    before = cpu_s(process)
    for _ in range(count):
        link = PahoLink(settings)
        link.start(timeout_s=START_S)
        link.stop()
    return (cpu_s(process) - before) / count


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--devices", type=number_of(int, 2), default=5000, help="simulated (default: %(default)s)")
    parser.add_argument("--capacity", type=float, default=700.0, metavar="N", help="connects a second of the broker")
    parser.add_argument("--outage", type=float, nargs="+", default=OUTAGES_S, metavar="SECONDS")
    parser.add_argument("--real", action="store_true", help="also kill a real mosquitto")
    parser.add_argument("--links", type=number_of(int, 1), default=8, help="to the real one (default: %(default)s)")
    parser.add_argument("--kills", type=number_of(int, 1), default=20, help="of the real one (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)


def run(bench: Bench) -> Report:
    options, rng = bench.options, random.Random(bench.options.seed)
    rows = [
        simulate(devices=options.devices, outage_s=outage_s, rng=rng, silent=silent, connects_per_s=options.capacity)
        for silent in (False, True)
        for outage_s in options.outage
    ]
    rates = {"attempts_per_s": ".1f", "peak_per_s": "d", "all_back_s": ".1f", "given_up": "d"}
    table(rows, {"outage_s": ".0f", "silent": "", "p50_s": ".2f", "p95_s": ".2f", **rates}, title="simulated")
    real: list[dict[str, float]] = []
    if options.real:
        real = [_measure(options.links, options.kills, rng, bench.folder / "broker")]
        times = {"p50_s": ".2f", "p95_s": ".2f", "max_s": ".2f"}
        table(real, {"links": "d", "kills": "d", **times, "broker_ms_per_connect": ".2f"}, title="a real mosquitto")
    found = [*rows, *real]
    goals = [
        at_most("seconds until a broker is found, median of the worst", max(row["p50_s"] for row in found), MEDIAN_S),
        at_most("the same, 95th percentile", max(row["p95_s"] for row in found), P95_S),
    ]
    return Report(rows, goals, more={"real": real})
