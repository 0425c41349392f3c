"""Outbound messages of a device, each to its own topic."""

import logging
from dataclasses import dataclass

from fleet_common.mqtt.errors import LinkError, LinkFault
from fleet_common.mqtt.link import Link
from fleet_device.client.inbox import Inbox
from fleet_device.errors import EdgeUnavailable
from schemas.codec import encode_close, encode_draft, encode_open
from schemas.messages import Close, Draft, Open
from schemas.topics import TREE, Topic, build

_log = logging.getLogger(__name__)

_RULES = {rule.topic: rule for rule in TREE}


@dataclass(frozen=True, slots=True)
class Outbound:
    """What a device sends.

    Attributes:
        link: To the broker.
        fleet: The fleet's name.
        device: This device's name.
        inbox: Told of messages that reached nobody, and of those that the broker does not allow.
        padding: Drafts are filled up to a multiple of so many bytes; 0 leaves them as they are.
    """

    link: Link
    fleet: str
    device: str
    inbox: Inbox
    padding: int = 0

    @property
    def connected(self) -> bool:
        return self.link.connected

    def silence(self, waited_s: float, *, edge: str | None = None) -> EdgeUnavailable:
        """Return why nobody has answered, and what to do.

        Args:
            waited_s: For so long.
            edge: The one that has the session, if any has.
        """
        if not self.connected:
            failure = self.link.failure
            if failure is not None and failure.refused:
                return EdgeUnavailable(str(failure), code=failure.fault)
            return EdgeUnavailable(
                f"The broker has not been reachable for {waited_s:.0f} s; check that it runs and try again.",
                code=LinkFault.UNREACHABLE,
            )
        if edge is not None:
            return EdgeUnavailable(
                f"Edge {edge!r} has the session and has not answered for {waited_s:.0f} s; see whether it hangs, and "
                "end it if it does."
            )
        if self.inbox.rejected is not None:
            return EdgeUnavailable(str(self.inbox.rejected), code=LinkFault.NOT_AUTHORIZED)
        return EdgeUnavailable(
            f"No edge of fleet {self.fleet!r} answered within {waited_s:.0f} s; start one with `fleet edge run`, "
            "or check that it uses the same broker and fleet name."
        )

    def open(self, message: Open) -> None:
        """Send an Open to whichever edge takes it."""
        self._send(Topic.OPEN, encode_open(message))

    def draft(self, message: Draft, *, edge: str) -> int:
        """Send a draft to the edge that has the session; return its bytes."""
        payload = encode_draft(message, padding=self.padding)
        self._send(Topic.DRAFT, payload, edge=edge)
        return len(payload)

    def close(self, message: Close) -> None:
        """Send a Close to all edges."""
        self._send(Topic.CLOSE, encode_close(message))

    def _send(self, topic: Topic, payload: bytes, *, edge: str | None = None) -> None:
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
