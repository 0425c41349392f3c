"""Who may do what on which topic, said once more and in another way than the access rules say it.

The rules are rendered from filters; this asks of one topic at a time, as a person would. The test of the access rules,
`fleet broker check` and the table in README.md all hold the broker to this.
"""

from broker_config.broker import Broker
from schemas.errors import TopicError
from schemas.names import check_name
from schemas.topics import Address, Role, Topic, parse

__all__ = ["may_publish", "may_receive", "roles_of"]

SYS = "$SYS/"


def roles_of(broker: Broker, user: str) -> frozenset[Role]:
    """Return the roles of a user who has shown a certificate of the fleet, under whatever name."""
    if user in broker.banned or not _is_name(user):
        return frozenset()
    roles = set()
    if user in broker.edges:
        roles.add(Role.EDGE)
    if user in broker.monitors:
        roles.add(Role.MONITOR)
    if broker.devices is None or user in broker.devices:
        roles.add(Role.DEVICE)  # an edge or a monitor too, under its own name
    return frozenset(roles)


def may_publish(broker: Broker, user: str, topic: str) -> bool:
    """Whether the broker takes what `user` publishes to `topic`."""
    address = _address(broker, topic)
    if address is None:
        return False
    return any(_own(role, user, address) for role in roles_of(broker, user) & address.rule.writers)


def may_receive(broker: Broker, user: str, topic: str) -> bool:
    """Whether the broker passes on to `user` what somebody publishes to `topic`, whatever `user` has subscribed to."""
    roles = roles_of(broker, user)
    if topic.startswith(SYS):
        return Role.MONITOR in roles
    address = _address(broker, topic)
    if address is None:
        return False
    # Everybody may learn which edges are up.
    return any(address.topic is Topic.EDGE_STATE or _own(role, user, address) for role in roles & address.rule.readers)


def _own(role: Role, user: str, address: Address) -> bool:
    """Whether a topic that concerns a role concerns this user in it."""
    match role:
        case Role.DEVICE:
            return address.device == user
        case Role.EDGE:
            return address.edge in {None, user}
        case Role.MONITOR:
            return True


def _address(broker: Broker, topic: str) -> Address | None:
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
