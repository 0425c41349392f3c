"""Settings: fields stated once, loaded from the command line, the environment and a TOML file.

A setting is looked up in this order: command-line flag, environment variable, TOML file, default. All wrong settings
are reported at once. Flags, errors and docs/settings.md are made from the fields.
"""

import dataclasses
import difflib
import enum
import functools
import json
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Final, Literal, Self, TypeVar, Union, get_args, get_origin

import annotated_types
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, SecretStr, ValidationError
from pydantic.fields import FieldInfo

from fleet_common.validation import plain_sentence
from schemas.errors import FleetError
from schemas.names import check_name


class SettingsError(FleetError):
    """Unusable settings, or an unreadable configuration file. The message has a line for each problem."""


NESTED: Final = "__"
"""Separates section and setting in an environment variable."""

SECTIONS: Final = "a section for each name"
"""Kind of a setting that is a table of sections with names of the user's choice."""


class Settings(BaseModel):
    """Base of the settings of one program; `variable_prefix` begins the names of its environment variables."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    variable_prefix: ClassVar[str]
    _origins: Mapping[str, str] = PrivateAttr(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]

    def came_from(self, origins: Mapping[str, str]) -> None:
        self._origins = {name: origin for name, origin in origins.items() if origin}

    def origin(self, name: str) -> str:
        """Return where a setting's value comes from; empty if a program has given it."""
        default = "" if name.split(".", maxsplit=1)[0] in self.model_fields_set else "the default"
        return self._origins.get(name, default)


def setting(
    default: Any,  # noqa: ANN401 - of the field's type
    meaning: str,
    *,
    unit: str = "",
    rare: bool = False,
    in_flags: bool = True,
    in_errors: bool = True,
    **bounds: float,
) -> Any:  # noqa: ANN401 - likewise
    """Return the field of a setting; `bounds` are pydantic's, such as `ge`.

    `rare` settings are listed separately by `--help`. `in_flags` is False for secrets, because every user of the
    machine can read flags with `ps`; `in_errors` says whether an error may show the value.
    """
    extra = {"unit": unit, "rare": rare, "flag": in_flags, "shown": in_errors}
    given: dict[str, Any] = {"default_factory": default} if callable(default) else {"default": default}
    return Field(**given, description=meaning, json_schema_extra=extra, **bounds)  # type: ignore[call-overload]


@dataclass(frozen=True, slots=True)
class SettingField:
    """Description of one setting.

    Attributes:
        path: Its names from the outermost section inwards.
        flag: None for a secret.
        kind: Continues "it must be": `a whole number from 1 to 1024`.
        default: As text; empty if there is none.
        metavar: Placeholder of the value in `--help`, such as `INTEGER`; `WORD` for a choice.
        switch: Whether the flag takes no value: `--ahead`, `--no-ahead`.
    """

    path: tuple[str, ...]
    flag: str | None
    variable: str
    kind: str
    unit: str
    default: str
    meaning: str
    rare: bool
    shown: bool
    metavar: str
    switch: bool

    @property
    def name(self) -> str:
        return ".".join(self.path)


@functools.cache
def fields_of(model: type[Settings]) -> tuple[SettingField, ...]:
    return tuple(_fields(model, (), model.variable_prefix))


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _fields(model: type[BaseModel], path: tuple[str, ...], prefix: str) -> Iterator[SettingField]:
    for name, field in model.model_fields.items():
        section = section_of(field)
        if section is not None:
            yield from _fields(section, (*path, name), f"{prefix}{name.upper()}{NESTED}")
            continue
        said = field.json_schema_extra
        extra: Mapping[str, Any] = said if isinstance(said, dict) else {}
        types = set(_simple_types(field.annotation))
        secret = SecretStr in types
        yield SettingField(
            path=(*path, name),
            flag=None if secret or not extra.get("flag", True) else "--" + name.replace("_", "-"),
            variable=prefix + name.upper(),
            kind=_kind(field.annotation, field.metadata),
            unit=str(extra.get("unit", "")),
            default=_shown(field.get_default(call_default_factory=True)),
            meaning=field.description or "",
            rare=bool(extra.get("rare", False)),
            shown=not secret and bool(extra.get("shown", True)),
            metavar=_metavar(field.annotation),
            switch=bool in types,
        )


def _shown(default: object) -> str:
    if default in (None, {}, ()):
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, float):
        return f"{default:g}"
    return str(default.value if isinstance(default, enum.Enum) else default)


def _simple_types(annotation: Any) -> Iterator[type]:  # noqa: ANN401 - an annotation
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _simple_types(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for each in get_args(annotation):
            yield from _simple_types(each)
    elif isinstance(annotation, type):
        yield annotation


def _metavar(annotation: Any) -> str:  # noqa: ANN401 - an annotation
    found = [_METAVARS[each] for each in _simple_types(annotation) if each in _METAVARS]
    return found[0] if found else "WORD"


_METAVARS: Final[Mapping[type, str]] = {int: "INTEGER", float: "NUMBER", str: "TEXT", SecretStr: "TEXT", Path: "PATH"}
_SIMPLE: Final[Mapping[type, str]] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    SecretStr: "text",
    Path: "a path",
}
_ONE_SIDED: Final[tuple[tuple[type, str, str], ...]] = (
    (annotated_types.Ge, "ge", "of at least"),
    (annotated_types.Gt, "gt", "above"),
    (annotated_types.Le, "le", "up to"),
    (annotated_types.Lt, "lt", "below"),
)


def _kind(annotation: Any, metadata: list[Any]) -> str:  # noqa: ANN401 - an annotation
    words = _alternatives(annotation, metadata)
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _alternatives(annotation: Any, metadata: list[Any]) -> list[str]:  # noqa: ANN401 - likewise
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is dict:
        return [SECTIONS]
    if origin is tuple:
        return ["a list of texts"]
    if origin is Annotated:
        return _alternatives(arguments[0], [*arguments[1:], *metadata])
    if origin in (Union, UnionType):
        return [word for each in arguments if each is not NoneType for word in _alternatives(each, metadata)]
    words = [str(each) for each in arguments] if origin is Literal else _words(annotation)
    return words or [_phrase(annotation, metadata)]


def _words(annotation: type) -> list[str]:
    if annotation is bool:
        return ["true", "false"]
    return [str(each.value) for each in annotation] if issubclass(annotation, enum.Enum) else []


def _phrase(annotation: type, metadata: list[Any]) -> str:
    facts = [fact for each in metadata for fact in (each.metadata if isinstance(each, FieldInfo) else [each])]
    if any(isinstance(fact, AfterValidator) and fact.func is check_name for fact in facts):
        return "a name of letters, digits, '.', '_' or '-'"
    if any(isinstance(fact, annotated_types.MinLen) for fact in facts):
        return f"{_SIMPLE[annotation]} that is not empty"
    return _SIMPLE[annotation] + _range(facts)


def _range(facts: list[Any]) -> str:
    bounds = {name: getattr(fact, name) for fact in facts for kind, name, _ in _ONE_SIDED if isinstance(fact, kind)}
    if bounds.keys() == {"ge", "le"}:
        return f" from {bounds['ge']} to {bounds['le']}"
    said = [f"{words} {bounds[name]}" for _, name, words in _ONE_SIDED if name in bounds]
    return f" {' and '.join(said)}" if said else ""


Place = tuple[str, ...]
"""A setting's names from the outermost section inwards: `("broker", "port")`."""

_LARGEST_FILE: Final = 64 << 10


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
        if len(content) > _LARGEST_FILE:
            raise SettingsError(f"The configuration file {path} has more than {_LARGEST_FILE} bytes; name another.")
        return tomllib.loads(content.decode("utf-8"))
    except OSError as error:
        raise SettingsError(f"The configuration file {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"The configuration file {path} is not valid TOML: {error}.") from error


@dataclass(frozen=True, slots=True)
class _Variables:
    """Environment variables that hold settings: their names by setting, and a sentence for each problem."""

    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    names: dict[Place, str] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def read(cls, model: type[Settings], environment: Mapping[str, str] = os.environ) -> Self:
        found = cls()
        for variable, text in sorted(environment.items()):
            place = tuple(variable.removeprefix(model.variable_prefix).lower().split(NESTED))
            known = model.model_fields.get(place[0]) if variable.startswith(model.variable_prefix) else None
            if known is None:
                continue
            value: Any = text
            if get_origin(known.annotation) is tuple:
                try:
                    value = json.loads(text)
                except ValueError:
                    found.problems.append(f"The environment variable {variable} is not valid JSON: write a list.")
                    continue
            found.names[place] = variable
            _set_value(found.values, place, value)
        return found


def _value_at(values: Any, place: Place) -> Any:  # noqa: ANN401 - whatever a file holds
    for name in place:
        if not isinstance(values, Mapping):
            return None
        values = values.get(name)
    return values


def _merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(low)
    for key, value in high.items():
        below = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        merged[key] = _merge(below, value) if both and isinstance(below, Mapping) else value
    return merged


def _set_value(values: dict[str, Any], place: Place, value: object) -> None:
    for name in place[:-1]:
        inner = values.get(name)
        values[name] = values = {**inner} if isinstance(inner, Mapping) else {}
    values[place[-1]] = value


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
    """Load settings; None as a flag means not given, also within nested mappings.

    `by_program`: the flags are a program's arguments rather than a command line's, for errors. Raise SettingsError with
    a line for each problem: its origin, and its value unless that is a secret.
    """
    sources = _Sources(
        {each.path: each for each in fields_of(model)},
        config,
        _read_toml(config) if config else {},
        _Variables.read(model, environment),
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
    fields: Mapping[Place, SettingField]
    config: Path | None
    file: Mapping[str, Any]
    environment: _Variables
    flags: Mapping[str, Any]
    by_program: bool

    def values(self) -> dict[str, Any]:
        return _merge(_merge(self.file, self.environment.values), self.flags)

    def explain(self, error: ValidationError) -> list[str]:
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
                what = plain_sentence(each)
            else:  # pydantic's wording is for programmers
                what = f"it must be {field.kind}" if field else f"it must be a section, [{'.'.join(place)}] in TOML"
            value = _value_at(values, place)
            shown = f" = {shown_value(value)}" if field and field.shown and isinstance(value, str | int | float) else ""
            origin = self.origin(place)
            where = f" ({origin})" if origin else ""
            line = f"The setting {'.'.join(place)!r}{shown}{where} cannot be used: {what}."
            lines.setdefault(place, line)  # one mistake, though each alternative of a type reports it
        return list(lines.values())

    def _setting_at(self, place: Place) -> Place:
        """Return the setting that an error is about: each alternative of a type has a separate location."""
        return next((place[:end] for end in range(1, len(place)) if place[:end] in self.fields), place)

    def origin(self, place: Place) -> str:
        field = self.fields.get(place)
        if _value_at(self.flags, place) is not None:
            flag = f"flag {field.flag}" if field and field.flag else ""
            return "argument" if self.by_program else flag
        if (variable := self.environment.names.get(place)) is not None:
            return f"environment variable {variable}"
        return "" if _value_at(self.file, place) is None else str(self.config)

    def _nearest(self, place: Place) -> str:
        """Suggest settings with a similar name, from any section."""
        by_word: dict[str, list[str]] = {}
        for path, field in self.fields.items():
            by_word.setdefault(path[-1], []).append(field.name)
        near = [repr(name) for word in difflib.get_close_matches(place[-1], by_word) for name in by_word[word]]
        if near:
            return f"there is no setting of that name, maybe {' or '.join(near)} is meant"
        known = sorted({path[len(place) - 1] for path in self.fields if path[: len(place) - 1] == place[:-1]})
        return f"there is no setting of that name; known are {', '.join(known)}"


def _given(flags: Mapping[str, Any]) -> dict[str, Any]:
    given = {}
    for key, value in flags.items():
        inner = _given(value) if isinstance(value, Mapping) else value
        if inner is not None and inner != {}:
            given[key] = inner
    return given


def shown_value(value: object) -> str:
    text = repr(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "…"


def check_all(settings: Settings, checks: Mapping[str, Callable[[], object]]) -> None:
    """Run checks before a program loads a model, and raise one SettingsError for all failures.

    `checks` are by the setting's name; each raises a FleetError if the value cannot work. An error with an attribute
    `setting` is about that other setting.
    """
    failed: list[str] = []
    for name, check in checks.items():
        try:
            check()
        except FleetError as error:
            about = str(getattr(error, "setting", name))
            place = ", ".join(filter(None, (f"setting {about!r}", settings.origin(about))))
            failed.append(f"{str(error).rstrip('.')} ({place}).")
    if failed:
        raise SettingsError("\n".join(failed))
