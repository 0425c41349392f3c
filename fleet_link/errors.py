"""The exception tree of the wire.

::

    LinkError
    ├── ConnectFailed       the broker cannot be reached or turned us away
    ├── NotConnected        nothing can be sent now, and the queue for later is full
    ├── PacketTooLarge      the broker would never take this packet
    └── PublishRejected     the broker answered a QoS 1 publish with an error
"""

__all__ = ["ConnectFailed", "LinkError", "NotConnected", "PacketTooLarge", "PublishRejected"]


class LinkError(Exception):
    """Base of all errors of this package. Its text is one sentence for the user."""


class ConnectFailed(LinkError):  # noqa: N818 - reads as what it says
    """The broker cannot be reached or turned us away."""


class NotConnected(LinkError):  # noqa: N818
    """Nothing can be sent now, and the queue for later is full."""


class PacketTooLarge(LinkError):  # noqa: N818
    """The broker would never take this packet.

    Attributes:
        size: Bytes of the packet.
        limit: Bytes that the broker announced.
    """

    def __init__(self, *, size: int, limit: int) -> None:
        super().__init__(f"A packet of {size} bytes exceeds the broker's limit of {limit}.")
        self.size = size
        self.limit = limit


class PublishRejected(LinkError):  # noqa: N818
    """The broker answered a QoS 1 publish with an error.

    Attributes:
        topic: Where to.
        reason: MQTT 5 reason code; 0x10 is "no matching subscribers", 0x87 "not authorized".
    """

    def __init__(self, *, topic: str, reason: int) -> None:
        super().__init__(f"The broker rejected a publish to {topic} with reason 0x{reason:02x}.")
        self.topic = topic
        self.reason = reason
