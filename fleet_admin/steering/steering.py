"""Steering of a fleet: sets what devices do, gives them commands, and keeps who has done it.

::

    from fleet_admin.settings import AdminSettings
    from fleet_admin.steering import Actor, Selection, Steering

    with Steering.open(AdminSettings(), "sqlite:///fleet.sqlite3") as steering:
        for result in steering.set({"temperature": 0.2}, Selection(labels=("hall_a",)), actor=Actor("alice")):
            print(result.device, result.state, result.sentence)

What cannot be recorded does not happen: the database is written before a device is told anything.
"""

import json
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Final, Self

from fleet_admin.settings import AdminSettings
from fleet_admin.steering.commanding import Commanding, limit_of
from fleet_admin.steering.log import ASKED, SteeringEvent, SteeringLog
from fleet_admin.steering.planning import device_view, outcome_of, plan_changes
from fleet_admin.steering.selection import KnownDevice, Selection
from fleet_admin.steering.values import check_change
from fleet_admin.steering.views import (
    Actor,
    CommandResult,
    DeviceSettingsView,
    SetResult,
    SettingsChange,
    SettingState,
)
from fleet_admin.steering.wire import SteeringWire
from fleet_common.mqtt.link import Link
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import LinkSettings
from fleet_edge.store.event_codes import EventKind
from fleet_edge.store.states import MachineState, device_state
from fleet_edge.store.steering.audit import AuditEntry
from schemas.control import DesiredSettings, Presence, SettingValue

_WAIT_S: Final = 10.0
_RECORD_S: Final = 2.0

# Codes of events, as `fleet_edge.store.event_codes` has them.
_CODES: Final[Mapping[SettingState, str]] = {
    SettingState.IN_FORCE: "applied",
    SettingState.NEEDS_RESTART: "applied",
    SettingState.REFUSED: "refused",
    SettingState.WAITING: "wanted",
    SettingState.SILENT: "wanted",
    SettingState.AHEAD: "refused",
}


class Steering:
    """A monitor at work. May be used by several threads.

    Args:
        log: Where it is kept.
        wire: To the devices; not started.
        now: The wall clock (UTC).
        clock: Monotonic seconds.

    Attributes:
        log: Labels, commands and the audit log, which need no broker.
    """

    def __init__(
        self,
        log: SteeringLog,
        wire: SteeringWire,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.log = log
        self._wire = wire
        self._now = now
        self._clock = clock
        self._setting = threading.Lock()
        self._ended = threading.Event()
        self._recorder: threading.Thread | None = None
        self._commands = Commanding(log, wire, now=now, clock=clock)

    @classmethod
    def open(cls, settings: AdminSettings, db: str, *, make_link: Callable[[LinkSettings], Link] = PahoLink) -> Self:
        """Return a monitor as the settings say, not started.

        Raises:
            StoreError: The database cannot be opened.
        """
        link = make_link(settings.broker.link(settings.fleet, settings.name, will=None))
        return cls(SteeringLog(db), SteeringWire(link, fleet=settings.fleet, name=settings.name))

    def start(self, *, records: bool = False) -> None:
        """Connect, and hear what the broker keeps.

        Args:
            records: Whether to keep what devices report for as long as this runs, as a dashboard does.

        Raises:
            ConnectFailed: The broker cannot be reached.
            SteeringError: It does not let this monitor speak.
        """
        try:
            self._wire.start()
        except BaseException:
            self.stop()
            raise
        if records:
            self._recorder = threading.Thread(target=self._record, name="steering", daemon=True)
            self._recorder.start()

    def stop(self) -> None:
        self._ended.set()
        if self._recorder is not None:
            self._recorder.join()
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

    # Whom

    def known(self, *, edges: bool = False) -> dict[str, KnownDevice]:
        """Return the devices that the log or the broker knows, by name; the broker's word is the later one."""
        found = self.log.known(edges=edges)
        for device, state in self._wire.states().items():
            of_log = found.get(device, KnownDevice(device=device))
            found[device] = replace(
                of_log,
                presence=state.presence,
                software=state.software,
                draft_model=state.draft_model,
                state=device_state(
                    state.presence,
                    since_last_sign=timedelta(),
                    fenced=of_log.state is MachineState.FENCED,
                    retired=of_log.retired_at is not None,
                ),
            )
        return found

    def choose(self, selection: Selection) -> list[str]:
        """Return the devices that a selection means.

        Raises:
            SteeringError: It means none, or one that nobody knows.
        """
        return selection.choose(self.known(edges=selection.edge is not None))

    # Settings

    def preview(
        self, changes: Mapping[str, SettingValue], selection: Selection, *, unset: Collection[str] = ()
    ) -> list[SettingsChange]:
        """Return what a change would do to each device that it concerns; nothing is changed.

        Raises:
            SteeringError: Nobody is chosen, or a setting cannot be set so.
        """
        check_change(changes, unset)
        known = self.known(edges=selection.edge is not None)
        return plan_changes(
            [known[device] for device in selection.choose(known)],
            changes,
            unset=unset,
            desired=self._wire.desired(),
            reported=self._wire.reported(),
            kept=self.log.wanted(),
        )

    def set(
        self,
        changes: Mapping[str, SettingValue],
        selection: Selection,
        *,
        actor: Actor,
        unset: Collection[str] = (),
        wait_s: float = _WAIT_S,
    ) -> Iterator[SetResult]:
        """Want settings of devices, and tell of each what becomes of them, as they answer.

        Args:
            changes: Values by name; what else is wanted of a device stays.
            selection: Whom it concerns.
            actor: Who wants it.
            unset: Settings that are no longer wanted: the device's own hold again.
            wait_s: Longest wait for the devices that are there.

        Raises:
            SteeringError: Nobody is chosen, or a setting cannot be set so; nothing is changed.
            StoreUnavailable: It cannot be recorded; nothing is changed.
        """
        with self._setting:  # two changes at once would be of one version
            planned = self.preview(changes, selection, unset=unset)
            entries = self._want(planned, actor=actor)
        return self._results(planned, entries, actor=actor, wait_s=wait_s)

    def unset(
        self, names: Collection[str], selection: Selection, *, actor: Actor, wait_s: float = _WAIT_S
    ) -> Iterator[SetResult]:
        """Take back what was wanted; see `set`."""
        return self.set({}, selection, actor=actor, unset=names, wait_s=wait_s)

    def wanted_and_reported(self, devices: Collection[str] | None = None) -> list[DeviceSettingsView]:
        """Return the settings of all devices, or of some, as they are wanted and as they have been reported."""
        self._keep_fresh()
        known, desired, reported = self.known(), self._wire.desired(), self._wire.reported()
        kept, heard = self.log.wanted(), self.log.reported()
        names = known.keys() | desired.keys() | reported.keys() | kept.keys()
        return [
            device_view(
                device,
                known.get(device),
                desired=desired.get(device),
                reported=reported.get(device),
                kept=kept.get(device),
                heard=heard.get(device),
            )
            for device in sorted(names if devices is None else names & set(devices))
        ]

    def _want(self, planned: Sequence[SettingsChange], *, actor: Actor) -> dict[str, str]:
        """Record what is wanted, and tell the devices; return the ids of the entries in the audit log."""
        now = self._now()
        wanted = {
            each.device: DesiredSettings(version=each.version, values=dict(each.wanted), who=actor.who[:100], at=now)
            for each in planned
        }
        entries = [
            AuditEntry(
                who=actor.who,
                action="set" if each.after else "unset",
                subject=each.device,
                before=_shown(each.before),
                after=_shown(each.after),
                outcome=ASKED,
                source=actor.source,
            )
            for each in planned
        ]
        ids = self.log.keep_wanted(wanted, entries)
        for device, settings in wanted.items():
            self._wire.want(device, settings)
        return dict(zip(wanted, ids, strict=True))

    def _results(
        self, planned: Sequence[SettingsChange], entries: Mapping[str, str], *, actor: Actor, wait_s: float
    ) -> Iterator[SetResult]:
        deadline = self._clock() + wait_s
        there = {each.device: each for each in planned if each.presence not in {None, Presence.OFFLINE}}
        done: dict[str, SetResult] = {}

        def judged() -> list[SetResult]:
            """Judge what the devices have reported that are not done."""
            reported, desired = self._wire.reported(), self._wire.desired()
            return [
                outcome_of(
                    each,
                    reported.get(device),
                    latest=max(each.version, desired[device].version if device in desired else 0),
                    rejected=self._wire.rejected(device),
                )
                for device, each in there.items()
                if device not in done
            ]

        def answered() -> list[SetResult]:
            # A report that is ahead may be older than the change.
            return [each for each in judged() if each.state not in {SettingState.SILENT, SettingState.AHEAD}]

        try:
            for each in planned:
                if each.device not in there:
                    done[each.device] = outcome_of(each, None, latest=each.version)
                    yield done[each.device]
            while len(done) < len(planned) and (left_s := deadline - self._clock()) > 0:
                for result in self._wire.wait(answered, left_s):
                    done[result.device] = result
                    yield result
            for result in judged():
                done[result.device] = result
                yield result
        finally:
            self._keep_fresh()
            self.log.end_audit({entries[device]: f"{each.state}: {each.sentence}" for device, each in done.items()})
            self.log.note(
                [
                    SteeringEvent(
                        device=each.device,
                        kind=EventKind.CONFIG,
                        code=_CODES[each.state],
                        sentence=each.sentence,
                        who=actor.who,
                    )
                    for each in done.values()
                ]
            )

    # Commands

    def command(
        self,
        name: str,
        selection: Selection,
        *,
        actor: Actor,
        arguments: Mapping[str, SettingValue] | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[CommandResult]:
        """Give devices a command, and tell what each answers, as they answer.

        Args:
            name: One of `fleet_admin.steering.commanding.COMMANDS`.
            selection: To whom.
            actor: Who gives it.
            arguments: By name.
            timeout_s: Seconds that it is given; None: as the command usually takes.

        Raises:
            SteeringError: There is no such command, nobody is chosen, or the time is none; nothing is sent.
            StoreUnavailable: It cannot be recorded; nothing is sent.
        """
        limit_s = limit_of(name, timeout_s)
        known = self.known(edges=selection.edge is not None)
        chosen = {device: known[device] for device in selection.choose(known)}
        return self._commands.give(name, chosen, actor=actor, arguments=dict(arguments or {}), limit_s=limit_s)

    # Devices that go

    def retire(self, device: str, *, undo: bool = False, actor: Actor) -> None:
        """Take a device out of service, or put it back; see `SteeringLog.retire`. Nothing is wanted of it any more."""
        self.log.retire(device, undo=undo, actor=actor)
        if not undo:
            self._wire.forget(device)

    def _record(self) -> None:
        while not self._ended.wait(_RECORD_S):
            self._keep_fresh()

    def _keep_fresh(self) -> None:
        self.log.keep_reported(self._wire.take_fresh())


def _shown(values: Mapping[str, SettingValue]) -> str | None:
    return json.dumps(values) if values else None
