"""Commands of an administrator, and the thread that receives them and desired settings.

Commands run one at a time, and each is answered once however often it arrives. A command that is late or unknown is
refused with a reason, and so is one that arrives while another runs.
"""

import contextlib
import json
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Final, Protocol

from fleet_common.mqtt.errors import LinkError
from fleet_common.mqtt.link import Link, Message
from fleet_device.checks.doctor import check_generation, probe_request
from fleet_device.drafters.contract import DrafterError
from fleet_device.errors import DeviceError
from fleet_device.requests.generate import Cancellation, RequestContext
from fleet_device.service import DeviceService
from fleet_device.steering.remote_settings import SteeredSettings
from fleet_device.updates.handoff import UpdateFolder
from schemas.control import (
    MAX_RESULT,
    CommandOutcome,
    CommandRequest,
    CommandResponse,
    ControlMessage,
    DesiredSettings,
    UpdateReport,
    decode_json,
    encode_json,
)
from schemas.errors import CodecError
from schemas.fields import MAX_SENTENCE
from schemas.printable import printable_line
from schemas.topics import TREE, Topic, build

MAX_LINES: Final = 200
_LONGEST: Final = 500  # characters of a line


class LogTail(logging.Handler):
    """Keep the latest log lines, which never contain tokens, prompts or generations."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: deque[str] = deque(maxlen=MAX_LINES)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
        except Exception:  # noqa: BLE001 - as logging does
            self.handleError(record)
            return
        for line in text.splitlines():
            self._lines.append(printable_line(line)[:_LONGEST])

    def lines(self) -> list[str]:
        return list(self._lines.copy())


@dataclass(frozen=True, slots=True)
class Answer:
    outcome: CommandOutcome
    sentence: str
    result: str | None = None
    then: Callable[[], None] | None = None


class SteeredDevice(Protocol):
    service: DeviceService
    log_tail: LogTail

    def hold(self) -> int:
        """Accept no new requests; return how many are left."""

    def resume(self) -> bool: ...

    def reload(self) -> None: ...


def _self_test(device: SteeredDevice, limit_s: float) -> Answer:
    """Run a short request through the edge, next to others."""
    service = device.service
    if (missing := service.absence()) is not None:
        return Answer(CommandOutcome.FAILED, str(missing))
    cancellation = Cancellation()
    stop_timer = _after(limit_s, cancellation.cancel)
    try:
        request = probe_request(service.drafter, service.settings.policy())
        text = service.generate(request, RequestContext(cancellation=cancellation))
        sentence = check_generation(text.generation)
    except (DeviceError, DrafterError) as error:
        return Answer(CommandOutcome.FAILED, str(error))
    finally:
        stop_timer()
    generation = text.generation
    figures = {
        "tokens": len(text.tokens),
        "tokens_per_s": round(text.tokens_per_s, 2),
        "acceptance": generation.counters.acceptance,
        "first_ms": generation.first_ms,
        "round_trip_ms": generation.round_trips.mean_ms,
        "edge": generation.edge,
        "plan": generation.choice.plan if generation.choice is not None else None,
    }
    return Answer(CommandOutcome.OK, sentence, json.dumps(figures))


def _drain(device: SteeredDevice, _limit_s: float) -> Answer:
    left = device.hold()
    return Answer(
        CommandOutcome.OK, f"The device accepts no new requests until it is resumed or restarted; {left} are left."
    )


def _resume(device: SteeredDevice, _limit_s: float) -> Answer:
    held = device.resume()
    return Answer(
        CommandOutcome.OK, "The device accepts requests again." if held else "The device was accepting requests."
    )


def _reload(device: SteeredDevice, _limit_s: float) -> Answer:
    return Answer(
        CommandOutcome.OK,
        "The device ends its running requests, loads its model again and comes back; its settings then say with which.",
        then=device.reload,
    )


def _log_tail(device: SteeredDevice, _limit_s: float) -> Answer:
    return Answer(CommandOutcome.OK, "The last lines of the log.", "\n".join(device.log_tail.lines())[-MAX_RESULT:])


ACTIONS: Final[Mapping[str, Callable[[SteeredDevice, float], Answer]]] = {
    "self-test": _self_test,
    "reload": _reload,
    "drain": _drain,
    "resume": _resume,
    "log-tail": _log_tail,
}
"""The commands that a device knows: each gets the device and its time limit in seconds."""

_log = logging.getLogger(__name__)

_REMEMBERED: Final = 64  # commands whose answers are known
_LONGEST_S: Final = 600.0  # that a command may take, however far its deadline is

Send = Callable[[CommandResponse], None]


class Commands:
    """The commands of one device; one thread calls `take`.

    `send` is called from any thread. `after` calls a function after some seconds, unless the function that it returns
    is called before.
    """

    def __init__(
        self,
        device: SteeredDevice,
        send: Send,
        *,
        now: Callable[[], datetime],
        start: Callable[[Callable[[], None]], object] | None = None,
        after: Callable[[float, Callable[[], None]], Callable[[], None]] | None = None,
    ) -> None:
        self._device = device
        self._send = send
        self._now = now
        self._start = start or _start
        self._after = after or _after
        self._lock = threading.Lock()
        self._running: CommandRequest | None = None
        self._answered: OrderedDict[str, CommandResponse] = OrderedDict()

    def accept(self, request: CommandRequest) -> None:
        """Begin a command, refuse it, or repeat its answer."""
        with self._lock:
            before = self._answered.get(request.id)
            running = self._running
        if before is not None:
            self._send(before)
            return
        if running is not None and running.id == request.id:
            return  # its answer follows
        left_s = (request.deadline - self._now()).total_seconds()
        refusal = self._refusal(request, left_s, running)
        if refusal is not None:
            _log.warning("The command %s of %s is refused: %s", request.command, request.who, refusal)
            self._answer(request, Answer(CommandOutcome.REFUSED, refusal))
            return
        limit_s = min(left_s, _LONGEST_S)
        with self._lock:
            self._running = request
        _log.info("The command %s of %s begins.", request.command, request.who)
        cancel = self._after(limit_s, lambda: self._late(request))
        self._start(lambda: self._run(request, limit_s, cancel))

    def _refusal(self, request: CommandRequest, left_s: float, running: CommandRequest | None) -> str | None:
        if left_s <= 0:
            return (
                f"The command came {-left_s:.0f} s too late by this device's clock, "
                f"{self._now():%Y-%m-%d %H:%M:%S} UTC."
            )
        if request.command not in ACTIONS:
            return f"This release knows no command {request.command!r}; it knows {', '.join(ACTIONS)}."
        return None if running is None else f"The command {running.command} is still running; ask again later."

    def _run(self, request: CommandRequest, limit_s: float, cancel: Callable[[], None]) -> None:
        try:
            answer = ACTIONS[request.command](self._device, limit_s)
        except Exception as error:  # noqa: BLE001 - the sender gets an answer
            _log.exception("The command %s failed because of a defect.", request.command)
            answer = Answer(
                CommandOutcome.FAILED, f"The command failed: {type(error).__name__}; the device's log has details."
            )
        cancel()
        _log.info("The command %s of %s: %s. %s", request.command, request.who, answer.outcome.value, answer.sentence)
        self._answer(request, answer)
        with self._lock:
            self._running = None
        if answer.then is not None:
            answer.then()

    def _late(self, request: CommandRequest) -> None:
        """Report that a command takes too long. No other is begun before it has ended."""
        self._answer(request, Answer(CommandOutcome.FAILED, "The command did not end within its time limit."))

    def _answer(self, request: CommandRequest, answer: Answer) -> None:
        response = CommandResponse(
            id=request.id,
            outcome=answer.outcome,
            sentence=answer.sentence[:MAX_SENTENCE],
            result=answer.result,
        )
        with self._lock:
            if request.id in self._answered:
                return  # it was reported as late
            self._answered[request.id] = response
            while len(self._answered) > _REMEMBERED:
                self._answered.popitem(last=False)
        self._send(response)


def _start(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, name="command", daemon=True)
    thread.start()
    return thread


def _after(seconds: float, work: Callable[[], None]) -> Callable[[], None]:
    timer = threading.Timer(seconds, work)
    timer.daemon = True
    timer.start()
    return timer.cancel


_MAX_WAITING: Final = 16
"""Commands that wait; further ones are dropped. Of desired settings only the latest waits."""

_UPDATE_POLL_S: Final = 5.0
_TRIALS: Final = 3
_TRIAL_S: Final = 60.0

_RULES: Final = {rule.topic: rule for rule in TREE}


class SteeringListener:
    """Receive messages of administrators. Attach it before the link is started."""

    def __init__(
        self,
        settings: SteeredSettings,
        device: SteeredDevice,
        link: Link,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        own = settings.settings
        self._settings = settings
        self._device = device
        self._link = link
        self._updates = settings.updates
        self._update: UpdateReport | None = None
        self._topics = {
            topic: build(topic, fleet=own.fleet, device=own.device)
            for topic in (Topic.CONFIG_DESIRED, Topic.CONFIG_REPORTED, Topic.COMMAND_REQUEST, Topic.COMMAND_RESPONSE)
        }
        self._commands = Commands(device, partial(self._publish, Topic.COMMAND_RESPONSE), now=now)
        self._changed = threading.Condition()
        self._wanted: Message | None = None
        self._asked: deque[Message] = deque()
        self._reports = self._drops = self._ending = False
        self._thread: threading.Thread | None = None

    def attach(self) -> None:
        self._link.subscribe(self._topics[Topic.CONFIG_DESIRED], self._receive)
        self._link.subscribe(self._topics[Topic.COMMAND_REQUEST], self._receive, retained=False)
        self._link.on_connection(self._note_connection)

    def start(self) -> None:
        self._thread = threading.Thread(target=self._work, name="steering", daemon=True)
        self._thread.start()
        if self._updates is not None and (trial := self._updates.trial()) is not None:
            _start(partial(self._prove, self._updates, trial))

    def stop(self) -> None:
        """Stop without waiting for a running command."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _note_connection(self, up: bool) -> None:
        with self._changed:
            self._reports = self._reports or up  # again: the broker may have lost the retained message
            self._changed.notify_all()

    def _receive(self, message: Message) -> None:
        if not message.payload:
            return  # it deletes a retained message
        with self._changed:
            if message.topic == self._topics[Topic.CONFIG_DESIRED]:
                self._wanted = message
            elif len(self._asked) < _MAX_WAITING:
                self._asked.append(message)
            elif not self._drops:
                self._drops = True
                _log.warning("Commands are dropped: %d are waiting.", _MAX_WAITING)
            self._changed.notify_all()

    def _work(self) -> None:
        while not self._ending:
            with self._changed:
                poll_s = None if self._updates is None else _UPDATE_POLL_S
                self._changed.wait_for(lambda: self._wanted or self._asked or self._reports or self._ending, poll_s)
                wanted, self._wanted = self._wanted, None
                asked = self._asked.popleft() if self._asked else None
                reports, self._reports = self._reports, False
                self._drops = self._drops and bool(self._asked)
            try:
                if wanted is not None and self._handle(wanted):
                    reports = True  # also if it was ignored: its sender waits for an answer
                if self._updates is not None and (update := self._updates.report()) != self._update:
                    self._update, reports = update, True
                if reports:
                    self._publish(Topic.CONFIG_REPORTED, self._settings.report())
                if asked is not None:
                    self._handle(asked)
            except Exception:  # noqa: BLE001 - the next one is handled
                _log.exception("An administrator's message failed because of a defect.")

    def _handle(self, message: Message) -> bool:
        """Do what a message asks for; return whether it could be read."""
        try:
            if message.topic == self._topics[Topic.COMMAND_REQUEST]:
                self._commands.accept(decode_json(CommandRequest, message.payload))
            else:
                self._settings.consider(decode_json(DesiredSettings, message.payload))
        except CodecError as error:
            _log.warning("An administrator's message on %s is ignored: %s", message.topic, error)
            return False
        return True

    def _prove(self, updates: UpdateFolder, trial: str) -> None:
        """Run the self-test of a new release. An absent edge is no failure: the updater limits the wait."""
        failures, service = 0, self._device.service
        while not self._ending:
            if service.absence() is None:
                answer = _self_test(self._device, _TRIAL_S)
                ok = answer.outcome is CommandOutcome.OK
                failures += not ok and service.absence() is None
                if ok or failures == _TRIALS:
                    updates.end_trial(trial, ok=ok, sentence=answer.sentence)
                    return
            with self._changed:
                self._changed.wait_for(lambda: self._ending, _UPDATE_POLL_S)

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
