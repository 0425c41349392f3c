from collections.abc import Callable, Iterator

import pytest

from broker_config.processes import MosquittoProcess
from fleet_common.mqtt.errors import PublishRejected
from fleet_common.mqtt.link import publish_confirmed
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import LinkSettings
from schemas.topics import ROOT, TREE, Topic, build
from tests.support.links import START_S

pytestmark = pytest.mark.broker

NOT_AUTHORIZED = 0x87
FLEET, EDGE, DEVICE = "home", "edge-1", "device-a"

Connect = Callable[[str | None], PahoLink]


@pytest.fixture
def connect(mosquitto: MosquittoProcess) -> Iterator[Connect]:
    links: list[PahoLink] = []

    def make(name: str | None) -> PahoLink:
        link = PahoLink(LinkSettings(client_id=f"acl-{name}-{len(links)}", username=name, port=mosquitto.port))
        link.start(timeout_s=START_S)
        links.append(link)
        return link

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
    device, nobody = connect(DEVICE), connect(None)
    assert not allowed(device, build(Topic.OPEN, fleet="neighbours", device=DEVICE))
    assert not allowed(device, "anything")
    assert not allowed(nobody, build(Topic.OPEN, fleet=FLEET, device=DEVICE))


@pytest.mark.parametrize("name", ["#", "+", "device-a/up", "+/#"])
def test_a_name_with_wildcards_gains_nothing(connect: Connect, name: str) -> None:
    liar = connect(name)
    for rule in TREE:
        assert not allowed(liar, f"{ROOT}/{FLEET}/{rule.template.format(device=DEVICE, edge=EDGE)}")
