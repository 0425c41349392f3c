"""Steering: hears what an administrator wants, has it done on a thread of its own, and reports."""

import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from fleet_device.steering.actions import SteeredDevice
from fleet_device.steering.commands import Commands
from fleet_device.steering.remote_settings import RemoteSettings
from fleet_link.errors import LinkError
from fleet_link.link import Link, Message
from schemas.control import ControlMessage, decode_json, encode_json
from schemas.errors import CodecError
from schemas.steering import CommandRequest, CommandResponse, DesiredSettings
from schemas.topics import TREE, Topic, build

__all__ = ["Steering"]

_log = logging.getLogger(__name__)

_MOST_WAITING: Final = 16
"""Messages that wait to be looked at; what comes beyond is dropped. The broker keeps the latest wanted settings."""

_RULES: Final = {rule.topic: rule for rule in TREE}


class _Reconnected:
    """The broker can be reached again."""


class Steering:
    """Listens for a device. Attach it before the link is started.

    Args:
        settings: What can be set.
        device: What commands act on.
        link: To the broker.
        now: The wall clock (UTC).
    """

    def __init__(
        self,
        settings: RemoteSettings,
        device: SteeredDevice,
        link: Link,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        own = settings.settings
        self._settings = settings
        self._link = link
        self._topics = {
            topic: build(topic, fleet=own.fleet, device=own.device)
            for topic in (
                Topic.CONFIG_DESIRED,
                Topic.CONFIG_REPORTED,
                Topic.COMMAND_REQUEST,
                Topic.COMMAND_RESPONSE,
            )
        }
        self._commands = Commands(device, self._respond, now=now)
        self._waiting: queue.Queue[Message | _Reconnected | None] = queue.Queue(_MOST_WAITING)
        self._thread: threading.Thread | None = None

    def attach(self) -> None:
        """Subscribe; once, before the link is started."""
        self._link.subscribe(self._topics[Topic.CONFIG_DESIRED], self._hear)
        self._link.subscribe(self._topics[Topic.COMMAND_REQUEST], self._hear, retained=False)
        # Said anew after every reconnect: the broker may have forgotten what it kept.
        self._link.on_connection(lambda up: self._put(_Reconnected()) if up else None)

    def start(self) -> None:
        """Begin to do what is wanted."""
        self._thread = threading.Thread(target=self._work, name="steering", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End; a command that runs is left to itself."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()

    def report(self) -> None:
        """Publish the settings that hold, to be kept by the broker."""
        self._publish(Topic.CONFIG_REPORTED, self._settings.report())

    def _hear(self, message: Message) -> None:
        if message.payload:  # nothing is what takes a kept message from the broker
            self._put(message)

    def _put(self, what: Message | _Reconnected) -> None:
        try:
            self._waiting.put_nowait(what)
        except queue.Full:
            _log.warning("An administrator's message is dropped: %d wait already.", _MOST_WAITING)

    def _work(self) -> None:
        while (what := self._waiting.get()) is not None:
            try:
                self._look_at(what)
            except Exception:  # noqa: BLE001 - whatever it is, the next one is looked at
                _log.exception("An administrator's message failed for a reason that should not be possible.")

    def _look_at(self, what: Message | _Reconnected) -> None:
        if isinstance(what, _Reconnected):
            self.report()
            return
        try:
            if what.topic == self._topics[Topic.COMMAND_REQUEST]:
                self._commands.take(decode_json(CommandRequest, what.payload))
                return
            self._settings.consider(decode_json(DesiredSettings, what.payload))
        except CodecError as error:
            _log.warning("An administrator's message on %s is not looked at: %s", what.topic, error)
            return
        self.report()  # also of what was passed over: its sender waits for an answer

    def _respond(self, response: CommandResponse) -> None:
        self._publish(Topic.COMMAND_RESPONSE, response)

    def _publish(self, topic: Topic, message: ControlMessage) -> None:
        rule = _RULES[topic]
        with contextlib.suppress(LinkError):  # reported again after the reconnect
            self._link.publish(
                self._topics[topic],
                encode_json(message),
                qos=rule.qos,
                retain=rule.retained,
                content_type=rule.content_type,
            )
