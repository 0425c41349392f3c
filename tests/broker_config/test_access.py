from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import pytest

from fleet_common.mqtt.errors import PublishRejected
from fleet_common.mqtt.link import publish_confirmed
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import LinkSettings
from schemas.topics import TREE, ClientRole, Topic, TopicRule, build
from tests.support.links import START_S, Inbox
from tests.support.waiting import until

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


def topic_of(rule: TopicRule, *, device: str = DEVICE, edge: str = EDGE) -> str:
    return build(
        rule.topic,
        fleet=FLEET,
        device=device if "{device}" in rule.template else None,
        edge=edge if "{edge}" in rule.template else None,
    )


def allowed(link: PahoLink, topic: str) -> bool:
    reason = None
    try:
        publish_confirmed(link, topic, b"x", timeout_s=START_S)
    except PublishRejected as error:
        reason = error.reason
    assert reason in {None, NOT_AUTHORIZED}
    return reason is None


@pytest.mark.parametrize("rule", TREE, ids=lambda rule: rule.topic.value)
@pytest.mark.parametrize(
    ("name", "role"), [(DEVICE, ClientRole.DEVICE), (EDGE, ClientRole.EDGE), (MONITOR, ClientRole.MONITOR)]
)
def test_who_may_publish_is_what_the_table_says(connect: Connect, rule: TopicRule, name: str, role: ClientRole) -> None:
    link, _ = connect(name)
    assert allowed(link, topic_of(rule)) == (role in rule.writers)


@pytest.mark.parametrize("rule", TREE, ids=lambda rule: rule.topic.value)
def test_nobody_publishes_as_another_device_or_edge(connect: Connect, rule: TopicRule) -> None:
    device, _ = connect(DEVICE)
    if "{device}" in rule.template:
        assert not allowed(device, topic_of(rule, device=OTHER))
    edge, _ = connect(EDGE)
    if rule.topic is Topic.EDGE_STATE:
        assert not allowed(edge, topic_of(rule, edge="edge-2"))
        assert not allowed(device, topic_of(rule))


@pytest.mark.parametrize("rule", TREE, ids=lambda rule: rule.topic.value)
@pytest.mark.parametrize(
    ("name", "role"), [(DEVICE, ClientRole.DEVICE), (EDGE, ClientRole.EDGE), (MONITOR, ClientRole.MONITOR)]
)
def test_who_receives_is_what_the_table_says(connect: Connect, rule: TopicRule, name: str, role: ClientRole) -> None:
    # The reader subscribes to everything and gets what the broker lets it read.
    _, inbox = connect(name, "#")
    writer, _ = connect(
        {ClientRole.DEVICE: DEVICE, ClientRole.EDGE: EDGE, ClientRole.MONITOR: MONITOR}[next(iter(rule.writers))]
    )
    publish_confirmed(writer, topic_of(rule), b"probe", timeout_s=START_S)
    mark(connect, inbox)
    assert (topic_of(rule) in {message.topic for message in inbox}) == (role in rule.readers)


@pytest.mark.parametrize("topic", [Topic.VERDICT, Topic.SESSION, Topic.CONFIG_DESIRED, Topic.COMMAND_REQUEST])
def test_a_device_never_hears_what_is_for_another(connect: Connect, topic: Topic) -> None:
    others = build(topic, fleet=FLEET, device=OTHER)
    _, inbox = connect(DEVICE, "#", others)
    _, right = connect(OTHER, others)
    writer, _ = connect(EDGE if topic in {Topic.VERDICT, Topic.SESSION} else MONITOR)
    publish_confirmed(writer, others, b"secret", timeout_s=START_S)
    mark(connect, inbox)
    until(lambda: right.payloads == [b"secret"])
    assert b"secret" not in inbox.payloads


def test_drafts_go_to_the_edges_that_there_are(connect: Connect) -> None:
    _, inbox = connect(EDGE, "#")
    device, _ = connect(DEVICE)
    publish_confirmed(device, build(Topic.DRAFT, fleet=FLEET, device=DEVICE, edge=EDGE), b"mine", timeout_s=START_S)
    mark(connect, inbox)
    assert b"mine" in inbox.payloads
    for none in ("edge-2", "anything"):
        assert not allowed(device, build(Topic.DRAFT, fleet=FLEET, device=DEVICE, edge=none))


def test_an_edge_may_share_the_opens(connect: Connect) -> None:
    opens = f"$share/edges/dssd/v1/{FLEET}/+/up/open"
    _, inbox = connect(EDGE, opens, f"dssd/v1/{FLEET}/_edge/+/state")
    device, _ = connect(DEVICE)
    publish_confirmed(device, build(Topic.OPEN, fleet=FLEET, device=DEVICE), b"open", timeout_s=START_S)
    mark(connect, inbox)
    assert inbox.payloads.count(b"open") == 1


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
        assert not allowed(liar, topic_of(rule))


def mark(connect: Connect, inbox: Inbox) -> None:
    """Wait until `inbox` has a message that all clients may read, published after everything else."""
    edge, _ = connect(EDGE)
    payload = b"mark %d" % id(inbox)
    publish_confirmed(edge, build(Topic.EDGE_STATE, fleet=FLEET, edge=EDGE), payload, timeout_s=START_S)
    until(lambda: payload in inbox.payloads)
