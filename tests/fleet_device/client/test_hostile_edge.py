import itertools
from collections.abc import Callable
from typing import Final

import pytest
from hypothesis import given, settings, strategies as st

from fleet_device.errors import DeviceError
from fleet_device.pacing.contract import FixedPacing
from schemas.control import Presence
from schemas.downlink import Samples, Sparse
from schemas.messages import Draft, Open
from schemas.policy import Mode
from schemas.reasons import Action, FaultCode, Finish, RefusalCode
from tests.support.memory_fleet import TARGET
from tests.support.scripted_edge import Answers, LoneDevice, ScriptedEdge, accepted, closed, fault, opened, refusal

MOST: Final = 8
"""Requested tokens."""

OnOpen = Callable[[Open], Answers]
OnDraft = Callable[[Open, Draft], Answers]

RARE = 1e-6
"""So unlikely that no sample passes."""


def hopeless(_message: Open, draft: Draft) -> Answers:
    if not draft.tokens and draft.tried is None:
        return [accepted(draft)]
    start = draft.tried or 0
    return [accepted(draft, accepted=0, next=Samples(start=start, ids=(draft.tokens or (1,))[:1], probs=(RARE,)))]


def rejected_with(following: object) -> OnDraft:
    return lambda _message, draft: [accepted(draft, accepted=0, next=following)]


def faulted(code: FaultCode, action: Action, retry_s: float | None = None) -> OnDraft:
    return lambda _message, draft: [fault(draft, action, retry_s, code=code)]


def refusing(code: RefusalCode, retry_s: float | None = None) -> OnOpen:
    return lambda message: [refusal(message, code, retry_s)]


def one_token_and_again() -> OnDraft:
    turns = itertools.cycle((False, True))

    def answer(_message: Open, draft: Draft) -> Answers:
        if next(turns):
            return [fault(draft, Action.RESUME, code=FaultCode.TOKENS_DIFFER)]
        return [accepted(draft, accepted=0, next=_law()) if draft.tokens else accepted(draft)]

    return answer


def _law() -> Sparse:
    return Sparse(ids=tuple(range(1, TARGET.size)), probs=(1.0 / (TARGET.size - 1),) * (TARGET.size - 1))


def flapping(message: Open) -> Answers:
    del message
    return [Presence.OFFLINE, Presence.ONLINE]


EDGES: Final[dict[str, tuple[OnOpen, OnDraft]]] = {
    "samples that never pass": (lambda m: [opened(m)], hopeless),
    "a limit above the one asked for": (lambda m: [opened(m, max_new_tokens=1000)], lambda _m, d: [accepted(d)]),
    "a token behind the last": (lambda m: [opened(m)], lambda _m, d: [accepted(d, next=1)]),
    "a text that is always another": (lambda m: [opened(m)], faulted(FaultCode.TOKENS_DIFFER, Action.RESUME)),
    "a session that is always unknown": (lambda m: [opened(m)], faulted(FaultCode.UNKNOWN_SESSION, Action.RESUME)),
    "a token, and the text is another": (lambda m: [opened(m)], one_token_and_again()),
    "a session that is over at once": (lambda m: [opened(m), closed(m)], lambda _m, _d: ()),
    "a session that is over at its first draft": (lambda m: [opened(m)], lambda m, _d: [closed(m)]),
    "a draft that always waits": (lambda m: [opened(m)], faulted(FaultCode.QUOTA, Action.WAIT, 0.0)),
    "a draft that waits without a time": (lambda m: [opened(m)], faulted(FaultCode.QUOTA, Action.WAIT)),
    "a draft that waits for ever": (lambda m: [opened(m)], faulted(FaultCode.QUOTA, Action.WAIT, 1e300)),
    "an Open that always waits": (refusing(RefusalCode.QUOTA, 0.0), lambda _m, _d: ()),
    "an Open that waits for ever": (refusing(RefusalCode.QUARANTINED, 1e300), lambda _m, _d: ()),
    "an edge that always ends": (refusing(RefusalCode.DRAINING), lambda _m, _d: ()),
    "an edge that comes and goes": (flapping, lambda _m, _d: ()),
    "an edge that comes and goes behind its grant": (
        lambda m: [opened(m), Presence.OFFLINE, Presence.ONLINE],
        lambda _m, _d: (),
    ),
    "an edge that is silent": (lambda _m: (), lambda _m, _d: ()),
    "an edge that grants and is silent": (lambda m: [opened(m)], lambda _m, _d: ()),
    "another edge's name": (lambda m: [opened(m, edge="edge-9")], lambda _m, _d: ()),
    "no correction": (lambda m: [opened(m)], rejected_with(None)),
    "p of the rejected token alone": (
        lambda m: [opened(m)],
        lambda _m, d: [accepted(d, accepted=0, next=Sparse(ids=(d.tokens or (1,))[:1], probs=(1.0,)))],
    ),
    "samples from elsewhere": (lambda m: [opened(m)], rejected_with(Samples(start=9, ids=(1,), probs=(1.0,)))),
    "a grant at another place": (lambda m: [opened(m, position=3)], lambda _m, _d: ()),
    "a grant of no room": (lambda m: [opened(m, max_new_tokens=1, max_draft=0, window=1)], lambda _m, d: [accepted(d)]),
    "everything is an end": (lambda m: [opened(m, end_tokens=tuple(range(6)))], lambda _m, d: [accepted(d)]),
    "an end at once": (lambda m: [opened(m)], lambda _m, d: [accepted(d, next=None, finish=Finish.STOP)]),
}


def bound(tokens: int) -> int:
    """Return how many messages a request of `tokens` tokens may cost, whatever the edge answers.

    A token may take a draft and 32 requests for more samples. Each token, and the request, may restart a number of
    times with as many drafts as are in flight. Nothing else is repeated unless nothing arrives for a second.
    """
    return (tokens + 1) * (1 + 32) + (tokens + 20) * (1 + 8) + 150


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("pacing", [FixedPacing(3), FixedPacing(2, ahead=True)], ids=["waiting", "ahead"])
@pytest.mark.parametrize("edge", EDGES)
def test_a_text_ends_whatever_the_edge_answers(edge: str, pacing: FixedPacing, mode: Mode) -> None:
    device = LoneDevice(pacing=pacing, most=4 * bound(MOST))
    on_open, on_draft = EDGES[edge]
    hostile = ScriptedEdge(device.broker, on_open=on_open, on_draft=on_draft)
    check(device, hostile, mode=mode)


def check(device: LoneDevice, hostile: ScriptedEdge, *, mode: Mode) -> None:
    """Check that a request fails with a message or stays within its limit, after a bounded number of messages."""
    try:
        done = device.generate(mode=mode, most=MOST)
    except DeviceError as failed:
        error: DeviceError | None = failed
    else:
        error = None
        assert len(done.tokens) <= MOST
    assert error is None or is_sentence(str(error))
    assert hostile.messages <= bound(MOST)


def is_sentence(text: str) -> bool:
    return text[:1].isupper() and text.endswith(".") and "\n" not in text and len(text) < 600


@pytest.mark.parametrize("window", [1, 3, 64])
def test_no_more_drafts_are_under_way_than_the_device_allows_whatever_the_edge_grants(window: int) -> None:
    device = LoneDevice(pacing=FixedPacing(1, ahead=True), window=window)
    generous = ScriptedEdge(device.broker, on_open=lambda m: [opened(m, window=5)])
    with pytest.raises(DeviceError):
        device.generate(most=100)
    assert len({draft.round for draft in generous.drafts}) == min(window, 5)


def mixed(mode: Mode) -> dict[str, OnDraft]:
    law = 1 if mode is Mode.COUPLED else _law()
    return {
        "accept": lambda _m, d: [accepted(d)],
        "reject": rejected_with(law),
        "samples": lambda _m, d: [accepted(d, accepted=0, next=Samples(start=d.tried or 0, ids=(1,), probs=(RARE,)))],
        "tokens-differ": faulted(FaultCode.TOKENS_DIFFER, Action.RESUME),
        "unknown": faulted(FaultCode.UNKNOWN_SESSION, Action.RESUME),
        "wait": faulted(FaultCode.QUOTA, Action.WAIT, 0.1),
        "closed": lambda m, _d: [closed(m)],
        "back": lambda _m, _d: [Presence.DRAINING, Presence.ONLINE],
        "length": lambda _m, d: [accepted(d, next=None, finish=Finish.LENGTH)],
        "violate": lambda _m, d: [accepted(d, accepted=63)],
        "nothing": lambda _m, _d: (),
    }


@settings(max_examples=60, deadline=None)
@given(
    script=st.lists(st.sampled_from(sorted(mixed(Mode.COUPLED))), min_size=1, max_size=12),
    ahead=st.booleans(),
    mode=st.sampled_from(Mode),
)
def test_a_text_ends_whatever_an_edge_mixes(script: list[str], ahead: bool, mode: Mode) -> None:
    turns, ways = itertools.cycle(script), mixed(mode)

    def answer(message: Open, draft: Draft) -> Answers:
        return ways[next(turns)](message, draft)

    device = LoneDevice(pacing=FixedPacing(2, ahead=ahead), most=4 * bound(MOST))
    check(device, ScriptedEdge(device.broker, on_draft=answer), mode=mode)
