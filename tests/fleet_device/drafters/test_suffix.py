from collections.abc import Sequence

import numpy as np
import pytest

from fleet_device.drafters.suffix import Speculation, SuffixDrafter, Trust, speculate
from fleet_device.drafters.suffix_index import History, Match
from fleet_device.drafters.without_model import WordCodec
from sampling.distribution import Dist, point_mass
from schemas.policy import SamplingPolicy
from schemas.vocabulary import Vocabulary

WORDS = tuple(f"w{number}" for number in range(60))
POLICY = SamplingPolicy(temperature=1.0, top_k=0, top_p=1.0, seed=1)
REPORT = list(range(10, 40))


class Model:
    """A draft model that always returns 0, takes 10 ms per token and counts the tokens it reads."""

    name, quantization, context = "model", "none", 4096
    vocabulary, codec = Vocabulary.of(WORDS), WordCodec(WORDS, (0,))

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.read = 0
        self.now = 0.0
        self.asked = 0

    def reset(self, tokens: Sequence[int]) -> None:
        self.tokens[:] = tokens

    def extend(self, tokens: Sequence[int]) -> None:
        self.tokens += tokens

    def truncate(self, length: int) -> None:
        del self.tokens[length:]

    def next(self, policy: SamplingPolicy) -> Dist:
        del policy
        self.asked += 1
        unread = len(self.tokens) - min(self.read, len(self.tokens))
        self.now += 0.010 + 0.004 * max(0, unread - 1)
        self.read = len(self.tokens)
        return point_mass(0)

    def close(self) -> None:
        pass


def before(model: Model, history: History | None = None) -> SuffixDrafter:
    return SuffixDrafter(
        model,
        vocabulary=model.vocabulary,
        codec=model.codec,
        context=model.context,
        history=history,
        clock=lambda: model.now,
    )


def history_of(*texts: Sequence[int]) -> History:
    history = History(memory_bytes=100_000)
    for text in texts:
        history.remember([], text)
    return history


def alone(history: History | None = None) -> SuffixDrafter:
    codec = WordCodec(WORDS, (0,))
    return SuffixDrafter(None, vocabulary=Vocabulary.of(WORDS), codec=codec, context=96, history=history)


def follower(drafter: SuffixDrafter) -> int | None:
    dist = drafter.next(POLICY)
    return None if dist is None else int(dist.ids[0])


def test_what_was_written_before_is_drafted_and_so_is_what_the_text_has_said() -> None:
    drafter = alone(history_of(REPORT))
    drafter.reset([1, 2, 12, 13])
    assert follower(drafter) == 14
    drafter.extend([14, 1, 2])
    assert follower(drafter) == 12
    drafter.extend([5])
    assert follower(drafter) is None


def test_what_was_taken_back_is_not_found() -> None:
    drafter = alone()
    drafter.reset([1, 2, 3, 4, 1])
    drafter.extend([2])
    assert follower(drafter) == 3
    drafter.truncate(2)
    drafter.extend([5, 1, 2])
    assert follower(drafter) == 5


def test_the_history_is_one_for_all_sequences_and_a_sequence_alone_has_its_own_text() -> None:
    history = History(memory_bytes=100_000)
    first, second = alone(history), alone(history)
    first.reset([1, 2])
    second.reset([1, 2, 3, 1, 2])
    assert follower(first) is None
    first.remember([1], REPORT)
    second.reset([20, 21])
    assert follower(second) == 22


def test_before_a_model_whoever_plans_says_which_of_the_two_drafts() -> None:
    model = Model()
    drafter = before(model, history_of(REPORT))
    drafter.reset([1, 12, 13])
    assert follower(drafter) == 0
    drafter.begin_draft(repeats=True)
    assert follower(drafter) == 14
    drafter.begin_draft(repeats=False)
    assert follower(drafter) == 0
    assert model.asked == 2


def test_a_draft_from_earlier_text_ends_where_it_would_hardly_stand() -> None:
    drafter = before(Model(), history_of(REPORT, REPORT, REPORT))
    drafter.reset([1, *REPORT[:8]])
    prospect = drafter.prospect(POLICY)
    assert list(prospect.chances) == sorted(prospect.chances, reverse=True)
    drafter.begin_draft(repeats=True, least=prospect.chances[2])
    drafted = []
    while (token := follower(drafter)) is not None:
        drafted.append(token)
        drafter.extend([token])
    assert drafted == REPORT[8:11]


def test_there_is_no_prospect_where_nothing_is_alike_and_it_says_whether_there_is_a_model() -> None:
    drafter = before(Model(), history_of(REPORT))
    for unlikely in ([1, 2, 3], [1, 12, 13]):  # nothing is alike, or so little that it says nothing
        drafter.reset(unlikely)
        assert drafter.prospect(POLICY) is None
    for each, without_model in ((drafter, False), (alone(history_of(REPORT)), True)):
        each.reset([1, *REPORT[:8]])
        prospect = each.prospect(POLICY)
        assert prospect.alone == without_model


def test_what_is_final_says_how_far_it_is_trusted() -> None:
    history = history_of(*[REPORT] * 3)
    drafter, misled = before(Model(), history), before(Model(), history)
    for each, text in ((drafter, REPORT), (misled, [token for token in REPORT for token in (token, 50)])):
        for _ in range(6):
            each.reset([1])
            each.extend(text[:20])
            each.observe(21)
    worth = []
    for each in (drafter, misled):
        each.reset([2, 10, 11])
        prospect = each.prospect(POLICY)
        worth.append(0.0 if prospect is None else prospect.chances[0])
    assert worth[0] > 0.6


def test_nothing_is_learnt_from_a_prompt_nor_twice_nor_from_what_is_drafted() -> None:
    drafter = before(Model(), history_of(REPORT))
    learnt: list[int] = []

    class Listener(Trust):
        def learn(self, speculation: Speculation, token: int) -> None:
            del speculation
            learnt.append(token)

    drafter._trust = Listener()
    drafter.reset([1, *REPORT[:10]])
    drafter.observe(11)
    assert learnt == []
    drafter.extend(REPORT[10:16])
    drafter.observe(13)
    drafter.observe(13)
    assert learnt == REPORT[10:12]
    drafter.truncate(15)
    drafter.extend([59])
    drafter.observe(16)
    assert learnt == [*REPORT[10:14], 59]


def test_what_the_model_reads_late_is_no_part_of_its_time_for_a_token() -> None:
    model = Model()
    drafter = before(model, history_of(REPORT))
    drafter.reset([1, 2])
    for _ in range(3):
        drafter.next(POLICY)
        drafter.extend([3])
    drafter.caught_up_s()
    drafter.extend(REPORT[9:18])  # from edge-only decoding
    drafter.next(POLICY)
    assert drafter.caught_up_s() == 0.0
    drafter.begin_draft(repeats=True)
    drafter.extend(REPORT[:9])
    drafter.begin_draft(repeats=False)
    drafter.next(POLICY)
    assert drafter.caught_up_s() == pytest.approx(9 * 0.004, abs=0.004)
    assert drafter.caught_up_s() == 0.0
    prospect = drafter.prospect(POLICY)
    assert prospect.catch_up_s == pytest.approx(0.004, abs=0.0005)


def test_of_what_followed_only_what_is_allowed_is_drafted() -> None:
    drafter = alone(history_of([5, 6, 7, 8], [5, 6, 9, 8], [5, 6, 7, 8]))
    drafter.reset([1, 5, 6])
    dist = drafter.next_allowed(POLICY, np.array([8, 9]))
    assert (dist.ids.tolist(), dist.probs.tolist()) == ([9], [1.0])
    assert drafter.next_allowed(POLICY, np.array([8])) is None


def test_a_new_sequence_is_the_models_until_a_draft_is_taken_from_earlier_text() -> None:
    drafter = before(Model(), history_of(REPORT))
    drafter.reset([1, 12, 13])
    drafter.begin_draft(repeats=True)
    drafter.reset([1, 12, 13, 14])
    assert follower(drafter) == 0


POLICY = SamplingPolicy(temperature=1.0, seed=1)


def match(followers: list[int], alike: list[int]) -> Match:
    return Match(followers, alike)


def test_what_followed_is_speculated_with_its_counts() -> None:
    speculation = speculate([match([7, 4, 7], [8, 8, 8]), match([7], [8])], POLICY)
    assert speculation.dist.ids.tolist() == [7, 4]
    assert speculation.dist.probs.tolist() == [0.75, 0.25]
    assert speculation.likeliest == 7


def test_a_place_that_is_more_alike_counts_for_more() -> None:
    speculation = speculate([match([7, 4], [2, 5])], POLICY)
    assert speculation.likeliest == 4
    assert speculation.dist.probability(7) == pytest.approx(1 / 9)


def test_a_greedy_policy_has_the_likeliest_alone() -> None:
    speculation = speculate([match([7, 4, 7], [8, 8, 8])], SamplingPolicy(temperature=0.0, seed=1))
    assert speculation.dist.ids.tolist() == [7]
    assert speculation.dist.probs.tolist() == [1.0]


def test_trust_is_what_guesses_of_a_kind_have_earned() -> None:
    trust = Trust()
    sure, unsure = (
        speculate([match([7] * 6, [16] * 6)], POLICY),
        speculate([match([7, 8], [2, 2])], POLICY),
    )
    assert trust.of(sure) > 2 * trust.of(unsure)
    before = trust.of(unsure)
    for _ in range(50):
        trust.learn(sure, 9)
    assert trust.of(sure) < 0.1
    assert trust.of(unsure) == before
    for _ in range(100):
        trust.learn(sure, 7)
    assert trust.of(sure) > 0.75
