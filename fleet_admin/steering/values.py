"""Values of settings as an administrator gives them, checked by the rules that devices have for them."""

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Final

from fleet_admin.steering.errors import SteeringError
from fleet_device.settings import DeviceSettings
from fleet_device.steering.remote_settings import Effect, check_values, effect_of
from schemas.control import MAX_SETTING_VALUE, SettingValue

_LONGEST: Final = 60


def read_assignments(texts: Iterable[str]) -> dict[str, SettingValue]:
    """Read `KEY=VALUE`: true, false and numbers are what they look like, all else is text.

    Raises:
        SteeringError: One is no assignment, or a key comes twice.
    """
    found: dict[str, SettingValue] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        name = name.strip()
        if not sign or not name:
            raise SteeringError(f"{text[:_LONGEST]!r} is no setting; write it as KEY=VALUE.")
        if name in found:
            raise SteeringError(f"The setting {name!r} is given twice.")
        found[name] = _value(value.strip())
    return found


def check_change(changes: Mapping[str, SettingValue], unset: Collection[str]) -> None:
    """Refuse what no device would take; a device may still refuse what it cannot do.

    Raises:
        SteeringError: A setting is unknown or the device's own, or its value cannot work; or nothing is to be changed.
    """
    if not changes and not unset:
        raise SteeringError("Nothing is to be set; give KEY=VALUE.")
    if both := sorted(set(changes) & set(unset)):
        raise SteeringError(f"The setting {both[0]!r} is to be set and taken back at once.")
    checked = check_values(changes, DeviceSettings())
    if checked.refused:
        raise SteeringError("\n".join(f"{name}: {why}" for name, why in checked.refused.items()))
    for name in unset:
        if effect_of(name) is None:
            raise SteeringError("\n".join(f"{each}: {why}" for each, why in _unknown(name).items()))


def needs_reload(name: str) -> bool:
    """Return whether a device takes a setting into use only when it loads its model anew."""
    return effect_of(name) is Effect.RELOAD


def _unknown(name: str) -> Mapping[str, str]:
    return check_values({name: True}, DeviceSettings()).refused


def _value(text: str) -> SettingValue:
    if len(text) > MAX_SETTING_VALUE:
        raise SteeringError(f"{text[:_LONGEST]!r}… is longer than the {MAX_SETTING_VALUE} characters of a setting.")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, bool | int | float | str) else text
