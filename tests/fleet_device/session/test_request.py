from typing import Any

import pytest

from fleet_device.errors import SessionRefused
from fleet_device.session.sequence import SessionRequest
from schemas.bounds import MAX_TOKENS
from schemas.policy import SamplingPolicy
from schemas.reasons import RefusalCode
from schemas.vocabulary import Vocabulary

VOCABULARY = Vocabulary.of([f"t{token}" for token in range(10)])


def terms(**fields: Any) -> SessionRequest:
    whole = {
        "session": b"session1", "prompt": (1, 2), "policy": SamplingPolicy(), "max_new_tokens": 20,
        "vocabulary": VOCABULARY, "draft_model": "toy", "quantization": "none",
    }  # fmt: skip
    return SessionRequest(**(whole | fields))


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"prompt": (1,) * (MAX_TOKENS + 1)}, RefusalCode.PROMPT_TOO_LONG),
        ({"max_new_tokens": MAX_TOKENS + 1}, RefusalCode.MAX_NEW_TOKENS),
        ({"max_new_tokens": -1}, RefusalCode.MAX_NEW_TOKENS),
    ],
    ids=["prompt", "text", "negative"],
)
def test_what_no_open_can_carry_is_refused_at_once(fields: dict[str, Any], code: RefusalCode) -> None:
    with pytest.raises(SessionRefused) as caught:
        terms(**fields)
    assert caught.value.code is code


def test_long_names_of_models_are_cut() -> None:
    asked = terms(draft_model="m" * 5000, quantization="q" * 5000).open(attempt=0, text=[])
    assert (len(asked.draft_model), len(asked.quantization)) == (200, 200)


@pytest.mark.parametrize(
    ("attempt", "text", "resume"), [(0, [], None), (0, [4], (4,)), (1, [], ()), (1, [4, 5], (4, 5))]
)
def test_every_open_but_the_first_of_an_empty_text_tells_the_text(
    attempt: int, text: list[int], resume: tuple[int, ...] | None
) -> None:
    asked = terms().open(attempt=attempt, text=text)
    assert (asked.attempt, asked.resume, asked.prompt, asked.max_new_tokens) == (attempt, resume, (1, 2), 20)
