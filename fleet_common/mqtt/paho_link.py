"""Link over a real broker: paho-mqtt for the protocol, one thread of ours for everything else.

The thread loops over connection attempts. Whatever ends an attempt, a lost connection or a bug in a library, ends only
that attempt. There is no second thread that could die unnoticed, so the loop is its own watchdog.
"""

import contextlib
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Final

from fleet_common.mqtt.connection import Connection, ConnectionLost, Handover, Waker
from fleet_common.mqtt.errors import ConnectFailed, LinkFault
from fleet_common.mqtt.failures import lost, name_taken, silent, subscription_refused
from fleet_common.mqtt.link import (
    Accepts,
    CallbackGuard,
    Handler,
    LinkCounters,
    Listener,
    OutcomeHandler,
    Route,
    Routes,
)
from fleet_common.mqtt.outbox import BrokerLimits, Outgoing, Sender
from fleet_common.mqtt.settings import LinkSettings
from fleet_common.mqtt.tls import Credentials

_log = logging.getLogger(__name__)


GROWTH: Final = 2.0
FORGIVEN_S: Final = 1.0  # being connected for this long takes back one step of growth


class Backoff:
    """Exponential delays with full jitter, and a low ceiling.

    A broker that is back must be found within seconds, however long it was away. Trying to reach a machine where
    nothing listens costs next to nothing, so the ceiling is low. A working broker that refuses us is retried less
    often: refusals cost it work, and most need an operator.

    A fleet that lost its broker must not return at once: each delay is uniform between zero and the step, which spreads
    the fleet.
    """

    def __init__(self, *, minimum_s: float, maximum_s: float, refused_s: float, rng: random.Random) -> None:
        self._minimum_s = minimum_s
        self._maximum_s = maximum_s
        self._refused_s = max(maximum_s, refused_s)
        self._rng = rng
        self._step_s = minimum_s

    def next_delay_s(self, *, refused: bool = False) -> float:
        """Return the next delay and double the step, up to the ceiling for refusals or for silence."""
        ceiling_s = self._refused_s if refused else self._maximum_s
        step_s = min(self._step_s, ceiling_s)
        self._step_s = min(step_s * GROWTH, ceiling_s)
        return self._rng.uniform(0.0, step_s)

    def held(self, lived_s: float) -> None:
        """Reduce the step in proportion to how long a connection has lasted."""
        self._step_s = max(self._minimum_s, self._step_s * GROWTH ** (-lived_s / FORGIVEN_S))


POLL_S = 1.0
MAX_LEFT_OUT = 10_000  # each occupies one of a connection's 65,535 packet identifiers


class PahoLink:
    """A `Link` over MQTT 5; `rng` draws the jitter of the reconnect delays."""

    def __init__(
        self, settings: LinkSettings, *, rng: random.Random | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._guard = CallbackGuard()
        self._routes = Routes(self._guard)
        self._sender = Sender(settings, guard=self._guard, clock=clock)
        self._backoff = Backoff(
            minimum_s=settings.min_backoff_s,
            maximum_s=settings.max_backoff_s,
            refused_s=settings.refused_backoff_s,
            rng=rng if rng is not None else random.Random(),  # noqa: S311 - jitter
        )
        self._failure: ConnectFailed | None = None  # how the last attempt ended
        self._anonymous = False  # whether the next attempt goes without the user name
        self._online_since = 0.0
        self._credentials = Credentials(settings.tls, clock=clock)
        self._handover = Handover(self._credentials, counters=self.counters, clock=clock)
        self._listeners: tuple[Listener, ...] = ()
        self._connected = False
        self._accepts: Accepts | None = None
        self._requests: deque[Callable[[Connection], None]] = deque()  # for the thread to run on its connection
        self._announced = BrokerLimits(max_packet_bytes=settings.packet_bytes)
        self._started: Future[None] = Future()
        self._stopping = threading.Event()
        self._waker: Waker | None = None
        self._thread: threading.Thread | None = None
        self._lifecycle = threading.Lock()

    @property
    def counters(self) -> LinkCounters:
        return self._guard.counters

    @property
    def connected(self) -> bool:
        return self._connected

    @property
    def failure(self) -> ConnectFailed | None:
        return None if self._connected else self._failure

    @property
    def max_packet_bytes(self) -> int:
        return self._announced.max_packet_bytes

    def start(self, *, timeout_s: float) -> None:
        with self._lifecycle:
            if self._thread is not None and self._thread.is_alive():
                if self._stopping.is_set():
                    raise ConnectFailed("The link has not ended yet: a handler blocks its thread.")
                return
            self._stopping.clear()
            self._started, self._failure = Future(), None
            self._waker = Waker()
            name = f"link-{self._settings.client_id}"
            self._thread = threading.Thread(target=self._run, args=(self._waker,), name=name, daemon=True)
            self._thread.start()
        try:
            self._started.result(timeout_s)
        except (TimeoutError, ConnectFailed):
            error = self.failure or silent(self._settings)
            self.stop()
            self._failure = error
            raise error from None

    def stop(self) -> None:
        self._stopping.set()
        self._wake()
        if threading.current_thread() is self._thread:
            return  # called by a handler: the thread ends after it returns
        with self._lifecycle:
            if self._thread is not None:
                self._thread.join(self._longest_stop_s)
                if not self._thread.is_alive():
                    self._thread = None

    def subscribe(self, topic_filter: str, handler: Handler, *, qos: int = 1, retained: bool = True) -> None:
        route = Route(topic_filter, handler, qos, retained)
        self._routes.add(route)
        self._request(lambda connection: connection.subscribe([route]))

    def unsubscribe(self, topic_filter: str) -> None:
        if self._routes.remove(topic_filter):
            self._request(lambda connection: connection.unsubscribe(topic_filter))

    def screen(self, accepts: Accepts) -> None:
        self._accepts = accepts

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 1,
        retain: bool = False,
        expiry_s: int | None = None,
        content_type: str | None = None,
        alias: bool = False,
        priority: bool = False,
        on_outcome: OutcomeHandler | None = None,
    ) -> None:
        deadline = None if expiry_s is None else self._clock() + expiry_s
        message = Outgoing(topic, payload, qos, retain, deadline, content_type, alias, on_outcome, priority)
        message.check(limit=self.max_packet_bytes)
        if qos == 0 and not self._connected:
            self.counters.dropped += 1
            return
        self._sender.outbox.put(message)
        self._wake()

    def on_connection(self, listener: Listener) -> None:
        self._listeners = (*self._listeners, listener)

    @property
    def _longest_stop_s(self) -> float:
        settings = self._settings
        return settings.connect_timeout_s + settings.handshake_s + settings.flush_s + POLL_S

    def _request(self, action: Callable[[Connection], None]) -> None:
        self._requests.append(action)
        self._wake()

    def _wake(self) -> None:
        waker = self._waker
        if waker is not None and threading.current_thread() is not self._thread:
            waker.wake()

    def _run(self, waker: Waker) -> None:
        try:
            while not self._stopping.is_set() or self._handover.under_way:
                self._attempt(waker)
                if not self._stopping.is_set() and not self._handover.under_way:
                    refused = self._failure is not None and self._failure.refused
                    self._stopping.wait(self._backoff.next_delay_s(refused=refused))
        finally:
            waker.close()
            self._settle(self._failure or silent(self._settings))

    def _attempt(self, waker: Waker) -> None:
        """Connect and serve until the connection ends. No exception leaves this method."""
        connection: Connection | None = None
        try:
            connection = Connection(
                replace(self._settings, username=None) if self._anonymous else self._settings,
                context=self._handover.context(),
                guard=self._guard,
                waker=waker,
                clock=self._clock,
                accepts=self._accepted,
                on_message=self._routes.dispatch,
                on_answer=self._sender.on_answer,
            )
            self._enter(connection)
            self._serve(connection)
        except ConnectFailed as error:
            # The caller of `start` gets the error; later it is only logged.
            _log.log(logging.WARNING if self._started.done() else logging.DEBUG, "%s", error)
            self._failure = error
            if error.fault is LinkFault.NOT_AUTHORIZED and self._settings.anonymous_too:
                self._anonymous = not self._anonymous
                error.final = error.final and not self._anonymous
            if error.final and not self._started.done():
                self._stopping.set()  # `start` raises this, and nobody waits for another attempt
                self._settle(error)
            self._credentials.refused(str(error))
        except ConnectionLost as error:
            self._failure = name_taken(self._settings) if error.taken_over else lost(str(error), self._settings)
            self.counters.takeovers += error.taken_over
            _log.warning("%s", self._failure)
        except BaseException:  # noqa: BLE001 - a link without a thread is worse
            self.counters.restarts += 1
            _log.exception("The link's network loop failed and is restarted.")
        finally:
            self._leave(connection)

    def _accepted(self, topic: bytes, packet_bytes: int, retained: bool) -> bool:
        accepts = self._accepts
        return accepts is None or accepts(topic, packet_bytes, retained)

    def _enter(self, connection: Connection) -> None:
        self._announced = self._handover.open(connection)
        self._requests.clear()  # for the previous connection; their effect is restored below
        connection.subscribe(tuple(self._routes))
        deadline = self._clock() + self._settings.handshake_s
        while not connection.subscribed:
            if self._clock() >= deadline:
                raise silent(self._settings)
            connection.step(deadline - self._clock())
        refused = connection.take_refused_filters()
        if refused:
            raise subscription_refused(refused, self._settings)
        self._online_since = self._clock()
        self._failure = None
        self.counters.connects += 1
        self._set_connected(True)  # noqa: FBT003 - the state
        self._settle(None)

    def _settle(self, error: ConnectFailed | None) -> None:
        """End the wait of `start`, once."""
        if self._started.done():
            return
        if error is None:
            self._started.set_result(None)
        else:
            self._started.set_exception(error)

    def _serve(self, connection: Connection) -> None:
        flush_until: float | None = None
        while True:
            if self._stopping.is_set():
                flush_until = flush_until or self._clock() + self._settings.flush_s
                if self._sender.idle or self._clock() >= flush_until:
                    connection.goodbye()
                    return
            elif self._credentials.renewed():
                self._handover.begin(connection)
                return
            with contextlib.suppress(IndexError):
                while True:
                    self._requests.popleft()(connection)
            self._sender.drain(connection.send, self._announced, room=lambda: not connection.clogged)
            connection.step(POLL_S if flush_until is None else flush_until - self._clock())
            self._check_answers(connection)
            for topic_filter in connection.take_refused_filters():
                _log.error("The broker refuses to subscribe this client to %s.", topic_filter)

    def _check_answers(self, connection: Connection) -> None:
        """Raise ConnectionLost if the broker answers nothing any more.

        Some brokers drop whatever does not fit into a client's queue, including their answers to its messages. The
        window of unanswered messages would stay full, and nothing more would ever be sent. A new connection starts with
        an empty queue at the broker.
        """
        outbox, waited_s = self._sender.outbox, self._sender.unanswered_s(delivered=connection.delivered)
        if self._stopping.is_set():
            return
        if waited_s > self._settings.answer_s:
            why = f"has answered none of {outbox.awaiting_answers} messages for {waited_s:.0f} s"
        elif outbox.left_out > MAX_LEFT_OUT:
            why = f"has left {outbox.left_out} messages unanswered"
        else:
            return
        self.counters.stalls += 1
        connection.goodbye()  # or the broker would publish the last will
        raise ConnectionLost(f"the broker {why}; reconnecting")

    def _leave(self, connection: Connection | None) -> None:
        if connection is not None:
            connection.close()
        self._sender.connection_lost()
        if self._handover.under_way:
            return
        if not self._connected:
            return
        if self._failure is None or not self._failure.refused:
            # Two clients with one name end each other's connections: the delay grows until one of them stays.
            self._backoff.held(self._clock() - self._online_since)
        if self._stopping.is_set():
            self._connected = False  # a goodbye is no loss
        else:
            self.counters.losses += 1
            self._set_connected(False)  # noqa: FBT003 - the state

    def _set_connected(self, connected: bool) -> None:
        self._connected = connected
        for listener in self._listeners:
            self._guard.call(listener, connected)
