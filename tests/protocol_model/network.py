"""A memory broker whose messages wait until the model delivers, loses, repeats or delays them."""

from collections.abc import Callable
from dataclasses import dataclass

from fleet_common.mqtt.link import Message, Will
from fleet_common.mqtt.outbox import Outgoing
from tests.support.memory_broker import MemoryBroker, Peer
from tests.support.memory_link import MemoryLink

Tap = Callable[[str, bytes], None]


@dataclass(frozen=True, slots=True, eq=False)
class Parcel:
    """A message from the broker to a client; `act` delivers it if its connection still exists."""

    receiver: str
    topic: str
    act: Callable[[], None]


class SteeredBroker(MemoryBroker):
    """A broker that never loses or delays what a client publishes or learns of its own connection.

    Attributes:
        waiting: Messages in flight, in the order sent.
        held: Messages, and copies of them, that are held back until released.
    """

    def __init__(self, *, clock: Callable[[], float], max_packet_bytes: int = 1 << 20) -> None:
        super().__init__(clock=clock, max_packet_bytes=max_packet_bytes)
        self.waiting: list[Parcel] = []
        self.held: list[Parcel] = []

    def arrive(self, place: int) -> None:
        """Deliver a message; all places but 0 let it overtake others."""
        self.waiting.pop(place).act()
        self.pump()

    def lose(self, place: int) -> None:
        del self.waiting[place]

    def repeat(self, place: int) -> None:
        self.waiting[place].act()
        self.pump()

    def hold(self, place: int, *, copy: bool) -> None:
        """Hold a message back, or a copy of it, until it is released."""
        self.held.append(self.waiting[place] if copy else self.waiting.pop(place))

    def release(self, place: int, *, keep: bool = False) -> None:
        """Let a held message arrive next; with `keep`, it arrives again later."""
        self.waiting.insert(0, self.held[place] if keep else self.held.pop(place))

    def retained_again(self) -> None:
        """Send what is retained once more: a real broker neither loses it nor lets it overtake."""
        for peer in list(self._peers.values()):
            for topic_filter in sorted(peer.filters):
                self.subscribe(peer, topic_filter)

    def forget(self, client_id: str) -> None:
        """Close a client's connection for good: its process has died."""
        if client_id in self._peers:
            self.kill(client_id)
        if client_id in self._away:
            del self._away[client_id]
        self.pump()

    def connected(self, client_id: str) -> bool:
        return client_id in self._peers

    def cut(self, client_id: str) -> bool:
        """Return whether a client is cut off but can be revived."""
        return client_id in self._away

    def go_down(self, *, forget_retained: bool = True) -> None:
        self.waiting.clear()
        self.held.clear()
        super().go_down(forget_retained=forget_retained)

    def _send(self, peer: Peer, message: Outgoing, *, retained: bool) -> None:
        def act() -> None:
            if peer.alive and not message.expired(self.clock()):
                peer.receive(Message(message.topic, message.payload, retained))

        self.waiting.append(Parcel(peer.client_id, message.topic, act))


class TappedLink(MemoryLink):
    def __init__(self, broker: MemoryBroker, client_id: str, tap: Tap, *, will: Will | None = None) -> None:
        super().__init__(broker, client_id, will=will)
        self._tap = tap

    def publish(self, topic: str, payload: bytes, **options: object) -> None:  # type: ignore[override]
        self._tap(topic, payload)
        super().publish(topic, payload, **options)  # type: ignore[arg-type]
