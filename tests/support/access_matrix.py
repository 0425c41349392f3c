"""Access matrix: who may do what on which topic, stated independently of the access rules.

The rules are rendered from filters; this answers for one topic at a time. Tests check the rules and a real broker
against it. `python -m tests.support.access_matrix` writes the table in `broker_config/README.md`.
"""

from pathlib import Path
from typing import Final

import broker_config
from broker_config.broker import Broker
from schemas.errors import TopicError
from schemas.names import check_name
from schemas.topics import HOME_ASSISTANT, ROOT, TREE, ClientRole, Topic, TopicAddress, build, parse

SYS = "$SYS/"


def roles_of(broker: Broker, user: str) -> frozenset[ClientRole]:
    if user in broker.banned or not _is_name(user):
        return frozenset()
    roles = set()
    if user in broker.edges:
        roles.add(ClientRole.EDGE)
    if user in broker.monitors:
        roles.add(ClientRole.MONITOR)
    if broker.devices is None or user in broker.devices:
        roles.add(ClientRole.DEVICE)  # an edge or a monitor too, under its own name
    return frozenset(roles)


def may_publish(broker: Broker, user: str, topic: str) -> bool:
    """The right of `user` to publish to `topic`."""
    if topic.partition("/")[0] == HOME_ASSISTANT:
        return topic in _shown_to_home_assistant(broker, user, topic)
    address = _address(broker, topic)
    if address is None:
        return False
    if address.topic is Topic.DRAFT and address.edge not in broker.edges:
        return False
    if _may_clear(broker, user, address):
        return True
    return any(_own(role, user, address) for role in roles_of(broker, user) & address.rule.writers)


def may_receive(broker: Broker, user: str, topic: str) -> bool:
    """The right of `user` to receive from `topic`, whatever the subscription."""
    if topic.partition("/")[0] == HOME_ASSISTANT:
        return user == broker.home_assistant and user not in broker.banned
    roles = roles_of(broker, user)
    if topic.startswith(SYS):
        return ClientRole.MONITOR in roles
    address = _address(broker, topic)
    if address is None:
        return False
    if _may_clear(broker, user, address):
        return address.topic is not Topic.DRAFT or address.edge in broker.edges
    # Everybody may read what edges publish of themselves.
    own_topic = address.device is None and address.edge is not None
    return any(own_topic or _own(role, user, address) for role in roles & address.rule.readers)


def _shown_to_home_assistant(broker: Broker, user: str, topic: str) -> frozenset[str]:
    """Return the topics that a user may write to with the middle level of this one."""
    if broker.home_assistant is None or user in broker.banned:
        return frozenset()
    if user == broker.home_assistant:
        return frozenset({f"{HOME_ASSISTANT}/status"})
    levels = topic.split("/")
    if user not in broker.monitors or len(levels) != len(("homeassistant", "device", "id", "config")):
        return frozenset()
    return frozenset(f"{HOME_ASSISTANT}/device/{levels[2]}/{level}" for level in ("config", "state"))


def _may_clear(broker: Broker, user: str, address: TopicAddress) -> bool:
    """The janitor clears topics that devices write and where nothing should be retained."""
    if user != broker.janitor or user in broker.banned:
        return False
    return address.rule.writers == {ClientRole.DEVICE} and not address.rule.retained


def _own(role: ClientRole, user: str, address: TopicAddress) -> bool:
    """A topic that names a device or an edge concerns that one alone."""
    match role:
        case ClientRole.DEVICE:
            return address.device == user
        case ClientRole.EDGE:
            return address.edge in {None, user}
        case ClientRole.MONITOR:
            return True


def _address(broker: Broker, topic: str) -> TopicAddress | None:
    try:
        address = parse(topic)
    except TopicError:
        return None
    return address if address.fleet == broker.fleet else None


def _is_name(user: str) -> bool:
    try:
        check_name(user)
    except ValueError:
        return False
    return True


README: Final = Path(broker_config.__file__).with_name("README.md")
BEGIN: Final = "<!-- table: begin; written by `python -m tests.support.access_matrix` -->"
END: Final = "<!-- table: end -->"

DEVICE, EDGE = "device-a", "edge-1"
COLUMNS: Final = {
    "the device itself": DEVICE,
    "another device": "device-b",
    "the edge itself": EDGE,
    "another edge": "edge-2",
    "monitor": "monitor",
    "janitor": "monitor-janitor",
    "banned, or without an accepted certificate": "nobody",
}


def render_table() -> str:
    """Return the table as Markdown: `w` may publish, `r` receives."""
    broker = Broker(edges=(EDGE, "edge-2"), banned=("nobody",), janitor="monitor-janitor")
    rows = [["topic below `dssd/v1/<fleet>/`", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    for rule in TREE:
        topic = f"{ROOT}/{broker.fleet}/{rule.template.format(device=DEVICE, edge=EDGE)}"
        shown = rule.template.replace("{device}", "<device>").replace("{edge}", "<edge>")
        rows.append([f"`{shown}`", *(_cell(broker, user, topic) for user in COLUMNS.values())])
        if rule.topic is Topic.DRAFT:
            nobodys = build(rule.topic, fleet=broker.fleet, device=DEVICE, edge="of-no-edge")
            cells = [_cell(broker, user, nobodys) for user in COLUMNS.values()]
            rows.append([f"`{shown.replace('<edge>', '<any other name>')}`", *cells])
    sys = "$SYS/broker/version"
    rows.append(["`$SYS/#` (not below it)", *(_cell(broker, user, sys) for user in COLUMNS.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def with_table(text: str) -> str:
    """Return README's text with the table in its place; raise ValueError if there is no place for it."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("The text lacks the marks of the table.")
    return f"{before}{BEGIN}\n\n{render_table()}\n\n{END}{after}"


def main() -> None:
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")


def _cell(broker: Broker, user: str, topic: str) -> str:
    ways = "w" * may_publish(broker, user, topic) + "r" * may_receive(broker, user, topic)
    return ways or "-"


if __name__ == "__main__":
    main()
