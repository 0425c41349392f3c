"""Fields of settings, each stated once: of them flags, errors and docs/settings.md are made."""

import enum
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Final, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, SecretStr
from pydantic.fields import FieldInfo

from schemas.names import check_name

NESTED: Final = "__"
"""Between the names of a section and of a setting within it, in an environment variable."""

SECTIONS: Final = "a section for each name"
"""Kind of a setting that is a table of sections which the user names."""


class Settings(BaseModel):
    """Base of the settings of one program.

    Attributes:
        variable_prefix: What the names of the environment variables begin with.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    variable_prefix: ClassVar[str]
    _origins: Mapping[str, str] = PrivateAttr(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        """Whether the values are equal, wherever they come from."""
        return isinstance(other, type(self)) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]

    def came_from(self, origins: Mapping[str, str]) -> None:
        """Note where values come from, by setting; called by whoever has loaded them."""
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
    """Return the field of a setting.

    Args:
        default: The value if none is given, or a function that makes it.
        meaning: One sentence.
        unit: Of a quantity.
        rare: Whether `--help` shows it apart.
        in_flags: Whether it has a flag; what stands in a flag is seen by every user of the machine, in `ps`.
        in_errors: Whether an error may show the value.
        bounds: As pydantic's `Field` takes them: `ge`, `gt`, `le`, `lt`, `min_length`.
    """
    extra = {"unit": unit, "rare": rare, "flag": in_flags, "shown": in_errors}
    given: dict[str, Any] = {"default_factory": default} if callable(default) else {"default": default}
    return Field(**given, description=meaning, json_schema_extra=extra, **bounds)  # type: ignore[call-overload]


@dataclass(frozen=True, slots=True)
class SettingField:
    """What is known of one setting.

    Attributes:
        path: Its names from the outermost section inwards.
        flag: On the command line; None for a secret.
        variable: In the environment.
        kind: What a value is, after "it must be": `a whole number from 1 to 1024`.
        unit: Of a quantity; may be empty.
        default: As text; empty if there is none.
        meaning: One sentence.
        rare: Whether `--help` shows it apart.
        shown: Whether an error may show the value.
        metavar: What stands for a value in a help text, such as `INTEGER`; `WORD` where there are words to choose from.
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
        """As in the TOML file, with dots between sections."""
        return ".".join(self.path)


@functools.cache
def fields_of(model: type[Settings]) -> tuple[SettingField, ...]:
    """Return all settings of a program, those of its sections included."""
    return tuple(_walk(model, (), model.variable_prefix))


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the model of a field that is a section of its own."""
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _walk(model: type[BaseModel], path: tuple[str, ...], prefix: str) -> Iterator[SettingField]:
    for name, field in model.model_fields.items():
        section = section_of(field)
        if section is not None:
            yield from _walk(section, (*path, name), f"{prefix}{name.upper()}{NESTED}")
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


def _simple_types(annotation: Any) -> Iterator[type]:  # noqa: ANN401 - whatever stands after a colon
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _simple_types(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for each in get_args(annotation):
            yield from _simple_types(each)
    elif isinstance(annotation, type):
        yield annotation


def _metavar(annotation: Any) -> str:  # noqa: ANN401 - whatever stands after a colon
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


def _kind(annotation: Any, metadata: list[Any]) -> str:  # noqa: ANN401 - whatever stands after a colon
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
    """Return all values of a type that has few."""
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
