"""Settings that an administrator can set remotely, over the device's own.

All other settings belong to the device: its identity, broker and files, and who may use its API. The release that the
updater installs is set as `update.release`.

A set of desired settings is applied or refused as a whole, by the rules of the device's own settings. The broker
retains the latest set, which the device considers once. On disk the device keeps this set, and the values that it last
ran with.
"""

import difflib
import logging
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum, StrEnum
from pathlib import Path, PurePath
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fleet_common.host import write_atomically
from fleet_common.settings import fields_of, shown_value
from fleet_common.validation import plain_sentence
from fleet_device.drafters.contract import Drafter, ModelNotFound
from fleet_device.drafters.model_file import locate_model
from fleet_device.settings import MODEL_DRAFTER, DeviceSettings, OfflinePolicy
from fleet_device.updates.handoff import UPDATE_SETTINGS, UpdateFolder, WantedUpdate
from schemas.control import MAX_SETTINGS, DesiredSettings, Id, ReportedSettings, SettingValue
from schemas.errors import FleetError
from schemas.fields import MAX_SENTENCE


class Effect(StrEnum):
    """When a setting takes effect.

    `NOW`: running requests keep the old value. `RELOAD`: when the device loads its model again, after `fleet admin
    command reload` or a restart.
    """

    NOW = "now"
    RELOAD = "reload"


STEERABLE: Final[Mapping[str, Effect]] = {
    **dict.fromkeys(
        (
            "draft_length", "ahead", "edge_only", "goal", "padding",
            "target", "mode", "temperature", "top_k", "top_p", "seed", "max_new_tokens",
            "offline", "offline_s", "answer_s", "drain_s",
        ),
        Effect.NOW,
    ),
    **dict.fromkeys(
        ("model", "drafter", "suffix", "threads", "context", "memory_mb", "requests_at_once", "gpu_layers"),
        Effect.RELOAD,
    ),
}  # fmt: skip

_LONGEST_NAME: Final = 60


@dataclass(frozen=True, slots=True)
class Checked:
    values: Mapping[str, Any]
    update: Mapping[str, SettingValue]
    refused: Mapping[str, str]


def effect_of(name: str) -> Effect | None:
    """Return when a setting takes effect; None if it cannot be set remotely."""
    return Effect.NOW if name in UPDATE_SETTINGS else STEERABLE.get(name)


def check_values(
    values: Mapping[str, SettingValue],
    base: DeviceSettings,
    *,
    locate: Callable[[str], object] | None = None,
    updates: bool = True,
) -> Checked:
    """Check desired settings against the others in `base`.

    `locate` finds a prepared model or raises `ModelNotFound`, None skips that check. `updates` says whether the device
    has an updater.
    """
    refused: dict[str, str] = {}
    plain: dict[str, SettingValue] = {}
    update: dict[str, SettingValue] = {}
    for name, value in values.items():
        if name in UPDATE_SETTINGS:
            why: str | None = _update_problem(name, value) if updates else "This device has no updater (update_dir)."
        elif name == "model":
            why = _model_problem(value, locate)
        else:
            why = None if name in STEERABLE else _unknown(name)
        if why is not None:
            refused[name] = why
        elif name in UPDATE_SETTINGS:
            update[name] = value
        else:
            plain[name] = value
    checked, wrong = _validated(base, plain)
    refused |= wrong
    if refused or checked is None:
        return Checked({}, {}, refused)
    return Checked({name: getattr(checked, name) for name in plain}, update, refused)


def _validated(base: DeviceSettings, plain: Mapping[str, SettingValue]) -> tuple[DeviceSettings | None, dict[str, str]]:
    """Return the settings with these values, or the reason for each value that is refused."""
    try:
        checked = DeviceSettings.model_validate({**base.model_dump(), **plain})
    except ValidationError as error:
        known = {field.name: field for field in fields_of(DeviceSettings)}
        wrong = {}
        for each in error.errors(include_url=False, include_input=False):
            name = str(each["loc"][0]) if each["loc"] else ""
            if name in plain:
                own = each["type"] == "value_error"
                what = plain_sentence(each) if own else f"it must be {known[name].kind}"
                wrong[name] = f"{shown_value(plain[name])} cannot be used: {what}."
        return None, wrong or dict.fromkeys(plain, "The settings contradict each other.")
    if checked.offline is OfflinePolicy.LOCAL and checked.drafter != MODEL_DRAFTER:
        why = f"The drafter {checked.drafter!r} has no model to continue alone with offline = 'local'."
        return None, {name: why for name in ("offline", "drafter") if name in plain}
    return checked, {}


def _unknown(name: str) -> str:
    shown = name if len(name) <= _LONGEST_NAME else name[:_LONGEST_NAME] + "…"
    if name in {field.name for field in fields_of(DeviceSettings)}:
        return f"The setting {shown!r} cannot be set remotely."
    near = difflib.get_close_matches(name[:_LONGEST_NAME], STEERABLE, n=1)
    hint = f"; maybe {near[0]!r} is meant" if near else ""
    return f"This release has no setting {shown!r}{hint}."


def _update_problem(name: str, value: SettingValue) -> str | None:
    try:
        WantedUpdate.model_validate({UPDATE_SETTINGS[name]: value})
    except ValidationError as error:
        return f"{shown_value(value)} cannot be used: {plain_sentence(error.errors(include_url=False)[0])}."
    return None


def _model_problem(value: SettingValue, locate: Callable[[str], object] | None) -> str | None:
    """Only models of `models_dir` can be named remotely: neither files of the machine, nor what would be downloaded."""
    if not isinstance(value, str):
        return f"{shown_value(value)} cannot be used: it must be text."
    if PurePath(value).name != value or "\\" in value or value.lower().endswith(".gguf"):
        return "Remotely only a model in the device's models_dir can be named, such as smollm2-135m:Q4_0."
    try:
        if locate is not None:
            locate(value)
    except ModelNotFound as error:
        return str(error)
    return None


_log = logging.getLogger(__name__)

_MAX_BYTES: Final = 1 << 18
_PRIVATE: Final = 0o700


_Values = Annotated[dict[str, SettingValue], Field(max_length=MAX_SETTINGS)]


class StoredSettings(BaseModel):
    """Content of the state file.

    Attributes:
        id: Of the desired settings considered last.
        desired: Their values.
        refused: Why they are not in force, by name.
        good: Remote values that the device last ran with; in force if the desired ones are refused or do not load.
    """

    model_config = ConfigDict(frozen=True)

    id: Id | None = None
    desired: _Values = Field(default_factory=dict)
    refused: Annotated[dict[str, str], Field(max_length=MAX_SETTINGS)] = Field(default_factory=dict)
    good: _Values = Field(default_factory=dict)


def stored_file(settings: DeviceSettings) -> Path | None:
    """Return the path of the file; None for a user without a home, if the settings name none."""
    return settings.state_file(".json")


def read_stored(path: Path | None) -> StoredSettings:
    """Read the file; a missing or unusable one counts as empty, and the latter is logged."""
    if path is None:
        return StoredSettings()
    try:
        with path.open("rb") as file:
            return StoredSettings.model_validate_json(file.read(_MAX_BYTES))
    except FileNotFoundError:
        return StoredSettings()
    except (OSError, ValidationError) as error:
        why = (error.strerror or str(error)) if isinstance(error, OSError) else "it is damaged"
        _log.warning("Remote settings cannot be read from %s: %s. The device continues without them.", path, why)
        return StoredSettings()


_MAX_REFUSED: Final = 16
"""Refusals that are reported; more would not fit into a message."""

Changed = Callable[[Collection[str]], None]
"""Receives the names of the settings that have changed."""


class SteeredSettings:
    """The settings of a device that can be set remotely. One thread at a time applies them; any reads.

    `own` is the device's own configuration; `file` keeps what was set remotely, None keeps it in memory. `settings` are
    those in force: the object that the whole device reads, changed in place.
    """

    def __init__(
        self, own: DeviceSettings, file: Path | None, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._own = own
        self._file = file
        self._now = now
        self._changing = threading.Lock()
        self._stored = read_stored(file) if own.steering else StoredSettings()
        self._in_force: Mapping[str, SettingValue] = {}
        self._update: Mapping[str, SettingValue] = {}
        self.updates = None if own.update_dir is None else UpdateFolder(own.update_dir.expanduser())
        self._listeners: list[Changed] = []
        self.settings = own.model_copy()
        self.settings.came_from({name: own.origin(name) for name in type(own).model_fields})
        self.start_with(self.candidates()[0])
        self._hand_over()

    @classmethod
    def of(cls, own: DeviceSettings) -> "SteeredSettings":
        file = stored_file(own)
        if file is None and own.steering:
            _log.warning(
                "There is no folder for remote settings, so that it is lost at a restart: this user has no home; "
                "name one as state_dir."
            )
        return cls(own, file)

    def on_change(self, listener: Changed) -> None:
        self._listeners.append(listener)

    # While the device starts

    def candidates(self) -> list[Mapping[str, SettingValue]]:
        """Return the remote values to start with, preferred ones first; the last are none."""
        stored = self._stored
        found: list[Mapping[str, SettingValue]] = [] if stored.refused else [stored.desired]
        for values in (stored.good, {}):
            if values not in found:
                found.append(values)
        return found

    def start_with(self, values: Mapping[str, SettingValue]) -> None:
        """Put remote values into force that the model is then loaded with; leave out those that are now invalid."""
        checked = self._check(values)
        if checked.refused:  # the device's own configuration has changed since, or its release
            for name, why in checked.refused.items():
                _log.warning("%s, set remotely, is left out: %s", name, why)
            values = {name: value for name, value in values.items() if name not in checked.refused}
            self._stored = self._stored.model_copy(update={"refused": _bounded(checked.refused), "good": values})
            checked = self._check(values)
        self._apply(values, checked, starting=True)

    def loaded(self, failure: str | None = None) -> None:
        """Record that the device has loaded its model; `failure` says why the preferred settings were not used."""
        stored = self._stored.model_copy(update={"good": dict(self._in_force)})
        if failure is not None and not stored.refused and stored.desired != self._in_force:
            names = [name for name in stored.desired if STEERABLE.get(name) is Effect.RELOAD]
            why = f"The device could not start with it and uses its previous value: {failure}"[:MAX_SENTENCE]
            stored = stored.model_copy(update={"refused": dict.fromkeys(names, why)})
            _log.error("Remote settings are withdrawn: %s", failure)
        self._store(stored)

    # While it runs

    def consider(self, desired: DesiredSettings) -> bool:
        """Apply or refuse desired settings; return whether there is anything new to report."""
        with self._changing:
            if (desired.id, desired.values) == (self._stored.id, self._stored.desired):
                return False
            checked = self._check(desired.values)
            if checked.refused:
                refused = _bounded(checked.refused)
                update = {"id": desired.id, "desired": desired.values, "refused": refused, "good": dict(self._in_force)}
                self._store(self._stored.model_copy(update=update))
                for name, why in refused.items():
                    _log.warning("Settings %s of %s are refused: %s: %s", desired.id, desired.who, name, why)
                return True
            changed = self._apply(desired.values, checked, starting=False)
            self._store(StoredSettings(id=desired.id, desired=desired.values, good=dict(self._in_force)))
            self._hand_over()
        _log.info("Settings %s of %s are in force: %s.", desired.id, desired.who, ", ".join(sorted(changed)) or "-")
        for listener in self._listeners:
            listener(changed)
        return True

    def report(self) -> ReportedSettings:
        with self._changing:
            stored, settings = self._stored, self.settings
            values = {name: _plain(getattr(settings, name)) for name in STEERABLE}
            return ReportedSettings(
                id=stored.id,
                values={**{name: value for name, value in values.items() if value is not None}, **self._update},
                refused=stored.refused,
                needs_restart=() if stored.refused else tuple(self._waiting()),
                update=None if self.updates is None else self.updates.report(),
                at=self._now(),
            )

    def _waiting(self) -> list[str]:
        """Return the desired settings that differ from those with which the device was started."""
        desired = self._check(self._stored.desired).values
        return [
            name
            for name, effect in STEERABLE.items()
            if effect is Effect.RELOAD and desired.get(name, getattr(self._own, name)) != getattr(self.settings, name)
        ]

    def _check(self, values: Mapping[str, SettingValue]) -> Checked:
        return check_values(
            values,
            self._own,
            locate=lambda model: locate_model(model, folder=self._own.models_dir),
            updates=self.updates is not None,
        )

    def _apply(self, values: Mapping[str, SettingValue], checked: Checked, *, starting: bool) -> set[str]:
        """Put values into force, without a start only those that need none; return the settings that changed."""
        applied: dict[str, Any] = {
            name: checked.values.get(name, getattr(self._own, name))
            for name, effect in STEERABLE.items()
            if starting or effect is Effect.NOW
        }
        changed = {name for name, value in applied.items() if getattr(self.settings, name) != value}
        self.settings.__dict__.update(applied)  # in one step, so that a concurrent reader sees either all or none
        self._update = checked.update
        before = {} if starting else self._in_force
        self._in_force = {
            **{name: value for name, value in before.items() if effect_of(name) is Effect.RELOAD},
            **{name: value for name, value in values.items() if starting or effect_of(name) is Effect.NOW},
        }
        return changed

    def _hand_over(self) -> None:
        if self.updates is not None:
            self.updates.want(self._update)

    def _store(self, stored: StoredSettings) -> None:
        self._stored = stored
        if self._file is None:
            return
        try:
            self._file.parent.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
            write_atomically(self._file, stored.model_dump_json(indent=2).encode() + b"\n")
        except OSError as error:
            why = error.strerror or str(error)
            _log.warning("Remote settings cannot be saved in %s and are lost at a restart: %s.", self._file, why)


def _bounded(refused: Mapping[str, str]) -> dict[str, str]:
    return dict(list(refused.items())[:_MAX_REFUSED])


def _plain(value: object) -> SettingValue | None:
    if isinstance(value, Enum):
        return str(value.value)
    return value if isinstance(value, bool | int | float | str) else None


def load_steered(remote: SteeredSettings, load: Callable[[DeviceSettings], Drafter]) -> Drafter:
    """Load a draft model with the preferred settings, or earlier ones; raise FleetError if all fail."""
    failure: FleetError | None = None
    for values in remote.candidates():
        remote.start_with(values)
        try:
            drafter = load(remote.settings)
        except FleetError as error:
            failure = failure or error
        else:
            remote.loaded(None if failure is None else str(failure))
            return drafter
    assert failure is not None  # there is at least one candidate
    if remote.updates is not None and (trial := remote.updates.trial()) is not None:
        remote.updates.end_trial(trial, ok=False, sentence=str(failure))
    raise failure
