"""Catalogue of the settings that can be set from afar, and when each takes effect.

What is not here is the device's own: who it is, where its broker and its files are, who may use its API, and whether
its texts are shown. Quotas of its applications are set as `quota.<application>.tokens_per_min` and the like.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePath
from typing import Any, Final

from pydantic import ValidationError

from fleet_common.fields import fields_of
from fleet_common.validation import plain_sentence
from fleet_device.applications import Application
from fleet_device.drafters.contract import ModelNotFound
from fleet_device.offline import OfflinePolicy
from fleet_device.settings import MODEL_DRAFTER, DeviceSettings
from schemas.steering import SettingValue


class Effect(StrEnum):
    """When a setting takes effect.

    Attributes:
        NOW: At once; texts under way keep to what they began with.
        RELOAD: When the device loads its model anew: after `fleet admin command reload`, or a restart.
    """

    NOW = "now"
    RELOAD = "reload"


STEERABLE: Final[Mapping[str, Effect]] = {
    **dict.fromkeys(
        (
            "draft_length", "ahead", "stream", "window", "padding",
            "mode", "temperature", "top_k", "top_p", "seed", "max_new_tokens", "truncate",
            "offline", "rejoin", "offline_s", "answer_s", "open_s", "resume_s", "verdict_s", "drain_s",
            "log_level",
        ),
        Effect.NOW,
    ),
    **dict.fromkeys(
        ("model", "drafter", "suffix", "history_mb", "threads", "context", "memory_mb", "texts_at_once", "gpu_layers"),
        Effect.RELOAD,
    ),
}  # fmt: skip
"""By the setting's name."""

_QUOTA: Final = "quota."
_QUOTAS: Final = ("tokens_per_min", "tokens_per_day", "texts_at_once")
_LONGEST_NAME: Final = 60
_LONGEST_SHOWN: Final = 60

Quotas = Mapping[str, Mapping[str, int]]
"""By the application's name and the quota's."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What wanted settings come to, by the device's own rules.

    Attributes:
        values: As the settings take them, by name; without quotas.
        quotas: Of applications.
        refused: Why a setting cannot be taken, by name; if there is any, nothing is to be taken.
    """

    values: Mapping[str, Any]
    quotas: Quotas
    refused: Mapping[str, str]


def effect_of(name: str) -> Effect | None:
    """Return when a setting takes effect; None if it cannot be set from afar."""
    return Effect.NOW if quota_of(name) is not None else STEERABLE.get(name)


def quota_of(name: str) -> tuple[str, str] | None:
    """Return the application and the quota that a name such as `quota.chat.tokens_per_day` means; None if none."""
    application, dot, quota = name.removeprefix(_QUOTA).rpartition(".")
    return (application, quota) if name.startswith(_QUOTA) and dot and application and quota in _QUOTAS else None


def check_values(
    values: Mapping[str, SettingValue],
    base: DeviceSettings,
    *,
    fixed: Iterable[str] = (),
    applications: Iterable[str] | None = None,
    locate: Callable[[str], object] | None = None,
) -> Checked:
    """Judge wanted settings by the rules of the device's own.

    Args:
        values: As they are wanted.
        base: The settings as they are without them.
        fixed: Settings that are not to be set from afar.
        applications: Those that the device knows; None where that is not known.
        locate: Finds a prepared model or raises `ModelNotFound`; None where models are not looked for.
    """
    refused: dict[str, str] = {}
    plain: dict[str, SettingValue] = {}
    quotas: dict[str, dict[str, int]] = {}
    stays = frozenset(fixed)
    for name, value in values.items():
        quota = quota_of(name)
        if name in stays:
            why: str | None = "The device's own configuration does not let it be set from afar (steering_fixed)."
        elif quota is not None:
            why = _quota_problem(*quota, value, applications)
        elif name == "model":
            why = _model_problem(value, locate)
        else:
            why = None if name in STEERABLE else _unknown(name)
        if why is not None:
            refused[name] = why
        elif quota is not None:
            quotas.setdefault(quota[0], {})[quota[1]] = int(value)
        else:
            plain[name] = value
    checked, wrong = _validated(base, plain)
    refused |= wrong
    if refused or checked is None:
        return Checked({}, {}, refused)
    return Checked({name: getattr(checked, name) for name in plain}, quotas, refused)


def _validated(base: DeviceSettings, plain: Mapping[str, SettingValue]) -> tuple[DeviceSettings | None, dict[str, str]]:
    """Return the settings with these values, or why each of them that cannot be used cannot."""
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
        return None, wrong or dict.fromkeys(plain, "The settings do not go together.")
    if checked.offline is OfflinePolicy.LOCAL and checked.drafter != MODEL_DRAFTER:
        why = f"The drafter {checked.drafter!r} has no model that could go on alone with offline = 'local'."
        return None, {name: why for name in ("offline", "drafter") if name in plain}
    return checked, {}


def shown_value(value: object) -> str:
    """Return a value for a sentence."""
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "…"


def _unknown(name: str) -> str:
    shown = name if len(name) <= _LONGEST_NAME else name[:_LONGEST_NAME] + "…"
    if name in {field.name for field in fields_of(DeviceSettings)}:
        return f"The setting {shown!r} is the device's own and cannot be set from afar."
    near = difflib.get_close_matches(name[:_LONGEST_NAME], STEERABLE, n=1)
    hint = f"; maybe {near[0]!r} is meant" if near else ""
    return f"This release has no setting {shown!r}{hint}."


def _quota_problem(application: str, quota: str, value: SettingValue, applications: Iterable[str] | None) -> str | None:
    if applications is not None and application not in set(applications):
        return f"This device has no application {application[:_LONGEST_NAME]!r}; add it there with `fleet device app`."
    if isinstance(value, bool) or not isinstance(value, int):
        return f"{shown_value(value)} cannot be used: it must be a whole number."
    try:
        Application.model_validate({"name": "a", "sha256": "0" * 64, quota: value})
    except ValidationError as error:
        return f"{value} cannot be used: {plain_sentence(error.errors(include_url=False)[0])}."
    return None


def _model_problem(value: SettingValue, locate: Callable[[str], object] | None) -> str | None:
    """From afar only prepared models are named: neither files of the machine, nor what would have to be fetched."""
    if not isinstance(value, str):
        return f"{shown_value(value)} cannot be used: it must be text."
    if PurePath(value).name != value or "\\" in value or value.lower().endswith(".gguf"):
        return "From afar only a prepared model of the device's models_dir can be named, such as smollm2-135m:Q4_0."
    try:
        if locate is not None:
            locate(value)
    except ModelNotFound as error:
        return str(error)
    return None
