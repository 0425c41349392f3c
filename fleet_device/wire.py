"""What a device sends: each message to its own topic, as the topic tree says."""

import logging
from dataclasses import dataclass

from fleet_device.inbox import Inbox
from fleet_link.errors import LinkError
from fleet_link.link import Link
from schemas.topics import TREE, Topic, build

__all__ = ["Wire"]

_log = logging.getLogger(__name__)

_RULES = {rule.topic: rule for rule in TREE}


@dataclass(frozen=True, slots=True)
class Wire:
    """The device's way to the edge.

    Attributes:
        link: To the broker.
        fleet: The fleet's name.
        device: This device's name.
        inbox: Told of messages that reached nobody.
    """

    link: Link
    fleet: str
    device: str
    inbox: Inbox

    @property
    def connected(self) -> bool:
        """Whether the broker answers."""
        return self.link.connected

    def send(self, topic: Topic, payload: bytes, *, edge: str | None = None) -> None:
        """Send a message. What the link cannot take is logged: it is repeated when no answer comes."""
        rule = _RULES[topic]
        try:
            self.link.publish(
                build(topic, fleet=self.fleet, device=self.device, edge=edge),
                payload,
                qos=rule.qos,
                expiry_s=rule.expiry_s,
                content_type=None if rule.hot else rule.content_type,
                alias=rule.hot,
                on_outcome=self.inbox.on_undelivered(topic),
            )
        except LinkError as error:
            _log.warning("Not sent: %s", error)
