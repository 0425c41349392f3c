"""`fleet device run` with the drafts of a model of another processor, for a random target of `large`.

`PLAYED_DRAFTS` says which share of the tokens is right, and how many milliseconds one takes. Prompts take no time,
because the edge computes the same prompt meanwhile, and takes longer.
"""

import os
import time
from collections.abc import Sequence
from typing import Final, Self
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from benchmarks.large.models import FIRST, successors
from fleet_cli import device
from fleet_cli.main import main as fleet
from fleet_device.drafters.contract import TextCodec, require_tokens
from fleet_device.drafters.model_file import GgufModel, locate_model
from fleet_device.drafters.without_model import WithoutWeights
from fleet_device.settings import DeviceSettings
from sampling.distribution import Dist, point_mass
from schemas.policy import SamplingPolicy
from schemas.vocabulary import Vocabulary

PLAYED_DRAFTS: Final = "PLAYED_DRAFTS"
_CONTEXT: Final = 1 << 15
_SEED: Final = 3


class PlayedDrafter(WithoutWeights):
    """A `Drafter` that follows the target's walk, but at some positions: `right` says where it is right."""

    name = "played"

    def __init__(
        self, vocabulary: Vocabulary, codec: TextCodec, right: NDArray[np.bool], token_s: float, *, own: bool = True
    ) -> None:
        super().__init__(vocabulary, codec, context=len(right))
        self.owns_file = own
        self._following = successors()
        self._right = right
        self._token_s = token_s
        self._tokens: list[int] = []
        self._read = 0

    def another(self) -> Self:
        return type(self)(self.vocabulary, self.codec, self._right, self._token_s, own=False)

    def reset(self, tokens: Sequence[int]) -> None:
        require_tokens(tokens, self.vocabulary)
        self._tokens[:] = tokens
        self._read = len(tokens) - 1

    def extend(self, tokens: Sequence[int]) -> None:
        require_tokens(tokens, self.vocabulary)
        self._tokens += tokens

    def next(self, policy: SamplingPolicy) -> Dist:  # noqa: ARG002 - it is sure of each token
        # Tokens since the last one, such as a bonus token, are read as well, each in its time.
        time.sleep(self._token_s * max(1, len(self._tokens) - self._read))
        self._read = len(self._tokens)
        token = int(self._following[self._tokens[-1]])
        return point_mass(token if self._right[len(self._tokens) - 1] else _other(token))

    def truncate(self, length: int) -> None:
        del self._tokens[max(length, 0) :]
        self._read = min(self._read, len(self._tokens))


def load_played(settings: DeviceSettings, acceptance: float, token_ms: float) -> PlayedDrafter:
    model = GgufModel(locate_model(settings.model, folder=settings.models_dir).path, vocabulary_only=True)
    right = np.random.default_rng(_SEED).random(_CONTEXT) < acceptance
    return PlayedDrafter(model.vocabulary, model, right, token_ms / 1e3)


def _load(settings: DeviceSettings) -> PlayedDrafter:
    acceptance, token_ms = map(float, os.environ[PLAYED_DRAFTS].split())
    return load_played(settings, acceptance, token_ms)


def _other(token: int) -> int:
    return token - 1 if token > FIRST else token + 1


if __name__ == "__main__":
    with patch.object(device, "load_drafter", _load):
        fleet()
