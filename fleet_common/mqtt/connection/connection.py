"""MQTT connection, from CONNECT to its end, on one thread.

A `Connection` is used once: every reconnect makes a new one, with a new paho client. So nothing of an old
connection, a topic alias, a packet identifier, a message that paho would repeat by itself, can leak into a
new one. All calls into paho come from the link's thread, which polls the socket itself: paho's own loop uses
`select`, which fails from descriptor 1024 on, and its thread may die unnoticed.

Messages and their acknowledgements, which are nearly all of the traffic, are read and written here: in the library they
take most of the time of an edge that is busy. It has the rest of the protocol, and what of them is not as expected.
"""

from collections.abc import Callable, Sequence
from typing import Final

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from fleet_common.mqtt import failures
from fleet_common.mqtt.connection.mqtt_client import connect_properties, goodbye_properties, make_client
from fleet_common.mqtt.connection.polling import MAX_POLL_S, Waker, has_arrived, wait
from fleet_common.mqtt.connection.screen import Screen
from fleet_common.mqtt.connection.screened_socket import ScreenedSocket
from fleet_common.mqtt.connection.silence import Silence
from fleet_common.mqtt.counters import Accepts, Guard
from fleet_common.mqtt.link import FIRST_ERROR, Message
from fleet_common.mqtt.outbox.announced import Announced
from fleet_common.mqtt.outbox.outgoing import Outgoing
from fleet_common.mqtt.outbox.packets import AliasTable, publish_packet
from fleet_common.mqtt.routing import Route
from fleet_common.mqtt.settings import LinkSettings
from fleet_common.mqtt.tls.context import LinkContext

READS: Final = 32  # packets that the library takes before what waits to be sent has its turn
IDENTIFIERS: Final = 65_535


class ConnectionLost(Exception):  # noqa: N818 - reads as what it says
    """The connection has ended without our goodbye. Its text says how.

    Attributes:
        taken_over: Whether another client has connected with our client id.
    """

    def __init__(self, how: str, *, taken_over: bool = False) -> None:
        super().__init__(how)
        self.taken_over = taken_over


class Connection:
    """One connection. Every method but the constructor belongs to the link's thread."""

    def __init__(
        self,
        settings: LinkSettings,
        *,
        context: LinkContext | None,
        guard: Guard,
        waker: Waker,
        clock: Callable[[], float],
        on_message: Callable[[Message], None],
        on_answer: Callable[[int, int], None],
    ) -> None:
        """Prepare a connection.

        Args:
            settings: Where to and who we are.
            context: For TLS; None for plain TCP.
            guard: Of the link.
            waker: Ends a `step` early.
            clock: Monotonic seconds.
            on_message: Gets every message.
            on_answer: Gets packet identifier and reason code of every acknowledgement.
        """
        self._settings = settings
        self._context = context
        self._screen = Screen(
            max_packet_bytes=settings.packet_bytes, guard=guard, on_message=on_message, on_answer=self._answered
        )
        self._waker = waker
        self._clock = clock
        self._on_message = on_message
        self._on_answer = on_answer
        self._announced: Announced | None = None
        self._refusal: int | None = None
        self._aliases = AliasTable(maximum=0)
        self._identifier = IDENTIFIERS // 2
        self._under_way: set[int] = set()  # packet identifiers of messages that are not answered
        self._awaited: dict[int, tuple[str, ...]] = {}  # filters by the identifier of their SUBSCRIBE
        self._refused_filters: list[str] = []
        self._ending = ""
        self._taken_over = False
        self._socket: ScreenedSocket | None = None
        self._read_at = 0.0  # not before
        self._silence: Silence | None = None  # from the broker's first answer on
        self._client = make_client(settings, context, screen=self._screen)
        self._client.on_connect = self._connected
        self._client.on_disconnect = self._disconnected
        self._client.on_message = self._received
        self._client.on_subscribe = self._subscriptions_answered

    def open(self, *, resume: bool = False) -> Announced:
        """Connect and wait for the broker's CONNACK.

        Args:
            resume: Whether to go on with the session that a handover has kept: what came in between is then delivered.

        Raises:
            ConnectFailed: In time there was none, it says no, or the broker lacks what the fleet needs.
        """
        try:
            self._client.connect(
                self._settings.host,
                self._settings.port,
                keepalive=self._settings.keepalive_s,
                clean_start=not resume,
                properties=connect_properties(self._settings),
            )
        except (OSError, ValueError) as error:
            raise failures.explain(error, self._settings) from error
        deadline = self._clock() + self._settings.handshake_s
        while self._announced is None:
            if self._refusal is not None:
                raise failures.refused(self._refusal, self._settings)
            if self._clock() >= deadline:
                raise failures.silent(self._settings)
            try:
                self.step(deadline - self._clock())
            except ConnectionLost as error:
                if self._context is not None and self._context.alert is not None:
                    raise failures.explain(self._context.alert, self._settings) from error
                if self._refusal is None:
                    raise failures.silent(self._settings, closed=True) from error
        if self._announced.missing:
            self.goodbye()
            raise failures.unsuitable(self._announced.missing, self._settings)
        return self._announced

    def subscribe(self, routes: Sequence[Route]) -> None:
        if not routes:
            return
        _, identifier = self._client.subscribe([(route.filter, _options(route)) for route in routes])
        if identifier is not None:
            self._awaited[identifier] = tuple(route.filter for route in routes)

    def unsubscribe(self, topic_filter: str) -> None:
        self._client.unsubscribe(topic_filter)

    def screen(self, accepts: Accepts | None) -> None:
        self._screen.accepts = accepts

    @property
    def subscribed(self) -> bool:
        """Whether every subscription asked for has been answered."""
        return not self._awaited

    def take_refused_filters(self) -> list[str]:
        """Return the filters refused since the last call."""
        refused, self._refused_filters = self._refused_filters, []
        return refused

    def send(self, message: Outgoing) -> int:
        """Write a PUBLISH with the next `step`; return its packet identifier, which is 0 for QoS 0.

        Raises:
            ConnectionLost: The connection has ended, or the broker has left all identifiers unanswered.
        """
        topic, alias = message.topic, None
        assigned = self._aliases.assign(topic) if message.alias else None
        if assigned is not None:
            alias, known = assigned
            topic = "" if known else topic
        identifier = self._new_identifier() if message.qos else 0
        self._live_socket().put(
            publish_packet(
                topic,
                message.payload,
                identifier=identifier,
                retain=message.retain,
                expiry_s=message.expiry_s(self._clock()),
                content_type=message.content_type,
                alias=alias,
            )
        )
        return identifier

    @property
    def clogged(self) -> bool:
        """Whether what was sent waits for the network, and more would have to wait as well."""
        return self._live_socket().clogged

    def _new_identifier(self) -> int:
        """Return a packet identifier that no unanswered message has.

        The library counts its own, of subscriptions, from 1 on; ours begin far from there.
        """
        if len(self._under_way) == IDENTIFIERS:
            raise ConnectionLost("the broker has answered nothing that was sent")
        while True:
            self._identifier = self._identifier % IDENTIFIERS + 1
            if self._identifier not in self._under_way:
                self._under_way.add(self._identifier)
                return self._identifier

    def step(self, timeout_s: float) -> None:
        """Wait until the network or the waker has something, and serve it.

        Raises:
            ConnectionLost: The connection has ended.
        """
        sock = self._live_socket()
        if sock.wants_write:
            clogged = sock.clogged
            sock.flush()
            if clogged and not sock.clogged:
                timeout_s = 0.0  # there is room for what waits to be sent
        rest_s = 0.0 if sock.pending else max(0.0, self._read_at - self._clock())
        readable, writable = wait(
            sock,
            self._waker,
            reading=rest_s == 0.0,
            writing=self._client.want_write() or sock.wants_write,
            timeout_s=0.0 if sock.pending else min(timeout_s, rest_s or timeout_s),
        )
        if readable or sock.pending or rest_s > 0.0:
            self._read(sock, until=self._clock() + min(timeout_s, MAX_POLL_S))
        if writable:
            self._client.loop_write()
        sock.flush()
        self._client.loop_misc()
        self._listen(self._live_socket())

    def _listen(self, sock: ScreenedSocket) -> None:
        if self._silence is None:
            return
        if self._silence.asks(sock.received):
            sock.ask()
        if self._silence.given_up:
            raise ConnectionLost(f"nothing has come from the broker for {self._silence.lasts_s:.0f} s, nor to a ping")

    def _read(self, sock: ScreenedSocket, *, until: float) -> None:
        """Let the library have what has come. As long as all of that is dropped, stay here: a step costs more."""
        while self._clock() >= self._read_at:
            rest_s = sock.fill()
            self._read_at = self._clock() + rest_s
            if not rest_s or sock.pending or self._client.want_write():
                break
            sock.settle()
            if sock.wants_write or self._clock() >= until or self._waker.wait(rest_s):
                break
        for _ in range(READS):
            if self._client.socket() is None or not sock.ready:
                break
            self._client.loop_read()

    @property
    def delivered(self) -> bool:
        """Whether all that was sent has reached the broker's machine, and no answer can be behind what it sends now."""
        sock = self._client.socket()
        if not isinstance(sock, ScreenedSocket):
            return True
        return not self._client.want_write() and not sock.wants_write and not sock.receiving and has_arrived(sock)

    def goodbye(self, *, hand_over: bool = False) -> None:
        """Send DISCONNECT, so that the broker does not publish the last will.

        Args:
            hand_over: Whether the broker shall keep what comes for us until the next connection resumes.
        """
        deadline = self._clock() + MAX_POLL_S
        self._client.disconnect(properties=goodbye_properties(self._settings, hand_over=hand_over))
        try:
            while self._clock() < deadline:
                self.step(deadline - self._clock())
        except ConnectionLost:
            pass  # as it should be

    def close(self) -> None:
        """Free the socket, whatever state it is in. Idempotent."""
        sock = self._client.socket()
        if sock is not None:
            sock.close()

    def _live_socket(self) -> ScreenedSocket:
        sock = self._client.socket()
        if not isinstance(sock, ScreenedSocket):
            raise ConnectionLost(self._ending or "the connection broke", taken_over=self._taken_over)
        self._socket = sock
        return sock

    def _connected(
        self,
        _client: Client,
        _userdata: object,
        _flags: ConnectFlags,
        reason: ReasonCode,
        properties: Properties | None,
    ) -> None:
        if reason.value >= 1:  # 1 to 5 are the refusals of MQTT 3 brokers
            self._refusal = reason.value
            return
        announced = Announced.of(properties, packet_bytes=self._settings.packet_bytes)
        self._aliases = AliasTable(maximum=announced.alias_maximum)
        self._announced = announced
        self._silence = Silence(self._client.keepalive, clock=self._clock)

    def _disconnected(
        self,
        _client: Client,
        _userdata: object,
        flags: DisconnectFlags,
        reason: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        # The screen has its reasons, which the library does not know.
        ending = self._socket.ending if self._socket is not None else ""
        if flags.is_disconnect_packet_from_server:
            self._taken_over = reason.value == failures.TAKEN_OVER
            self._ending = ending or f"the broker said {str(reason).lower()}"
        else:
            self._ending = ending or f"the connection ended: {str(reason).lower()}"

    def _received(self, _client: Client, _userdata: object, message: MQTTMessage) -> None:
        self._on_message(Message(message.topic, bytes(message.payload), message.retain))

    def _answered(self, identifier: int, reason: int) -> None:
        self._under_way.discard(identifier)
        self._on_answer(identifier, reason)

    def _subscriptions_answered(
        self,
        _client: Client,
        _userdata: object,
        identifier: int,
        reasons: list[ReasonCode],
        _properties: Properties | None,
    ) -> None:
        filters = self._awaited.pop(identifier, ())
        for name, reason in zip(filters, reasons, strict=False):
            if reason.value >= FIRST_ERROR:
                self._refused_filters.append(name)


def _options(route: Route) -> SubscribeOptions:
    handling = SubscribeOptions.RETAIN_SEND_ON_SUBSCRIBE if route.retained else SubscribeOptions.RETAIN_DO_NOT_SEND
    return SubscribeOptions(qos=route.qos, retainHandling=handling)
