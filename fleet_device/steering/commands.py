"""Commands: runs those that an administrator gives, one at a time, and answers each once however often it comes.

One that is late, unknown or badly argued is refused with a reason, and so is one that comes while another runs.
"""

import json
import logging
import platform
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Protocol

from fleet_common.fields import fields_of
from fleet_device.checks.selftest import probe_prompt
from fleet_device.client.request import Cancellation, GenerateRequest, RequestContext
from fleet_device.drafters.contract import DrafterError
from fleet_device.errors import DeviceError
from fleet_device.service import DeviceService
from schemas.bounds import MAX_SENTENCE
from schemas.printable import printable_line
from schemas.reasons import EndReason
from schemas.steering import MAX_PARTS, MAX_RESULT, CommandOutcome, CommandRequest, CommandResponse, SettingValue
from schemas.version import VERSION

MOST_LINES: Final = 1000
_LONGEST: Final = 500  # characters of a line


class LogTail(logging.Handler):
    """Keeps what is logged. Tokens and texts are never logged, so that none are here."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: deque[str] = deque(maxlen=MOST_LINES)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record, line by line."""
        try:
            text = self.format(record)
        except Exception:  # noqa: BLE001 - as logging itself does: a bad record ends nothing
            self.handleError(record)
            return
        for line in text.splitlines():
            self._lines.append(printable_line(line)[:_LONGEST])

    def lines(self, number: int) -> list[str]:
        """Return the last lines, the oldest first."""
        return list(self._lines.copy())[-number:] if number > 0 else []


_TEST_TOKENS: Final = 24
_TAIL: Final = 100
_LONGEST_SETTING: Final = 200

Arguments = Mapping[str, SettingValue]


@dataclass(frozen=True, slots=True)
class Answer:
    """What an action says.

    Attributes:
        outcome: Whether it was done.
        sentence: What was done, or why not.
        result: What there is to read.
        then: Called when the answer has been sent.
    """

    outcome: CommandOutcome
    sentence: str
    result: str | None = None
    then: Callable[[], None] | None = None


class SteeredDevice(Protocol):
    """What actions act on: a device that serves applications."""

    @property
    def service(self) -> DeviceService: ...

    def hold(self, *, drain: bool) -> int:
        """Take no new texts (`drain`), or begin none; return how many are still to be written."""

    def resume(self) -> bool:
        """Take texts again; return whether it did not."""

    def reload(self) -> None:
        """End the open texts, and load the model anew."""

    def status(self) -> dict[str, Any]:
        """Return how it is and what it has written, as JSON values."""

    def settings_report(self) -> dict[str, Any]:
        """Return its settings as an administrator sees them, as JSON values."""

    @property
    def log_tail(self) -> LogTail: ...


@dataclass(frozen=True, slots=True)
class Action:
    """A command that a device knows.

    Attributes:
        run: Does it: the device, the arguments, and the seconds that there are.
        arguments: That it takes, by name, with the least and the greatest value of each.
    """

    run: Callable[[SteeredDevice, Arguments, float], Answer]
    arguments: Mapping[str, tuple[int, int]]


def _self_test(device: SteeredDevice, arguments: Arguments, limit_s: float) -> Answer:
    """Write a short text through the edge, beside whatever else is written."""
    del arguments
    service = device.service
    if (missing := service.absence()) is not None:
        return Answer(CommandOutcome.FAILED, str(missing))
    cancellation = Cancellation()
    order = GenerateRequest(tuple(probe_prompt(service.drafter)), service.settings.policy(), _TEST_TOKENS)

    timer = threading.Timer(limit_s, cancellation.cancel)
    timer.daemon = True
    timer.start()
    try:
        text = service.write(order, RequestContext(cancellation=cancellation))
    except (DeviceError, DrafterError) as error:
        return Answer(CommandOutcome.FAILED, str(error))
    finally:
        timer.cancel()
    generation = text.generation
    if text.reason not in (EndReason.STOP, EndReason.LENGTH):
        return Answer(CommandOutcome.FAILED, f"The text was ended by {text.reason.value}.")
    acceptance = generation.counters.acceptance
    tested = "no draft was tested" if acceptance is None else f"acceptance {acceptance:.2f}"
    sentence = f"{len(text.tokens)} tokens at {text.tokens_per_s:.1f} tokens/s by {generation.edge}, {tested}."
    figures = {
        "tokens": len(text.tokens),
        "tokens_per_s": round(text.tokens_per_s, 2),
        "acceptance": acceptance,
        "first_ms": generation.first_ms,
        "round_trip_ms": generation.round_trips.mean_ms,
        "edge": generation.edge,
        "plan": generation.choice.plan if generation.choice is not None else None,
    }
    return Answer(CommandOutcome.OK, sentence, json.dumps(figures))


def _drain(device: SteeredDevice, arguments: Arguments, limit_s: float) -> Answer:
    del arguments, limit_s
    left = device.hold(drain=True)
    return Answer(
        CommandOutcome.OK, f"The device takes no new texts until it is resumed or restarted; {left} are left."
    )


def _pause(device: SteeredDevice, arguments: Arguments, limit_s: float) -> Answer:
    del arguments, limit_s
    left = device.hold(drain=False)
    return Answer(
        CommandOutcome.OK,
        f"The device begins no text until it is resumed or restarted; {left} wait or are being written.",
    )


def _resume(device: SteeredDevice, arguments: Arguments, limit_s: float) -> Answer:
    del arguments, limit_s
    held = device.resume()
    return Answer(CommandOutcome.OK, "The device takes texts again." if held else "The device was taking texts.")


def _reload(device: SteeredDevice, arguments: Arguments, limit_s: float) -> Answer:
    del arguments, limit_s
    return Answer(
        CommandOutcome.OK,
        "The device ends its open texts, loads its model anew and comes back; its settings then say with which.",
        then=device.reload,
    )


def _log_tail(device: SteeredDevice, arguments: Arguments, limit_s: float) -> Answer:
    del limit_s
    lines = device.log_tail.lines(int(arguments.get("lines", _TAIL)))
    return Answer(CommandOutcome.OK, f"{len(lines)} lines.", "\n".join(lines))


def _support_bundle(device: SteeredDevice, arguments: Arguments, limit_s: float) -> Answer:
    """Tell what whoever looks for a fault asks first; no text, no prompt, no secret."""
    del arguments, limit_s
    settings = device.service.settings
    status = device.status()
    status.pop("last_texts", None)
    shown = {field.name: _shown(settings, field.path) for field in fields_of(type(settings)) if field.shown}
    bundle = {
        "software": VERSION,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}",
        "status": status,
        "settings": shown,
        "from_afar": device.settings_report(),
        "link": device.service.link_counters(),
        "log": device.log_tail.lines(MOST_LINES),
    }
    return Answer(CommandOutcome.OK, "Status, settings without secrets, and the log.", json.dumps(bundle, indent=1))


def _shown(settings: object, path: tuple[str, ...]) -> object:
    value = settings
    for name in path:
        value = getattr(value, name)
    return value if isinstance(value, bool | int | float | None) else str(value)[:_LONGEST_SETTING]


ACTIONS: Final[Mapping[str, Action]] = {
    "self-test": Action(_self_test, {}),
    "reload": Action(_reload, {}),
    "drain": Action(_drain, {}),
    "pause": Action(_pause, {}),
    "resume": Action(_resume, {}),
    "log-tail": Action(_log_tail, {"lines": (1, MOST_LINES)}),
    "support-bundle": Action(_support_bundle, {}),
}
"""By the command's name."""

_log = logging.getLogger(__name__)

_REMEMBERED: Final = 64  # commands whose answers are known
_KEPT_RESULTS: Final = 2  # of them, whose results are kept: they may be long
_LONGEST_S: Final = 600.0  # that a command may take, however far its deadline is
_CUT: Final = "\n… (the rest did not fit)"

Send = Callable[[CommandResponse], None]


class Commands:
    """The commands of one device. `take` is called by one thread.

    Args:
        device: What they act on.
        send: Sends an answer; called from any thread.
        now: The wall clock (UTC).
        start: Runs a function on a thread of its own; what it returns is of no use.
        after: Calls a function after so many seconds, unless the function that it returns was called before.
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
        self._answered: OrderedDict[str, Sequence[CommandResponse]] = OrderedDict()

    def take(self, request: CommandRequest) -> None:
        """Take a command: begin it, refuse it, or answer it again."""
        with self._lock:
            before = self._answered.get(request.id)
            running = self._running
        if before is not None:
            for response in before:
                self._send(response)
            return
        if running is not None and running.id == request.id:
            return  # its answer is on its way
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
        self._start(lambda: self._run(ACTIONS[request.command], request, limit_s, cancel))

    def _refusal(self, request: CommandRequest, left_s: float, running: CommandRequest | None) -> str | None:
        if left_s <= 0:
            return f"It has come {-left_s:.0f} s too late by this device's clock, {self._now():%Y-%m-%d %H:%M:%S} UTC."
        action = ACTIONS.get(request.command)
        if action is None:
            return f"This release knows no command {request.command!r}; it knows {', '.join(ACTIONS)}."
        if (why := _bad_argument(request.command, action, request.arguments)) is not None:
            return why
        return None if running is None else f"The command {running.command} is still running; ask again later."

    def _run(self, action: Action, request: CommandRequest, limit_s: float, cancel: Callable[[], None]) -> None:
        try:
            answer = action.run(self._device, request.arguments, limit_s)
        except Exception as error:  # noqa: BLE001 - whatever it is, its sender is told
            _log.exception("The command %s failed for a reason that should not be possible.", request.command)
            answer = Answer(CommandOutcome.FAILED, f"It failed: {type(error).__name__}; the device's log tells more.")
        cancel()
        _log.info("The command %s of %s: %s. %s", request.command, request.who, answer.outcome.value, answer.sentence)
        self._answer(request, answer)
        with self._lock:
            self._running = None
        if answer.then is not None:
            answer.then()

    def _late(self, request: CommandRequest) -> None:
        """Say that a command takes too long; it is not begun again, and no other is begun while it has not ended."""
        self._answer(request, Answer(CommandOutcome.FAILED, "It has not ended in the time that it was given."))

    def _answer(self, request: CommandRequest, answer: Answer) -> None:
        responses = in_parts(request.id, answer)
        with self._lock:
            if request.id in self._answered:
                return  # it was said to be late
            self._answered[request.id] = responses
            long = [known for known, said in self._answered.items() if len(said) > 1 or said[0].result]
            for known in long[:-_KEPT_RESULTS]:
                shorter = {"result": None, "part": 0, "parts": 1}
                self._answered[known] = [self._answered[known][0].model_copy(update=shorter)]
            while len(self._answered) > _REMEMBERED:
                self._answered.popitem(last=False)
        for response in responses:
            self._send(response)


def in_parts(command: str, answer: Answer) -> list[CommandResponse]:
    """Return an answer as messages: one, or as many as its result takes. What does not fit is left out."""
    result, most = answer.result, MAX_RESULT * MAX_PARTS
    if result is not None and len(result) > most:
        result = result[: most - len(_CUT)] + _CUT
    pieces = (
        [None] if result is None else [result[at : at + MAX_RESULT] for at in range(0, len(result) or 1, MAX_RESULT)]
    )
    return [
        CommandResponse(
            id=command,
            outcome=answer.outcome,
            sentence=answer.sentence[:MAX_SENTENCE],
            result=piece,
            part=number,
            parts=len(pieces),
        )
        for number, piece in enumerate(pieces)
    ]


def _bad_argument(command: str, action: Action, arguments: Arguments) -> str | None:
    for name, value in arguments.items():
        if name not in action.arguments:
            takes = ", ".join(action.arguments) or "none"
            return f"The command {command} takes no argument {name!r}; it takes {takes}."
        least, most = action.arguments[name]
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            return f"The argument {name} of {command} must be a whole number from {least} to {most}."
    return None


def _start(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, name="command", daemon=True)
    thread.start()
    return thread


def _after(seconds: float, work: Callable[[], None]) -> Callable[[], None]:
    timer = threading.Timer(seconds, work)
    timer.daemon = True
    timer.start()
    return timer.cancel
