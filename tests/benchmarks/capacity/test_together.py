import numpy as np
import pytest

from benchmarks.capacity.serving import Prompt
from benchmarks.capacity.together import Together, write_all
from benchmarks.exactness.laws import LENGTH, law
from dssd.distribution import shape
from dssd.sampling import coupled_token
from fleet_edge.verifiers.scripted import ScriptedVerifier
from schemas.policy import Mode
from tests.support.statistics import p_value
from tests.support.toy_pair import END_TOKENS, PROMPT, ToyPair, policy

_TEXTS = 1000
_ALARM = 1e-4


def prompts(mode: Mode, number: int, most: int) -> list[Prompt]:
    return [Prompt(PROMPT, policy(mode, seed), most) for seed in range(number)]


def together(length: int) -> Together:
    pair = ToyPair.standard()
    target = ScriptedVerifier(pair.target, pair.target.words, context=512, end_tokens=END_TOKENS)
    return Together(target, ScriptedVerifier(pair.draft, pair.draft_words, context=512), length=length)


def own_text(seed: int, tokens: int) -> list[int]:
    """Return what the toy target writes in coupled mode."""
    text: list[int] = []
    script = ToyPair.standard().target
    while len(text) < tokens and not (text and text[-1] in END_TOKENS):
        row = script.logits((*PROMPT, *text))
        text.append(coupled_token(shape(row, policy(Mode.COUPLED, seed)), seed, len(text)))
    return text


@pytest.mark.parametrize("length", [1, 4])
def test_many_texts_at_once_are_the_targets_own_in_coupled_mode(length: int) -> None:
    asked = prompts(Mode.COUPLED, 20, 9)
    slots = write_all(together(length), asked)
    assert [slot.text for slot in slots] == [own_text(prompt.policy.seed, 9) for prompt in asked]


def test_texts_in_residual_mode_follow_the_targets_law() -> None:
    # Seeds are fixed; a right program would fail with a probability of 10^-4.
    counts = np.zeros((6,) * LENGTH, dtype=np.int64)
    for slot in write_all(together(2), prompts(Mode.RESIDUAL, _TEXTS, LENGTH)):
        counts[tuple(slot.text + [slot.text[-1]] * (LENGTH - len(slot.text)))] += 1
    assert p_value(counts.ravel(), law(Mode.RESIDUAL, ToyPair.standard()).ravel()) > _ALARM


def test_long_prompts_are_computed_in_pieces_beside_texts_that_are_written() -> None:
    engine = together(2)
    # The first text has not come to its end, of itself, before the prompt is computed: 128 tokens a step.
    seed = next(seed for seed in range(100) if len(own_text(seed, 60)) > 10)
    engine.begin(0, Prompt(PROMPT, policy(Mode.COUPLED, seed), 60))
    engine.begin(1, Prompt(PROMPT * 301, policy(Mode.COUPLED, 1), 4))
    found = [engine.step() for _ in range(4)]
    assert [sorted(each) for each in found] == [[0], [0], [0], [0, 1]]
