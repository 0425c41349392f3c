"""MQTT connection, from CONNECT to its end, on one thread.

A `Connection` is used once: every reconnect makes a new one, with a new paho client. So nothing of an old connection, a
topic alias, a packet identifier, a message that paho would repeat, can leak into a new one. All calls into paho come
from the link's thread, which polls the socket itself: paho's own loop uses `select`, which fails from descriptor 1024
on, and its thread may die unnoticed.

Messages and their acknowledgements, which are nearly all of the traffic, are read and written here, since they would
take most of the time of a busy edge in the library. It handles the rest of the protocol, and whatever is unexpected.

Normally the broker keeps no session after a connection: the protocol above asks again, and a session that is kept for a
crashed client would make it look as if it still listened. A planned handover, to a renewed certificate, is the
exception: nothing may be lost within its few seconds. MQTT lets DISCONNECT lengthen a session's life only if CONNECT
gave it any (3.14.2.2.2), hence the one second.
"""

import contextlib
import fcntl
import logging
import select
import socket
import struct
import termios
from collections.abc import Callable, Sequence
from typing import Any, Final

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from fleet_common.mqtt import failures
from fleet_common.mqtt.link import FIRST_ERROR, Accepts, CallbackGuard, LinkCounters, Message, Route
from fleet_common.mqtt.outbox import BrokerLimits, Outgoing
from fleet_common.mqtt.packets import AliasTable, disconnect_packet, publish_packet
from fleet_common.mqtt.screen import Screen, ScreenedSocket
from fleet_common.mqtt.settings import LinkSettings
from fleet_common.mqtt.tls import Credentials, LinkContext, TlsStream

_log = logging.getLogger(__name__)


class Waker:
    """Wakes a thread that polls."""

    def __init__(self) -> None:
        self._receiver, self._sender = socket.socketpair()
        self._receiver.settimeout(0)
        self._sender.settimeout(0)
        self._due = False  # a wake-up is pending: one is enough

    def fileno(self) -> int:
        return self._receiver.fileno()

    def wake(self) -> None:
        """Make the descriptor readable; callable from any thread, also after `close`."""
        if self._due:
            return
        self._due = True
        with contextlib.suppress(OSError):  # closed: nobody waits
            self._sender.send(b"\0")

    def clear(self) -> None:
        """Make the descriptor unreadable until the next `wake`. Call this before looking for work."""
        with contextlib.suppress(BlockingIOError):
            self._receiver.recv(4096)
        self._due = False

    def close(self) -> None:
        self._receiver.close()
        self._sender.close()


MAX_POLL_S: Final = 1.0  # keepalive is checked at least this often


def wait(sock: Any, waker: Waker, *, writing: bool, timeout_s: float) -> tuple[bool, bool]:  # noqa: ANN401
    """Wait until the socket is readable or writable, and return both; `waker` ends the wait and is cleared.

    Unlike `select`, `poll` accepts descriptors above 1023.
    """
    poll = select.poll()
    poll.register(sock, select.POLLIN | (select.POLLOUT if writing else 0))
    poll.register(waker, select.POLLIN)
    events = dict(poll.poll(1000 * max(0.0, min(timeout_s, MAX_POLL_S))))
    if waker.fileno() in events:
        waker.clear()
    ready = events.get(sock.fileno(), 0)
    return bool(ready & ~select.POLLOUT), bool(ready & select.POLLOUT)


def has_arrived(sock: Any) -> bool:  # noqa: ANN401 - paho's
    """Ask the kernel for unacknowledged bytes; True, none, where the system does not know."""
    try:
        (left,) = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0" * 4))
    except OSError:
        return True
    return bool(left == 0)


# In keepalives. The library sends a ping after one, so ours is rarely needed.
ASK: Final = 1.1
GIVE_UP: Final = 1.5


class SilenceWatch:
    """Detect that the broker's machine, or the network to it, has gone. Belongs to the link's thread.

    A machine that loses power says no goodbye, nor does a router that forgets a connection. Each side sends a ping
    after a keepalive without traffic, and the broker gives a client up after one and a half (MQTT 5, 3.1.2.10). So do
    we here; the MQTT library alone would wait for two.

    Time in which the thread did not run counts only up to the ping: a process that was suspended must first read what
    has arrived, and send a ping. A keepalive of 0 disables this.
    """

    def __init__(self, keepalive_s: float, *, clock: Callable[[], float]) -> None:
        self._keepalive_s = keepalive_s
        self._clock = clock
        self._received = -1
        self._since = clock()
        self._asked_at: float | None = None

    def asks(self, received: int) -> bool:
        """Record the number of bytes received so far; return whether to send a ping now."""
        now = self._clock()
        if received != self._received or not self._keepalive_s:
            self._received, self._since, self._asked_at = received, now, None
        elif self._asked_at is None and now - self._since >= ASK * self._keepalive_s:
            self._asked_at = now
            return True
        return False

    @property
    def given_up(self) -> bool:
        patience_s = (GIVE_UP - ASK) * self._keepalive_s
        return self._asked_at is not None and self._clock() - self._asked_at >= patience_s

    @property
    def lasts_s(self) -> float:
        return self._clock() - self._since


class _ScreenedClient(Client):
    """Client that reads from a `ScreenedSocket`, as paho's own reads from its wrapper for WebSockets."""

    screen: Screen
    context: LinkContext | None
    handshake_s: float

    def _create_socket(self) -> Any:  # noqa: ANN401 - as paho's
        sock: Any = super()._create_socket()
        if self.context is not None:
            stream = TlsStream(sock, self.context, self._host)
            stream.shake_hands(timeout_s=self.handshake_s)  # the broker is there: this may take longer
            sock = stream
        return ScreenedSocket(sock, self.screen)


def make_client(settings: LinkSettings, context: LinkContext | None = None, *, screen: Screen | None = None) -> Client:
    """Return a client that has not connected yet, with no callbacks but the socket's."""
    client = _ScreenedClient(
        CallbackAPIVersion.VERSION2,
        client_id=settings.client_id,
        protocol=MQTTProtocolVersion.MQTTv5,
        reconnect_on_failure=False,
    )
    client.screen = screen if screen is not None else Screen(max_packet_bytes=settings.packet_bytes)
    client.suppress_exceptions = True  # ours are guarded; this is for unexpected ones
    client.context = context
    client.connect_timeout = settings.connect_timeout_s
    client.handshake_s = settings.handshake_s
    client.max_inflight_messages_set(0)  # the outbox limits them
    if settings.username is not None:
        client.username_pw_set(settings.username, settings.password)
    if settings.will is not None:
        client.will_set(settings.will.topic, settings.will.payload, qos=1, retain=True)
    client.on_socket_open = _send_at_once
    return client


def _send_at_once(_client: Client, _userdata: object, sock: Any) -> None:  # noqa: ANN401 - plain or TLS
    # Otherwise a QoS 1 round trip waits for the peer's delayed acknowledgement: 40 ms instead of 1 ms.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


LINGER_S: Final = 1
HANDOVER_S: Final = 30


def connect_properties(settings: LinkSettings) -> Properties:
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    properties.MaximumPacketSize = settings.packet_bytes
    if _may_hand_over(settings):
        properties.SessionExpiryInterval = LINGER_S
    return properties


def _may_hand_over(settings: LinkSettings) -> bool:
    return settings.tls is not None and settings.tls.certificate is not None


READS: Final = 32  # packets that the library reads before anything is sent
IDENTIFIERS: Final = 65_535


class ConnectionLost(Exception):  # noqa: N818 - reads as what it says
    """The connection has ended without our goodbye; `taken_over` if another client has our client id."""

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
        guard: CallbackGuard,
        waker: Waker,
        clock: Callable[[], float],
        accepts: Accepts,
        on_message: Callable[[Message], None],
        on_answer: Callable[[int, int], None],
    ) -> None:
        """Prepare a connection.

        `context` is None for plain TCP; `waker` ends a `step` early; `accepts` and `on_message` are the screen's;
        `on_answer` gets packet identifier and reason code of every acknowledgement.
        """
        self._settings = settings
        self._context = context
        self._screen = Screen(
            max_packet_bytes=settings.packet_bytes,
            accepts=accepts,
            guard=guard,
            on_message=on_message,
            on_answer=self._answered,
        )
        self._waker = waker
        self._clock = clock
        self._on_message = on_message
        self._on_answer = on_answer
        self._announced: BrokerLimits | None = None
        self._refusal: int | None = None
        self._aliases = AliasTable(maximum=0)
        self._identifier = IDENTIFIERS // 2
        self._under_way: set[int] = set()  # packet identifiers of unanswered messages
        self._awaited: dict[int, tuple[str, ...]] = {}  # filters by the identifier of their SUBSCRIBE
        self._refused_filters: list[str] = []
        self._ending = ""
        self._taken_over = False
        self._socket: ScreenedSocket | None = None
        self._silence: SilenceWatch | None = None  # from the broker's first answer on
        self._client = make_client(settings, context, screen=self._screen)
        self._client.on_connect = self._connected
        self._client.on_disconnect = self._disconnected
        self._client.on_message = self._received
        self._client.on_subscribe = self._subscriptions_answered

    def open(self, *, resume: bool = False) -> BrokerLimits:
        """Connect and wait for the broker's CONNACK; raise ConnectFailed.

        `resume` continues the session that a handover has kept; messages of the meantime are then delivered.
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

    @property
    def subscribed(self) -> bool:
        return not self._awaited

    def take_refused_filters(self) -> list[str]:
        refused, self._refused_filters = self._refused_filters, []
        return refused

    def send(self, message: Outgoing) -> int:
        """Write a PUBLISH with the next `step`; return its packet identifier, 0 for QoS 0.

        Raise ConnectionLost if the connection has ended or the broker has left all identifiers unanswered.
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
        """Sent data waits for the network, and more would have to wait as well."""
        return self._live_socket().clogged

    def _new_identifier(self) -> int:
        """Return a packet identifier that no unanswered message has.

        The library counts its own, for subscriptions, from 1; ours begin far from there.
        """
        if len(self._under_way) == IDENTIFIERS:
            raise ConnectionLost("the broker has answered nothing that was sent")
        while True:
            self._identifier = self._identifier % IDENTIFIERS + 1
            if self._identifier not in self._under_way:
                self._under_way.add(self._identifier)
                return self._identifier

    def step(self, timeout_s: float) -> None:
        """Wait for the network or the waker, and serve the network; raise ConnectionLost."""
        sock = self._live_socket()
        if sock.wants_write:
            clogged = sock.clogged
            sock.flush()
            if clogged and not sock.clogged:
                timeout_s = 0.0  # now there is room to send
        readable, writable = wait(
            sock,
            self._waker,
            writing=self._client.want_write() or sock.wants_write,
            timeout_s=0.0 if sock.pending else timeout_s,
        )
        if readable or sock.pending:
            sock.fill()
            for _ in range(READS):
                if self._client.socket() is None or not sock.ready:
                    break
                self._client.loop_read()
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
            raise ConnectionLost(
                f"the broker has sent nothing for {self._silence.lasts_s:.0f} s, not even a reply to a ping"
            )

    @property
    def delivered(self) -> bool:
        """All sent data has reached the broker's machine, and no answer can be behind what it sends now."""
        sock = self._client.socket()
        if not isinstance(sock, ScreenedSocket):
            return True
        return not self._client.want_write() and not sock.wants_write and not sock.receiving and has_arrived(sock)

    def goodbye(self, *, hand_over: bool = False) -> None:
        """Send DISCONNECT, so that the broker does not publish the last will, and wait until the broker hangs up.

        `hand_over` has the broker keep our messages until the next connection resumes.

        Closing at once could lose the DISCONNECT. If the broker still has to read what we sent before it, its answers
        meet a closed connection. That error makes it give us up before it reads on.
        """
        deadline = self._clock() + (self._settings.handshake_s if hand_over else MAX_POLL_S)
        expiry_s = (HANDOVER_S if hand_over else 0) if _may_hand_over(self._settings) else None
        with contextlib.suppress(ConnectionLost):
            while self._client.want_write() or self._live_socket().wants_write:
                if self._clock() >= deadline:
                    return
                self.step(deadline - self._clock())
            sock = self._live_socket()
            sock.say_last(disconnect_packet(session_expiry_s=expiry_s))
            while not sock.finish() and self._clock() < deadline:
                rest_s = 0.0 if sock.pending else deadline - self._clock()
                wait(sock, self._waker, writing=sock.wants_write, timeout_s=rest_s)

    def close(self) -> None:
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
        announced = BrokerLimits.of(properties, packet_bytes=self._settings.packet_bytes)
        self._aliases = AliasTable(maximum=announced.alias_maximum)
        self._announced = announced
        self._silence = SilenceWatch(self._client.keepalive, clock=self._clock)

    def _disconnected(
        self,
        _client: Client,
        _userdata: object,
        flags: DisconnectFlags,
        reason: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        # The library does not know why the screen ended the connection.
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


class Handover:
    """Switch to a renewed certificate without loss. Belongs to the link's thread.

    `under_way`: the last connection was ended for the next one, which is then made at once.
    """

    def __init__(self, credentials: Credentials, *, counters: LinkCounters, clock: Callable[[], float]) -> None:
        self._credentials = credentials
        self._counters = counters
        self._clock = clock
        self._resume_until: float | None = None  # the broker keeps our session until then
        self.under_way = False

    def context(self) -> LinkContext | None:
        """Return the context of the next connection, None for plain TCP; raise as `Credentials.take` does."""
        self.under_way = False
        return self._credentials.current()

    def begin(self, connection: Connection) -> None:
        """End a working connection; its session waits at the broker."""
        _log.info("The certificate was renewed; reconnecting.")
        self._counters.renewals += 1
        self.under_way = True
        self._resume_until = self._clock() + HANDOVER_S
        connection.goodbye(hand_over=True)

    def open(self, connection: Connection) -> BrokerLimits:
        """Connect, and resume the waiting session, if any; raise as `Connection.open` does."""
        resume = self._resume_until is not None and self._clock() < self._resume_until
        announced = connection.open(resume=resume)
        self._credentials.accepted()
        self._resume_until = None
        return announced
