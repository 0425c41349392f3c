from datetime import UTC, datetime, timedelta, timezone
from typing import Annotated, Any, get_args

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core.core_schema import ErrorType

from fleet_common.validation import field_at, plain_sentence, read_duration, read_time

# Errors with messages of our own.
OURS = {"value_error", "assertion_error"}


@pytest.mark.parametrize("kind", sorted(set(get_args(ErrorType)) - OURS))
def test_no_error_of_pydantics_is_told_in_its_own_words(kind: str) -> None:
    said = plain_sentence({"type": kind, "loc": (), "msg": "Input should be what it is", "input": 0, "ctx": _Facts()})
    assert said.startswith(("it ", "there is no such field"))
    assert "Input" not in said
    assert not said.endswith(".")


class _Facts(dict[str, Any]):
    def __missing__(self, key: str) -> str:
        return "7"


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")

    number: Annotated[int, Field(ge=0)] | Annotated[str, Field(max_length=2)] = 0


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    inner: Inner | None = None
    many: tuple[Inner, ...] = ()


@pytest.mark.parametrize(
    ("value", "place", "said"),
    [
        ({"inner": 5}, ("inner",), "it must be a section or an object with fields of its own"),
        ({"inner": {"number": []}}, ("inner", "number"), "it must be a whole number"),
        ({"many": [{}, {"number": -1}]}, ("many", 1, "number"), "it must be at least 0"),
        ({"many": [{"str": 1}]}, ("many", 0, "str"), "there is no such field"),
        ({"many": 1}, ("many",), "it must be a list"),
        ({"other": 1}, ("other",), "there is no such field"),
    ],
)
def test_the_place_is_that_which_the_user_knows(value: Any, place: tuple[int | str, ...], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(value)
    first = caught.value.errors()[0]
    assert (field_at(Outer, first), plain_sentence(first)) == (place, said)


NOW = datetime(2026, 3, 4, 10, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("90s", NOW - timedelta(seconds=90)),
        (" 2h ", NOW - timedelta(hours=2)),
        ("7d", NOW - timedelta(days=7)),
        (timedelta(minutes=30), NOW - timedelta(minutes=30)),
        ("2026-03-04T10:30", NOW),
        ("2026-03-04T12:30+02:00", NOW),
        (datetime(2026, 3, 4, 10, 30), NOW),  # noqa: DTZ001 - without a zone on purpose
        (datetime(2026, 3, 4, 12, 30, tzinfo=timezone(timedelta(hours=2))), NOW),
    ],
)
def test_ages_and_times_are_points_in_time(given: str | datetime | timedelta, meant: datetime) -> None:
    read = read_time(given, now=NOW)
    assert read == meant
    assert read.utcoffset() == timedelta(0)


@pytest.mark.parametrize("wrong", ["", "2", "h", "-2h", "2h30m", "2026-13-01", "999999999d", timedelta(days=999999999)])
def test_what_is_neither_an_age_nor_a_time_is_refused_by_name(wrong: str | timedelta) -> None:
    with pytest.raises(ValueError, match="neither an age"):
        read_time(wrong, now=NOW)


@pytest.mark.parametrize("wrong", ["", "0s", "-1h", "2026-03-04", "1h\x1b[2J", timedelta(0), timedelta(seconds=-1)])
def test_what_is_no_duration_is_refused_by_name(wrong: str | timedelta) -> None:
    with pytest.raises(ValueError, match="is no duration such as") as caught:
        read_duration(wrong)
    assert "\x1b" not in str(caught.value)
