import contextlib
from collections.abc import Iterator

import pytest

from broker_config.broker import Broker
from broker_config.processes import EmbeddedBroker, MosquittoProcess
from fleet_common.mqtt.errors import ConnectFailed, NotConnected, PacketTooLarge
from fleet_common.mqtt.link import NO_MATCHING_SUBSCRIBERS, Link, Message, PublishOutcome, Will
from schemas.topics import Topic, build, wildcard
from tests.support.brokers import require_mosquitto
from tests.support.links import START_S, Harness, Inbox, MemoryHarness, PahoHarness

FLEET = "home"
EDGE = "edge-1"
OTHER_EDGE = "edge-2"
DEVICE = "device-1"
OPENS = wildcard(Topic.OPEN, fleet=FLEET)
LIMIT = 4096


def topic(kind: Topic, device: str = DEVICE) -> str:
    return build(kind, fleet=FLEET, device=device)


DRAFT = build(Topic.DRAFT, fleet=FLEET, device=DEVICE, edge=EDGE)
DRAFTS = wildcard(Topic.DRAFT, fleet=FLEET, edge=EDGE)


@pytest.fixture(params=["memory", pytest.param("mosquitto", marks=pytest.mark.broker), "rumqttd"])
def harness(request: pytest.FixtureRequest) -> Iterator[Harness]:
    description = Broker(fleet=FLEET, edges=(EDGE, OTHER_EDGE), max_packet_bytes=LIMIT)
    with contextlib.ExitStack() as stack:
        made: Harness
        if request.param == "memory":
            made = MemoryHarness(max_packet_bytes=LIMIT)
        elif request.param == "mosquitto":
            require_mosquitto()
            # The links' own limit is high: the broker's announced limit applies.
            made = PahoHarness(stack.enter_context(MosquittoProcess(description)))
        else:
            pytest.importorskip("iotcore")
            made = PahoHarness(stack.enter_context(EmbeddedBroker(description)), packet_bytes=LIMIT)
        stack.callback(made.close)
        yield made


@pytest.fixture
def device(harness: Harness) -> Link:
    link = harness.link(DEVICE)
    link.start(timeout_s=START_S)
    return link


def started(harness: Harness, name: str, topic_filter: str) -> tuple[Link, Inbox]:
    link, inbox = harness.link(name), Inbox()
    link.subscribe(topic_filter, inbox)
    link.start(timeout_s=START_S)
    return link, inbox


def isolate(harness: Harness, link: Link, name: str) -> None:
    harness.isolate(name)
    harness.until(lambda: not link.connected)


def isolated(harness: Harness, name: str, *, queue_messages: int = 1000) -> Link:
    """Return a link that has lost its connection."""
    link = harness.link(name, queue_messages=queue_messages)
    link.start(timeout_s=START_S)
    isolate(harness, link, name)
    return link


def settle(harness: Harness, link: Link, name: str, payload: bytes = b"barrier", *, retain: bool = False) -> None:
    """Publish, and return when the broker has answered: it has processed what was sent before."""
    answered: list[PublishOutcome] = []
    link.publish(name, payload, retain=retain, on_outcome=answered.append)
    harness.until(lambda: bool(answered))


def test_wildcard_subscriptions_get_what_matches_and_nothing_else(harness: Harness, device: Link) -> None:
    _, inbox = started(harness, EDGE, OPENS)
    other = harness.link("device-2")
    other.start(timeout_s=START_S)
    device.publish(topic(Topic.CLOSE), b"not an open")
    device.publish(topic(Topic.OPEN), b"one")
    harness.until(lambda: inbox.payloads == [b"one"])
    other.publish(topic(Topic.OPEN, "device-2"), b"two")
    harness.until(lambda: inbox.payloads == [b"one", b"two"])
    assert inbox[1].topic == topic(Topic.OPEN, "device-2")


def test_a_retained_message_reaches_who_comes_later_and_says_so(harness: Harness, device: Link) -> None:
    settle(harness, device, topic(Topic.STATE), b"online", retain=True)
    _, inbox = started(harness, EDGE, wildcard(Topic.STATE, fleet=FLEET))
    harness.until(lambda: inbox == [Message(topic(Topic.STATE), b"online", retained=True)])
    device.publish(topic(Topic.STATE), b"draining", retain=True)
    harness.until(lambda: len(inbox) == 2)
    assert inbox[1] == Message(topic(Topic.STATE), b"draining", retained=False)


def test_the_last_will_is_published_and_retained_when_a_client_vanishes(harness: Harness) -> None:
    _, inbox = started(harness, EDGE, wildcard(Topic.STATE, fleet=FLEET))
    device = harness.link(DEVICE, will=Will(topic(Topic.STATE), b"offline"))
    device.start(timeout_s=START_S)
    device.publish(topic(Topic.STATE), b"online", retain=True)
    harness.until(lambda: inbox.payloads == [b"online"])
    harness.isolate(DEVICE)
    harness.until(lambda: inbox.payloads == [b"online", b"offline"])
    monitor, later = harness.link("monitor"), Inbox()
    monitor.subscribe(topic(Topic.STATE), later)
    monitor.start(timeout_s=START_S)
    harness.until(lambda: later == [Message(topic(Topic.STATE), b"offline", retained=True)])


def test_a_goodbye_publishes_no_last_will(harness: Harness) -> None:
    _, inbox = started(harness, EDGE, f"dssd/v1/{FLEET}/+/state")
    device = harness.link(DEVICE, will=Will(topic(Topic.STATE), b"offline"))
    device.start(timeout_s=START_S)
    device.stop()
    other = harness.link("device-2")
    other.start(timeout_s=START_S)
    other.publish(topic(Topic.STATE, "device-2"), b"a later message")
    harness.until(lambda: len(inbox) > 0)
    assert inbox.payloads == [b"a later message"]


def test_messages_of_one_topic_stay_in_order(harness: Harness, device: Link) -> None:
    _, inbox = started(harness, EDGE, DRAFTS)
    sent = [b"%d" % number for number in range(300)]
    for payload in sent:
        device.publish(DRAFT, payload, alias=True, expiry_s=30)
    harness.until(lambda: len(inbox) == len(sent))
    assert inbox.payloads == sent
    assert {message.topic for message in inbox} == {DRAFT}


def test_aliased_messages_arrive_under_their_full_topic_across_a_reconnect(harness: Harness, device: Link) -> None:
    _, inbox = started(harness, EDGE, DRAFTS)
    answered: list[PublishOutcome] = []
    for payload in (b"1", b"2"):
        device.publish(DRAFT, payload, alias=True, on_outcome=answered.append)
    harness.until(lambda: len(answered) == 2)  # without the broker's answer they would be sent again
    harness.until(lambda: inbox.payloads == [b"1", b"2"])
    isolate(harness, device, DEVICE)
    for payload in (b"3", b"4"):
        device.publish(DRAFT, payload, alias=True)
    harness.reunite(DEVICE)
    harness.until(lambda: len(inbox) == 4)
    device.publish(DRAFT, b"5", alias=True)
    harness.until(lambda: len(inbox) == 5)
    assert inbox.payloads == [b"1", b"2", b"3", b"4", b"5"]
    assert {message.topic for message in inbox} == {DRAFT}
    assert device.connected


def test_what_is_retained_is_not_sent_to_a_subscriber_that_does_not_want_it(harness: Harness, device: Link) -> None:
    settle(harness, device, topic(Topic.CLOSE), b"left there", retain=True)
    settle(harness, device, DRAFT, b"left there", retain=True)
    edge, inbox = harness.link(EDGE), Inbox()
    edge.subscribe(wildcard(Topic.CLOSE, fleet=FLEET), inbox, retained=False)
    edge.start(timeout_s=START_S)
    edge.subscribe(DRAFTS, inbox, retained=False)
    isolate(harness, edge, EDGE)
    harness.reunite(EDGE)
    harness.until(lambda: edge.connected)
    device.publish(topic(Topic.CLOSE), b"said now")
    device.publish(DRAFT, b"said now")
    harness.until(lambda: len(inbox) >= 2)
    assert inbox.payloads == [b"said now", b"said now"]


def test_a_screen_drops_what_it_refuses_and_nothing_else(harness: Harness, device: Link) -> None:
    other = harness.link("device-2")
    other.start(timeout_s=START_S)
    asked: list[tuple[bytes, bool]] = []

    def accepts(name: bytes, packet_bytes: int, retained: bool) -> bool:
        assert packet_bytes > len(name)
        asked.append((name, retained))
        return b"/device-2/" not in name

    edge, inbox = harness.link(EDGE), Inbox()
    edge.subscribe(OPENS, inbox)
    edge.screen(accepts)
    edge.start(timeout_s=START_S)
    for number in range(300):  # more than a broker leaves unacknowledged
        other.publish(topic(Topic.OPEN, "device-2"), bytes(200))
        if number % 100 == 0:
            device.publish(topic(Topic.OPEN), b"%d" % number)
    harness.until(lambda: edge.counters.screened == 300 and len(inbox) == 3)
    assert inbox.payloads == [b"0", b"100", b"200"]
    assert edge.counters.received == 3
    assert set(asked) == {(topic(Topic.OPEN, name).encode(), False) for name in (DEVICE, "device-2")}


def test_a_screen_may_be_set_at_any_time_and_holds_across_reconnects(harness: Harness, device: Link) -> None:
    edge, inbox = started(harness, EDGE, OPENS)
    device.publish(topic(Topic.OPEN), b"before it")
    harness.until(lambda: inbox.payloads == [b"before it"])
    edge.screen(lambda name, *_: name != topic(Topic.OPEN).encode())
    device.publish(topic(Topic.OPEN), b"refused")
    harness.until(lambda: edge.counters.screened == 1)
    isolate(harness, edge, EDGE)
    harness.reunite(EDGE)
    harness.until(lambda: edge.connected)
    device.publish(topic(Topic.OPEN), b"refused again")
    harness.until(lambda: edge.counters.screened == 2)
    edge.screen(lambda *_: True)
    device.publish(topic(Topic.OPEN), b"let in")
    harness.until(lambda: len(inbox) == 2)
    assert inbox.payloads == [b"before it", b"let in"]


def test_a_screen_sees_whether_a_message_is_the_brokers_kept_copy(harness: Harness, device: Link) -> None:
    settle(harness, device, topic(Topic.STATE), b"online", retain=True)
    edge, inbox = harness.link(EDGE), Inbox()
    edge.screen(lambda _topic, _bytes, retained: not retained)
    edge.subscribe(wildcard(Topic.STATE, fleet=FLEET), inbox)
    edge.start(timeout_s=START_S)
    harness.until(lambda: edge.counters.screened == 1)
    device.publish(topic(Topic.STATE), b"draining", retain=True)
    harness.until(lambda: inbox.payloads == [b"draining"])


@pytest.mark.parametrize("error", [RuntimeError("a bug"), SystemExit(1)])
def test_a_screen_that_raises_lets_messages_pass(
    harness: Harness, device: Link, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    edge, inbox = harness.link(EDGE), Inbox()

    def fail(_topic: bytes, _bytes: int, _retained: bool) -> bool:
        raise error

    edge.screen(fail)
    edge.subscribe(OPENS, inbox)
    edge.start(timeout_s=START_S)
    device.publish(topic(Topic.OPEN), b"1")
    device.publish(topic(Topic.OPEN), b"2")
    harness.until(lambda: inbox.payloads == [b"1", b"2"])
    assert edge.counters.handler_errors == 2
    assert caplog.text.count("screen fails") == 1
    assert edge.counters.losses == 0


def test_after_unsubscribe_nothing_arrives(harness: Harness, device: Link) -> None:
    edge, opens = started(harness, EDGE, OPENS)
    closes = Inbox()
    edge.subscribe(wildcard(Topic.CLOSE, fleet=FLEET), closes)
    edge.unsubscribe(OPENS)
    edge.unsubscribe("never/subscribed")
    # The edge's own publish follows its UNSUBSCRIBE; its answer shows that it is in force.
    settle(harness, edge, topic(Topic.SESSION))
    device.publish(topic(Topic.OPEN), b"unheard")
    device.publish(topic(Topic.CLOSE), b"heard")
    harness.until(lambda: closes.payloads == [b"heard"])
    assert opens == []


def test_a_packet_over_the_brokers_limit_is_refused_before_it_is_sent(harness: Harness, device: Link) -> None:
    _, inbox = started(harness, EDGE, OPENS)
    assert device.max_packet_bytes == LIMIT
    with pytest.raises(PacketTooLarge) as caught:
        device.publish(topic(Topic.OPEN), bytes(LIMIT))
    assert caught.value.limit == LIMIT
    assert caught.value.size > LIMIT
    # 1 + 2 bytes of header, topic with its length, packet identifier, no properties: the largest that fits.
    largest = bytes(LIMIT - 3 - 2 - len(topic(Topic.OPEN)) - 2 - 1)
    with pytest.raises(PacketTooLarge):
        device.publish(topic(Topic.OPEN), largest + b"\0")
    device.publish(topic(Topic.OPEN), largest)
    harness.until(lambda: inbox.payloads == [largest])


def test_a_full_queue_refuses_and_what_it_holds_arrives_later(harness: Harness) -> None:
    _, inbox = started(harness, EDGE, OPENS)
    device = isolated(harness, DEVICE, queue_messages=3)
    outcomes: list[PublishOutcome] = []
    for payload in (b"1", b"2", b"3"):
        device.publish(topic(Topic.OPEN), payload, on_outcome=outcomes.append)
    with pytest.raises(NotConnected):
        device.publish(topic(Topic.OPEN), b"4")
    harness.reunite(DEVICE)
    # They may arrive before the broker's answers, but only those make room.
    harness.until(lambda: inbox.payloads == [b"1", b"2", b"3"] and len(outcomes) == 3)
    device.publish(topic(Topic.OPEN), b"5")
    harness.until(lambda: inbox.payloads == [b"1", b"2", b"3", b"5"])


def test_what_waits_is_sent_by_priority_unless_it_has_expired_or_may_be_lost(harness: Harness) -> None:
    _, inbox = started(harness, DEVICE, f"dssd/v1/{FLEET}/{DEVICE}/down/+")
    edge = isolated(harness, EDGE)
    edge.publish(topic(Topic.SESSION), b"lost", qos=0)
    edge.publish(topic(Topic.SESSION), b"stale", expiry_s=30)
    edge.publish(topic(Topic.SESSION), b"reply", expiry_s=3600)
    edge.publish(topic(Topic.VERDICT), b"verdict", priority=True)
    harness.clock.advance(31.0)
    harness.reunite(EDGE)
    harness.until(lambda: len(inbox) == 2)
    assert inbox.payloads == [b"verdict", b"reply"]
    assert edge.counters.expired == 1


@pytest.mark.parametrize("error", [RuntimeError("a bug"), SystemExit(1)])
def test_a_failing_handler_is_counted_and_isolated(harness: Harness, device: Link, error: BaseException) -> None:
    edge, inbox = harness.link(EDGE), Inbox()

    def fail(_: Message) -> None:
        raise error

    edge.subscribe(OPENS, fail)
    edge.subscribe(wildcard(Topic.CLOSE, fleet=FLEET), inbox)
    edge.start(timeout_s=START_S)
    device.publish(topic(Topic.OPEN), b"poison")
    device.publish(topic(Topic.CLOSE), b"fine")
    harness.until(lambda: inbox.payloads == [b"fine"])
    assert edge.counters.handler_errors == 1
    assert edge.counters.losses == 0
    assert edge.connected


def test_the_outcome_tells_of_listeners(request: pytest.FixtureRequest, harness: Harness, device: Link) -> None:
    if "rumqttd" in request.node.callspec.id:
        pytest.skip("rumqttd does not say whether anybody listens: there, a deadline has to tell")
    outcomes: list[PublishOutcome] = []
    device.publish(topic(Topic.OPEN), b"anybody?", on_outcome=outcomes.append)
    harness.until(lambda: len(outcomes) == 1)
    assert outcomes[0] == PublishOutcome(topic(Topic.OPEN), NO_MATCHING_SUBSCRIBERS)
    assert outcomes[0].accepted
    assert outcomes[0].reason == NO_MATCHING_SUBSCRIBERS
    _, inbox = started(harness, EDGE, OPENS)
    device.publish(topic(Topic.OPEN), b"now?", on_outcome=outcomes.append)
    harness.until(lambda: len(outcomes) == 2 and len(inbox) == 1)
    assert outcomes[1].reason == 0


def test_stop_is_idempotent_and_start_may_follow(harness: Harness, device: Link) -> None:
    edge, inbox = started(harness, EDGE, OPENS)
    edge.start(timeout_s=START_S)  # already started: nothing happens
    edge.stop()
    edge.stop()
    assert not edge.connected
    edge.start(timeout_s=START_S)
    device.publish(topic(Topic.OPEN), b"again")
    harness.until(lambda: inbox.payloads == [b"again"])


def test_stop_delivers_what_was_published_before_it(harness: Harness, device: Link) -> None:
    _, inbox = started(harness, EDGE, wildcard(Topic.CLOSE, fleet=FLEET))
    for number in range(20):
        device.publish(topic(Topic.CLOSE), b"%d" % number)
    device.stop()
    harness.until(lambda: len(inbox) == 20)


def test_subscriptions_are_renewed_and_listeners_told_after_a_loss(harness: Harness, device: Link) -> None:
    changes: list[bool] = []
    edge, inbox = harness.link(EDGE), Inbox()
    edge.on_connection(changes.append)
    edge.subscribe(OPENS, inbox)
    edge.start(timeout_s=START_S)
    harness.until(lambda: changes == [True])
    harness.isolate(EDGE)
    harness.until(lambda: changes == [True, False])
    assert not edge.connected
    harness.reunite(EDGE)
    harness.until(lambda: changes == [True, False, True])
    device.publish(topic(Topic.OPEN), b"back?")
    harness.until(lambda: inbox.payloads == [b"back?"])


def test_a_broker_restart_is_survived(harness: Harness, device: Link) -> None:
    edge, inbox = started(harness, EDGE, OPENS)
    harness.broker_down()
    harness.until(lambda: not device.connected and not edge.connected)
    harness.broker_up()
    harness.until(lambda: device.connected and edge.connected)
    device.publish(topic(Topic.OPEN), b"after it")
    harness.until(lambda: inbox.payloads == [b"after it"])


def test_of_a_sharing_group_one_gets_each_message(harness: Harness, device: Link) -> None:
    _, first = started(harness, EDGE, f"$share/edges/{OPENS}")
    _, second = started(harness, OTHER_EDGE, f"$share/edges/{OPENS}")
    for number in range(6):
        device.publish(topic(Topic.OPEN), b"%d" % number)
    harness.until(lambda: len(first) + len(second) == 6)
    assert sorted(first.payloads + second.payloads) == [b"%d" % number for number in range(6)]
    assert len(first) == len(second) == 3


def test_a_handler_may_publish(harness: Harness, device: Link) -> None:
    edge, verdicts = harness.link(EDGE), Inbox()
    edge.subscribe(DRAFTS, lambda message: edge.publish(topic(Topic.VERDICT), message.payload, alias=True))
    edge.start(timeout_s=START_S)
    device.stop()
    device.subscribe(topic(Topic.VERDICT), verdicts)
    device.start(timeout_s=START_S)
    for number in range(5):
        device.publish(DRAFT, b"%d" % number)
    harness.until(lambda: verdicts.payloads == [b"0", b"1", b"2", b"3", b"4"])


def test_a_handler_may_stop_its_own_link(harness: Harness, device: Link) -> None:
    edge = harness.link(EDGE)
    edge.subscribe(OPENS, lambda _: edge.stop())
    edge.start(timeout_s=START_S)
    device.publish(topic(Topic.OPEN), b"stop")
    harness.until(lambda: not edge.connected)
    edge.stop()


def test_without_a_broker_start_says_so(harness: Harness) -> None:
    harness.broker_down()
    link = harness.link(DEVICE)
    with pytest.raises(ConnectFailed):
        link.start(timeout_s=0.3)
    assert not link.connected
    harness.broker_up()
    link.start(timeout_s=START_S)
    assert link.connected


def test_a_bad_topic_a_bad_filter_and_qos_2_are_refused(device: Link) -> None:
    for bad in ("", "+", "a/+/b", "a/#", "nul\0", "\ud800", "a" * 65_536):
        with pytest.raises(ValueError, match="topic"):
            device.publish(bad, b"")
    for bad in ("", "a#", "a/b+", "#/a", "$share//a", "$share/g", "$share/+/a", "$share/#/a", "a\0", "\ud800"):
        with pytest.raises(ValueError, match="filter"):
            device.subscribe(bad, Inbox())
    with pytest.raises(ValueError, match="QoS 2"):
        device.publish("a", b"", qos=2)
    with pytest.raises(ValueError, match="QoS 2"):
        device.subscribe("a", Inbox(), qos=2)
