"""Sources of settings: a TOML file that knows its line numbers, and environment variables."""

import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self, get_origin

from fleet_common.errors import SettingsError
from fleet_common.fields import NESTED, Settings, section_of

Place = tuple[str, ...]
"""A setting's names from the outermost section inwards: `("broker", "port")`."""

_LARGEST_FILE: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class TomlFile:
    """A TOML file as read.

    Attributes:
        path: Where it is; None if there is none.
        values: What it says.
        lines: The number of the line on which each setting and each section begins.
    """

    path: Path | None = None
    values: dict[str, Any] = field(default_factory=dict)
    lines: Mapping[Place, int] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file.

        Raises:
            SettingsError: It cannot be read, or is no TOML.
        """
        try:
            with path.open("rb") as file:
                content = file.read(_LARGEST_FILE + 1)
            if len(content) > _LARGEST_FILE:
                raise SettingsError(f"The configuration file {path} has more than {_LARGEST_FILE} bytes; name another.")
            text = content.decode("utf-8").replace("\r\n", "\n")
            return cls(path, tomllib.loads(text), _lines(text))
        except OSError as error:
            raise SettingsError(f"The configuration file {path} cannot be read: {error.strerror}.") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise SettingsError(f"The configuration file {path} is not valid TOML: {error}.") from error


@dataclass(frozen=True, slots=True)
class EnvironmentVariables:
    """The environment variables that hold settings.

    Attributes:
        values: What they say.
        names: The variable of each place that one was found for.
        problems: A sentence for each that cannot be read.
    """

    values: dict[str, Any] = field(default_factory=dict)
    names: dict[Place, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, model: type[Settings], environment: Mapping[str, str] = os.environ) -> Self:
        """Read the variables that begin as a setting or a section of `model` does; others are not for us."""
        found = cls()
        for variable, text in sorted(environment.items()):
            place = tuple(variable.removeprefix(model.variable_prefix).lower().split(NESTED))
            known = model.model_fields.get(place[0]) if variable.startswith(model.variable_prefix) else None
            if known is None:
                continue
            value: Any = text
            a_list = get_origin(known.annotation) is tuple
            if len(place) == 1 and (a_list or section_of(known) is not None):
                try:
                    value = json.loads(text)
                except ValueError:
                    # The text is not repeated: it may hold a secret.
                    what = "a list" if a_list else f"an object, or a variable {variable}{NESTED}… for each setting"
                    found.problems.append(f"The environment variable {variable} is not valid JSON: write {what}.")
                    continue
            found.names[place] = variable
            _put(found.values, place, value)
        return found

    def name_of(self, place: Place) -> str | None:
        """Return the variable that a value comes from: its own, or its section's."""
        ends = range(len(place), 0, -1)
        return next((self.names[place[:end]] for end in ends if place[:end] in self.names), None)


def _lines(text: str) -> dict[Place, int]:
    """Return where settings begin.

    The parser tells no positions, so it is given more and more of the file: a setting begins after the longest part
    that lacks it. A part that ends within a value is no TOML.
    """
    lines, found, before = text.split("\n"), dict[Place, int](), 0
    for end, line in enumerate(lines, start=1):
        if not line.strip():  # ends nothing, not even a text of several lines
            continue
        try:
            values = tomllib.loads("\n".join(lines[:end]))
        except tomllib.TOMLDecodeError:
            continue
        new = [place for place in _places(values) if place not in found]
        if new:
            begins = next(number for number in range(before, end) if lines[number].split("#")[0].strip())
            found |= dict.fromkeys(new, begins + 1)
        before = end
    return found


def _places(values: Mapping[str, Any], within: Place = ()) -> Iterator[Place]:
    for name, value in values.items():
        yield (*within, name)
        if isinstance(value, Mapping):
            yield from _places(value, (*within, name))


def look(values: Any, place: Place) -> Any:  # noqa: ANN401 - whatever a file holds
    """Return the value at a place, or None."""
    for name in place:
        if not isinstance(values, Mapping):
            return None
        values = values.get(name)
    return values


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Return both; where both have a value, that of `high`."""
    merged = dict(low)
    for key, value in high.items():
        below = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        merged[key] = merge(below, value) if both and isinstance(below, Mapping) else value
    return merged


def _put(values: dict[str, Any], place: Place, value: object) -> None:
    # Sorted by name, a section's own variable comes before those of the settings within it.
    for name in place[:-1]:
        inner = values.get(name)
        values[name] = values = {**inner} if isinstance(inner, Mapping) else {}
    values[place[-1]] = value
