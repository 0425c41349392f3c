"""Grammar: what a text must look like, agreed at Open by both ends as a part of the sampling policy."""

import hashlib
import json
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Final, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MAX_GRAMMAR_BYTES: Final = 1 << 16
"""Largest grammar, in bytes of UTF-8."""


class GrammarKind(StrEnum):
    """How a grammar is written."""

    JSON_SCHEMA = "json-schema"
    JSON_OBJECT = "json-object"  # any JSON object; its text is empty
    REGEX = "regex"
    LARK = "lark"


def _short(text: str) -> str:
    if len(text.encode("utf-8", "surrogatepass")) > MAX_GRAMMAR_BYTES:
        raise ValueError(f"a grammar has at most {MAX_GRAMMAR_BYTES} bytes")
    return text


class Grammar(BaseModel):
    """A grammar. Nothing unknown in it is passed over, as nothing is in the policy that it is part of.

    Attributes:
        kind: How it is written.
        text: The JSON schema, the regular expression, or the Lark grammar.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: GrammarKind
    text: Annotated[str, Field(max_length=MAX_GRAMMAR_BYTES, strict=True), AfterValidator(_short)] = ""

    @property
    def digest(self) -> str:
        """SHA-256 of kind and text in hexadecimal, by which logs and lists name it."""
        return hashlib.sha256(f"{self.kind.value}\0{self.text}".encode("utf-8", "surrogatepass")).hexdigest()

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any]) -> Self:
        """Return the grammar of JSON values of a schema."""
        return cls(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(schema, separators=(",", ":")))

    @classmethod
    def json_object(cls) -> Self:
        """Return the grammar of JSON objects, whatever is in them."""
        return cls(kind=GrammarKind.JSON_OBJECT)

    @classmethod
    def regex(cls, pattern: str) -> Self:
        """Return the grammar of what a regular expression matches as a whole."""
        return cls(kind=GrammarKind.REGEX, text=pattern)

    @classmethod
    def lark(cls, source: str) -> Self:
        """Return a grammar in llguidance's dialect of Lark, whose rule `start` is the whole text."""
        return cls(kind=GrammarKind.LARK, text=source)
