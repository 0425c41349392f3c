"""The access rules in mosquitto's language, from the one table of topics in `schemas.topics`.

mosquitto checks a publish when it arrives and answers "not authorized" at QoS 1. It never refuses a SUBSCRIBE: a
subscriber simply does not get what it may not read, so a wildcard or a `$share` prefix needs no rule of its own.

A user's name takes the place of one level of a topic. mosquitto refuses a name with wildcards but not one with a
slash, so whoever gives out names (in production the certificate authority) has to hold them to `schemas.names`.
"""

from collections.abc import Iterator

from broker_config.broker import Broker
from schemas.topics import Access, Role, rules_for

__all__ = ["render_access"]

USERNAME = "%u"  # replaced by mosquitto with the name of the client in question


def render_access(broker: Broker) -> str:
    """Return the ACL file."""
    return "\n".join(_lines(broker)) + "\n"


def _lines(broker: Broker) -> Iterator[str]:
    yield f"# Who may publish (write) and receive (read) what in the fleet {broker.fleet}. Generated."
    for edge in broker.edges:
        yield ""
        yield f"user {edge}"
        yield from _rules("topic", rules_for(Role.EDGE, fleet=broker.fleet, edge=edge))
    for monitor in broker.monitors:
        yield ""
        yield f"user {monitor}"
        yield from _rules("topic", rules_for(Role.MONITOR, fleet=broker.fleet))
    yield ""
    # Patterns apply to every user, those above included: an edge may also act as a device of its own name.
    yield "# Devices: every user, under its own name."
    yield from _rules("pattern", rules_for(Role.DEVICE, fleet=broker.fleet, device=USERNAME))


def _rules(keyword: str, rights: tuple[Access, ...]) -> Iterator[str]:
    # mosquitto adds the rights of several lines, so that two lines make "readwrite".
    for right in rights:
        yield f"{keyword} {'write' if right.write else 'read'} {right.filter}"
