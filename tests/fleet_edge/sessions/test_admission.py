from dataclasses import replace
from typing import Any

import pytest

from fleet_edge.errors import DraftFault, OpenRefused
from fleet_edge.sessions.admission import SessionOffer, grant
from fleet_edge.verifiers.contract import TargetInfo
from schemas.fields import TARGET_ID_BYTES
from schemas.messages import Draft
from schemas.policy import Mode
from schemas.reasons import FaultCode, Finish, RefusalCode
from schemas.vocabulary import Vocabulary
from tests.support.drafts import LIMITS, TOY as TARGET, draft, open_message


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
def test_a_text_ends_by_token_or_length(tokens: tuple[int, ...], committed: int, finish: Finish) -> None:
    assert LIMITS.finish(tokens, committed=committed) is finish


TERMS = SessionOffer(max_draft=5, window=3, max_new_tokens=16)


def test_the_terms_are_granted() -> None:
    limits = grant(open_message(max_new_tokens=8), target=TARGET, offer=TERMS)
    assert (limits.max_new_tokens, limits.max_draft, limits.window) == (8, 5, 3)
    assert (limits.vocabulary, limits.end_tokens) == (10, frozenset({0, 3}))


@pytest.mark.parametrize(("prompt", "asked", "granted"), [(3, 100, 16), (28, 100, 4), (31, 5, 1), (3, 1, 1)])
def test_the_text_is_as_long_as_asked_for_and_as_context_and_edge_allow(prompt: int, asked: int, granted: int) -> None:
    message = open_message(prompt=(1,) * prompt, max_new_tokens=asked)
    assert grant(message, target=TARGET, offer=TERMS).max_new_tokens == granted


def test_a_resumed_text_with_room_left_is_granted() -> None:
    assert grant(open_message(resume=(1,) * 15), target=TARGET, offer=TERMS).max_new_tokens == 16


@pytest.mark.parametrize(
    ("policy", "served"),
    [
        ({"top_k": 1}, True),
        ({"top_k": 4}, True),
        ({"top_k": 5}, False),
        ({"top_k": 0}, False),
        ({"top_k": 0, "temperature": 0.0}, True),
    ],
)
def test_a_policy_that_keeps_more_tokens_than_are_known_is_refused(policy: dict[str, Any], served: bool) -> None:
    message = open_message(max_new_tokens=8)
    message = message.model_copy(update={"policy": message.policy.model_copy(update=policy)})
    target = replace(TARGET, max_top_k=4)
    grant(message, target=TARGET, offer=TERMS)
    if served:
        grant(message, target=target, offer=TERMS)
        return
    with pytest.raises(OpenRefused, match="top_k") as caught:
        grant(message, target=target, offer=TERMS)
    assert caught.value.code is RefusalCode.OTHER


def test_log_probabilities_are_refused_by_an_edge_that_knows_only_the_likeliest_tokens() -> None:
    message = open_message(logprobs=1)
    few = replace(TARGET, max_top_k=4)
    message = message.model_copy(update={"policy": message.policy.model_copy(update={"top_k": 4})})
    grant(message, target=TARGET, offer=TERMS)
    with pytest.raises(OpenRefused) as caught:
        grant(message, target=few, offer=TERMS)
    assert caught.value.code is RefusalCode.LOGPROBS


@pytest.mark.parametrize("logprobs", [None, 1])
@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("policy", [{}, {"presence_penalty": 1.0}, {"logit_bias": ((1, 2.0),)}, {"min_tokens": 2}])
def test_log_probabilities_after_adjustments_need_the_coupled_mode(
    policy: dict[str, Any], mode: Mode, logprobs: int | None
) -> None:
    message = open_message(logprobs=logprobs, max_new_tokens=8)
    message = message.model_copy(update={"policy": message.policy.model_copy(update={**policy, "mode": mode})})
    if not policy or mode is Mode.COUPLED or logprobs is None:
        grant(message, target=TARGET, offer=TERMS)
        return
    with pytest.raises(OpenRefused) as caught:
        grant(message, target=TARGET, offer=TERMS)
    assert caught.value.code is RefusalCode.LOGPROBS


@pytest.mark.parametrize("target_id", [TARGET.target_id, None], ids=["own", "any"])
def test_tokens_of_its_own_target_are_resumed_and_of_any_if_the_device_allows_it(target_id: bytes | None) -> None:
    grant(open_message(resume=(1, 2), target_id=target_id), target=TARGET, offer=TERMS)


@pytest.mark.parametrize("other", [{}, {"vocabulary": Vocabulary.of(["a", "b"])}], ids=["same words", "other words"])
def test_tokens_of_another_target_are_refused_so_that_the_device_waits(other: dict[str, Any]) -> None:
    foreign = TARGET.identified(b"another").target_id
    for tokens in ((1, 2), ()):  # without any, the prompt is rendered for that target
        with pytest.raises(OpenRefused) as refused:
            grant(open_message(resume=tokens, target_id=foreign, **other), target=TARGET, offer=TERMS)
        assert refused.value.code is RefusalCode.OTHER_TARGET


@pytest.mark.parametrize(
    "other",
    [
        TARGET.identified(b"toy", b""),
        TARGET.identified(b"to", b"y"),
        replace(TARGET, end_tokens=(0,)).identified(b"toy"),
        replace(TARGET, vocabulary=Vocabulary.of(["a"] * 10)).identified(b"toy"),
    ],
    ids=["parts", "bounds", "ends", "words"],
)
def test_what_changes_the_output_changes_the_identity(other: TargetInfo) -> None:
    assert other.target_id != TARGET.target_id
    assert len(other.target_id) == len(TARGET.target_id) == TARGET_ID_BYTES


def test_a_name_and_limits_are_no_part_of_the_identity() -> None:
    assert replace(TARGET, name="x", context=8, runs_on="y").identified(b"toy").target_id == TARGET.target_id
