import pytest

from fleet_edge.errors import DraftFault
from schemas.messages import Draft
from schemas.policy import Mode
from schemas.reasons import Action, FaultCode, Finish
from tests.support.drafts import LIMITS, draft


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (draft((4,) * 5), FaultCode.TOO_LONG),
        (draft((4, 5), base=19), FaultCode.TOO_LONG),
        (draft((4, 10)), FaultCode.TOKEN),
        (draft((4,), fix=10, text=(10,)), FaultCode.TOKEN),
        (draft((0, 4)), FaultCode.TOKEN),
        (draft((4, 5), counted=False), FaultCode.COUNTS),
    ],
    ids=["long", "beyond the text", "token", "fix", "behind the end", "no counts"],
)
def test_a_draft_that_no_text_could_take_is_refused_for_good(message: Draft, code: FaultCode) -> None:
    with pytest.raises(DraftFault) as caught:
        LIMITS.check(message, mode=Mode.RESIDUAL)
    assert (caught.value.code, caught.value.action) == (code, Action.GIVE_UP)


def test_counts_are_refused_in_coupled_mode() -> None:
    with pytest.raises(DraftFault) as caught:
        LIMITS.check(draft((4,)), mode=Mode.COUPLED)
    assert caught.value.code is FaultCode.COUNTS


@pytest.mark.parametrize(
    ("message", "mode"),
    [
        (draft((4, 5, 6, 7), base=16), Mode.RESIDUAL),
        (draft((4, 0)), Mode.RESIDUAL),
        (draft((), counted=False, tried=16), Mode.RESIDUAL),
        (draft((9,), counted=False), Mode.COUPLED),
    ],
    ids=["longest and last", "end", "samples", "coupled"],
)
def test_what_keeps_to_the_limits_passes(message: Draft, mode: Mode) -> None:
    LIMITS.check(message, mode=mode)


@pytest.mark.parametrize(
    ("tokens", "committed", "finish"),
    [((), 0, Finish.NO), ((0, 4), 19, Finish.NO), ((4,), 20, Finish.LENGTH), ((4, 0), 20, Finish.STOP)],
)
def test_a_text_ends_with_an_end_token_or_at_its_length(
    tokens: tuple[int, ...], committed: int, finish: Finish
) -> None:
    assert LIMITS.finish(tokens, committed=committed) is finish
