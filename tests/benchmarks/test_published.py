import pytest

from benchmarks.exactness.published import WAYS, Way, Writer, hold
from schemas.policy import Mode, SamplingPolicy
from tests.support.toy_pair import PROMPT

TEXTS = 3000
"""Seeds are fixed; with fresh ones a correct variant would fail once in 10,000 runs."""


@pytest.mark.parametrize("name", list(WAYS))
def test_each_mistake_is_found_and_ours_is_not(name: str) -> None:
    verdict = hold(name, texts=TEXTS, first_seed=5)
    assert verdict.as_it_should_be, verdict


def test_without_a_cache_the_target_computes_the_whole_text_for_each_draft() -> None:
    policy = SamplingPolicy(mode=Mode.RESIDUAL, temperature=0.8, top_k=0, top_p=1.0, seed=3)
    with_cache, without = Writer(Way("")), Writer(Way("", cache=False))
    for writer in (with_cache, without):
        writer.write(policy, length=96, ends=())
        assert writer.written == 96
    # Count the output, the prompt, and tokens that are rejected or drawn again after an accepted draft.
    assert 95 + len(PROMPT) <= with_cache.computed < 96 * 3
    assert without.computed > 10 * with_cache.computed
