"""Steering of a fleet: sets what devices do, sends them commands, and records who did it.

::

    from fleet_admin.settings import AdminSettings
    from fleet_admin.steering import Actor, Selection, Steering

    with Steering.open(AdminSettings(), "sqlite:///fleet.sqlite3") as steering:
        for result in steering.set({"temperature": 0.2}, Selection(labels=("hall_a",)), actor=Actor("alice")):
            print(result.device, result.state, result.sentence)

What cannot be recorded does not happen: the database is written before anything is sent to a device.
"""

import json
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Final, Self

from fleet_admin.settings import AdminSettings
from fleet_admin.steering.clients import BrokerClient
from fleet_admin.steering.log import ASKED, SteeringLog
from fleet_admin.steering.planning import (
    Actor,
    CommandResult,
    DeviceSettingsView,
    KnownDevice,
    Selection,
    SettingsChange,
    SettingState,
    SteeringError,
    check_change,
    plan_changes,
    settings_after,
    settings_view,
)
from fleet_admin.steering.wire import SteeringWire
from fleet_common.mqtt.link import Link
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import LinkSettings
from fleet_edge.session_log import EventKind
from schemas.control import CommandRequest, CommandResponse, DesiredSettings, SettingValue


class CommandAnswers:
    """Answers received so far. Filled on the link's thread, taken while that is blocked."""

    def __init__(self, requests: Mapping[str, CommandRequest]) -> None:
        self._requests = requests
        self._began = time.monotonic()
        self._whole: list[CommandResult] = []
        self._told: set[str] = set()
        self.missing = set(requests)

    def listener(self, device: str) -> Callable[[CommandResponse], None]:
        """Return a function that takes a device's answer."""
        return lambda response: self._take(device, response)

    def take(self) -> list[CommandResult]:
        """Return the answers since the last call."""
        whole, self._whole = self._whole, []
        self.missing -= {each.device for each in whole}
        return whole

    def _take(self, device: str, response: CommandResponse) -> None:
        if device not in self._requests or device in self._told:
            return
        self._told.add(device)
        self._whole.append(
            CommandResult(
                device=device,
                id=response.id,
                outcome=response.outcome.value,
                sentence=response.sentence,
                result=response.result,
                seconds=time.monotonic() - self._began,
            )
        )


COMMANDS: Final[Mapping[str, float]] = {
    "self-test": 60.0,
    "reload": 10.0,
    "drain": 10.0,
    "resume": 10.0,
    "log-tail": 15.0,
}
"""Default time limit in seconds, by command."""

_MAX_S: Final = 600.0
_LATE_S: Final = 1.0
"""Extra wait for an answer, which takes time on the network."""

SILENT: Final = "silent"
"""Outcome of a command that was not answered in time."""

_OFFLINE: Final = "offline"
_ENDS: Final[Mapping[str, str]] = {"ok": "done", "failed": "failed", "refused": "refused", SILENT: "timed-out"}


def limit_of(command: str, asked_s: float | None) -> float:
    """Return a command's time limit, in seconds."""
    if command not in COMMANDS:
        raise SteeringError(f"There is no command {command[:40]!r}; there are {', '.join(COMMANDS)}.")
    limit_s = COMMANDS[command] if asked_s is None else asked_s
    if not 0 < limit_s <= _MAX_S:
        raise SteeringError(f"A command can be given up to {_MAX_S:.0f} s, not {limit_s:.0f} s.")
    return limit_s


_WAIT_S: Final = 10.0

# Codes of events, as `fleet_edge.session_log.event_codes` has them.
_CODES: Final[Mapping[SettingState, str]] = {
    SettingState.IN_FORCE: "applied",
    SettingState.NEEDS_RESTART: "applied",
    SettingState.REFUSED: "refused",
    SettingState.WAITING: "wanted",
    SettingState.SILENT: "wanted",
    SettingState.NONE: "wanted",
}


class Steering:
    """Steers devices over the broker. Thread-safe. `log` works without a broker."""

    def __init__(self, log: SteeringLog, wire: SteeringWire) -> None:
        self.log = log
        self._wire = wire
        self._setting = threading.Lock()

    @classmethod
    def open(cls, settings: AdminSettings, db: str, *, make_link: Callable[[LinkSettings], Link] = PahoLink) -> Self:
        """Return a monitor, not started; raises `StoreError` if the database cannot be opened."""
        link = make_link(settings.broker.link(settings.fleet, settings.name, will=None))
        return cls(SteeringLog(db), SteeringWire(link, fleet=settings.fleet, name=settings.name))

    def start(self) -> None:
        """Connect, and receive what the broker retains; raises as `SteeringWire.start`."""
        try:
            self._wire.start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        self._wire.stop()
        self.log.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def connected(self) -> bool:
        return self._wire.connected

    def known(self) -> dict[str, KnownDevice]:
        """Return the devices that the log or the broker knows, by name; the broker's data is newer."""
        found = self.log.known()
        for device in {*self._wire.desired(), *self._wire.reported()} - found.keys():
            found[device] = KnownDevice(device=device)
        for device, state in self._wire.states().items():
            found[device] = replace(
                found.get(device, KnownDevice(device=device)),
                presence=state.presence,
                software=state.software,
                draft_model=state.draft_model,
            )
        return found

    def clients(self) -> tuple[list[BrokerClient], int | None]:
        """Return the clients as the broker sees them; see `SteeringWire.clients`."""
        return self._wire.clients()

    def choose(self, selection: Selection) -> list[str]:
        """Return the devices of a selection; raises `SteeringError` if there are none or one is unknown."""
        return selection.choose(self.known())

    def preview(
        self, changes: Mapping[str, SettingValue], selection: Selection, *, unset: Collection[str] = ()
    ) -> list[SettingsChange]:
        """Return a change's effect on each device, without applying it."""
        check_change(changes, unset)
        known = self.known()
        return plan_changes(
            [known[device] for device in selection.choose(known)],
            changes,
            unset=unset,
            desired=self._wire.desired(),
            reported=self._wire.reported(),
        )

    def set(
        self,
        changes: Mapping[str, SettingValue],
        selection: Selection,
        *,
        actor: Actor,
        unset: Collection[str] = (),
        wait_s: float = _WAIT_S,
    ) -> Iterator[DeviceSettingsView]:
        """Change settings of devices, reset those in `unset`, and yield each device's settings as it answers.

        It waits at most `wait_s` for the devices that are online. Nothing is changed if it raises `SteeringError` (no
        device is chosen, or a setting is invalid) or `StoreUnavailable` (the change cannot be recorded).
        """
        with self._setting:  # of two changes at once, the later one would undo the earlier one
            planned = self.preview(changes, selection, unset=unset)
            entries = self._want(planned, actor=actor)
        return self._results(planned, entries, actor=actor, wait_s=wait_s)

    def wanted_and_reported(self, devices: Collection[str] | None = None) -> list[DeviceSettingsView]:
        """Return the desired and reported settings that the broker retains, of all devices or of some."""
        known, desired, reported = self.known(), self._wire.desired(), self._wire.reported()
        names = known.keys() if devices is None else known.keys() & set(devices)
        return [settings_view(known[name], desired.get(name), reported.get(name)) for name in sorted(names)]

    def _want(self, planned: Sequence[SettingsChange], *, actor: Actor) -> dict[str, str]:
        """Record and publish wanted settings; return the ids of the audit entries."""
        now = datetime.now(UTC)
        wanted = {
            each.device: DesiredSettings(id=each.id, values=dict(each.wanted), who=actor.who[:100], at=now)
            for each in planned
        }
        entries = [
            actor.entry(
                "set" if each.after else "unset",
                each.device,
                before=_as_json(each.before),
                after=_as_json(each.after),
                outcome=ASKED,
            )
            for each in planned
        ]
        ids = self.log.record(entries)
        for device, settings in wanted.items():
            self._wire.want(device, settings)
        return dict(zip(wanted, ids, strict=True))

    def _results(
        self, planned: Sequence[SettingsChange], entries: Mapping[str, str], *, actor: Actor, wait_s: float
    ) -> Iterator[DeviceSettingsView]:
        deadline = time.monotonic() + wait_s
        left = {each.device: each for each in planned}
        done: list[DeviceSettingsView] = []

        def finish(*, late: bool = False) -> list[DeviceSettingsView]:
            """Return the devices that have answered since the last call, or all of them."""
            desired, reported = self._wire.desired(), self._wire.reported()
            views = [
                settings_after(change, desired.get(name), reported.get(name), rejected=self._wire.rejected(name))
                for name, change in left.items()
            ]
            return [view for view in views if late or view.state is not SettingState.SILENT]

        try:
            while left:
                left_s = deadline - time.monotonic()
                for view in self._wire.wait(finish, left_s) if left_s > 0 else finish(late=True):
                    done.append(view)
                    del left[view.device]
                    yield view
        finally:
            self.log.end_audit({entries[each.device]: f"{each.state}: {each.sentence}" for each in done})
            noted = [(each.device, _CODES[each.state], each.sentence) for each in done]
            self.log.note(EventKind.CONFIG, noted, actor=actor)

    def command(
        self,
        name: str,
        selection: Selection,
        *,
        actor: Actor,
        timeout_s: float | None = None,
    ) -> Iterator[CommandResult]:
        """Send devices a command, and yield their answers.

        Nothing is sent if it raises `SteeringError` (no such command, no device, or an invalid limit) or
        `StoreUnavailable` (the command cannot be recorded).
        """
        limit_s = limit_of(name, timeout_s)
        known = self.known()
        chosen = selection.choose(known)
        present = ((device, known[device].presence) for device in chosen)
        there = [device for device, presence in present if presence is not None and not presence.gone]
        deadline = datetime.now(UTC) + timedelta(seconds=limit_s)
        requests = {
            device: CommandRequest(
                id=secrets.token_hex(8),
                command=name,
                deadline=deadline,
                who=actor.who[:100],
            )
            for device in there
        }
        entries = [
            actor.entry(f"command {name}", device, outcome=ASKED if device in requests else "offline: not sent")
            for device in chosen
        ]
        ids = self.log.keep_commands(requests, entries, batch=secrets.token_hex(8))
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
        began = time.monotonic()
        answers = CommandAnswers(requests)
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
            while answers.missing and (left_s := began + limit_s + _LATE_S - time.monotonic()) > 0:
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
            sent = [each for each in results.values() if each.id]
            self.log.end_commands({each.id: (each.outcome, each.sentence) for each in sent})
            self.log.end_audit({entries[each.device]: f"{each.outcome}: {each.sentence}" for each in sent})
            noted = [(each.device, _ENDS[each.outcome], f"{name}: {each.sentence}") for each in sent]
            self.log.note(EventKind.COMMAND, noted, actor=actor)

    def retire(self, device: str, *, undo: bool = False, actor: Actor) -> None:
        """Retire a device, or undo that; see `SteeringLog.retire`. Its wanted settings are deleted."""
        self.log.retire(device, undo=undo, actor=actor)
        if not undo:
            self._wire.forget(device)


def _as_json(values: Mapping[str, SettingValue]) -> str | None:
    return json.dumps(dict(values)) if values else None
