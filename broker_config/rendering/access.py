"""Access rules in mosquitto's language, from the one table of topics in `schemas.topics`.

mosquitto checks a publish when it arrives and answers "not authorized" at QoS 1. It never refuses a SUBSCRIBE: a
subscriber simply does not get what it may not read, so a wildcard or a `$share` prefix needs no rule of its own.

A user's name takes the place of one level of a topic. mosquitto refuses a name with wildcards but not one with a
slash: as `_edge/edge-1` a client would be let into that edge's own topic. The certificate authority signs no such name;
should it ever, the edges' topics are denied here by name, and a list of devices shuts out every other name.
"""

from collections.abc import Iterator

from broker_config.broker import REPORTED, Broker
from broker_config.rendering.janitor import janitor_rights
from schemas.topics import ROOT, Access, Role, Topic, build, rules_for, wildcard

USERNAME = "%u"  # replaced by mosquitto with the name of the client in question
SYS = "$SYS/#"


def render_access(broker: Broker) -> str:
    return "\n".join(_lines(broker)) + "\n"


def render_site_access(broker: Broker) -> str:
    """Return what the head office's broker has to add to its ACL file for this site.

    Raises:
        ValueError: The broker has no head office.
    """
    if broker.head_office is None:
        raise ValueError("The description names no head office.")
    lines = [
        f"# What the site {broker.head_office.site} may write at the head office. Generated.",
        f"user {broker.head_office.site}",
        *(f"topic write {wildcard(topic, fleet=broker.fleet)}" for topic in REPORTED),
    ]
    return "\n".join(lines) + "\n"


def _lines(broker: Broker) -> Iterator[str]:
    yield f"# Who may publish (write) and receive (read) what in the fleet {broker.fleet}. Generated."
    if broker.banned:
        yield ""
        yield "# Banned: a denial goes before every right."
        for name in broker.banned:
            yield from _denial(name)
            if name in broker.monitors:
                yield f"topic deny {SYS}"
    everyone = () if broker.devices is not None else _of_device(broker, USERNAME)
    for edge in broker.edges:
        yield from _section(edge, rules_for(Role.EDGE, fleet=broker.fleet, edge=edge), everyone)
    for monitor in broker.monitors:
        rights = (*rules_for(Role.MONITOR, fleet=broker.fleet), Access(SYS, write=False))
        yield from _section(monitor, rights, everyone)
    if broker.janitor is not None:
        yield from _section(broker.janitor, janitor_rights(broker), everyone)
    for device in broker.devices or ():
        yield from _section(device, _of_device(broker, device), everyone)
    if everyone:
        yield ""
        yield "# Names with a slash that would become an edge's topic in the patterns below."
        for edge in broker.edges:
            topic = build(Topic.EDGE_STATE, fleet=broker.fleet, edge=edge)
            yield from _denial(topic.removeprefix(f"{ROOT}/{broker.fleet}/").removesuffix("/state"))
        yield ""
        # Patterns apply to every user, those above included: an edge may also act as a device of its own name.
        yield "# Devices: every user, under its own name."
        yield from _rules("pattern", everyone)


def _of_device(broker: Broker, name: str) -> tuple[Access, ...]:
    # Each edge by its name: what is published under another would be kept, if it is retained, and read by nobody.
    return rules_for(Role.DEVICE, fleet=broker.fleet, device=name, edges=broker.edges)


def _denial(name: str) -> Iterator[str]:
    yield f"user {name}"
    yield "topic deny #"


def _section(name: str, rights: tuple[Access, ...], everyone: tuple[Access, ...]) -> Iterator[str]:
    yield ""
    yield f"user {name}"
    # What everyone may is said once, so that each line matters.
    yield from _rules("topic", tuple(right for right in rights if right not in everyone))


def _rules(keyword: str, rights: tuple[Access, ...]) -> Iterator[str]:
    for topic_filter in dict.fromkeys(right.filter for right in rights):
        ways = {right.write for right in rights if right.filter == topic_filter}
        access = "readwrite" if len(ways) > 1 else "write" if True in ways else "read"
        yield f"{keyword} {access} {topic_filter}"
