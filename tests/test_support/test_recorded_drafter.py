from dssd.distribution import point_mass
from fleet_device.drafters.without_model import WordCodec
from schemas.policy import SamplingPolicy
from schemas.vocabulary import Vocabulary
from tests.support.recorded_drafter import RecordedDrafter, RecordedText

WORDS = tuple(f"w{number}" for number in range(12))
POLICY = SamplingPolicy(seed=1)
TEXT = RecordedText("chat", (1, 2, 3), POLICY, (4, 5, 6, 7), tuple(map(point_mass, (4, 5, 9, 7))))


def drafter(slept: list[float]) -> RecordedDrafter:
    made = RecordedDrafter(WordCodec(WORDS, (0,)), Vocabulary.of(WORDS), token_s=0.5, sleep=slept.append)
    made.play(TEXT)
    made.reset(TEXT.prompt)
    return made


def test_at_each_position_it_says_what_was_recorded_there_and_behind_the_end_nothing() -> None:
    played = drafter([])
    said = []
    for token in TEXT.tokens:
        dist = played.next(POLICY)
        said.append(int(dist.ids[0]))
        played.extend((token,))
    assert said == [4, 5, 9, 7]
    assert played.next(POLICY) is None


def test_a_token_takes_its_time_and_one_that_came_from_the_edge_is_read_too() -> None:
    slept: list[float] = []
    played = drafter(slept)
    for token in TEXT.tokens[:2]:
        played.next(POLICY)
        played.extend((token,))
    assert slept == [0.5, 0.5]
    played.extend((6,))  # after an accepted draft: the edge's own token
    played.next(POLICY)
    assert slept[2:] == [1.0]
