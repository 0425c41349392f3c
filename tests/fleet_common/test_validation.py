from typing import Annotated, Any, get_args

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core.core_schema import ErrorType

from fleet_common.validation import field_at, plain_sentence

# Their own sentences come from us.
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
