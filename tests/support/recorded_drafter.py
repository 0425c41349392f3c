"""Recorded drafter: a draft model's own distributions along a known text, and its own time for each token.

In coupled mode a text is known before it is written, and what a draft model says at each position of it may be recorded
once. Played again, it is accepted as the model itself would be, and costs no processor of this machine: so a hundred
devices, each with a processor of its own, can be measured on one.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dssd.distribution import Dist
from fleet_device.drafters.contract import TextCodec
from schemas.policy import SamplingPolicy
from schemas.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class RecordedText:
    """A text that a target writes in coupled mode, and what a draft model says along it."""

    category: str
    prompt: tuple[int, ...]
    policy: SamplingPolicy
    tokens: tuple[int, ...]
    dists: tuple[Dist, ...]


class RecordedDrafter:
    """A `Drafter` that plays a record.

    Off the text (behind a token that will be rejected) it goes on with what was recorded for the position: nobody
    will look at that.
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
        """Go over to another record."""
        self._text, self._length, self._computed = text, 0, 0

    def reset(self, tokens: Sequence[int]) -> None:
        """Stand behind the tokens; the prompt is taken as computed."""
        self._length = len(tokens)
        self._computed = max(self._computed, len(tokens) - 1)

    def extend(self, tokens: Sequence[int]) -> None:
        """Go on behind them."""
        self._length += len(tokens)

    def next(self, policy: SamplingPolicy) -> Dist | None:  # noqa: ARG002 - recorded under it
        """Return what was recorded, after the time that the model would have taken; None behind the record's end."""
        text = self._text
        assert text is not None
        place = self._length - len(text.prompt)
        if not 0 <= place < len(text.dists):
            return None
        # Tokens that have come since the last one, a bonus token say, are read with it, each at its time.
        self._sleep(self._token_s * max(1, self._length - max(self._computed, len(text.prompt))))
        self._computed = self._length
        return text.dists[place]

    def truncate(self, length: int) -> None:
        """Go back."""
        self._length = min(self._length, length)
        self._computed = min(self._computed, length)

    def close(self) -> None:
        """Nothing is held."""
