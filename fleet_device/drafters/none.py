"""No drafter: for a device that has no draft model, and has the edge write by itself.

It needs no more than a vocabulary, to turn text into tokens and back.
"""

from collections.abc import Sequence

from dssd.distribution import Dist
from fleet_device.drafters.contract import DrafterError, TextCodec, require_tokens
from fleet_device.drafters.gguf import GgufModel
from fleet_device.drafters.model_source import locate_model
from fleet_device.drafters.without_weights import WithoutWeights
from fleet_device.settings import DeviceSettings
from schemas.policy import SamplingPolicy
from schemas.vocabulary import Vocabulary


class NoDrafter(WithoutWeights):
    """A `Drafter` that never has an idea.

    Args:
        vocabulary: Must be the target's.
        codec: Its text side.
        context: Most tokens in the sequence.
    """

    def __init__(self, vocabulary: Vocabulary, codec: TextCodec, *, context: int) -> None:
        super().__init__(vocabulary, codec, context=context, name="none")
        self._length = 0

    def another(self) -> "NoDrafter":
        other = NoDrafter(self._vocabulary, self._codec, context=self._context)
        other._owns = False
        return other

    def reset(self, tokens: Sequence[int]) -> None:
        require_tokens(tokens, self._vocabulary)
        self._length = len(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        require_tokens(tokens, self._vocabulary)
        self._length += len(tokens)

    def next(self, policy: SamplingPolicy) -> Dist | None:  # noqa: ARG002 - it looks at nothing
        """Return None: the target writes the next token alone."""
        if not self._length:
            raise DrafterError("There is nothing to go on from: the sequence is empty.")
        if self._length > self._context:
            raise DrafterError(f"The context of {self._context} tokens is full.")
        return None

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on."""
        self._length = min(self._length, max(length, 0))


def load(settings: DeviceSettings) -> NoDrafter:
    """Load the vocabulary of the model file that the settings name.

    Raises:
        DrafterError: It cannot be found or loaded.
    """
    model = GgufModel(locate_model(settings.model, folder=settings.models_dir).path, vocabulary_only=True)
    return NoDrafter(model.vocabulary, model, context=settings.context)
