"""Bounds of what session messages hold, and the types of their fields: a value outside is no message."""

from typing import Annotated

from pydantic import Field

from schemas.downlink import TokenId
from schemas.printable import PRINTABLE

MAX_DRAFT = 64
"""Most tokens in one draft, whatever an edge grants."""

MAX_WINDOW = 64
"""Most drafts of a session under way at once, whatever an edge grants."""

SESSIONS_PER_DEVICE = 8
"""Default number of sessions that an edge grants one device, and of requests that a device runs at once."""

MAX_TOKENS = 1 << 17
"""Most tokens in a prompt or a continuation."""

MAX_SENTENCE = 500
MAX_LABEL = 200
MAX_CODE = 40
MAX_APP_NAME = 40
SESSION_BYTES = 8
MAX_POSITION = 1 << 20
QUANTIZED_TOTAL = 1 << 16

U16 = Annotated[int, Field(ge=0, lt=1 << 16, strict=True)]
U32 = Annotated[int, Field(ge=0, lt=1 << 32, strict=True)]
Position = Annotated[int, Field(ge=0, lt=MAX_POSITION, strict=True)]
Count = Annotated[int, Field(ge=1, le=QUANTIZED_TOTAL, strict=True)]
SessionId = Annotated[bytes, Field(min_length=SESSION_BYTES, max_length=SESSION_BYTES, strict=True)]
Tokens = Annotated[tuple[TokenId, ...], Field(max_length=MAX_TOKENS, fail_fast=True)]
Milliseconds = Annotated[float, Field(ge=0.0, allow_inf_nan=False, strict=True)]
Seconds = Annotated[float, Field(ge=0.0, allow_inf_nan=False, strict=True)]
Code = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$", max_length=MAX_CODE, strict=True)]
Sentence = Annotated[str, Field(max_length=MAX_SENTENCE, strict=True), PRINTABLE]
AppName = Annotated[str, Field(min_length=1, max_length=MAX_APP_NAME, strict=True), PRINTABLE]
Label = Annotated[str, Field(max_length=MAX_LABEL, strict=True), PRINTABLE]
