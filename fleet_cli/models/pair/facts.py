"""Facts of a model, read from its files without loading weights: what a pair is judged by, and what memory it takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from schemas.vocabulary import Vocabulary

__all__ = ["Form", "LayerShape", "ModelFacts"]


class Form(StrEnum):
    """What a model lies in."""

    GGUF = "gguf"
    FOLDER = "folder"


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What a layer keeps of each token.

    Attributes:
        kv_heads: Heads of keys and values.
        key_dim: Numbers of a key, for each of them.
        value_dim: Likewise of a value.
        window: Tokens that it looks back, if that is bounded. Memory is taken for all tokens all the same: a rejection
            takes tokens back, and what has left the window by then would be missing.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None

    @property
    def numbers(self) -> int:
        """Numbers that are kept of each token."""
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """A model.

    Attributes:
        source: Its file or folder, as it was named.
        form: Which of both.
        architecture: In the words of its files.
        number_format: Of its weights.
        vocabulary: Size and fingerprint.
        end_tokens: Ids that end a text or a turn.
        end_texts: Their strings, in the same order.
        chat_template: Jinja source; None if it has none.
        bos: Text of the token that begins a text; chat templates want it.
        eos: Text of the token that ends one.
        context: Tokens that it was trained for; 0 if its files do not say.
        parameters: Number of weights.
        weight_bytes: As they are stored.
        layers: What each keeps of a token.
        refusal: Why it cannot be used at all, as the end of a sentence; empty if it can.
    """

    source: str
    form: Form
    architecture: str
    number_format: str
    vocabulary: Vocabulary
    end_tokens: tuple[int, ...]
    end_texts: tuple[str, ...]
    chat_template: str | None
    bos: str
    eos: str
    context: int
    parameters: int
    weight_bytes: int
    layers: Sequence[LayerShape]
    refusal: str = ""

    def kv_bytes(self, *, tokens: int, number_bytes: int) -> int:
        """Return the memory that keys and values of a text take.

        Args:
            tokens: Of prompt and text.
            number_bytes: Of each number: 2 for float16 and bfloat16, 4 for float32.
        """
        return tokens * number_bytes * sum(layer.numbers for layer in self.layers)
