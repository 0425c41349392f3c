"""Steering: hears what an administrator wants, has it done on a thread of its own, and reports."""

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from fleet_common.mqtt.errors import LinkError
from fleet_common.mqtt.link import Link, Message
from fleet_device.steering.commands import Commands, SteeredDevice
from fleet_device.steering.remote_settings import RemoteSettings
from schemas.control import ControlMessage, decode_json, encode_json
from schemas.errors import CodecError
from schemas.steering import CommandRequest, CommandResponse, DesiredSettings
from schemas.topics import TREE, Topic, build

_log = logging.getLogger(__name__)

_MOST_WAITING: Final = 16
"""Commands that wait to be looked at; what comes beyond is dropped. Of wanted settings only the latest wait."""

_RULES: Final = {rule.topic: rule for rule in TREE}


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
        self._changed = threading.Condition()
        self._wanted: Message | None = None
        self._asked: deque[Message] = deque()
        self._reports = self._drops = self._ending = False
        self._thread: threading.Thread | None = None

    def attach(self) -> None:
        """Subscribe; once, before the link is started."""
        self._link.subscribe(self._topics[Topic.CONFIG_DESIRED], self._hear)
        self._link.subscribe(self._topics[Topic.COMMAND_REQUEST], self._hear, retained=False)
        self._link.on_connection(self._note_connection)

    def start(self) -> None:
        """Begin to do what is wanted."""
        self._thread = threading.Thread(target=self._work, name="steering", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End; a command that runs is left to itself."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def report(self) -> None:
        """Publish the settings that hold, to be kept by the broker."""
        self._publish(Topic.CONFIG_REPORTED, self._settings.report())

    def _note_connection(self, up: bool) -> None:
        with self._changed:
            self._reports = self._reports or up  # said anew: the broker may have forgotten what it kept
            self._changed.notify_all()

    def _hear(self, message: Message) -> None:
        if not message.payload:
            return  # it takes a kept message from the broker, and says nothing
        with self._changed:
            if message.topic == self._topics[Topic.CONFIG_DESIRED]:
                self._wanted = message
            elif len(self._asked) < _MOST_WAITING:
                self._asked.append(message)
            elif not self._drops:
                self._drops = True
                _log.warning("Commands are dropped: %d wait already.", _MOST_WAITING)
            self._changed.notify_all()

    def _work(self) -> None:
        while not self._ending:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._asked or self._reports or self._ending)
                wanted, self._wanted = self._wanted, None
                asked = self._asked.popleft() if self._asked else None
                reports, self._reports = self._reports, False
                self._drops = self._drops and bool(self._asked)
            try:
                if wanted is not None and self._look_at(wanted):
                    reports = True  # also of what was passed over: its sender waits for an answer
                if reports:
                    self.report()
                if asked is not None:
                    self._look_at(asked)
            except Exception:  # noqa: BLE001 - whatever it is, the next one is looked at
                _log.exception("An administrator's message failed for a reason that should not be possible.")

    def _look_at(self, message: Message) -> bool:
        """Do what a message asks for; return whether it could be read."""
        try:
            if message.topic == self._topics[Topic.COMMAND_REQUEST]:
                self._commands.take(decode_json(CommandRequest, message.payload))
            else:
                self._settings.consider(decode_json(DesiredSettings, message.payload))
        except CodecError as error:
            _log.warning("An administrator's message on %s is not looked at: %s", message.topic, error)
            return False
        return True

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
