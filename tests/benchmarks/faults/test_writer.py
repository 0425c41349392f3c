import pytest

from benchmarks.client_process import Identity
from benchmarks.faults.writer import Task, verdict
from schemas.policy import Mode, SamplingPolicy
from tests.support.scripted_language import LANGUAGE, reference_text

PROMPT = (5, 6)
LENGTH = 30


def policy(mode: Mode) -> SamplingPolicy:
    return SamplingPolicy(mode=mode, temperature=0.8, top_k=12, top_p=0.95, seed=4)


@pytest.mark.parametrize("mode", Mode)
def test_a_text_that_is_lost_in_part_duplicated_or_altered_is_found(mode: Mode) -> None:
    text = reference_text(PROMPT, policy(mode), LENGTH)
    assert verdict(PROMPT, policy(mode), text, text) is None
    assert verdict(PROMPT, policy(mode), text, text[:-1]) == "torn"
    for wrong in (
        [*text[:9], *text[10:]],  # lost
        [*text[:9], text[8], *text[9:]],  # duplicated
        [*text[:9], (text[9] + 1) % LANGUAGE.size, *text[10:]],  # altered
    ):
        assert verdict(PROMPT, policy(mode), wrong, wrong) == "altered"


def test_a_task_comes_out_of_its_line_as_it_went_in() -> None:
    task = Task("home", Identity("device-1", "127.0.0.1", 8883, "ca", "cert", "key"), "1", 4, 9, 0.1, 0.0)
    assert Task.from_json(task.to_json()) == task
