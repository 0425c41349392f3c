"""Commands for devices: given, answered or not, and recorded either way."""

import json
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Final

from fleet_admin.steering.errors import SteeringError
from fleet_admin.steering.log import ASKED, SteeringEvent, SteeringLog
from fleet_admin.steering.selection import KnownDevice
from fleet_admin.steering.views import Actor, CommandResult
from fleet_admin.steering.wire import SteeringWire
from fleet_edge.store.event_codes import EventKind
from fleet_edge.store.steering.audit import AuditEntry
from fleet_edge.store.steering.commands import SILENT
from schemas.control import CommandRequest, CommandResponse, Presence, SettingValue


class Answers:
    """What has come so far. Told on the link's thread, taken while that is held up.

    Args:
        requests: The commands, by device.
        clock: Monotonic seconds.
    """

    def __init__(self, requests: Mapping[str, CommandRequest], clock: Callable[[], float]) -> None:
        self._requests = requests
        self._clock = clock
        self._began = clock()
        self._parts: dict[str, dict[int, CommandResponse]] = {}
        self._whole: list[CommandResult] = []
        self._told: set[str] = set()
        self.missing = set(requests)

    def listener(self, device: str) -> Callable[[CommandResponse], None]:
        """Return what takes the parts of a device's answer."""
        return lambda response: self._take(device, response)

    def take(self) -> list[CommandResult]:
        """Return the answers that have become whole since this was asked last."""
        whole, self._whole = self._whole, []
        self.missing -= {each.device for each in whole}
        return whole

    def _take(self, device: str, response: CommandResponse) -> None:
        if device not in self._requests or device in self._told:
            return
        parts = self._parts.setdefault(device, {})
        if parts and next(iter(parts.values())).parts != response.parts:
            return  # of another answer than the first
        parts[response.part] = response
        if len(parts) < response.parts:
            return
        texts = [parts[number].result or "" for number in range(response.parts)]
        self._whole.append(
            CommandResult(
                device=device,
                id=response.id,
                outcome=response.outcome.value,
                sentence=response.sentence,
                result=None if parts[0].result is None else "".join(texts),
                seconds=self._clock() - self._began,
            )
        )
        self._parts.pop(device)
        self._told.add(device)


COMMANDS: Final[Mapping[str, float]] = {
    "self-test": 60.0,
    "reload": 10.0,
    "drain": 10.0,
    "pause": 10.0,
    "resume": 10.0,
    "log-tail": 15.0,
    "support-bundle": 20.0,
}
"""Seconds that a command is given unless its sender says otherwise, by its name."""

_MOST_S: Final = 600.0
_LATE_S: Final = 1.0
"""For which an answer is waited for behind the command's own time: it travels too."""

_OFFLINE: Final = "offline"
_ENDS: Final[Mapping[str, str]] = {"ok": "done", "failed": "failed", "refused": "refused", SILENT: "timed-out"}


def limit_of(command: str, asked_s: float | None) -> float:
    """Return the seconds that a command is given.

    Args:
        command: Its name.
        asked_s: As its sender says; None: as it usually takes.

    Raises:
        SteeringError: There is no such command, or the time is none.
    """
    if command not in COMMANDS:
        raise SteeringError(f"There is no command {command[:40]!r}; there are {', '.join(COMMANDS)}.")
    limit_s = COMMANDS[command] if asked_s is None else asked_s
    if not 0 < limit_s <= _MOST_S:
        raise SteeringError(f"A command can be given up to {_MOST_S:.0f} s, not {limit_s:.0f} s.")
    return limit_s


class Commanding:
    """Gives commands. May be used by several threads.

    Args:
        log: Where they are kept.
        wire: To the devices.
        now: The wall clock (UTC).
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        log: SteeringLog,
        wire: SteeringWire,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log = log
        self._wire = wire
        self._now = now
        self._clock = clock

    def give(
        self,
        name: str,
        chosen: Mapping[str, KnownDevice],
        *,
        actor: Actor,
        arguments: Mapping[str, SettingValue],
        limit_s: float,
    ) -> Iterator[CommandResult]:
        """Give devices a command, and tell what each answers, as they answer.

        Args:
            name: One of `COMMANDS`.
            chosen: To whom, by name. Those that are offline are sent nothing.
            actor: Who gives it.
            arguments: By name.
            limit_s: Seconds that it is given.

        Raises:
            StoreUnavailable: It cannot be recorded; nothing is sent.
        """
        there = [device for device, each in chosen.items() if each.presence not in {None, Presence.OFFLINE}]
        deadline = self._now() + timedelta(seconds=limit_s)
        requests = {
            device: CommandRequest(
                id=secrets.token_hex(8),
                command=name,
                arguments=dict(arguments),
                deadline=deadline,
                who=actor.who[:100],
            )
            for device in there
        }
        said = json.dumps(dict(arguments)) if arguments else None
        entries = [
            AuditEntry(
                who=actor.who,
                action=f"command {name}",
                subject=device,
                after=said,
                outcome=ASKED if device in requests else "offline: not sent",
                source=actor.source,
            )
            for device in chosen
        ]
        ids = self._log.keep_commands(requests, entries, batch=secrets.token_hex(8))
        return self._answers(name, chosen, requests, dict(zip(chosen, ids, strict=True)), actor=actor, limit_s=limit_s)

    def _answers(
        self,
        name: str,
        chosen: Collection[str],
        requests: Mapping[str, CommandRequest],
        entries: Mapping[str, str],
        *,
        actor: Actor,
        limit_s: float,
    ) -> Iterator[CommandResult]:
        began = self._clock()
        answers = Answers(requests, self._clock)
        results: dict[str, CommandResult] = {}
        try:
            for device, request in requests.items():
                self._wire.command(device, request, answers.listener(device))
            for device in chosen:
                if device not in requests:
                    results[device] = CommandResult(
                        device=device, id="", outcome=_OFFLINE, sentence="The device is offline; nothing was sent."
                    )
                    yield results[device]
            while answers.missing and (left_s := began + limit_s + _LATE_S - self._clock()) > 0:
                for result in self._wire.wait(answers.take, left_s):
                    results[result.device] = result
                    yield result
            for device in sorted(answers.missing):
                results[device] = CommandResult(
                    device=device,
                    id=requests[device].id,
                    outcome=SILENT,
                    sentence=f"The device has not answered within {limit_s:.0f} s.",
                )
                yield results[device]
        finally:
            for device, request in requests.items():
                self._wire.end_command(device, request.id)
            ended = {each.id: (each.outcome, each.sentence) for each in results.values() if each.id}
            self._log.end_commands(ended)
            self._log.end_audit(
                {entries[each.device]: f"{each.outcome}: {each.sentence}" for each in results.values() if each.id}
            )
            self._log.note(
                [
                    SteeringEvent(
                        device=each.device,
                        kind=EventKind.COMMAND,
                        code=_ENDS[each.outcome],
                        sentence=f"{name}: {each.sentence}",
                        who=actor.who,
                    )
                    for each in results.values()
                    if each.id
                ]
            )
