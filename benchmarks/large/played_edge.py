"""Edge whose target writes the known text, in steps that take as long as a measured curve says.

All of the real edge but the model: so a machine's step times can be replayed on one that is slower, or busy.
"""

import os
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Final
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from benchmarks.large.models import VOCABULARY, successors
from fleet_cli.main import main as fleet
from fleet_device.drafters.model_file import GgufModel
from fleet_edge import edge
from fleet_edge.settings import EdgeSettings
from fleet_edge.step_curve import read_curve
from fleet_edge.verifiers.contract import Item, TargetInfo, TokenVerifier
from tests.support.played_steps import CURVE, step_s

_BUDGET: Final = 1 << 18
_LOGIT: Final = 30.0


class PlayedVerifier(TokenVerifier):
    def __init__(self, settings: EdgeSettings) -> None:
        with closing(GgufModel(Path(settings.target), vocabulary_only=True)) as model:
            vocabulary = model.vocabulary
        super().__init__(TargetInfo("played", vocabulary, settings.context or 1023, ()).identified(b"played"), _BUDGET)
        self._curve = read_curve(Path(os.environ[CURVE]))
        self._following = successors()
        self._rows = np.zeros((0, VOCABULARY), dtype=np.float32)

    def score(self, items: Sequence[Item]) -> NDArray[np.float32]:
        began = time.perf_counter()
        self._check(items)
        self._commit(items)
        following = [self._following[list(item.tokens[-item.rows :])] for item in items if item.rows]
        chosen = np.concatenate(following) if following else np.empty(0, np.int64)
        if len(chosen) > len(self._rows):
            self._rows = np.zeros((len(chosen), VOCABULARY), dtype=np.float32)
        rows = self._rows[: len(chosen)]
        rows[:] = 0.0
        rows[np.arange(len(chosen)), chosen] = _LOGIT
        time.sleep(max(0.0, step_s(self._curve, items) - (time.perf_counter() - began)))
        return rows


if __name__ == "__main__":
    with patch.object(edge, "load_verifier", PlayedVerifier):
        fleet()
