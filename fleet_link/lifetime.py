"""How long the broker keeps a client's session after the connection.

Normally not at all: the protocol above asks again, and a session that is kept for one who crashed would make him look
like one who still listens. A planned handover is the exception: within the seconds that it takes, nothing may be lost.
MQTT lets a goodbye lengthen a session's life only if its beginning gave it any (3.14.2.2.2), hence the one second.
"""

from typing import Final

from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from fleet_link.settings import LinkSettings

__all__ = ["HANDOVER_S", "connect_properties", "goodbye_properties"]

LINGER_S: Final = 1
HANDOVER_S: Final = 30


def connect_properties(settings: LinkSettings) -> Properties:
    """Return the properties of a CONNECT."""
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    properties.MaximumPacketSize = settings.packet_bytes
    if _may_hand_over(settings):
        properties.SessionExpiryInterval = LINGER_S
    return properties


def goodbye_properties(settings: LinkSettings, *, hand_over: bool) -> Properties | None:
    """Return the properties of a DISCONNECT.

    Args:
        settings: As at the CONNECT.
        hand_over: Whether another connection is to go on with the session.
    """
    if not _may_hand_over(settings):
        return None
    properties = Properties(PacketTypes.DISCONNECT)  # type: ignore[no-untyped-call]
    properties.SessionExpiryInterval = HANDOVER_S if hand_over else 0
    return properties


def _may_hand_over(settings: LinkSettings) -> bool:
    return settings.tls is not None and settings.tls.certificate is not None
