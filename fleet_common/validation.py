"""Validation errors in plain sentences: pydantic's own words are for programmers.

A sentence goes on after "cannot be used: ". Settings have kinds of their own (`fleet_common.fields`); this is for
whatever else a user writes: the description of a broker, a request to the device's API, options of a command.
"""

from collections.abc import Mapping
from typing import Any, Final, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

_UNKNOWN_FORM: Final = "it does not have the form that it should have"

# By the beginning of pydantic's error types; in braces what pydantic tells beside them.
_SENTENCES: Final[Mapping[str, str]] = {
    "missing": "it is required",
    "extra_forbidden": "there is no such field",
    "int_": "it must be a whole number",
    "float_": "it must be a number",
    "finite_number": "it must be a finite number",
    "bool_": "it must be true or false",
    "string_type": "it must be text",
    "string_sub_type": "it must be text",
    "string_unicode": "it must be text",
    "string_too_short": "it must have at least {min_length} characters",
    "string_too_long": "it must have at most {max_length} characters",
    "greater_than_equal": "it must be at least {ge}",
    "greater_than": "it must be above {gt}",
    "less_than_equal": "it must be at most {le}",
    "less_than": "it must be below {lt}",
    "literal_error": "it must be {expected}",
    "enum": "it must be {expected}",
    "path_type": "it must be a path",
    "tuple_type": "it must be a list",
    "list_type": "it must be a list",
    "too_short": "it must have at least {min_length} entries",
    "too_long": "it must have at most {max_length} entries",
    "dict_": "it must be a section or an object with fields of its own",
    "model_": "it must be a section or an object with fields of its own",
    "none_required": "it must be left out",
}


def plain_sentence(error: ErrorDetails) -> str:
    """Say what is wrong, for somebody who has never heard of pydantic; without a full stop."""
    kind = error["type"]
    if kind == "value_error":  # a check of our own, which has its own sentence
        return error["msg"].removeprefix("Value error, ").rstrip(".")
    facts = error.get("ctx", {})
    if kind.endswith("too_short") and facts.get("min_length") == 1:
        return "it must not be empty"
    beginnings = (beginning for beginning in _SENTENCES if kind.startswith(beginning))
    found = max(beginnings, key=len, default=None)
    return _UNKNOWN_FORM if found is None else _SENTENCES[found].format_map(facts)


def field_at(model: type[BaseModel], error: ErrorDetails) -> tuple[int | str, ...]:
    """Return the field that is wrong, as its user knows it.

    Where a type has alternatives, pydantic's place ends with the alternative, such as `tuple[constrained-int, ...]`.

    Args:
        model: What was validated.
        error: One of its errors.
    """
    place: list[int | str] = []
    here: type[BaseModel] | None = model
    for part in error["loc"]:
        if isinstance(part, int):
            place.append(part)
        elif here is not None and part in here.model_fields:
            place.append(part)
            here = _model_within(here.model_fields[part].annotation)
        elif error["type"] == "extra_forbidden":
            place.append(part)
    return tuple(place)


def _model_within(annotation: Any) -> type[BaseModel] | None:  # noqa: ANN401 - whatever stands after a colon
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_within, get_args(annotation))), None)
