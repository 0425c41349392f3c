import pytest

from schemas.codec import encode_verdict
from schemas.fields import EdgeLoad
from schemas.messages import Verdict

TOLD = EdgeLoad(requests=8, writing_ms=60.0, step_ms=30.0, request_ms=5.0, token_ms=2.0)


@pytest.mark.parametrize(
    "changed", [{"requests": 11}, {"requests": 5}, {"writing_ms": 81.0}, {"token_ms": 1.4}, {"step_ms": None}]
)
def test_what_has_changed_by_a_quarter_is_news(changed: dict[str, float | None]) -> None:
    now = TOLD.model_copy(update=changed)
    assert now.differs(TOLD)
    assert TOLD.differs(now)


@pytest.mark.parametrize(("told", "now"), [(3, 4), (4, 3), (13, 16)])
def test_so_is_one_text_more_of_a_few(told: int, now: int) -> None:
    """Otherwise devices that arrive one after another would each take itself for the last."""
    assert EdgeLoad(requests=now).differs(EdgeLoad(requests=told))
    assert not EdgeLoad(requests=15).differs(EdgeLoad(requests=16))


def test_what_has_changed_by_little_is_not() -> None:
    assert not TOLD.model_copy(update={"requests": 7, "writing_ms": 66.0, "token_ms": 1.6}).differs(TOLD)
    assert not TOLD.differs(TOLD)
    assert not EdgeLoad(requests=1).differs(EdgeLoad(requests=1))


def test_that_a_text_is_no_longer_by_itself_is_always_news() -> None:
    assert EdgeLoad(requests=2).differs(EdgeLoad(requests=1))


def test_of_what_is_nothing_a_little_is_news() -> None:
    assert TOLD.model_copy(update={"token_ms": 0.0}).differs(TOLD)
    nothing = TOLD.model_copy(update={"token_ms": 0.0})
    assert not nothing.differs(nothing)


def test_a_load_is_24_bytes_at_most() -> None:
    verdict = Verdict(handle=7, round=3, accepted=2, next=5)
    most = EdgeLoad(
        requests=65535, writing_ms=123.4, step_ms=41.3, request_ms=5.6, token_ms=3.3, acceptance=0.71, free=64
    )
    told = verdict.model_copy(update={"load": most})
    assert len(encode_verdict(told)) - len(encode_verdict(verdict)) <= 24
