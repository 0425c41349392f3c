"""Sampling policy: what is done to logits before a token is drawn, agreed at Open by both ends."""

import secrets
from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from schemas.grammar import Grammar

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


class SamplingPolicy(BaseModel):
    """What both ends do to their logits, and the seed of every random decision.

    The one part of a message where nothing unknown is passed over: a text written without a setting that was asked for
    follows another law. A newer release leaves a new setting out as long as it does nothing.

    Attributes:
        mode: How drafts are verified.
        temperature: Divides the logits; 0 is greedy.
        top_k: Keeps the k largest logits; 0 keeps all.
        top_p: Keeps the smallest head whose mass reaches this; 1 keeps all.
        seed: Key of the random numbers; the same seed and policy give the same decisions.
        grammar: What the text must look like: before all else, tokens that it rules out are impossible. None: anything.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    mode: Mode = Mode.RESIDUAL
    temperature: Annotated[float, Field(ge=0.0, le=100.0, strict=True)] = 0.7
    top_k: Annotated[int, Field(ge=0, le=MAX_TOP_K, strict=True)] = 50
    top_p: Annotated[float, Field(gt=0.0, le=1.0, strict=True)] = 0.95
    seed: Annotated[int, Field(ge=0, le=MAX_SEED, strict=True)] = Field(default_factory=random_seed)
    grammar: Grammar | None = None

    @property
    def greedy(self) -> bool:
        """Whether every distribution is a point mass."""
        return self.temperature == 0.0

    @property
    def repeats(self) -> bool:
        """Whether the same seed is to give the same text, however it is drafted."""
        return self.mode is Mode.COUPLED or self.greedy
