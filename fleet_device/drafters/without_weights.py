"""What the drafters without a model have in common: a vocabulary, its text side, and a longest sequence."""

from fleet_device.drafters.contract import TextCodec
from schemas.vocabulary import Vocabulary


class WithoutWeights:
    """The part of a `Drafter` that describes it.

    Args:
        vocabulary: Must be the target's.
        codec: Its text side.
        context: Most tokens in the sequence.
        name: For the log.
    """

    def __init__(self, vocabulary: Vocabulary, codec: TextCodec, *, context: int, name: str) -> None:
        self._vocabulary = vocabulary
        self._codec = codec
        self._context = context
        self._name = name
        self._owns = True  # the vocabulary's file, which further sequences only use

    @property
    def name(self) -> str:
        return self._name

    @property
    def quantization(self) -> str:
        return "none"

    @property
    def vocabulary(self) -> Vocabulary:
        return self._vocabulary

    @property
    def context(self) -> int:
        return self._context

    @property
    def codec(self) -> TextCodec:
        return self._codec

    def close(self) -> None:
        """Free the vocabulary's file, if it is one."""
        if self._owns and callable(close := getattr(self._codec, "close", None)):
            close()
