"""A broker in memory whose messages wait until they are told to arrive, to be lost, to arrive twice, or later."""

from collections.abc import Callable
from dataclasses import dataclass

from fleet_common.mqtt.link import Message, Will
from fleet_common.mqtt.outbox import Outgoing
from tests.support.memory_broker import MemoryBroker, Peer
from tests.support.memory_link import MemoryLink

Tap = Callable[[str, bytes], None]


@dataclass(frozen=True, slots=True, eq=False)
class Parcel:
    """A message on its way from the broker to a client.

    Attributes:
        receiver: The client's name.
        topic: Of the message.
        act: Hands it over, if the connection that it was meant for still stands.
    """

    receiver: str
    topic: str
    act: Callable[[], None]


class SteeredBroker(MemoryBroker):
    """The broker. What a client is told of its own connection and publishes is never lost, and comes at once.

    Attributes:
        waiting: Messages on their way, in the order sent.
        held: Messages, and copies of them, that are kept back until they are released.
    """

    def __init__(self, *, clock: Callable[[], float], max_packet_bytes: int = 1 << 20) -> None:
        super().__init__(clock=clock, max_packet_bytes=max_packet_bytes)
        self.waiting: list[Parcel] = []
        self.held: list[Parcel] = []

    def arrive(self, place: int) -> None:
        """Hand a message over; all places but 0 let it overtake others."""
        self.waiting.pop(place).act()
        self.pump()

    def lose(self, place: int) -> None:
        """Let a message never arrive."""
        del self.waiting[place]

    def repeat(self, place: int) -> None:
        """Hand a message over, and again some time later."""
        self.waiting[place].act()
        self.pump()

    def hold(self, place: int, *, copy: bool) -> None:
        """Keep a message back, or a copy of it, for as long as nobody releases it."""
        self.held.append(self.waiting[place] if copy else self.waiting.pop(place))

    def release(self, place: int, *, keep: bool = False) -> None:
        """Let a message that was held back arrive next; if it is kept, another time as well."""
        self.waiting.insert(0, self.held[place] if keep else self.held.pop(place))

    def forget(self, client_id: str) -> None:
        """Break a client's connection for good: its process has died."""
        if client_id in self._peers:
            self.kill(client_id)
        if client_id in self._away:
            del self._away[client_id]
        self.pump()

    def connected(self, client_id: str) -> bool:
        """Whether a client's connection stands."""
        return client_id in self._peers

    def cut(self, client_id: str) -> bool:
        """Whether a client is only cut off, so that it may be revived."""
        return client_id in self._away

    def go_down(self, *, forget_retained: bool = True) -> None:
        """Stop; what was on its way is lost."""
        self.waiting.clear()
        self.held.clear()
        super().go_down(forget_retained=forget_retained)

    def _send(self, peer: Peer, message: Outgoing, *, retained: bool) -> None:
        def act() -> None:
            if peer.alive and not message.expired(self.clock()):
                peer.receive(Message(message.topic, message.payload, retained))

        self.waiting.append(Parcel(peer.client_id, message.topic, act))


class TappedLink(MemoryLink):
    """A link that tells of all that is published on it."""

    def __init__(self, broker: MemoryBroker, client_id: str, tap: Tap, *, will: Will | None = None) -> None:
        super().__init__(broker, client_id, will=will)
        self._tap = tap

    def publish(self, topic: str, payload: bytes, **options: object) -> None:  # type: ignore[override]
        """Send a message, and tell of it."""
        self._tap(topic, payload)
        super().publish(topic, payload, **options)  # type: ignore[arg-type]
