"""Sampling policy and grammar: both ends agree on them at Open."""

import hashlib
import json
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Annotated, Any, Final, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr

from schemas.fields import MAX_TOKENS

MAX_GRAMMAR_BYTES: Final = 1 << 16
"""Bytes of UTF-8."""


class GrammarKind(StrEnum):
    """How a grammar is written."""

    JSON_SCHEMA = "json-schema"
    JSON_OBJECT = "json-object"  # any JSON object; its text is empty
    REGEX = "regex"
    LARK = "lark"


def _check_size(text: str) -> str:
    if len(text.encode("utf-8", "surrogatepass")) > MAX_GRAMMAR_BYTES:
        raise ValueError(f"a grammar has at most {MAX_GRAMMAR_BYTES} bytes")
    return text


class Grammar(BaseModel):
    """A grammar that the generation must match. Unknown fields are rejected, as in the policy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: GrammarKind
    text: Annotated[str, Field(max_length=MAX_GRAMMAR_BYTES, strict=True), AfterValidator(_check_size)] = ""

    @property
    def digest(self) -> str:
        """SHA-256 of kind and text in hexadecimal, for logs and lists."""
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


MAX_SEED = 2**64 - 1
MAX_TOP_K = 1_000_000


def random_seed() -> int:
    """Return 63 random bits: a seed that every language's signed integer holds."""
    return secrets.randbits(63)


class Mode(StrEnum):
    """How a draft is verified.

    Attributes:
        RESIDUAL: The paper's: accept by probability ratio, draw the correction from max(0, p - q).
        COUPLED: Both ends share Gumbel noise; a draft token is accepted iff the target draws it too.
    """

    RESIDUAL = "residual"
    COUPLED = "coupled"


MAX_BIASES: Final = 300
MAX_BIAS: Final = 100
MAX_BIASED: Final = (1 << 31) - 1
_Penalty = Annotated[float, Field(ge=-2.0, le=2.0, strict=True)]
_Bias = tuple[
    Annotated[int, Field(ge=0, le=MAX_BIASED, strict=True)],
    Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)],
]


@dataclass(frozen=True, slots=True)
class TokensBefore:
    """The tokens before a position, as far as the policy's penalties and its least length depend on them."""

    prompt: Sequence[int]
    generated: Sequence[int]
    end_tokens: Collection[int]


def _rising(biases: tuple[_Bias, ...]) -> tuple[_Bias, ...]:
    if any(one >= other for (one, _), (other, _) in pairwise(biases)):
        raise ValueError("tokens of the biases must rise")
    return biases


ADJUSTMENTS: Final = ("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "min_tokens")
"""Fields that change logits before they are shaped."""


class SamplingPolicy(BaseModel):
    """What both ends do to their logits, and the seed of every random decision.

    The only message in which unknown fields are rejected: without a requested setting the generation would follow
    another distribution. A newer release omits a new setting while it has no effect.

    Attributes:
        mode: How drafts are verified.
        temperature: Divides the logits; 0 is greedy.
        top_k: Keeps the k largest logits; 0 keeps all.
        top_p: Keeps the smallest head whose mass reaches this; 1 keeps all.
        seed: Key of the random numbers; the same seed and policy give the same decisions.
        grammar: Tokens that it forbids are impossible, before all other steps. None allows everything.
        min_p: Keeps tokens whose probability is at least this share of the largest one.
        presence_penalty: Subtracted from the logits of tokens that the output has.
        frequency_penalty: Subtracted from a token's logit for each time that the output has it.
        repetition_penalty: Divides the positive logits, and multiplies the negative ones, of tokens that the prompt or
            the output has.
        logit_bias: Added to the logits of tokens; rising ids, each with its bias.
        min_tokens: The tokens that end a generation are impossible before the output has this number of tokens.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    mode: Mode = Mode.RESIDUAL
    temperature: Annotated[float, Field(ge=0.0, le=100.0, strict=True)] = 0.7
    top_k: Annotated[int, Field(ge=0, le=MAX_TOP_K, strict=True)] = 50
    top_p: Annotated[float, Field(gt=0.0, le=1.0, strict=True)] = 0.95
    seed: Annotated[int, Field(ge=0, le=MAX_SEED, strict=True)] = Field(default_factory=random_seed)
    grammar: Grammar | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0, strict=True)] = 0.0
    presence_penalty: _Penalty = 0.0
    frequency_penalty: _Penalty = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100.0, strict=True)] = 1.0
    logit_bias: Annotated[tuple[_Bias, ...], Field(max_length=MAX_BIASES), AfterValidator(_rising)] = ()
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS, strict=True)] = 0
    _history: TokensBefore | None = PrivateAttr(default=None)

    @property
    def adjusts(self) -> bool:
        """Logits are changed before they are shaped, so that p depends on more than them."""
        penalised = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0
        return bool(penalised or self.logit_bias or self.min_tokens)

    @property
    def history(self) -> TokensBefore | None:
        """The tokens before the position that is shaped; None if nothing depends on them."""
        return self._history

    def after(self, prompt: Sequence[int], generated: Sequence[int], end_tokens: Collection[int]) -> Self:
        """Return the policy for the position behind these tokens, which has their history where that matters."""
        if not self.adjusts:
            return self
        placed = self.model_copy()
        placed._history = TokensBefore(prompt, generated, end_tokens)  # noqa: SLF001 - of the same class
        return placed

    def plain(self) -> Self:
        """Return the policy without what adjusts logits."""
        if not self.adjusts:
            return self
        none = {name: type(self).model_fields[name].default for name in ADJUSTMENTS}
        return self.model_copy(update=none)

    @property
    def greedy(self) -> bool:
        """Every distribution is a point mass."""
        return self.temperature == 0.0

    @property
    def repeats(self) -> bool:
        """The same seed gives the same output, however it is drafted."""
        return self.mode is Mode.COUPLED or self.greedy
