"""Publish and wait for the broker's answer, for those who have the time: tools, not the hot path."""

import threading

from fleet_link.errors import PublishRejected
from fleet_link.link import Link, Outcome

__all__ = ["publish_confirmed"]


def publish_confirmed(
    link: Link,
    topic: str,
    payload: bytes,
    *,
    timeout_s: float,
    retain: bool = False,
    expiry_s: int | None = None,
    content_type: str | None = None,
) -> Outcome:
    """Publish at QoS 1 and return the broker's answer, which may be that nobody listens.

    Blocks, so it MUST NOT be called from a handler.

    Raises:
        PublishRejected: The broker says no, or nothing within `timeout_s`.
        PacketTooLarge: As `Link.publish`.
        NotConnected: Likewise.
    """
    answered = threading.Event()
    answers: list[Outcome] = []

    def remember(outcome: Outcome) -> None:
        answers.append(outcome)
        answered.set()

    link.publish(
        topic,
        payload,
        retain=retain,
        expiry_s=expiry_s,
        content_type=content_type,
        on_outcome=remember,
    )
    if not answered.wait(timeout_s):
        raise PublishRejected(topic=topic, reason=None)
    if not answers[0].accepted:
        raise PublishRejected(topic=topic, reason=answers[0].reason)
    return answers[0]
