"""Loads settings from the command line, the environment and a TOML file.

A setting is looked for in this order: a command-line flag, an environment variable, the TOML file, the default.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource
from pydantic_settings import SettingsError as EnvironmentUnreadable

from schemas.errors import FleetError

__all__ = ["SettingsError", "load_settings"]

S = TypeVar("S", bound=BaseSettings)


class SettingsError(FleetError):
    """A setting that cannot work, or a configuration file that cannot be read."""


def load_settings(model: type[S], *, config: Path | None, flags: Mapping[str, Any]) -> S:
    """Read settings.

    Args:
        model: What to read; its `env_prefix` names the environment variables.
        config: The TOML file, if any.
        flags: From the command line; None means not given, also within nested mappings.

    Raises:
        SettingsError: The file cannot be read, or a value cannot work.
    """
    file = _read_toml(config) if config else {}
    try:
        environment = EnvSettingsSource(model)()
    except EnvironmentUnreadable as error:
        # Its text names the setting and not the value, which may be a secret.
        prefix = model.model_config.get("env_prefix", "")
        raise SettingsError(f"An environment variable {prefix}… is not the JSON it should be: {error}.") from error
    values = _merge(_merge(file, environment), _given(flags))
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "settings"
        what = f"no setting of that name; known are {', '.join(sorted(_fields_beside(model, first['loc'])))}"
        if first["type"] != "extra_forbidden":
            what = first["msg"].removeprefix("Value error, ").rstrip(".")
        origin = f" in {config}" if config and _holds(file, first["loc"]) else ""
        raise SettingsError(f"The setting {where!r}{origin} cannot be used: {what}.") from error


def _fields_beside(model: type[BaseModel], location: tuple[int | str, ...]) -> Mapping[str, Any]:
    """Return the fields of the (nested) model that a location's last part was looked for in."""
    for part in location[:-1]:
        field = model.model_fields.get(str(part))
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            break
        model = field.annotation
    return model.model_fields


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"The configuration file {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"The configuration file {path} is not valid TOML: {error}.") from error


def _given(flags: Mapping[str, Any]) -> dict[str, Any]:
    given = {}
    for key, value in flags.items():
        inner = _given(value) if isinstance(value, Mapping) else value
        if inner is not None and inner != {}:
            given[key] = inner
    return given


def _merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(low)
    for key, value in high.items():
        below = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        merged[key] = _merge(below, value) if both and isinstance(below, Mapping) else value
    return merged


def _holds(values: Mapping[str, Any], location: tuple[int | str, ...]) -> bool:
    here: Any = values
    for part in location:
        if not isinstance(here, Mapping) or part not in here:
            return False
        here = here[part]
    return True
