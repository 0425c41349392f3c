"""Replays a draft model's recorded distributions along a known output, with its own time per token.

In coupled mode an output is known in advance, and a draft model's distribution at each position can be recorded once.
A replay is accepted as often as the model itself, without its computation: so a hundred devices, each with its own
processor, can be measured on one machine.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fleet_device.drafters.contract import TextCodec
from sampling.distribution import Dist, point_mass
from schemas.policy import SamplingPolicy
from schemas.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class RecordedText:
    category: str
    prompt: tuple[int, ...]
    policy: SamplingPolicy
    tokens: tuple[int, ...]
    dists: tuple[Dist, ...]


def mostly_right(
    prompt: Sequence[int], tokens: Sequence[int], policy: SamplingPolicy, vocabulary: Vocabulary
) -> RecordedText:
    """Return a record in which the draft model is sure of each token, and wrong at every fourth."""
    drafted = (
        (token + 1) % vocabulary.size if place % 4 == 0 else token
        for place, token in enumerate(tokens, start=len(prompt))
    )
    return RecordedText("", tuple(prompt), policy, tuple(tokens), tuple(map(point_mass, drafted)))


class RecordedDrafter:
    """A `Drafter` that replays a record.

    After a token that will be rejected it continues with what was recorded for the position: nobody uses that.
    """

    def __init__(
        self,
        codec: TextCodec,
        vocabulary: Vocabulary,
        *,
        token_s: float = 0.0,
        quantization: str = "none",
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.name = "recorded"
        self.quantization = quantization
        self.codec = codec
        self.vocabulary = vocabulary
        self.context = 1 << 20
        self._token_s = token_s
        self._sleep = sleep
        self._text: RecordedText | None = None
        self._length = 0
        self._computed = 0

    def play(self, text: RecordedText) -> None:
        self._text, self._length, self._computed = text, 0, 0

    def reset(self, tokens: Sequence[int]) -> None:
        self._length = len(tokens)
        self._computed = max(self._computed, len(tokens) - 1)

    def extend(self, tokens: Sequence[int]) -> None:
        self._length += len(tokens)

    def next(self, policy: SamplingPolicy) -> Dist | None:  # noqa: ARG002 - recorded under it
        """Return the recorded distribution, after the time of the model; None after the record's end."""
        text = self._text
        assert text is not None
        place = self._length - len(text.prompt)
        if not 0 <= place < len(text.dists):
            return None
        # Tokens since the last one, such as a bonus token, are read as well, each in its time.
        self._sleep(self._token_s * max(1, self._length - max(self._computed, len(text.prompt))))
        self._computed = self._length
        return text.dists[place]

    def truncate(self, length: int) -> None:
        self._length = min(self._length, length)
        self._computed = min(self._computed, length)

    def close(self) -> None:
        """Nothing is held."""
