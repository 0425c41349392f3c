from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest
from numpy.typing import NDArray

from fleet_device.drafters.contract import Drafter
from fleet_device.drafters.llama_cpp import LlamaCppDrafter, LlamaCppSettings
from fleet_device.drafters.model_file import load_drafter
from fleet_device.drafters.suffix import SuffixDrafter
from fleet_device.drafters.unlike import UnlikeVocabularyDrafter
from fleet_device.drafters.without_model import ScriptedDrafter, WordCodec
from fleet_device.settings import DRAFTERS, DeviceSettings
from schemas.policy import SamplingPolicy
from schemas.vocabulary import Vocabulary
from tests.support.tiny_gguf import tiny_gguf, tiny_hybrid_gguf

CONTEXT = 96
POLICY = SamplingPolicy(temperature=1.0, top_k=0, top_p=1.0, seed=1)
WORDS = tuple(f"w{i}" for i in range(12))
OTHER_WORDS = ("w3", "w7", "x", "w10", "y", "w0", "w4", "z", "w11", "w5", "v", "w1")
KINDS = (*DRAFTERS, "scripted", "unlike")
"""The kinds that have several sequences."""


class Make(Protocol):
    def __call__(self, sequences: int = 1) -> Drafter:
        """Return a drafter of the kind under test, with memory for a number of sequences."""


class Sums:
    def logits(self, prefix: Sequence[int]) -> NDArray[np.float64]:
        state = np.random.default_rng(list(prefix))
        return state.normal(size=len(WORDS))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def build(kind: str, tiny: Path, sequences: int) -> Drafter:
    several = {"requests_at_once": sequences, "edge_only": False} if sequences > 1 else {}
    match kind:
        case name if name in DRAFTERS:
            return load_drafter(
                DeviceSettings.model_validate({"drafter": name, "model": str(tiny), "context": CONTEXT, **several})
            )
        case "llama.cpp beside suffix":
            drafter = load_drafter(DeviceSettings(suffix=True, model=str(tiny), context=CONTEXT))
            assert isinstance(drafter, SuffixDrafter)
            return drafter
        case "llama.cpp in small batches":
            return LlamaCppDrafter(LlamaCppSettings(tiny, threads=1, context=CONTEXT, batch=16))
        case "llama.cpp, a hybrid":
            hybrid = tiny.with_name("hybrid.gguf")
            path = hybrid if hybrid.exists() else tiny_hybrid_gguf(hybrid)
            return LlamaCppDrafter(LlamaCppSettings(path, threads=1, context=CONTEXT))
        case "scripted":
            return ScriptedDrafter(Sums(), WORDS, context=CONTEXT, end_tokens=(0,))
        case _:
            inner = ScriptedDrafter(Sums(), OTHER_WORDS, context=CONTEXT, end_tokens=(5,))
            return UnlikeVocabularyDrafter(inner, Vocabulary.of(WORDS), WordCodec(WORDS, (0,)))


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest, tiny: Path) -> Iterator[Make]:
    made: list[Drafter] = []

    def make(sequences: int = 1) -> Drafter:
        made.append(build(request.param, tiny, sequences))
        return made[-1]

    yield make
    for drafter in made:
        drafter.close()
