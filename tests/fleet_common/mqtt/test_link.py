import heapq
import random
import statistics
import threading
from collections import Counter
from typing import Final

import pytest
from paho.mqtt.client import topic_matches_sub

from fleet_common.mqtt.errors import NOT_AUTHORIZED, PublishRejected
from fleet_common.mqtt.link import (
    matches,
    publish_confirmed,
    split_share,
)
from fleet_common.mqtt.paho_link import Backoff, PahoLink
from fleet_common.mqtt.settings import LinkSettings
from tests.support.links import START_S
from tests.support.memory_broker import MemoryBroker
from tests.support.memory_link import MemoryLink
from tests.support.scripted_broker import ScriptedBroker, connack, puback
from tests.support.waiting import until


def test_no_answer_is_an_error() -> None:
    link = MemoryLink(MemoryBroker(), "a")  # nobody pumps
    link.start(timeout_s=0)
    with pytest.raises(PublishRejected) as caught:
        publish_confirmed(link, "t", b"", timeout_s=0.01)
    assert caught.value.reason is None


def test_a_rejection_is_an_error() -> None:
    with ScriptedBroker(connack()) as broker:

        def reject() -> None:
            until(lambda: len(broker.publishes()) == 1)
            broker.send(puback(broker.identifiers()[0], NOT_AUTHORIZED))

        link = PahoLink(LinkSettings(client_id="a", port=broker.port))
        link.start(timeout_s=START_S)
        thread = threading.Thread(target=reject)
        thread.start()
        with pytest.raises(PublishRejected) as caught:
            publish_confirmed(link, "t", b"", timeout_s=START_S)
        assert caught.value.reason == NOT_AUTHORIZED
        thread.join()
        link.stop()


FILTERS = ["a", "a/b", "a/+", "+/b", "+", "#", "a/#", "a/b/#", "+/+/c", "/a", "+/a", "a/", "a/+/c", "$SYS/#", "$SYS/+"]
TOPICS = ["a", "a/b", "a/b/c", "b/b", "/a", "a/", "a//c", "b", "$SYS", "$SYS/a", "$SYS/a/b", ""]


@pytest.mark.parametrize("topic_filter", FILTERS)
@pytest.mark.parametrize("topic", TOPICS)
def test_matching_agrees_with_an_independent_matcher(topic_filter: str, topic: str) -> None:
    assert matches(topic_filter, topic) == topic_matches_sub(topic_filter, topic)


def test_a_share_prefix_plays_no_part_in_matching() -> None:
    assert matches("$share/edges/a/+", "a/b")
    assert not matches("$share/edges/a/+", "b/b")
    assert split_share("$share/edges/a/+") == ("edges", "a/+")
    assert split_share("a/$share/b") == (None, "a/$share/b")


def backoff_of(seed: int = 0) -> Backoff:
    return Backoff(minimum_s=0.5, maximum_s=4.0, refused_s=30.0, rng=random.Random(seed))


def delays(seed: int, count: int = 12, *, refused: bool = False) -> list[float]:
    backoff = backoff_of(seed)
    return [backoff.next_delay_s(refused=refused) for _ in range(count)]


class Longest(random.Random):
    def uniform(self, a: float, b: float) -> float:
        return max(a, b)


def steps_of() -> Backoff:
    return Backoff(minimum_s=0.5, maximum_s=4.0, refused_s=30.0, rng=Longest())


@pytest.mark.parametrize(("refused", "ceiling_s"), [(False, 4.0), (True, 30.0)])
def test_each_delay_lies_within_its_doubling_step(refused: bool, ceiling_s: float) -> None:
    steps = [min(0.5 * 2**attempt, ceiling_s) for attempt in range(12)]
    drawn = [delays(seed, refused=refused) for seed in range(200)]
    for attempt, step in enumerate(steps):
        of_this = [delay[attempt] for delay in drawn]
        # Of 200 draws from [0, step], all below 0.9 or all above 0.1 of it is a false alarm in 10^9.
        assert 0.0 <= min(of_this) < 0.1 * step
        assert 0.9 * step < max(of_this) <= step


def test_a_broker_that_answers_again_after_refusals_is_soon_found_again_when_it_dies() -> None:
    backoff = steps_of()
    assert [backoff.next_delay_s(refused=True) for _ in range(8)] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert backoff.next_delay_s() == 4.0


def test_a_connection_waits_back_what_the_delays_have_grown_by_in_proportion_to_its_life() -> None:
    backoff = steps_of()
    assert [backoff.next_delay_s() for _ in range(5)] == [0.5, 1.0, 2.0, 4.0, 4.0]
    backoff.held(1.0)
    assert backoff.next_delay_s() == 2.0
    backoff.held(2.5)
    assert backoff.next_delay_s() == pytest.approx(4.0 / 2**2.5)
    backoff.held(1e9)
    assert backoff.next_delay_s() == 0.5


DEFAULTS: Final = LinkSettings(client_id="device-1")
SYN_AT_S: Final = (0.0, 1.0, 3.0, 7.0, 15.0)  # when Linux sends a connect that nobody answers, and again


def simulate(
    *,
    devices: int,
    outage_s: float,
    silent: bool = False,
    connects_per_s: float = float("inf"),
    settings: LinkSettings = DEFAULTS,
) -> dict[str, float]:
    """Simulate a fleet that loses its broker for a while; seconds are counted from the broker's return.

    Where the machine is silent, each attempt waits for TCP to give up. The broker handles one connect after another, as
    mosquitto does; a device that waits too long gives up and tries again.
    """
    rng = random.Random(7)
    limits = {"minimum_s": settings.min_backoff_s, "maximum_s": settings.max_backoff_s}
    backoffs = [Backoff(**limits, refused_s=settings.refused_backoff_s, rng=rng) for _ in range(devices)]
    attempts = [(backoff.next_delay_s(), device) for device, backoff in enumerate(backoffs)]
    heapq.heapify(attempts)
    found_s: dict[int, float] = {}
    connects: Counter[int] = Counter()
    free_at, given_up = outage_s, 0  # when the broker has worked off all that has come
    rest_s = settings.connect_timeout_s if silent else 0.0
    while attempts:
        at, device = heapq.heappop(attempts)
        knocks = [at + syn for syn in SYN_AT_S if syn <= rest_s]
        reached = next((each for each in knocks if each >= outage_s), None)
        if reached is None:
            heapq.heappush(attempts, (at + rest_s + backoffs[device].next_delay_s(), device))
            continue
        found_s.setdefault(device, reached - outage_s)
        connects[int(reached - outage_s)] += 1
        free_at = max(free_at, reached) + 1 / connects_per_s
        if free_at - reached > settings.handshake_s:
            given_up += 1  # the broker does its work all the same
            heapq.heappush(attempts, (reached + settings.handshake_s + backoffs[device].next_delay_s(), device))
    percentiles = statistics.quantiles(found_s.values(), n=20, method="inclusive")
    peak = max(connects.values())
    return {"p50_s": percentiles[9], "p95_s": percentiles[18], "peak_per_s": peak, "given_up": given_up}


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("outage_s", [0.5, 60.0, 3600.0])
def test_a_broker_that_is_back_is_found_within_two_seconds_at_the_median(outage_s: float, silent: bool) -> None:
    recovery = simulate(devices=400, outage_s=outage_s, silent=silent)
    # Theirs are at most 1.2 s and 3.6 s. Among 400 devices the standard error of the median is 0.08 s, of the
    # percentile 0.15 s: with any seed a false alarm is less likely than 10^-9.
    assert recovery["p50_s"] <= 2.0
    assert recovery["p95_s"] <= 5.0


def test_a_fleet_does_not_come_back_as_one() -> None:
    recovery = simulate(devices=2000, outage_s=60.0)
    # A uniform distribution over four seconds would have a quarter in each; delays drawn from [0, 4] have 7/16 in the
    # first. 0.5 is more than 5 standard errors (0.011) above it.
    assert recovery["peak_per_s"] <= 0.5 * 2000


def test_a_broker_that_a_whole_fleet_comes_back_to_is_not_given_up_while_it_works() -> None:
    recovery = simulate(devices=5000, outage_s=5.0, connects_per_s=600.0)
    assert recovery["given_up"] == 0
    impatient = LinkSettings(client_id="device-1", handshake_s=4.0)
    assert simulate(devices=5000, outage_s=5.0, connects_per_s=600.0, settings=impatient)["given_up"]
