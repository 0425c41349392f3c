import pytest
from hypothesis import example, given, settings, strategies as st

from fleet_common.mqtt.link import matches
from schemas.errors import InvalidName, TopicError
from schemas.topics import TREE, ClientRole, Topic, TopicAddress, TopicRule, build, parse, rules_for, wildcard
from tests.schemas.strategies import NAME

each_rule = pytest.mark.parametrize("rule", TREE, ids=lambda rule: rule.topic.value)


def address(rule: TopicRule, *, fleet: str = "fleet", device: str = "device-1", edge: str = "edge-1") -> TopicAddress:
    return TopicAddress(
        rule.topic,
        fleet,
        device if "{device}" in rule.template else None,
        edge if "{edge}" in rule.template else None,
    )


@each_rule
@given(fleet=NAME, device=NAME, edge=NAME)
@settings(max_examples=50, deadline=None)
def test_what_is_built_is_parsed(rule: TopicRule, fleet: str, device: str, edge: str) -> None:
    whole = address(rule, fleet=fleet, device=device, edge=edge)
    assert parse(str(whole)) == whole
    assert whole.rule is rule


def test_the_topics_are_those_that_were_agreed() -> None:
    """Other software and access lists rely on them letter by letter."""
    assert [str(address(rule)) for rule in TREE] == [
        "dssd/v1/fleet/device-1/state",
        "dssd/v1/fleet/device-1/up/open",
        "dssd/v1/fleet/device-1/up/draft/edge-1",
        "dssd/v1/fleet/device-1/up/close",
        "dssd/v1/fleet/device-1/up/telemetry",
        "dssd/v1/fleet/device-1/down/session",
        "dssd/v1/fleet/device-1/down/verdict",
        "dssd/v1/fleet/device-1/config/desired",
        "dssd/v1/fleet/device-1/config/reported",
        "dssd/v1/fleet/device-1/command/request",
        "dssd/v1/fleet/device-1/command/response",
        "dssd/v1/fleet/_edge/edge-1/state",
        "dssd/v1/fleet/_edge/edge-1/chat",
        "dssd/v1/fleet/_alert",
    ]


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "dssd",
        "dssd/v1",
        "dssd/v1/fleet",
        "dssd/v2/fleet/device-1/state",
        "DSSD/v1/fleet/device-1/state",
        "/dssd/v1/fleet/device-1/state",
        "dssd/v1/fleet/device-1/state/",
        "dssd/v1/fleet//state",
        "dssd/v1//device-1/state",
        "dssd/v1/+/device-1/state",
        "dssd/v1/fleet/+/state",
        "dssd/v1/fleet/#",
        "dssd/v1/fleet/device 1/state",
        "dssd/v1/fleet/_edge/state",
        "dssd/v1/fleet/_device/up/open",
        "dssd/v1/fleet/$SYS/state",
        "dssd/v1/fleet/device-1\x00/state",
        "dssd/v1/fleet/device-1\n/state",
        "dssd/v1/fleet/device-1/up/draft",
        "dssd/v1/fleet/device-1/up/draft/edge-1/more",
        "dssd/v1/fleet/device-1/up/draft/..",
        "dssd/v1/fleet/device-1/down/open",
        "dssd/v1/_fleet/device-1/state",
        "dssd/v1/fleet/" + "d" * 64 + "/state",
        "x" * 70_000,
    ],
)
def test_a_topic_outside_the_tree_is_refused_in_a_short_sentence(topic: str) -> None:
    with pytest.raises(TopicError) as caught:
        parse(topic)
    assert len(str(caught.value)) < 1000


@given(
    st.text(max_size=60)
    | st.lists(
        st.sampled_from(["dssd", "v1", "f", "d", "up", "open", "draft", "state", "_edge", "down", "+", "#"])
    ).map("/".join)
)
@example("dssd/v2/f/d/state")
@settings(max_examples=300, deadline=None)
def test_random_topics_are_parsed_or_refused(topic: str) -> None:
    try:
        whole = parse(topic)
    except TopicError:
        return
    assert str(whole) == topic


@pytest.mark.parametrize("name", ["", "a/b", "+", "#", "_a", "$a", "a-", ".a", "a b", "ä", "a\n", "a" * 64])
def test_a_name_that_is_no_level_builds_no_topic(name: str) -> None:
    for names in ({"fleet": name, "device": "d"}, {"fleet": "f", "device": name}):
        with pytest.raises(InvalidName):
            build(Topic.STATE, **names)
    with pytest.raises(InvalidName):
        build(Topic.DRAFT, fleet="f", device="d", edge=name)


@each_rule
def test_missing_and_needless_levels_are_refused(rule: TopicRule) -> None:
    levels = {"device": "d", "edge": "e"}
    needed = {level: name for level, name in levels.items() if "{" + level + "}" in rule.template}
    assert build(rule.topic, fleet="f", **needed)
    for level in levels:
        wrong = (
            {key: name for key, name in needed.items() if key != level} if level in needed else needed | {level: "x"}
        )
        with pytest.raises(TopicError):
            build(rule.topic, fleet="f", **wrong)


def may(role: ClientRole, topic: str, *, write: bool, device: str = "+", edge: str = "+") -> bool:
    return any(
        access.write == write and matches(access.filter, topic)
        for access in rules_for(role, fleet="fleet", device=device, edge=edge)
    )


@each_rule
def test_a_device_speaks_and_hears_under_its_own_name_alone(rule: TopicRule) -> None:
    own, other = str(address(rule, device="device-1")), str(address(rule, device="device-2"))
    assert may(ClientRole.DEVICE, own, write=True, device="device-1") == (ClientRole.DEVICE in rule.writers)
    assert may(ClientRole.DEVICE, own, write=False, device="device-1") == (ClientRole.DEVICE in rule.readers)
    if own != other:
        assert not may(ClientRole.DEVICE, other, write=True, device="device-1")
        assert not may(ClientRole.DEVICE, other, write=False, device="device-1")


@each_rule
def test_every_topic_has_someone_who_speaks_and_someone_who_hears(rule: TopicRule) -> None:
    assert rule.writers
    assert rule.readers
    assert matches(wildcard(rule.topic, fleet="fleet"), str(address(rule)))


def test_who_speaks_where_is_what_was_agreed() -> None:
    """One letter here decides whether a device could give verdicts or command its neighbours."""
    spoken = {role: {rule.topic for rule in TREE if role in rule.writers} for role in ClientRole}
    assert spoken[ClientRole.EDGE] == {Topic.SESSION, Topic.VERDICT, Topic.EDGE_STATE, Topic.EDGE_CHAT}
    assert spoken[ClientRole.MONITOR] == {Topic.CONFIG_DESIRED, Topic.COMMAND_REQUEST, Topic.ALERT}
    assert spoken[ClientRole.DEVICE] == set(Topic) - spoken[ClientRole.EDGE] - spoken[ClientRole.MONITOR]


def test_hot_messages_are_binary_and_perish_and_states_are_kept() -> None:
    for rule in TREE:
        assert not rule.hot or (rule.binary and rule.expiry_s is not None and rule.qos == 1)
        assert rule.content_type == ("application/cbor" if rule.binary else "application/json")
    assert {rule.topic for rule in TREE if rule.retained} == {
        Topic.STATE, Topic.EDGE_STATE, Topic.EDGE_CHAT, Topic.CONFIG_DESIRED, Topic.CONFIG_REPORTED,
    }  # fmt: skip
