"""Remote settings: a device's own settings with those over them that an administrator wants it to have.

Wanted settings are a set with a version. A set is taken as a whole or refused as a whole, by the rules of the device's
own settings; an older one than was considered before is passed over. What was taken is kept on disk.
"""

import logging
import os
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fleet_common.state import state_folder
from fleet_device.applications import ApplicationsFile
from fleet_device.drafters.contract import Drafter
from fleet_device.drafters.model_source import locate_model
from fleet_device.errors import ConfigurationError
from fleet_device.settings import DeviceSettings
from fleet_device.steering.catalogue import STEERABLE, Checked, Effect, Quotas, check_values
from schemas.bounds import MAX_SENTENCE
from schemas.control import Instant
from schemas.errors import FleetError
from schemas.steering import MAX_SETTINGS, MAX_VERSION, DesiredSettings, ReportedSettings, SettingValue

_log = logging.getLogger(__name__)

_MOST_BYTES: Final = 1 << 18
_PRIVATE: Final = 0o700

_Version = Annotated[int, Field(ge=0, le=MAX_VERSION)]


class SettingsSet(BaseModel):
    """Settings of one version, all of them.

    Attributes:
        version: 0 is the device's own configuration, with nothing from afar.
        values: By name.
        at: When a monitor has written them (UTC), if it says so.
    """

    model_config = ConfigDict(frozen=True)

    version: _Version = 0
    at: Instant | None = None
    values: Annotated[dict[str, SettingValue], Field(max_length=MAX_SETTINGS)] = Field(default_factory=dict)


class Kept(BaseModel):
    """What the file holds.

    Attributes:
        considered: The latest settings that were considered, taken or refused.
        taken: The settings that hold.
        proven: Those with which the device has loaded its model last: what it goes back to.
        refused: Why the latest were refused, by name.
    """

    model_config = ConfigDict(frozen=True)

    considered: SettingsSet = Field(default_factory=SettingsSet)
    taken: SettingsSet = Field(default_factory=SettingsSet)
    proven: SettingsSet = Field(default_factory=SettingsSet)
    refused: Annotated[dict[str, str], Field(max_length=MAX_SETTINGS)] = Field(default_factory=dict)


def kept_file(settings: DeviceSettings) -> Path | None:
    """Return where a device keeps what was set from afar; None for a user without a home, if the settings name none."""
    folder = settings.steering_dir
    if folder is None:
        state = state_folder()
        folder = None if state is None else state / "steering"
    return None if folder is None else folder.expanduser() / f"{settings.fleet}.{settings.device}.json"


def read_kept(path: Path | None) -> Kept:
    """Read the file. One that is not there, or cannot be used, holds nothing; the latter is logged."""
    if path is None:
        return Kept()
    try:
        with path.open("rb") as file:
            return Kept.model_validate_json(file.read(_MOST_BYTES))
    except FileNotFoundError:
        return Kept()
    except (OSError, ValidationError) as error:
        why = (error.strerror or str(error)) if isinstance(error, OSError) else "it is damaged"
        _log.warning("What was set from afar cannot be read from %s: %s. The device goes on without it.", path, why)
        return Kept()


def write_kept(path: Path | None, kept: Kept) -> None:
    """Write the file, whole or not at all.

    Raises:
        OSError: It cannot be written.
    """
    if path is None:
        return
    path.parent.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(kept.model_dump_json())
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


_MOST_REFUSED: Final = 16
"""Settings whose refusal is reported: that many reasons say enough, and fit into a message."""

Changed = Callable[[Collection[str]], None]
"""Told of the settings that have changed, by name."""


class RemoteSettings:
    """The settings of a device that can be set from afar. One thread at a time considers; any reads.

    Args:
        own: As the device itself is configured.
        file: That keeps what was set from afar; None keeps it in memory.
        now: The wall clock (UTC).

    Attributes:
        settings: What holds: the object that all of the device reads, changed in place.
        applications: Those of the device; their quotas can be set from afar. None if it knows none.
    """

    def __init__(
        self, own: DeviceSettings, file: Path | None, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._own = own
        self._file = file
        self._now = now
        self._changing = threading.Lock()
        self._kept = read_kept(file) if own.steering else Kept()
        self._quotas: Quotas = {}
        self._holding = SettingsSet()
        self._listeners: list[Changed] = []
        self.settings = own.model_copy()
        self.settings.came_from({name: own.origin(name) for name in type(own).model_fields})
        named = own.applications
        self.applications = None if named is None else ApplicationsFile(named.expanduser())
        self._start_from(self._kept.taken)

    @classmethod
    def of(cls, own: DeviceSettings) -> "RemoteSettings":
        """Return a device's settings with what was set from afar before."""
        file = kept_file(own)
        if file is None and own.steering:
            _log.warning(
                "There is no folder for what is set from afar, so that it is lost at a restart: this user has no home; "
                "name one as steering_dir."
            )
        return cls(own, file)

    def on_change(self, listener: Changed) -> None:
        """Tell a listener of the settings that change while the device runs."""
        self._listeners.append(listener)

    # While the device starts

    def candidates(self) -> Iterator[DeviceSettings]:
        """Yield the settings to start with, those first that are to hold; ask for the next if a model does not load.

        The last are the device's own. The one that was yielded last holds.
        """
        tried: list[Mapping[str, SettingValue]] = []
        for candidate in (self._kept.taken, self._kept.proven, SettingsSet()):
            if candidate.values in tried:
                continue
            tried.append(candidate.values)
            self._start_from(candidate)
            yield self.settings

    def loaded(self, failure: str | None = None) -> None:
        """The device has loaded its model with the settings that hold.

        Args:
            failure: Why those that were to hold could not be used, if others do.
        """
        holds = self._holding
        kept = self._kept.model_copy(update={"proven": holds})
        if failure is not None and self._kept.taken.values != holds.values:
            names = [name for name in self._kept.taken.values if STEERABLE.get(name) is Effect.RELOAD]
            why = f"The device could not start with it, and has gone back: {failure}"[:MAX_SENTENCE]
            kept = kept.model_copy(update={"taken": holds, "refused": dict.fromkeys(names, why)})
            _log.error("Settings from afar are taken back: %s", failure)
        self._keep(kept)

    # While it runs

    def consider(self, wanted: DesiredSettings) -> bool:
        """Take wanted settings, or refuse them; return whether there is anything new to report."""
        with self._changing:
            kept = self._kept
            asked = SettingsSet(version=wanted.version, values=wanted.values, at=wanted.at)
            # Of two that have come under one version the later is the one that the broker keeps.
            if asked == kept.considered or not _follows(asked, kept.considered):
                return False
            checked = self._check(wanted.values)
            if checked.refused:
                refused = dict(list(checked.refused.items())[:_MOST_REFUSED])
                kept = kept.model_copy(update={"considered": asked, "refused": refused})
                self._keep(kept)
                for name, why in refused.items():
                    _log.warning("Wanted settings %d of %s are refused: %s: %s", wanted.version, wanted.who, name, why)
                return True
            self._keep(kept.model_copy(update={"considered": asked, "taken": asked, "refused": {}}))
            changed = self._hold(asked, checked, starting=False)
        _log.info("Settings %d of %s are in force: %s.", wanted.version, wanted.who, ", ".join(sorted(changed)) or "-")
        for listener in self._listeners:
            listener(changed)
        return True

    def report(self) -> ReportedSettings:
        """Return what holds and what was refused."""
        with self._changing:
            kept, settings = self._kept, self.settings
            values = {name: _plain(getattr(settings, name)) for name in STEERABLE}
            quotas = {
                f"quota.{app}.{name}": each for app, found in self._quotas.items() for name, each in found.items()
            }
            return ReportedSettings(
                version=kept.considered.version,
                applied=kept.taken.version,
                values={name: value for name, value in values.items() if value is not None} | quotas,
                refused=kept.refused,
                needs_restart=tuple(self._waiting()),
                fixed=tuple(sorted(self._own.stays())),
                at=self._now(),
            )

    def _waiting(self) -> list[str]:
        """Return the settings that differ from those with which the device was started."""
        wanted = self._check(self._kept.taken.values).values
        return [
            name
            for name, effect in STEERABLE.items()
            if effect is Effect.RELOAD and wanted.get(name, getattr(self._own, name)) != getattr(self.settings, name)
        ]

    def _start_from(self, chosen: SettingsSet) -> None:
        checked = self._check(chosen.values)
        if checked.refused:  # the device's own configuration has changed since, or its release
            for name, why in checked.refused.items():
                _log.warning("%s, set from afar, is left out: %s", name, why)
            chosen = SettingsSet(
                version=chosen.version,
                values={name: value for name, value in chosen.values.items() if name not in checked.refused},
            )
            refused = dict(list(checked.refused.items())[:_MOST_REFUSED])
            self._kept = self._kept.model_copy(update={"taken": chosen, "refused": refused})
            checked = self._check(chosen.values)
        self._hold(chosen, checked, starting=True)

    def _check(self, values: Mapping[str, SettingValue]) -> Checked:
        known: list[str] | None = []
        if self.applications is not None:
            try:
                known = [each.name for each in self.applications.read().applications]
            except ConfigurationError:
                known = None  # whoever uses the API is told
        return check_values(
            values,
            self._own,
            fixed=self._own.stays(),
            applications=known,
            locate=lambda model: locate_model(model, folder=self._own.models_dir),
        )

    def _hold(self, chosen: SettingsSet, checked: Checked, *, starting: bool) -> set[str]:
        """Let settings hold; return the names of those that have changed."""
        taken: dict[str, Any] = {
            name: checked.values.get(name, getattr(self._own, name))
            for name, effect in STEERABLE.items()
            if starting or effect is Effect.NOW
        }
        changed = {name for name, value in taken.items() if getattr(self.settings, name) != value}
        self.settings.__dict__.update(taken)  # in one step: whoever reads at the same time finds either all or none
        if checked.quotas != self._quotas:
            changed.add("quotas")
        self._quotas = checked.quotas
        if self.applications is not None:
            self.applications.quotas = checked.quotas
        self._holding = chosen
        return changed

    def _keep(self, kept: Kept) -> None:
        self._kept = kept
        try:
            write_kept(self._file, kept)
        except OSError as error:
            why = error.strerror or str(error)
            _log.warning("What was set from afar cannot be kept in %s, and is lost at a restart: %s.", self._file, why)


def _follows(asked: SettingsSet, considered: SettingsSet) -> bool:
    """Whether a set is not older than another: by version, or by time where the monitors have lost the versions."""
    if asked.version >= considered.version:
        return True
    return asked.at is not None and considered.at is not None and asked.at > considered.at


def _plain(value: object) -> SettingValue | None:
    """Return a setting's value as messages have it."""
    if isinstance(value, Enum):
        return str(value.value)
    return value if isinstance(value, bool | int | float | str) else None


def load_steered(remote: RemoteSettings, load: Callable[[DeviceSettings], Drafter]) -> Drafter:
    """Load a draft model with the settings that are to hold, or else with those that held before.

    Args:
        remote: The settings; those with which it was loaded hold.
        load: Checks them, and loads.

    Raises:
        FleetError: It cannot be loaded with the device's own settings either.
    """
    failure: FleetError | None = None
    for settings in remote.candidates():
        try:
            drafter = load(settings)
        except FleetError as error:
            failure = failure or error
        else:
            remote.loaded(None if failure is None else str(failure))
            return drafter
    assert failure is not None  # there is at least one candidate
    raise failure


def apply_log_level(settings: DeviceSettings, usual: int) -> None:
    """Log from the severity on that the settings say.

    Args:
        settings: In which it may be left out.
        usual: Where it is.
    """
    level = settings.log_level
    logging.getLogger().setLevel(usual if level is None else level.upper())
