"""Simulation of a fleet that loses its broker for a while, with the back-off of the link (seconds).

Where the machine is silent, each attempt waits for TCP to give up. The broker handles one connect after another, as
mosquitto does; a device that waits too long gives up and tries again.
"""

import heapq
import random
import statistics
from collections import Counter
from typing import Any, Final

from fleet_common.mqtt.paho_link import Backoff
from fleet_common.mqtt.settings import LinkSettings

DEFAULTS: Final = LinkSettings(client_id="device-1")
SYN_AT_S: Final = (0.0, 1.0, 3.0, 7.0, 15.0)  # when Linux sends a connect that nobody answers, and again


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
