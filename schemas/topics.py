"""Topic tree, defined once: building, parsing, filters and access rules come from the same table.

A device's identity is a whole level of every topic it uses, so one ACL pattern serves every device,
and the reply topic follows from the publish topic that the broker has already checked.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from schemas.errors import TopicError
from schemas.names import check_name

ROOT: Final = "dssd/v1"

HOME_ASSISTANT: Final = "homeassistant"
"""Root of Home Assistant's discovery, which is no topic of a fleet: a monitor presents the devices there."""


class ClientRole(StrEnum):
    """Role of a client on a topic."""

    DEVICE = "device"
    EDGE = "edge"
    MONITOR = "monitor"  # an administrator: reads all, writes configuration and commands


class Topic(StrEnum):
    STATE = "state"
    OPEN = "up/open"
    DRAFT = "up/draft"
    CLOSE = "up/close"
    TELEMETRY = "up/telemetry"
    SESSION = "down/session"
    VERDICT = "down/verdict"
    CONFIG_DESIRED = "config/desired"
    CONFIG_REPORTED = "config/reported"
    COMMAND_REQUEST = "command/request"
    COMMAND_RESPONSE = "command/response"
    EDGE_STATE = "_edge"
    EDGE_CHAT = "_edge/chat"
    ALERT = "_alert"


@dataclass(frozen=True, slots=True)
class TopicRule:
    """One line of the tree.

    Attributes:
        template: Levels below `dssd/v1/<fleet>/`, with `{device}` and `{edge}` to fill in.
        writers: Roles that publish here; a device only under its own name, an edge under any device's but only under
            its own edge name.
        readers: Roles that subscribe here; a device only to its own name.
        expiry_s: Seconds after which an undelivered message is worthless; None for never.
        hot: One message per round: binary, with a topic alias.
        binary: CBOR rather than JSON.
    """

    topic: Topic
    template: str
    writers: frozenset[ClientRole]
    readers: frozenset[ClientRole]
    qos: int = 1
    retained: bool = False
    expiry_s: int | None = None
    hot: bool = False
    binary: bool = False

    @property
    def of_edge(self) -> bool:
        """An edge publishes here about itself."""
        return self.template.startswith("_edge/")

    @property
    def content_type(self) -> str:
        return "application/cbor" if self.binary else "application/json"


_DEVICE = frozenset({ClientRole.DEVICE})
_EDGE = frozenset({ClientRole.EDGE})
_MONITOR = frozenset({ClientRole.MONITOR})
_ALL = frozenset(ClientRole)

# When a verdict is later than this, the device has resumed elsewhere.
HOT_EXPIRY_S: Final = 30
COMMAND_EXPIRY_S: Final = 60

TREE: Final[tuple[TopicRule, ...]] = (
    TopicRule(Topic.STATE, "{device}/state", _DEVICE, _EDGE | _MONITOR, retained=True),
    TopicRule(Topic.OPEN, "{device}/up/open", _DEVICE, _EDGE, binary=True),
    TopicRule(Topic.DRAFT, "{device}/up/draft/{edge}", _DEVICE, _EDGE, expiry_s=HOT_EXPIRY_S, hot=True, binary=True),
    TopicRule(Topic.CLOSE, "{device}/up/close", _DEVICE, _EDGE, binary=True),
    TopicRule(Topic.TELEMETRY, "{device}/up/telemetry", _DEVICE, _EDGE | _MONITOR, qos=0),
    TopicRule(Topic.SESSION, "{device}/down/session", _EDGE, _DEVICE, binary=True),
    TopicRule(Topic.VERDICT, "{device}/down/verdict", _EDGE, _DEVICE, expiry_s=HOT_EXPIRY_S, hot=True, binary=True),
    TopicRule(Topic.CONFIG_DESIRED, "{device}/config/desired", _MONITOR, _DEVICE | _MONITOR, retained=True),
    TopicRule(Topic.CONFIG_REPORTED, "{device}/config/reported", _DEVICE, _MONITOR, retained=True),
    TopicRule(Topic.COMMAND_REQUEST, "{device}/command/request", _MONITOR, _DEVICE, expiry_s=COMMAND_EXPIRY_S),
    TopicRule(Topic.COMMAND_RESPONSE, "{device}/command/response", _DEVICE, _MONITOR),
    TopicRule(Topic.EDGE_STATE, "_edge/{edge}/state", _EDGE, _ALL, retained=True),
    TopicRule(Topic.EDGE_CHAT, "_edge/{edge}/chat", _EDGE, _ALL, retained=True),
    TopicRule(Topic.ALERT, "_alert", _MONITOR, _MONITOR),
)

_CACHED_TOPICS: Final = 4096

_BY_TOPIC: Final = {rule.topic: rule for rule in TREE}


@dataclass(frozen=True, slots=True)
class TopicAddress:
    """Components of a topic; `device` is None for an edge's own topic, `edge` for a topic without an edge."""

    topic: Topic
    fleet: str
    device: str | None = None
    edge: str | None = None

    @property
    def rule(self) -> TopicRule:
        return _BY_TOPIC[self.topic]

    def __str__(self) -> str:
        return build(self.topic, fleet=self.fleet, device=self.device, edge=self.edge)


@dataclass(frozen=True, slots=True)
class Access:
    """One access right of a role, to publish or else to subscribe.

    `retained`: its messages there are to be retained, for brokers that can distinguish.
    """

    filter: str
    write: bool
    retained: bool = False


@functools.lru_cache(_CACHED_TOPICS)
def build(topic: Topic, *, fleet: str, device: str | None = None, edge: str | None = None) -> str:
    """Return the full topic; raise InvalidName, or TopicError if a level is missing or superfluous."""
    template = _BY_TOPIC[topic].template
    values = {"device": device, "edge": edge}
    for level, value in values.items():
        if ("{" + level + "}" in template) != (value is not None):
            word = "needs" if value is None else "has no"
            raise TopicError(f"The topic {topic.value!r} {word} {level} name.")
        if value is not None:
            check_name(value)
    return f"{ROOT}/{check_name(fleet)}/{template.format(device=device, edge=edge)}"


def wildcard(topic: Topic, *, fleet: str, device: str = "+", edge: str = "+") -> str:
    """Return a subscription filter: each level either a name or `+`."""
    return f"{ROOT}/{fleet}/{_BY_TOPIC[topic].template.format(device=device, edge=edge)}"


@functools.lru_cache(_CACHED_TOPICS)  # exceptions are not cached
def parse(topic: str) -> TopicAddress:
    """Parse a received topic; raise TopicError outside the tree."""
    levels = topic.split("/")
    root = ROOT.split("/")
    if levels[: len(root)] == root and len(levels) > len(root) + 1:
        fleet, below = levels[len(root)], levels[len(root) + 1 :]
        for rule in TREE:
            names = _match(rule.template.split("/"), below)
            if names is not None:
                return TopicAddress(rule.topic, _level(fleet, topic), names.get("device"), names.get("edge"))
    raise TopicError(f"{topic[:200]!r} is not a topic of this fleet's tree.")


def rules_for(
    role: ClientRole, *, fleet: str, device: str = "+", edge: str = "+", edges: Sequence[str] = ("+",)
) -> tuple[Access, ...]:
    """Return the rights of a role, as topic filters.

    `device` and `edge` are a name, `+`, or the broker's own substitution (`%u`); a device may draft to each of `edges`.
    """
    rights = []
    for rule in TREE:
        # Any device may draft to any edge of its fleet; an edge only reads under its own name.
        levels = edges if role is ClientRole.DEVICE and rule.topic is Topic.DRAFT else (edge,)
        patterns = [wildcard(rule.topic, fleet=fleet, device=device, edge=level) for level in levels]
        if role in rule.writers:
            rights += [Access(pattern, write=True, retained=rule.retained) for pattern in patterns]
        if role in rule.readers:
            # What edges publish of themselves, every reader may read of all.
            everywhere = [wildcard(rule.topic, fleet=fleet)] if rule.of_edge else patterns
            rights += [Access(pattern, write=False) for pattern in everywhere]
    return tuple(rights)


def _match(template: list[str], levels: list[str]) -> dict[str, str] | None:
    if len(template) != len(levels):
        return None
    names = {}
    for expected, level in zip(template, levels, strict=True):
        if expected.startswith("{"):
            try:
                names[expected[1:-1]] = check_name(level)
            except ValueError:
                return None
        elif expected != level:
            return None
    return names


def _level(name: str, topic: str) -> str:
    try:
        return check_name(name)
    except ValueError as error:
        raise TopicError(f"{topic[:200]!r} is not a topic of this fleet's tree.") from error
