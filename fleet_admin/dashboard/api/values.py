"""Values of the API: views as JSON, their worked-out rates included, and the schemas that say so."""

import math
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import datetime
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from pydantic import BaseModel, create_model


def to_json(value: object) -> object:
    """Return a value as JSON holds it; times become ISO 8601 in UTC, what is no number becomes null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {name: to_json(getattr(value, name)) for name in _names(type(value))}
    if isinstance(value, Mapping):
        return {str(key): to_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(each) for each in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Enum):
        return value.value
    return None if isinstance(value, float) and not math.isfinite(value) else value


@cache
def model_of(view: type) -> type[BaseModel]:
    """Return a model of what `to_json` makes of a view, for its schema."""
    types = {field.name: typing.get_type_hints(view)[field.name] for field in fields(view)}
    for name in _names(view):
        if name not in types:
            types[name] = typing.get_type_hints(_property(view, name).fget)["return"]
    shaped: dict[str, Any] = {name: (type_of(each), ...) for name, each in types.items()}
    return create_model(view.__name__.removesuffix("View"), __doc__=_summary(view), **shaped)


def type_of(annotation: Any) -> Any:  # noqa: ANN401 - whatever stands after a colon
    """Return a type as JSON has it: views become their models."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if is_dataclass(annotation):
        assert isinstance(annotation, type)
        return model_of(annotation)
    if annotation is float:
        return float | None  # what is no number becomes null
    if origin in (list, tuple) or (isinstance(origin, type) and issubclass(origin, typing.Sequence)):
        return list[type_of(arguments[0])]  # type: ignore[misc]
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return dict[str, type_of(arguments[1])]  # type: ignore[misc]
    if origin in (typing.Union, UnionType):
        members = tuple(NoneType if each is NoneType else type_of(each) for each in arguments)
        return typing.Union[members]  # noqa: UP007 - of a tuple
    return annotation


@cache
def _names(view: type) -> tuple[str, ...]:
    assert is_dataclass(view)
    names = [field.name for field in fields(view) if not field.name.startswith("_")]
    for kind in reversed(view.__mro__):
        names += [name for name, member in vars(kind).items() if isinstance(member, property) and name not in names]
    return tuple(names)


def _property(view: type, name: str) -> property:
    member = next(vars(kind)[name] for kind in view.__mro__ if name in vars(kind))
    assert isinstance(member, property)
    return member


def _summary(view: type) -> str:
    return (view.__doc__ or "").partition("\n")[0]
