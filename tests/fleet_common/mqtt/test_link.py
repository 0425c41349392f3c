import threading

import pytest

from fleet_common.mqtt.errors import PublishRejected
from fleet_common.mqtt.link import NO_MATCHING_SUBSCRIBERS, Outcome, publish_confirmed
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import LinkSettings
from tests.support.links import START_S
from tests.support.memory_broker import MemoryBroker
from tests.support.memory_link import MemoryLink
from tests.support.scripted_broker import ScriptedBroker, connack, puback
from tests.support.waiting import until


def test_the_answer_is_returned() -> None:
    broker = MemoryBroker()
    link = MemoryLink(broker, "a")
    link.start(timeout_s=0)
    with broker.running():
        assert publish_confirmed(link, "t", b"", timeout_s=START_S) == Outcome("t", NO_MATCHING_SUBSCRIBERS)


def test_no_answer_is_an_error() -> None:
    link = MemoryLink(MemoryBroker(), "a")  # nobody pumps
    link.start(timeout_s=0)
    with pytest.raises(PublishRejected, match="did not answer") as caught:
        publish_confirmed(link, "t", b"", timeout_s=0.01)
    assert caught.value.reason is None


def test_a_rejection_is_an_error() -> None:
    with ScriptedBroker(connack()) as broker:

        def reject() -> None:
            until(lambda: len(broker.publishes()) == 1)
            broker.send(puback(broker.identifiers()[0], 0x87))

        link = PahoLink(LinkSettings(client_id="a", port=broker.port))
        link.start(timeout_s=START_S)
        thread = threading.Thread(target=reject)
        thread.start()
        with pytest.raises(PublishRejected, match="does not let this client publish to t:"):
            publish_confirmed(link, "t", b"", timeout_s=START_S)
        thread.join()
        link.stop()
