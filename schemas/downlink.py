"""Downlink forms: encodings of the target distribution p of one position, all exact, chosen by size.

A form is a class that defines its wire format; `dssd.downlink` makes it from p and draws from it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Final, Literal, Self, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema, core_schema

from schemas.cbor import pack_ids, pack_probabilities
from schemas.fields import MAX_DRAFT, MAX_VOCABULARY, TokenId
from schemas.reasons import UNKNOWN_NUMBERS

MAX_SAMPLES = 1024

Probability = Annotated[float, Field(gt=0.0, le=1.0 + 1e-6, allow_inf_nan=False, strict=True)]


RowSize = Annotated[int, Field(ge=1, le=MAX_VOCABULARY, strict=True)]
Bound = Annotated[float, Field(ge=0.0, le=1.0 + 1e-6, allow_inf_nan=False, strict=True)]


class _Form(BaseModel):
    """Base of all forms.

    Attributes:
        number: First in the verdict's array; permanent.
        wire: Following fields in order, each with the function that packs it.
        described: The array, for documentation.
    """

    model_config = ConfigDict(frozen=True)

    number: ClassVar[int]
    wire: ClassVar[Mapping[str, Callable[[Any], object]]]
    described: ClassVar[str]

    kind: str


class Sparse(_Form):
    """The whole shaped support: ids and float32 probabilities, six bytes a token (eight above 65,536 tokens).

    Attributes:
        ids: Token ids, distinct.
        probs: Their probabilities; they sum to 1 up to float32 rounding.
    """

    number = 1
    wire = MappingProxyType({"ids": pack_ids, "probs": pack_probabilities})
    described = "[1, ids, probabilities]"

    kind: Literal["sparse"] = "sparse"
    ids: Annotated[tuple[TokenId, ...], Field(min_length=1, fail_fast=True)]
    probs: Annotated[tuple[Probability, ...], Field(fail_fast=True)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.ids) != len(self.probs):
            raise ValueError("ids and probabilities differ in number")
        _check_row(self.ids, self.probs)
        return self


def _check_row(ids: Sequence[int], probs: Sequence[float]) -> None:
    if len(set(ids)) != len(ids):
        raise ValueError("a token id occurs twice")
    if abs(sum(probs) - 1.0) > 1e-3:  # noqa: PLR2004 - float32 rounding stays far below
        raise ValueError("the probabilities do not sum to 1")


class Samples(_Form):
    """Independent draws from p, each with its probability; the device thins them to max(0, p - q).

    Attributes:
        start: Index of the first draw: 0, or the number the device has already tried without success.
        ids: The draws in order; a token may repeat.
        probs: p of each.
    """

    number = 2
    wire = MappingProxyType({"start": int, "ids": pack_ids, "probs": pack_probabilities})
    described = "[2, start, ids, probabilities]"

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
    described = "[3, bytes of little-endian float32]"

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


class Tries(_Form):
    """Tries of block verification; the device takes the first with a draft probability below its bound.

    Attributes:
        heads: Number of draft tokens that each try accepts.
        ids: The correction after them.
        bounds: Bound on the draft probability of the correction there.
    """

    number = 4
    wire = MappingProxyType({"heads": bytes, "ids": pack_ids, "bounds": pack_probabilities})
    described = "[4, bytes of accepted tokens, ids, bounds]"

    kind: Literal["tries"] = "tries"
    heads: Annotated[bytes, Field(min_length=1, max_length=MAX_SAMPLES, strict=True)]
    ids: Annotated[tuple[TokenId, ...], Field(max_length=MAX_SAMPLES, fail_fast=True)]
    bounds: Annotated[tuple[Bound, ...], Field(fail_fast=True)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not len(self.heads) == len(self.ids) == len(self.bounds):
            raise ValueError("accepted tokens, ids and bounds differ in number")
        return self


class Rows(_Form):
    """What is left of the race of a rejected block after its tries; the device draws how it ends.

    Attributes:
        reached: P after 0, 1, 2, … tokens of the block.
        sizes: Number of tokens with a probability after as many tokens of the block.
        ids: These tokens, distinct in each row, the rows one after another.
        probs: Their probabilities; those of a row sum to 1 up to float32 rounding.
    """

    number = 5
    wire = MappingProxyType(
        {"reached": pack_probabilities, "sizes": pack_ids, "ids": pack_ids, "probs": pack_probabilities}
    )
    described = "[5, P after 0, 1, 2, … tokens, tokens in each row, ids, probabilities]"

    kind: Literal["rows"] = "rows"
    reached: Annotated[tuple[Bound, ...], Field(fail_fast=True)]
    sizes: Annotated[tuple[RowSize, ...], Field(min_length=1, max_length=MAX_DRAFT, fail_fast=True)]
    ids: Annotated[tuple[TokenId, ...], Field(fail_fast=True)]
    probs: Annotated[tuple[Probability, ...], Field(fail_fast=True)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.reached) != len(self.sizes) or not len(self.ids) == len(self.probs) == sum(self.sizes):
            raise ValueError("the rows differ in number from what they hold")
        begin = 0
        for size in self.sizes:
            _check_row(self.ids[begin : begin + size], self.probs[begin : begin + size])
            begin += size
        return self


@dataclass(frozen=True, slots=True)
class UnknownForm:
    """A form of a newer release. It cannot be used here, so the session fails and says why."""

    number: int

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: object, _handler: GetCoreSchemaHandler) -> CoreSchema:
        """Accept only instances: the decoder makes them, and no message contains one."""
        return core_schema.is_instance_schema(cls)


DownlinkForm = Annotated[Sparse | Samples | Dense | Tries | Rows, Field(discriminator="kind")]

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
