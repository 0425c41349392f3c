import pytest
from paho.mqtt.client import topic_matches_sub

from fleet_common.mqtt.routing import check_filter, check_topic, matches, split_share

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


@pytest.mark.parametrize("good", [*FILTERS, "$share/g/a/#", "a b/ü"])
def test_valid_filters_pass(good: str) -> None:
    check_filter(good)


@pytest.mark.parametrize("bad", ["", "a#", "a/b+", "#/a", "$share/g", "$share//a", "$share/#/a", "a\0", "\ud800"])
def test_invalid_filters_are_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="filter"):
        check_filter(bad)


@pytest.mark.parametrize("bad", ["", "+", "a/#", "a\0", "\ud800", "a" * 65_536])
def test_topics_with_wildcards_or_too_long_are_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="publish"):
        check_topic(bad)
