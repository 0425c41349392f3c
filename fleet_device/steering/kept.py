"""Kept settings: what was set from afar, in a file that survives a restart."""

import logging
import os
import tempfile
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fleet_device.settings import DeviceSettings
from fleet_runtime.state import state_folder
from schemas.control import Instant
from schemas.steering import MAX_SETTINGS, MAX_VERSION, SettingValue

__all__ = ["Kept", "SettingsSet", "kept_file", "read_kept", "write_kept"]

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
