"""Broker in memory that loses, repeats, delays and reorders on demand; deterministic with a seeded generator."""

import contextlib
import heapq
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from fleet_common.mqtt.link import NO_MATCHING_SUBSCRIBERS, Message, Will, matches, split_share
from fleet_common.mqtt.outbox import Outgoing


@dataclass(frozen=True, slots=True)
class Faults:
    """Faults between the broker and a subscriber, each with its probability."""

    drop: float = 0.0
    duplicate: float = 0.0
    delay: float = 0.0
    max_delay: int = 8
    reorder: float = 0.0
    only: str = "#"


@dataclass(slots=True, eq=False)
class Peer:
    """One connection of a client; a reconnect makes a new one."""

    client_id: str
    receive: Callable[[Message], None]
    lost: Callable[[], None]
    restored: Callable[[], None]
    will: Will | None = None
    filters: set[str] = field(default_factory=set)
    alive: bool = True


MAX_STEPS = 1_000_000
IDLE_S = 0.05


@dataclass(order=True, slots=True)
class _Parcel:
    due: int  # step
    number: int  # in the order posted
    act: Callable[[], None] = field(compare=False)


class MemoryBroker:
    def __init__(
        self,
        *,
        rng: random.Random | None = None,
        faults: Faults | None = None,
        max_packet_bytes: int = 1 << 20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.faults = faults if faults is not None else Faults()
        self.max_packet_bytes = max_packet_bytes
        self.clock = clock
        self.up = True
        self._rng = rng if rng is not None else random.Random(0)
        self._peers: dict[str, Peer] = {}
        self._away: dict[str, Peer] = {}
        self._retained: dict[str, Outgoing] = {}
        self._parcels: list[_Parcel] = []
        self._turns: dict[tuple[str, str], int] = {}  # of shared subscriptions
        self._tick = 0
        self._posted = 0
        self._latest = _Parcel(0, 0, lambda: None)  # the last message, for the next to overtake
        self._arrived = threading.Condition(threading.RLock())

    # Called by links

    def attach(self, peer: Peer) -> None:
        """Connect a client; an older connection of the same name is closed."""
        with self._arrived:
            older = self._peers.get(peer.client_id)
            if older is not None:
                self._break(older)
            self._peers[peer.client_id] = peer

    def detach(self, peer: Peer) -> None:
        """Disconnect a client after its DISCONNECT, without a last will."""
        with self._arrived:
            peer.alive = False
            if self._peers.get(peer.client_id) is peer:
                del self._peers[peer.client_id]
            if self._away.get(peer.client_id) is peer:
                del self._away[peer.client_id]

    def subscribe(self, peer: Peer, topic_filter: str, *, retained: bool = True) -> None:
        with self._arrived:
            peer.filters.add(topic_filter)
            if retained and split_share(topic_filter)[0] is None:
                for kept in list(self._retained.values()):
                    if matches(topic_filter, kept.topic):
                        self._send(peer, kept, retained=True)

    def accept(self, message: Outgoing) -> int:
        """Take a publish and hand it on; return its MQTT reason code."""
        with self._arrived:
            if message.retain:
                self._retained.pop(message.topic, None)
                if message.payload:  # an empty one only clears, as MQTT says
                    self._retained[message.topic] = message
            receivers = self._receivers(message.topic)
            for peer in receivers:
                self._send(peer, message, retained=False)
            return 0 if receivers else NO_MATCHING_SUBSCRIBERS

    def schedule(self, act: Callable[[], None]) -> None:
        """Schedule `act` in order with the messages, without faults."""
        self._post(act, due=self._tick)

    # Called by tests

    def step(self) -> bool:
        with self._arrived:
            if not self._parcels:
                return False
            parcel = heapq.heappop(self._parcels)
            self._tick = max(self._tick + 1, parcel.due)
        parcel.act()
        return True

    def pump(self) -> int:
        for count in range(MAX_STEPS):
            if not self.step():
                return count
        raise RuntimeError(f"Messages still arrive after {MAX_STEPS} steps: handlers answer each other for ever.")

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        stopping = threading.Event()

        def deliver() -> None:
            while not stopping.is_set():
                if not self.step():
                    with self._arrived:
                        self._arrived.wait_for(lambda: bool(self._parcels) or stopping.is_set(), IDLE_S)

        thread = threading.Thread(target=deliver, name="memory-broker", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopping.set()
            thread.join()

    def kill(self, client_id: str) -> None:
        """Break a client's connection as a power failure does: the last will is published."""
        with self._arrived:
            peer = self._peers[client_id]
            self._break(peer)
            self._away[client_id] = peer

    def revive(self, client_id: str) -> None:
        with self._arrived:
            self.schedule(self._away.pop(client_id).restored)

    def go_down(self, *, forget_retained: bool = True) -> None:
        """Stop: all clients lose their connection, and messages in flight are lost."""
        with self._arrived:
            self.up = False
            self._parcels.clear()
            if forget_retained:
                self._retained.clear()
            lost = list(self._peers.values())
            self._away.update(self._peers)
            self._peers.clear()
            for peer in lost:
                peer.alive = False
                self.schedule(peer.lost)

    def come_up(self) -> None:
        with self._arrived:
            self.up = True
            for client_id in list(self._away):
                self.revive(client_id)

    def retained(self, topic: str) -> bytes | None:
        kept = self._retained.get(topic)
        return None if kept is None else kept.payload

    def _break(self, peer: Peer) -> None:
        self.detach(peer)
        self.schedule(peer.lost)
        if peer.will is not None:
            self.accept(Outgoing(peer.will.topic, peer.will.payload, retain=True))

    def _receivers(self, topic: str) -> list[Peer]:
        """Return the receivers of a message: every client once, and one client of every shared subscription."""
        receivers = []
        groups: dict[tuple[str, str], list[Peer]] = {}
        for peer in self._peers.values():
            mine = [name for name in peer.filters if matches(name, topic)]
            if any(split_share(name)[0] is None for name in mine):
                receivers.append(peer)
            for name in mine:
                group, inner = split_share(name)
                if group is not None:
                    groups.setdefault((group, inner), []).append(peer)
        for key, members in groups.items():
            turn = self._turns.get(key, 0)
            self._turns[key] = turn + 1
            receivers.append(members[turn % len(members)])
        return receivers

    def _send(self, peer: Peer, message: Outgoing, *, retained: bool) -> None:
        def act() -> None:
            if peer.alive and not message.expired(self.clock()):
                peer.receive(Message(message.topic, message.payload, retained))

        faults = self.faults if matches(self.faults.only, message.topic) else Faults()
        if self._happens(faults.drop):
            return
        for _ in range(2 if self._happens(faults.duplicate) else 1):
            late = self._rng.randint(1, faults.max_delay) if self._happens(faults.delay) else 0
            if self._happens(faults.reorder) and self._latest in self._parcels:
                self._latest.act, act = act, self._latest.act
            self._latest = self._post(act, due=self._tick + late)

    def _happens(self, probability: float) -> bool:
        return probability > 0.0 and self._rng.random() < probability

    def _post(self, act: Callable[[], None], *, due: int) -> _Parcel:
        with self._arrived:
            self._posted += 1
            parcel = _Parcel(due, self._posted, act)
            heapq.heappush(self._parcels, parcel)
            self._arrived.notify_all()
        return parcel
