"""A client of the broker in memory, as the broker sees it."""

from collections.abc import Callable
from dataclasses import dataclass, field

from fleet_link.link import Message, Will

__all__ = ["Peer"]


@dataclass(slots=True, eq=False)
class Peer:
    """One connection of a client; a reconnect makes a new one.

    Attributes:
        client_id: Its name.
        receive: Takes a message.
        lost: Told when the connection breaks.
        restored: Told when a broker that was down is back.
        will: Published when it breaks.
        filters: Its subscriptions.
        alive: Whether the connection stands.
    """

    client_id: str
    receive: Callable[[Message], None]
    lost: Callable[[], None]
    restored: Callable[[], None]
    will: Will | None = None
    filters: set[str] = field(default_factory=set)
    alive: bool = True
