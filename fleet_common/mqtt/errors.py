"""Exceptions of the link."""

from enum import StrEnum
from typing import Final

from schemas.errors import FleetError

NOT_AUTHORIZED: Final = 0x87


class LinkError(FleetError):
    """Base of all errors of a link. The message is one sentence for the user."""


class LinkFault(StrEnum):
    UNREACHABLE = "broker_unreachable"  # nobody answers, or what answers is no MQTT broker
    BUSY = "broker_busy"  # it asks to be tried later
    NOT_AUTHORIZED = "broker_not_authorized"  # user name, password or name are not accepted
    CERTIFICATE = "broker_certificate"  # one of the two certificates is not accepted
    NAME_TAKEN = "broker_name_taken"  # another client has connected with our client id
    UNSUITABLE = "broker_unsuitable"  # no MQTT 5, or a feature is missing that the fleet needs


class ConnectFailed(LinkError):  # noqa: N818 - reads as what it says
    """The broker cannot be reached or refused the connection.

    Attributes:
        fault: Why, for programs.
        final: Whether trying again is pointless until somebody changes something (a password, a certificate).
        refused: Whether a working broker refused us, or we refused it: everything final, and requests to try later.
    """

    def __init__(
        self, sentence: str, *, fault: LinkFault = LinkFault.UNREACHABLE, final: bool = False, refused: bool = False
    ) -> None:
        super().__init__(sentence)
        self.fault = fault
        self.final = final
        self.refused = final or refused


class NotConnected(LinkError):  # noqa: N818
    """Nothing can be sent now, and the queue for later is full."""


class PacketTooLarge(LinkError):  # noqa: N818
    """The broker would never accept this packet."""

    def __init__(self, *, size: int, limit: int) -> None:
        super().__init__(f"A packet of {size} bytes exceeds the broker's limit of {limit}.")
        self.size = size
        self.limit = limit


class PublishRejected(LinkError):  # noqa: N818
    """The broker answered a QoS 1 publish with an error, or did not answer in time.

    `reason` is the MQTT 5 reason code (0x87 is "not authorized"), None if no answer came.
    """

    def __init__(self, *, topic: str, reason: int | None) -> None:
        if reason == NOT_AUTHORIZED:
            sentence = (
                f"The broker does not let this client publish to {topic}: check the fleet's name and the client's own, "
                "or have the operator name it in the broker's description."
            )
        else:
            answer = "did not answer" if reason is None else f"rejected with reason 0x{reason:02x}"
            sentence = f"The broker {answer} a publish to {topic}."
        super().__init__(sentence)
        self.topic = topic
        self.reason = reason
