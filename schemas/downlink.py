"""Downlink forms: encodings of the target distribution p of one position, all exact, chosen by size.

A form is a class that defines its wire format; `sampling.downlink` makes it from p and draws from it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Final, Literal, Self, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema, core_schema

from schemas.cbor import pack_ids, pack_probabilities
from schemas.fields import MAX_VOCABULARY, TokenId
from schemas.reasons import UNKNOWN_NUMBERS

MAX_SAMPLES = 1024

Probability = Annotated[float, Field(gt=0.0, le=1.0 + 1e-6, allow_inf_nan=False, strict=True)]


class _Form(BaseModel):
    """Base of all forms.

    Attributes:
        number: First in the verdict's array; permanent.
        wire: Following fields in order, each with the function that packs it.
    """

    model_config = ConfigDict(frozen=True)

    number: ClassVar[int]
    wire: ClassVar[Mapping[str, Callable[[Any], object]]]

    kind: str


class Sparse(_Form):
    """The whole shaped support: ids and float32 probabilities, six bytes a token (eight above 65,536 tokens).

    Attributes:
        ids: Token ids, distinct.
        probs: Their probabilities; they sum to 1 up to float32 rounding.
    """

    number = 1
    wire = MappingProxyType({"ids": pack_ids, "probs": pack_probabilities})

    kind: Literal["sparse"] = "sparse"
    ids: Annotated[tuple[TokenId, ...], Field(min_length=1, fail_fast=True)]
    probs: Annotated[tuple[Probability, ...], Field(fail_fast=True)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.ids) != len(self.probs):
            raise ValueError("ids and probabilities differ in number")
        if len(set(self.ids)) != len(self.ids):
            raise ValueError("a token id occurs twice")
        if abs(sum(self.probs) - 1.0) > 1e-3:  # noqa: PLR2004 - float32 rounding stays far below
            raise ValueError("the probabilities do not sum to 1")
        return self


class Samples(_Form):
    """Independent draws from p, each with its probability; the device thins them to max(0, p - q).

    Attributes:
        start: Index of the first draw: 0, or the number the device has already tried without success.
        ids: The draws in order; a token may repeat.
        probs: p of each.
    """

    number = 2
    wire = MappingProxyType({"start": int, "ids": pack_ids, "probs": pack_probabilities})

    kind: Literal["samples"] = "samples"
    start: Annotated[int, Field(ge=0, lt=1 << 20, strict=True)] = 0
    ids: Annotated[tuple[TokenId, ...], Field(min_length=1, max_length=MAX_SAMPLES, fail_fast=True)]
    probs: Annotated[tuple[Probability, ...], Field(fail_fast=True)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.ids) != len(self.probs):
            raise ValueError("ids and probabilities differ in number")
        return self


class Dense(_Form):
    """p over the whole vocabulary, as in the paper.

    Attributes:
        probs: float32, little-endian, by token id.
    """

    number = 3
    wire = MappingProxyType({"probs": bytes})

    kind: Literal["dense"] = "dense"
    probs: Annotated[bytes, Field(min_length=8, max_length=4 * MAX_VOCABULARY, strict=True)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.probs) % 4:
            raise ValueError("not a whole number of float32 values")
        values = np.frombuffer(self.probs, dtype="<f4")
        # NaN fails both comparisons' negations, so it is caught too.
        if not (values.min() >= 0.0 and abs(float(values.sum(dtype=np.float64)) - 1.0) <= 1e-3):  # noqa: PLR2004
            raise ValueError("not a distribution")
        return self


@dataclass(frozen=True, slots=True)
class UnknownForm:
    """A form of a newer release. It cannot be used here, so the session fails and says why."""

    number: int

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: object, _handler: GetCoreSchemaHandler) -> CoreSchema:
        """Accept only instances: the decoder makes them, and no message contains one."""
        return core_schema.is_instance_schema(cls)


DownlinkForm = Annotated[Sparse | Samples | Dense, Field(discriminator="kind")]

FORMS: Final[tuple[type[_Form], ...]] = get_args(get_args(DownlinkForm)[0])
"""All forms, in order of preference at equal size."""

_BY_NUMBER: Final = MappingProxyType({form.number: form for form in FORMS})


def pack_form(form: DownlinkForm) -> list[object]:
    """Return the array of a form: its number, and its packed fields."""
    return [form.number, *(pack(getattr(form, name)) for name, pack in form.wire.items())]


def unpack_form(array: object) -> dict[str, object] | UnknownForm | None:
    """Read a form's array: its fields, not yet validated, an `UnknownForm`, or None if it is no form."""
    if not isinstance(array, list) or not array or type(array[0]) is not int:
        return None
    number, *values = array
    form = _BY_NUMBER.get(number)
    if form is None:
        return UnknownForm(number) if number in UNKNOWN_NUMBERS else None
    if len(values) < len(form.wire):
        return None
    return {"kind": form.model_fields["kind"].default, **dict(zip(form.wire, values, strict=False))}
