import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dssd.distribution import Dist
from fleet_device.drafters.contract import Drafter, DrafterError
from fleet_device.drafters.llama_cpp import LlamaCppDrafter, LlamaCppSettings
from fleet_device.drafters.model_file import load_drafter
from fleet_device.drafters.suffix import SuffixDrafter
from fleet_device.drafters.unlike import UnlikeVocabularyDrafter
from fleet_device.drafters.without_model import ScriptedDrafter, WordCodec
from fleet_device.settings import DRAFTERS, NO_DRAFTER, DeviceSettings
from schemas.policy import SamplingPolicy
from schemas.vocabulary import Vocabulary
from tests.support.tiny_gguf import tiny_gguf

CONTEXT = 96
WORDS = tuple(f"w{i}" for i in range(12))
OTHER_WORDS = ("w3", "w7", "x", "w10", "y", "w0", "w4", "z", "w11", "w5", "v", "w1")
POLICY = SamplingPolicy(temperature=1.0, top_k=0, top_p=1.0, seed=1)


class Sums:
    def logits(self, prefix: Sequence[int]) -> NDArray[np.float64]:
        state = np.random.default_rng(list(prefix))
        return state.normal(size=len(WORDS))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(
    params=[
        *DRAFTERS,
        "llama.cpp in small batches",
        "llama.cpp beside suffix",
        "scripted",
        "unlike",
    ]
)
def make(request: pytest.FixtureRequest, tiny: Path) -> Iterator[Callable[[], Drafter]]:
    made: list[Drafter] = []

    def build() -> Drafter:
        drafter: Drafter
        match request.param:
            case name if name in DRAFTERS:
                drafter = load_drafter(DeviceSettings(drafter=name, model=str(tiny), context=CONTEXT))
            case "llama.cpp beside suffix":
                drafter = load_drafter(DeviceSettings(suffix=True, model=str(tiny), context=CONTEXT))
                assert isinstance(drafter, SuffixDrafter)
            case "llama.cpp in small batches":
                drafter = LlamaCppDrafter(LlamaCppSettings(tiny, threads=1, context=CONTEXT, batch=16))
            case "scripted":
                drafter = ScriptedDrafter(Sums(), WORDS, context=CONTEXT, end_tokens=(0,))
            case _:
                inner = ScriptedDrafter(Sums(), OTHER_WORDS, context=CONTEXT, end_tokens=(5,))
                drafter = UnlikeVocabularyDrafter(inner, Vocabulary.of(WORDS), WordCodec(WORDS, (0,)))
        made.append(drafter)
        return drafter

    yield build
    for drafter in made:
        drafter.close()


def equal(left: Dist | None, right: Dist | None) -> bool:
    """Compare up to rounding: llama.cpp adds up in another order in a chunk than for a single token."""
    if left is None or right is None:
        return left is right
    return all(abs(left.probability(token) - right.probability(token)) < 1e-5 for token in (*left.ids, *right.ids))


def test_any_history_gives_what_a_fresh_drafter_gives_over_the_same_tokens(make: Callable[[], Drafter]) -> None:
    used, fresh = make(), make()
    rng = random.Random(5)

    def some(most: int) -> list[int]:
        return [rng.randrange(10) for _ in range(rng.randint(1, most))]

    tokens = some(20)
    used.reset(tokens)
    compared = 0
    for _ in range(150):
        match rng.randrange(4):
            case 0 if len(tokens) < CONTEXT - 10:
                more = some(10)
                tokens = tokens + more
                used.extend(more)
            case 1 if len(tokens) > 1:
                tokens = tokens[: rng.randint(1, len(tokens))]
                used.truncate(len(tokens))
            case 2:
                tokens = tokens[: rng.randint(0, len(tokens))] + some(8)
                tokens = tokens[:CONTEXT]
                used.reset(tokens)
            case _:
                fresh.reset([11])  # shares no beginning with any sequence here
                fresh.reset(tokens)
                assert equal(used.next(POLICY), fresh.next(POLICY)), tokens
                compared += 1
    assert compared > 20


def test_next_changes_nothing(make: Callable[[], Drafter]) -> None:
    drafter = make()
    drafter.reset([3, 4, 5, 3, 4])
    first = drafter.next(POLICY)
    assert equal(first, drafter.next(POLICY))


def test_another_end_of_the_same_length_is_looked_at_anew(make: Callable[[], Drafter]) -> None:
    drafter, fresh = make(), make()
    drafter.reset([3, 4, 5, 3, 4])
    drafter.next(POLICY)
    drafter.truncate(3)
    drafter.extend([4, 5])
    fresh.reset([3, 4, 5, 4, 5])
    assert equal(drafter.next(POLICY), fresh.next(POLICY))


def test_a_distribution_is_whole_and_within_the_vocabulary(make: Callable[[], Drafter]) -> None:
    drafter = make()
    drafter.reset([3, 4, 5, 3, 4])
    dist = drafter.next(POLICY)
    if drafter.name == NO_DRAFTER:
        assert dist is None
        return
    assert dist is not None
    assert dist.ids.max() < drafter.vocabulary.size
    assert abs(dist.probs.sum() - 1.0) < 1e-5


def test_a_full_context_is_said_and_truncation_helps(make: Callable[[], Drafter]) -> None:
    drafter = make()
    assert drafter.context == CONTEXT
    drafter.reset([3] * CONTEXT)
    drafter.next(POLICY)
    drafter.extend([3])
    with pytest.raises(DrafterError, match="full"):
        drafter.next(POLICY)
    drafter.truncate(CONTEXT)
    drafter.next(POLICY)


def test_an_empty_sequence_is_refused(make: Callable[[], Drafter]) -> None:
    drafter = make()
    drafter.reset([3])
    drafter.truncate(0)
    with pytest.raises(DrafterError, match="empty"):
        drafter.next(POLICY)


def test_a_token_outside_the_vocabulary_is_refused_and_changes_nothing(make: Callable[[], Drafter]) -> None:
    drafter = make()
    drafter.reset([3, 4, 3])
    before = drafter.next(POLICY)
    for wrong in (-1, drafter.vocabulary.size, 1 << 40):
        with pytest.raises(DrafterError, match="outside"):
            drafter.extend([3, wrong])
        with pytest.raises(DrafterError, match="outside"):
            drafter.reset([wrong])
    assert equal(before, drafter.next(POLICY))


def test_truncating_beyond_the_end_is_nothing(make: Callable[[], Drafter]) -> None:
    drafter = make()
    drafter.reset([3, 4, 3])
    before = drafter.next(POLICY)
    drafter.truncate(50)
    assert equal(before, drafter.next(POLICY))


def test_closing_twice_is_allowed_and_names_are_told(make: Callable[[], Drafter]) -> None:
    drafter = make()
    assert drafter.name
    assert drafter.quantization
    assert 0 in drafter.codec.end_tokens
    drafter.close()
    drafter.close()
