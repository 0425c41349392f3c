"""Publisher: send replies and verdicts to the topic of their device."""

import logging
from dataclasses import dataclass
from typing import Any, Final

from fleet_common.mqtt.errors import LinkError
from fleet_common.mqtt.link import Link
from fleet_edge.metrics import Figures
from schemas.codec import MAX_VERDICT_BYTES, encode_reply
from schemas.messages import SessionReply
from schemas.topics import TREE, Topic, build

_log = logging.getLogger(__name__)

_OF_TOPIC: Final = {rule.topic: rule for rule in TREE}

_PACKET_OVERHEAD: Final = 512
"""Bytes of a packet reserved for topic, properties and the message's other fields."""

_TOPIC_OVERHEAD: Final = 256
"""Bytes of these for topic and properties."""


@dataclass(frozen=True, slots=True)
class Publisher:
    """Sends to devices. Failures are logged only: devices repeat what was not answered."""

    link: Link
    fleet: str
    figures: Figures

    @property
    def max_form_bytes(self) -> int:
        return self.link.max_packet_bytes - _PACKET_OVERHEAD

    @property
    def max_verdict_bytes(self) -> int:
        return min(MAX_VERDICT_BYTES, self.link.max_packet_bytes - _TOPIC_OVERHEAD)

    def reply(self, device: str, message: SessionReply, *, qos: int = 1) -> None:
        payload = encode_reply(message)
        self.figures.on_reply(len(payload))
        topic = build(Topic.SESSION, fleet=self.fleet, device=device)
        self._publish(topic, payload, content_type=_OF_TOPIC[Topic.SESSION].content_type, qos=qos)

    def verdict(self, device: str, payload: bytes, *, form: str) -> None:
        """Send a verdict ahead of waiting replies, counted as `form`."""
        self.figures.downlink_bytes[form] += len(payload)
        topic = build(Topic.VERDICT, fleet=self.fleet, device=device)
        # Without a content type, which would be larger than a coupled verdict.
        expiry_s, probe = _OF_TOPIC[Topic.VERDICT].expiry_s, self.figures.probe()
        self._publish(topic, payload, qos=1, expiry_s=expiry_s, alias=True, priority=True, on_outcome=probe)

    def _publish(self, topic: str, payload: bytes, **options: Any) -> None:  # noqa: ANN401 - those of `Link.publish`
        try:
            self.link.publish(topic, payload, **options)
        except LinkError as error:
            _log.warning("Not sent to %s: %s", topic, error)
