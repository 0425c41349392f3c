import pytest

from broker_config.broker import Broker
from schemas.topics import ROOT, TREE, ClientRole, Topic, TopicRule, build
from tests.support.access_matrix import README, may_publish, may_receive, render_table, roles_of, with_table


def topic_of(rule: TopicRule) -> str:
    return f"{ROOT}/home/{rule.template.format(device='d', edge='edge-1')}"


def test_the_table_in_the_readme_is_current() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_table(text) == text, "run: python -m tests.support.access_matrix"
    assert render_table() in text


@pytest.mark.parametrize("rule", TREE, ids=lambda rule: rule.topic.value)
@pytest.mark.parametrize(
    ("user", "role"), [("d", ClientRole.DEVICE), ("edge-1", ClientRole.EDGE), ("monitor", ClientRole.MONITOR)]
)
def test_roles_may_on_their_own_topics_what_the_tree_says(rule: TopicRule, user: str, role: ClientRole) -> None:
    topic = topic_of(rule)
    assert may_publish(Broker(), user, topic) == (role in rule.writers)
    assert may_receive(Broker(), user, topic) == (role in rule.readers)


def test_no_role_reaches_beyond_its_own() -> None:
    broker = Broker(edges=("e1", "e2"))
    verdict = build(Topic.VERDICT, fleet="home", device="d")
    assert not may_receive(broker, "other", verdict)
    assert not may_publish(broker, "d", build(Topic.STATE, fleet="home", device="other"))
    assert not may_publish(broker, "e1", build(Topic.EDGE_STATE, fleet="home", edge="e2"))
    assert not may_receive(broker, "e1", build(Topic.DRAFT, fleet="home", device="d", edge="e2"))
    assert not may_publish(broker, "e1", build(Topic.VERDICT, fleet="elsewhere", device="d"))
    assert may_publish(broker, "d", build(Topic.DRAFT, fleet="home", device="d", edge="e2"))
    assert not may_publish(broker, "d", build(Topic.DRAFT, fleet="home", device="d", edge="e3"))


def test_the_janitor_reads_and_clears_what_nobody_is_to_keep_and_nothing_else() -> None:
    broker = Broker(janitor="broom")
    left = {Topic.OPEN, Topic.DRAFT, Topic.CLOSE, Topic.TELEMETRY, Topic.COMMAND_RESPONSE}
    for rule in TREE:
        topic = topic_of(rule)
        assert may_publish(broker, "broom", topic) == (rule.topic in left)
        assert may_receive(broker, "broom", topic) == (rule.topic in left or rule.of_edge)
    assert not may_publish(broker.model_copy(update={"banned": ("broom",)}), "broom", "dssd/v1/home/d/up/open")


def test_with_a_list_of_devices_only_those_are_devices() -> None:
    broker = Broker(devices=("d",))
    assert roles_of(broker, "d") == {ClientRole.DEVICE}
    assert roles_of(broker, "x") == frozenset()
    assert roles_of(broker, "edge-1") == {ClientRole.EDGE}
