import socket
from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter

import pytest
from pydantic import SecretStr

from fleet_common.mqtt.errors import ConnectFailed, LinkFault
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import BrokerSettings, LinkSettings
from tests.support.links import connect_failure
from tests.support.scripted_broker import ScriptedBroker, connack
from tests.support.waiting import PATIENCE_S, until

LONG_S = PATIENCE_S
USER_NAME = 0x80
FINAL = attrgetter("final")


def failure(settings: LinkSettings, enough: Callable[[ConnectFailed], bool] = lambda _: True) -> ConnectFailed:
    error = connect_failure(PahoLink(settings), enough=enough)
    assert "\n" not in str(error)
    return error


def settings_for(port: int, host: str = "127.0.0.1") -> LinkSettings:
    return LinkSettings(
        client_id="a",
        host=host,
        port=port,
        username="a",
        password="hunter2",
        connect_timeout_s=LONG_S,
        handshake_s=LONG_S,
        min_backoff_s=0.01,
    )


def test_a_port_where_nobody_listens() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        error = failure(settings_for(port))
    assert str(error) == (
        f"No broker listens at 127.0.0.1:{port}: start it, or correct host and port in the configuration."
    )
    assert not error.final


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, "did not answer in time"),
        (b"", "closed the connection without an answer"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "is it an MQTT broker"),
    ],
)
def test_what_does_not_speak_mqtt_is_told(answer: bytes | None, words: str) -> None:
    with ScriptedBroker(answer) as broker:
        # On a busy machine the first answers may come too late.
        failure(replace(settings_for(broker.port), handshake_s=0.1), lambda error: words in str(error))


OLD_CONNACK = b"\x20\x02\x00\x01"  # MQTT 3.1.1: "unacceptable protocol version", without properties


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (connack(0x86), LinkFault.NOT_AUTHORIZED),
        (connack(0x87), LinkFault.NOT_AUTHORIZED),
        (connack(0x8A), LinkFault.NOT_AUTHORIZED),
        (connack(0x84), LinkFault.UNSUITABLE),
        (connack(0x9A), LinkFault.UNSUITABLE),
        (connack(0x9B), LinkFault.UNSUITABLE),
        (OLD_CONNACK, LinkFault.UNSUITABLE),
    ],
)
def test_a_refusal_that_will_not_change_is_reported_at_once(answer: bytes, fault: LinkFault) -> None:
    with ScriptedBroker(answer) as broker:
        error = failure(replace(settings_for(broker.port), min_backoff_s=1e-6), FINAL)
        assert len(broker.packets) == 1
    assert (error.final, error.fault) == (True, fault)
    assert "hunter2" not in str(error)


@pytest.mark.parametrize(
    ("properties", "word"),
    [
        (b"\x2a\x00", "shared subscriptions"),
        (b"\x28\x00", "wildcard subscriptions"),
        (b"\x25\x00", "retain"),
        (b"\x24\x00", "QoS 1"),
        (b"\x27" + (2000).to_bytes(4, "big"), "2000 bytes"),
        (b"\x27\x0f\xff\xff\xff\x2a\x00\x22\x00\x10\x24\x01", "shared subscriptions"),  # RabbitMQ 4.0's
    ],
)
def test_a_broker_without_what_the_fleet_needs_is_refused_by_name(properties: bytes, word: str) -> None:
    with ScriptedBroker(connack(properties=properties)) as broker:
        error = failure(settings_for(broker.port), FINAL)
    assert (error.final, error.fault) == (True, LinkFault.UNSUITABLE)
    assert word in str(error)


@pytest.mark.parametrize(("username", "password"), [(None, None), ("a", None), (None, "hunter2")])
def test_a_name_that_is_a_default_is_dropped_if_refused(username: str | None, password: str | None) -> None:
    tried: list[bool] = []

    def answer(connect: bytes) -> bytes:
        tried.append(bool(connect[7] & USER_NAME))
        return connack(0x86 if tried[-1] else 0)

    settings = BrokerSettings(username=username, password=SecretStr(password) if password else None)
    with ScriptedBroker(answer) as broker:
        link = PahoLink(replace(settings.link("home", "a", will=None), port=broker.port, min_backoff_s=0.01))
        if username is None and password is None:
            link.start(timeout_s=LONG_S)
            link.stop()
            assert tried == [True, False]
        else:
            with pytest.raises(ConnectFailed) as caught:
                link.start(timeout_s=LONG_S)
            assert (tried, caught.value.final) == ([True], True)


def test_who_refuses_a_name_and_nobody_in_particular_is_final() -> None:
    with ScriptedBroker(connack(0x87)) as broker:
        settings = BrokerSettings(port=broker.port).link("home", "a", will=None)
        error = failure(replace(settings, min_backoff_s=1e-6), FINAL)
        assert len(broker.packets) == 2
    assert (error.final, error.fault) == (True, LinkFault.NOT_AUTHORIZED)


def test_a_client_whose_name_is_taken_says_so_and_leaves_the_other_alone() -> None:
    taken = b"\xe0\x02\x8e\x00"
    with ScriptedBroker(connack()) as broker:
        link = PahoLink(replace(settings_for(broker.port), max_backoff_s=0.02, refused_backoff_s=LONG_S))
        link.start(timeout_s=LONG_S)
        broker.answer = None
        broker.send(taken)
        until(lambda: not link.connected)
        until(lambda: link.failure is not None and link.failure.fault is LinkFault.NAME_TAKEN)
        assert link.counters.takeovers == 1
        link.stop()


def test_a_refusal_that_may_change_is_tried_again() -> None:
    with ScriptedBroker(connack(0x89)) as broker:
        error = failure(settings_for(broker.port), lambda _: len(broker.packets) > 1)
    assert (error.final, error.fault) == (False, LinkFault.BUSY)
