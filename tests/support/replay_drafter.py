"""Replays a recorded output, for load tests whose drafts should cost nothing."""

from collections.abc import Sequence

from dssd.distribution import Dist, point_mass
from fleet_device.drafters.contract import TextCodec
from schemas.policy import SamplingPolicy
from schemas.vocabulary import Vocabulary


class ReplayDrafter:
    """Proposes the recorded token at each position, or a wrong one at every fourth."""

    def __init__(self, codec: TextCodec, vocabulary: Vocabulary, recorded: Sequence[int]) -> None:
        self.name = "replay"
        self.quantization = "none"
        self.codec = codec
        self.vocabulary = vocabulary
        self.context = 1 << 20
        self._recorded = recorded
        self._length = 0

    def replay(self, recorded: Sequence[int]) -> None:
        self._recorded = recorded

    def reset(self, tokens: Sequence[int]) -> None:
        self._length = len(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        self._length += len(tokens)

    def next(self, policy: SamplingPolicy) -> Dist | None:  # noqa: ARG002 - what is recorded is certain
        if self._length >= len(self._recorded):
            return None
        token = self._recorded[self._length]
        if self._length % 4 == 0:
            token = (token + 1) % self.vocabulary.size
        return point_mass(token)

    def truncate(self, length: int) -> None:
        self._length = min(self._length, length)

    def close(self) -> None:
        """Nothing is held."""
