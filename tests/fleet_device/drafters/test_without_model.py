from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fleet_device.drafters.suffix import load
from fleet_device.drafters.without_model import ScriptedDrafter
from fleet_device.settings import DeviceSettings
from schemas.policy import SamplingPolicy
from schemas.vocabulary import Vocabulary
from tests.support.tiny_gguf import tiny_gguf, tiny_words

WORDS = ("end", "a", "b")


class Fixed:
    def __init__(self, row: Sequence[float]) -> None:
        self.row = np.array(row)

    def logits(self, prefix: Sequence[int]) -> NDArray[np.float64]:
        assert list(prefix) == [1, 2]
        return self.row


def drafter(row: Sequence[float]) -> ScriptedDrafter:
    made = ScriptedDrafter(Fixed(row), WORDS)
    made.reset([1, 2])
    return made


def test_a_gguf_gives_vocabulary_and_text(tmp_path: Path) -> None:
    drafter = load(DeviceSettings(model=str(tiny_gguf(tmp_path / "tiny.gguf"))))
    assert drafter.vocabulary == Vocabulary.of(tiny_words())
    drafter.reset(drafter.codec.encode("the end of the"))
    assert drafter.next(SamplingPolicy(seed=1)) is None  # one common token is too little
    drafter.extend(drafter.codec.encode(" end of the"))
    dist = drafter.next(SamplingPolicy(seed=1))
    assert dist is not None
    assert drafter.codec.piece(int(dist.ids[0])) == b" "
    drafter.close()
