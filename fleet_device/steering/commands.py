"""Commands: runs those that an administrator gives, one at a time, and answers each once however often it comes.

One that is late, unknown or badly argued is refused with a reason, and so is one that comes while another runs.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Final

from fleet_device.steering.actions import ACTIONS, Action, Answer, Arguments, SteeredDevice
from schemas.bounds import MAX_SENTENCE
from schemas.steering import MAX_PARTS, MAX_RESULT, CommandOutcome, CommandRequest, CommandResponse

__all__ = ["Commands", "in_parts"]

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
