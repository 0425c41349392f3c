"""Loads settings from the command line, the environment and a TOML file, and tells all wrong ones at once.

A setting is looked for in this order: a command-line flag, an environment variable, the TOML file, the default.
"""

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import ValidationError

from fleet_common.errors import SettingsError
from fleet_common.fields import SECTIONS, SettingField, Settings, fields_of
from fleet_common.sources import EnvironmentVariables, Place, TomlFile, look, merge
from fleet_common.validation import plain_sentence

__all__ = ["SettingsError", "load_settings"]

S = TypeVar("S", bound=Settings)

_LONGEST_VALUE: Final = 60


def load_settings(
    model: type[S],
    *,
    config: Path | None,
    flags: Mapping[str, Any],
    by_program: bool = False,
    environment: Mapping[str, str] = os.environ,
) -> S:
    """Read settings.

    Args:
        model: What to read.
        config: The TOML file, if any.
        flags: From the command line; None means not given, also within nested mappings.
        by_program: Whether the flags are a program's arguments rather than a command line's, for errors.
        environment: The environment's variables.

    Raises:
        SettingsError: The file cannot be read, or settings cannot work: a line for each, with its value unless that is
            a secret, and where it comes from.
    """
    sources = _Sources(
        {each.path: each for each in fields_of(model)},
        TomlFile.read(config) if config else TomlFile(),
        EnvironmentVariables.read(model, environment),
        _given(flags),
        by_program=by_program,
    )
    problems = sources.environment.problems
    try:
        settings = model.model_validate(sources.values())
    except ValidationError as error:
        raise SettingsError("\n".join([*problems, *sources.explain(error)])) from error
    if problems:
        raise SettingsError("\n".join(problems))
    settings.came_from({field.name: sources.origin(path) for path, field in sources.fields.items()})
    return settings


@dataclass(frozen=True, slots=True)
class _Sources:
    """Where values come from, to say so of those that are wrong."""

    fields: Mapping[Place, SettingField]
    file: TomlFile
    environment: EnvironmentVariables
    flags: Mapping[str, Any]
    by_program: bool

    def values(self) -> dict[str, Any]:
        return merge(merge(self.file.values, self.environment.values), self.flags)

    def explain(self, error: ValidationError) -> list[str]:
        """Return a line for each setting that cannot work."""
        values, lines = self.values(), dict[Place, str]()
        for each in error.errors(include_url=False, include_input=False):
            whole = tuple(str(part) for part in each["loc"] if part != "[key]")
            place = self._setting_at(whole)
            field = self.fields.get(place)
            if field is not None and field.kind == SECTIONS and len(whole) > len(place):
                place, what = whole, plain_sentence(each)
            elif each["type"] == "extra_forbidden":
                what = self._nearest(place)
            elif each["type"] == "value_error":  # a check of our own
                what = each["msg"].removeprefix("Value error, ").rstrip(".")
            else:  # pydantic's own words are for programmers
                what = f"it must be {field.kind}" if field else f"it must be a section, [{'.'.join(place)}] in TOML"
            value = look(values, place)
            shown = f" = {_short(value)}" if field and field.shown and isinstance(value, str | int | float) else ""
            origin = self.origin(place)
            where = f" ({origin})" if origin else ""
            line = f"The setting {'.'.join(place)!r}{shown}{where} cannot be used: {what}."
            lines.setdefault(place, line)  # a value that fits no alternative of a type is one mistake
        return list(lines.values())

    def _setting_at(self, place: Place) -> Place:
        """Return the setting that an error's place is part of: each alternative of a type has a place of its own."""
        return next((place[:end] for end in range(1, len(place)) if place[:end] in self.fields), place)

    def origin(self, place: Place) -> str:
        """Return where a value comes from; empty if it is the default, or given by a program."""
        field = self.fields.get(place)
        if look(self.flags, place) is not None:
            flag = f"flag {field.flag}" if field and field.flag else ""
            return "argument" if self.by_program else flag
        if (variable := self.environment.name_of(place)) is not None:
            return f"environment variable {variable}"
        line = self.file.lines.get(place)
        return "" if line is None else f"{self.file.path}, line {line}"

    def _nearest(self, place: Place) -> str:
        """Say what an unknown setting may have been meant as: a like name, in whatever section."""
        by_word: dict[str, list[str]] = {}
        for path, field in self.fields.items():
            by_word.setdefault(path[-1], []).append(field.name)
        near = [repr(name) for word in difflib.get_close_matches(place[-1], by_word) for name in by_word[word]]
        if near:
            return f"there is no setting of that name, maybe {' or '.join(near)} is meant"
        beside = sorted({path[len(place) - 1] for path in self.fields if path[: len(place) - 1] == place[:-1]})
        return f"there is no setting of that name; known are {', '.join(beside)}"


def _given(flags: Mapping[str, Any]) -> dict[str, Any]:
    given = {}
    for key, value in flags.items():
        inner = _given(value) if isinstance(value, Mapping) else value
        if inner is not None and inner != {}:
            given[key] = inner
    return given


def _short(value: str | float) -> str:
    text = repr(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "…"
