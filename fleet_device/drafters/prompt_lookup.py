"""Prompt-lookup drafter: proposes what followed the last time that these words were written; needs no model.

Works where a text repeats its prompt: summaries, corrections, code, forms. It needs no more than a vocabulary,
so a gateway too small for any model can draft. A proposal is a certain token: q is a point mass, and the
acceptance rate is the target's own probability of it. (Saxena, "Prompt Lookup Decoding", 2023.) It is the special case
of the suffix drafter without a history, and searches with the same index.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dssd.distribution import Dist, point_mass
from fleet_device.drafters.contract import DrafterError, TextCodec, common_prefix, require_tokens
from fleet_device.drafters.gguf import GgufModel
from fleet_device.drafters.model_source import locate_model
from fleet_device.drafters.suffix.index import SuffixIndex
from fleet_device.drafters.without_weights import WithoutWeights
from fleet_device.settings import DeviceSettings
from schemas.policy import SamplingPolicy
from schemas.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class Lookup:
    """How to search.

    Attributes:
        shortest: Fewest tokens at the end of the sequence that must have been there before. One alone matches
            nearly everywhere and is nearly always wrong.
        longest: Most tokens compared; a longer agreement says no more.
        context: Most tokens in the sequence.
    """

    shortest: int = 2
    longest: int = 8
    context: int = 1 << 17

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest or self.context < 1:
            raise DrafterError("Prompt lookup needs 1 <= shortest <= longest and a context of at least 1 token.")


class PromptLookupDrafter(WithoutWeights):
    """A `Drafter` that repeats what the sequence itself has shown.

    Args:
        vocabulary: Must be the target's.
        codec: Its text side.
        lookup: How to search.
        name: For the log.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        codec: TextCodec,
        lookup: Lookup | None = None,
        *,
        name: str = "prompt-lookup",
    ) -> None:
        self._lookup = lookup or Lookup()
        super().__init__(vocabulary, codec, context=self._lookup.context, name=name)
        # Hashed by the fewest tokens of a match, and by twice as many as often as that is no more than the most.
        shortest, longest = self._lookup.shortest, self._lookup.longest
        lengths = [shortest << doubled for doubled in range(longest.bit_length()) if shortest << doubled <= longest]
        self._index = SuffixIndex(lengths=lengths, longest=longest)

    @classmethod
    def from_gguf(cls, path: Path, lookup: Lookup | None = None) -> "PromptLookupDrafter":
        """Take the vocabulary from any GGUF of the target's family; its weights are not loaded.

        Raises:
            DrafterError: The file cannot be used.
        """
        model = GgufModel(path, vocabulary_only=True)
        return cls(model.vocabulary, model, lookup)

    def another(self) -> "PromptLookupDrafter":
        other = PromptLookupDrafter(self._vocabulary, self._codec, self._lookup, name=self._name)
        other._owns = False
        return other

    def reset(self, tokens: Sequence[int]) -> None:
        require_tokens(tokens, self._vocabulary)
        common = common_prefix(self._index.tokens.tolist(), tokens)
        self._index.truncate(common)
        self._index.append(tokens[common:])

    def extend(self, tokens: Sequence[int]) -> None:
        require_tokens(tokens, self._vocabulary)
        self._index.append(tokens)

    def next(self, policy: SamplingPolicy) -> Dist | None:  # noqa: ARG002 - a certain token is certain at any temperature
        """Return what followed the latest of the longest earlier matches of the sequence's end, or None."""
        if not len(self._index):
            raise DrafterError("Prompt lookup has nothing to go on: the sequence is empty.")
        if len(self._index) > self._lookup.context:
            raise DrafterError(f"Prompt lookup's context of {self._lookup.context} tokens is full.")
        match = self._index.find(self._index.tokens)
        # The first of the longest is the latest.
        return None if match is None else point_mass(match.followers[match.alike.index(max(match.alike))])

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on."""
        self._index.truncate(length)


def load(settings: DeviceSettings) -> PromptLookupDrafter:
    """Load the vocabulary of the model file that the settings name.

    Raises:
        DrafterError: It cannot be found or loaded.
    """
    located = locate_model(settings.model, folder=settings.models_dir)
    return PromptLookupDrafter.from_gguf(located.path, Lookup(context=settings.context))
