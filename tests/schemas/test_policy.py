from typing import Any

import pytest
from pydantic import ValidationError

from schemas.policy import SamplingPolicy


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": 101},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": True},
        {"temperature": "1"},
        {"top_k": -1},
        {"top_k": 1.0},
        {"top_k": True},
        {"top_k": 1_000_001},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"seed": -1},
        {"seed": 2**64},
        {"seed": True},
        {"mode": "other"},
    ],
    ids=repr,
)
def test_what_describes_no_distribution_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SamplingPolicy(**wrong)
