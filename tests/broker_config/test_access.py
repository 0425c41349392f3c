from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import pytest

from fleet_common.mqtt.errors import PublishRejected
from fleet_common.mqtt.link import publish_confirmed
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import LinkSettings
from schemas.topics import ROOT, TREE, Topic, build
from tests.support.links import START_S, Inbox

if TYPE_CHECKING:
    from broker_config.processes import MosquittoProcess

pytestmark = pytest.mark.broker

NOT_AUTHORIZED = 0x87
FLEET, EDGE, MONITOR, DEVICE, OTHER = "home", "edge-1", "monitor", "device-a", "device-b"


class Connect(Protocol):
    def __call__(self, name: str | None, *filters: str) -> tuple[PahoLink, Inbox]: ...


@pytest.fixture
def connect(mosquitto: "MosquittoProcess") -> Iterator[Connect]:
    links: list[PahoLink] = []

    def make(name: str | None, *filters: str) -> tuple[PahoLink, Inbox]:
        settings = LinkSettings(client_id=f"acl-{name}-{len(links)}", username=name, port=mosquitto.port)
        link, inbox = PahoLink(settings), Inbox()
        for topic_filter in filters:
            link.subscribe(topic_filter, inbox)
        link.start(timeout_s=START_S)
        links.append(link)
        return link, inbox

    yield make
    for link in links:
        link.stop()


def allowed(link: PahoLink, topic: str) -> bool:
    reason = None
    try:
        publish_confirmed(link, topic, b"x", timeout_s=START_S)
    except PublishRejected as error:
        reason = error.reason
    assert reason in {None, NOT_AUTHORIZED}
    return reason is None


def test_another_fleet_and_the_nameless_may_do_nothing(connect: Connect) -> None:
    device, _ = connect(DEVICE)
    assert not allowed(device, build(Topic.OPEN, fleet="neighbours", device=DEVICE))
    assert not allowed(device, "anything")
    nobody, _ = connect(None)
    assert not allowed(nobody, build(Topic.OPEN, fleet=FLEET, device=DEVICE))


@pytest.mark.parametrize("name", ["#", "+", "device-a/up", "+/#"])
def test_a_name_with_wildcards_gains_nothing(connect: Connect, name: str) -> None:
    liar, _ = connect(name)
    for rule in TREE:
        assert not allowed(liar, f"{ROOT}/{FLEET}/{rule.template.format(device=DEVICE, edge=EDGE)}")
