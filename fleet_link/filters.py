"""Topic filters: which topics they match, and what a valid one is."""

__all__ = ["check_filter", "check_topic", "matches", "split_share"]

SHARE = "$share"
MAX_TOPIC_BYTES = 65_535


def split_share(topic_filter: str) -> tuple[str | None, str]:
    """Return group and filter of `$share/<group>/<filter>`; None and the filter itself of any other."""
    head, _, rest = topic_filter.partition("/")
    if head != SHARE:
        return None, topic_filter
    group, _, below = rest.partition("/")
    return group, below


def matches(topic_filter: str, topic: str) -> bool:
    """Whether a message to `topic` is for a subscriber of `topic_filter`; a `$share` prefix plays no part."""
    expected = split_share(topic_filter)[1].split("/")
    levels = topic.split("/")
    if topic.startswith("$") and expected[0] in {"+", "#"}:
        return False  # MQTT 5, 4.7.2: the server's own topics are not for wildcards
    for position, level in enumerate(expected):
        if level == "#":
            return True  # the parent level included
        if position >= len(levels) or level not in {"+", levels[position]}:
            return False
    return len(levels) == len(expected)


def check_filter(topic_filter: str) -> None:
    """Refuse what is no topic filter.

    Raises:
        ValueError: It is empty, has a wildcard in the midst of a level, or is a share without a group.
    """
    group, inner = split_share(topic_filter)
    levels = inner.split("/")
    wildcards_alone = all(level in {"+", "#"} or not set(level) & {"+", "#"} for level in levels)
    good_group = group is None or (bool(group) and not set(group) & {"+", "#"})
    if not inner or not good_group or not wildcards_alone or "#" in levels[:-1] or not _encodable(topic_filter):
        raise ValueError(f"{topic_filter[:200]!r} is not a valid topic filter.")


def check_topic(topic: str) -> None:
    """Refuse what nothing can be published to.

    Raises:
        ValueError: It is empty, too long, or has wildcards.
    """
    if not topic or set(topic) & {"+", "#"} or not _encodable(topic):
        raise ValueError(f"{topic[:200]!r} is not a topic to publish to.")


def _encodable(text: str) -> bool:
    try:
        return "\0" not in text and len(text.encode()) <= MAX_TOPIC_BYTES
    except UnicodeEncodeError:
        return False
