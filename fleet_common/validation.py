"""Reading what users write: validation errors in plain sentences, points in time and durations.

pydantic's own wording is for programmers. A sentence continues "cannot be used: ". Settings have their own
(`fleet_common.settings`); these are for everything else: the description of a broker, requests to the device's API,
options of a command.
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from schemas.printable import printable_line

_UNKNOWN_FORM: Final = "it does not have the expected form"

# By prefix of pydantic's error types; in braces their context.
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
    """Describe the first error, without a full stop, for readers who do not know pydantic."""
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
    """Return the location of an error, without pydantic's names for alternatives of a type."""
    place: list[int | str] = []
    here = [model]
    for part in error["loc"]:
        if isinstance(part, int):
            place.append(part)
        elif found := [
            field for each in here for name, field in each.model_fields.items() if part in (name, field.alias)
        ]:
            place.append(part)
            here = [each for field in found for each in _models_within(field.annotation)]
        elif error["type"] == "extra_forbidden":
            place.append(part)
    return tuple(place)


def _models_within(annotation: Any) -> list[type[BaseModel]]:  # noqa: ANN401 - an annotation
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [each for inner in get_args(annotation) for each in _models_within(inner)]


_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_LONGEST_SHOWN: Final = 60
_AMOUNT: Final = re.compile(r"(\d{1,9})([smhd])", re.ASCII)


def read_time(value: str | datetime | timedelta, *, now: datetime) -> datetime:
    """Return a point in time, in UTC; raise ValueError if it is invalid or outside the calendar.

    `value` is an age (`90s`, `30m`, `2h`, `7d`, or a timedelta), an ISO 8601 string, or a datetime; UTC without a time
    zone. Ages are relative to `now`.
    """
    try:
        if isinstance(value, timedelta):
            return (now - value).astimezone(UTC)
        if isinstance(value, str):
            if age := _AMOUNT.fullmatch(value.strip()):
                return now - _seconds(age)
            value = datetime.fromisoformat(value.strip())
        return (value.replace(tzinfo=UTC) if value.tzinfo is None else value).astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError(f"{_excerpt(value)!r} is neither an age such as 2h or 7d nor an ISO 8601 time.") from None


def read_duration(value: str | timedelta) -> timedelta:
    """Return a duration: `90s`, `30m`, `2h`, `7d`, or a timedelta; raise ValueError if it is not above zero."""
    length = value if isinstance(value, timedelta) else timedelta()
    if isinstance(value, str) and (amount := _AMOUNT.fullmatch(value.strip())):
        length = _seconds(amount)
    if length <= timedelta():
        raise ValueError(f"{_excerpt(value)!r} is no duration such as 90s, 30m, 2h or 7d.")
    return length


def in_words(span: timedelta) -> str:
    """Return a duration in its largest unit, such as `3 hours`, rounded down."""
    seconds = int(span.total_seconds())
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size:,} {unit}"
    return f"{seconds} s"


def _seconds(amount: re.Match[str]) -> timedelta:
    return timedelta(seconds=int(amount[1]) * _SECONDS[amount[2]])


def _excerpt(value: object) -> str:
    return printable_line(str(value)[:_LONGEST_SHOWN])
