"""Actions: the commands that a device knows, each with what it does and the arguments that it takes.

An action is bounded in time by its deadline, and in size by what an answer may hold. None tells texts or secrets.
"""

import json
import platform
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from fleet_device.checks.model_check import probe_prompt
from fleet_device.client.cancellation import Cancellation
from fleet_device.drafters.contract import DrafterError
from fleet_device.errors import DeviceError
from fleet_device.service import DeviceService
from fleet_device.steering.log_tail import MOST_LINES, LogTail
from fleet_device.texts.generate import GenerateRequest
from fleet_runtime.fields import fields_of
from schemas.reasons import EndReason
from schemas.steering import CommandOutcome, SettingValue
from schemas.version import VERSION

__all__ = ["ACTIONS", "Action", "Answer", "Arguments", "SteeredDevice"]

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
    def service(self) -> DeviceService:
        """Its service."""

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
    def log_tail(self) -> LogTail:
        """What it has logged."""


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
        return Answer(CommandOutcome.FAILED, missing)
    cancellation = Cancellation()
    order = GenerateRequest(tuple(probe_prompt(service.drafter)), service.settings.policy(), _TEST_TOKENS)

    timer = threading.Timer(limit_s, cancellation.cancel)
    timer.daemon = True
    timer.start()
    try:
        text = service.write(order, cancellation=cancellation)
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
