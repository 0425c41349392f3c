"""Publisher: sends replies and verdicts, each to the topic of the device that asked."""

import logging
from dataclasses import dataclass

from fleet_common.mqtt.errors import LinkError
from fleet_common.mqtt.link import Link, OutcomeHandler
from fleet_edge.metrics.figures import Figures
from schemas.codec import MAX_VERDICT_BYTES, encode_reply
from schemas.messages import SessionReply
from schemas.topics import TREE, Topic, build

_log = logging.getLogger(__name__)

_VERDICT = next(rule for rule in TREE if rule.topic is Topic.VERDICT)
_SESSION = next(rule for rule in TREE if rule.topic is Topic.SESSION)

PACKET_OVERHEAD = 512
"""Bytes kept free in a packet for topic, properties and the message's other fields."""

TOPIC_OVERHEAD = 256
"""Of them, those for the topic and properties."""


@dataclass(frozen=True, slots=True)
class Publisher:
    """Sends to devices. A message that the link cannot take is logged: the device repeats what was not answered.

    Attributes:
        link: To the broker.
        fleet: The fleet's name.
        figures: Count, for the metrics.
    """

    link: Link
    fleet: str
    figures: Figures

    @property
    def max_form_bytes(self) -> int:
        """Room for a downlink form of p in one packet."""
        return self.link.max_packet_bytes - PACKET_OVERHEAD

    @property
    def max_verdict_bytes(self) -> int:
        """Room for a whole verdict in one packet."""
        return min(MAX_VERDICT_BYTES, self.link.max_packet_bytes - TOPIC_OVERHEAD)

    def reply(self, device: str, message: SessionReply, *, qos: int = 1) -> None:
        """Send an Opened, Refused, Closed or Fault."""
        payload = encode_reply(message)
        self.figures.replied(len(payload))
        self._publish(
            build(Topic.SESSION, fleet=self.fleet, device=device),
            payload,
            content_type=_SESSION.content_type,
            qos=qos,
        )

    def verdict(self, device: str, payload: bytes, *, form: str) -> None:
        """Send a verdict's bytes, before replies that wait.

        Args:
            device: Whom to.
            payload: The verdict.
            form: What its bytes are counted as.
        """
        self.figures.downlink_bytes[form] += len(payload)
        topic = build(Topic.VERDICT, fleet=self.fleet, device=device)
        # No content type: its bytes would outweigh a coupled verdict.
        self._publish(
            topic,
            payload,
            expiry_s=_VERDICT.expiry_s,
            alias=True,
            priority=True,
            on_outcome=self.figures.probe(),
        )

    def _publish(
        self,
        topic: str,
        payload: bytes,
        *,
        content_type: str | None = None,
        expiry_s: int | None = None,
        alias: bool = False,
        qos: int = 1,
        priority: bool = False,
        on_outcome: OutcomeHandler | None = None,
    ) -> None:
        try:
            self.link.publish(
                topic,
                payload,
                qos=qos,
                content_type=content_type,
                expiry_s=expiry_s,
                alias=alias,
                priority=priority,
                on_outcome=on_outcome,
            )
        except LinkError as error:
            _log.warning("Not sent to %s: %s", topic, error)
