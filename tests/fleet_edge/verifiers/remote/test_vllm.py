import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from fleet_edge.verifiers.remote.vllm import BadAnswer, LogprobsQuery, TopRows, completion, read_completion

SIZE = 6
PROBS = np.array([[0.1, 0.4, 0.2, 0.15, 0.1, 0.05], [0.5, 0.2, 0.1, 0.1, 0.06, 0.04]])
QUESTION = LogprobsQuery([5, 4, 3, 2], rows=2, top=3)
LOGS = np.log(PROBS).tolist()


def top(row: int, *more: int) -> list[tuple[int, float]]:
    order = sorted(range(SIZE), key=lambda token: (-LOGS[row][token], token))[:3]
    return [(token, LOGS[row][token]) for token in (*order, *more)]


def answer_of(rows: list[list[tuple[Any, Any]]]) -> dict[str, Any]:
    choices = [
        {"index": index, "text": "?", "logprobs": {"top_logprobs": [{f"token_id:{token}": log for token, log in row}]}}
        for index, row in enumerate(rows)
    ]
    return {"id": "cmpl-1", "object": "text_completion", "choices": choices, "usage": {"prompt_tokens": 4}}


def read(answer: object, question: LogprobsQuery = QUESTION) -> TopRows:
    return read_completion(answer, question, vocabulary=SIZE)


def test_vllm_is_asked_for_every_prefix_that_ends_at_a_row() -> None:
    call = completion(QUESTION, model="m")
    assert call.path == "/v1/completions"
    assert call.body["prompt"] == [[5, 4, 3], [5, 4, 3, 2]]
    assert (call.body["model"], call.body["max_tokens"], call.body["temperature"]) == ("m", 1, 0)
    assert (call.body["logprobs"], call.body["return_tokens_as_token_ids"]) == (3, True)
    assert "prompt_logprobs" not in call.body  # it would switch the prefix cache off
    only = completion(LogprobsQuery([5, 4], rows=0, top=3), model="m")
    assert only.body["prompt"] == [[5, 4]]
    assert "logprobs" not in only.body


def test_a_namespace_keeps_a_servers_cache_apart() -> None:
    assert "cache_salt" not in completion(QUESTION, model="m").body
    assert completion(replace(QUESTION, namespace="device one"), model="m").body["cache_salt"] == "device one"


def test_choices_of_vllm_may_come_in_any_order() -> None:
    answer = answer_of([top(0), top(1)])
    answer["choices"].reverse()
    assert read(answer).ids.tolist() == [[1, 2, 3], [0, 1, 2]]


def test_more_entries_than_asked_for_are_left_out() -> None:
    assert read(answer_of([top(0, 5), top(1)])).ids.tolist() == [[1, 2, 3], [0, 1, 2]]


def test_rows_of_padding_are_no_tokens() -> None:
    padded = [*top(0), (SIZE + 7, math.log(0.01))]
    assert read(answer_of([padded, top(1)])).ids.max() < SIZE
    with pytest.raises(BadAnswer, match="vocabulary"):
        read(answer_of([[*top(0)[:2], (SIZE, math.log(0.15))], top(1)]))


def test_what_servers_write_for_impossible_is_impossible() -> None:
    row = [(3, 0.0), (1, -9999.0), (2, -3.4e38)]
    rows = read(answer_of([row, row]))
    assert rows.ids[0, 0] == 3
    assert np.isneginf(rows.logprobs[:, 1:]).all()


@pytest.mark.parametrize(
    "row",
    [
        [],
        top(0)[:2],
        [*top(0)[:2], top(0)[0]],
        [*top(0)[:2], (3, None)],
        [*top(0)[:2], (3, "-1.9")],
        [*top(0)[:2], (3, math.nan)],
        [*top(0)[:2], (3, math.inf)],
        [*top(0)[:2], (3, -math.inf)],
        [*top(0)[:2], (-3, -1.9)],
        [*top(0)[:2], ("x", -1.9)],
        [*top(0)[:2], (3.5, -1.9)],
        [(1, 0.0), (2, 0.0), (3, 0.0)],
        [(1, 700.0), (2, 1e300), (3, 0.0)],
        [(1, -5.0), (2, -6.0), (3, -300.0)],
    ],
    ids=str,
)
def test_entries_that_are_none_or_not_the_most_likely_are_refused(row: list[tuple[Any, Any]]) -> None:
    with pytest.raises(BadAnswer):
        read(answer_of([top(1), row]))


ODD = st.sampled_from([None, True, 10**400, -(10**400), math.nan, math.inf, -math.inf, 1e300, -1, 0, "", [], {}])
JSON = ODD | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=20), inner, max_size=4),
    max_leaves=12,
)


def replaced(value: Any, new: Any, draw: st.DrawFn) -> Any:
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 9)) == 0:
        return new
    place = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[place] = replaced(value[place], new, draw)
    return changed


@st.composite
def nearly_answers(draw: st.DrawFn) -> object:
    answer: object = answer_of([top(0), top(1)])
    for _ in range(draw(st.integers(1, 3))):
        answer = replaced(answer, draw(JSON), draw)
    return answer


@settings(max_examples=80)
@given(data=st.data())
def test_whatever_comes_is_an_answer_or_is_refused(data: st.DataObject) -> None:
    answer = data.draw(nearly_answers())
    try:
        rows = read(answer)
    except BadAnswer:
        return
    assert rows.ids.shape == rows.logprobs.shape == (2, 3)
    assert ((rows.ids >= 0) & (rows.ids < SIZE)).all()
    assert all(len(set(row)) == 3 for row in rows.ids.tolist())
    assert (np.exp(rows.logprobs.astype(np.float64)).sum(axis=1) < 1.01).all()


def test_a_row_too_few_or_too_many_is_refused() -> None:
    for rows in ([top(0)], [top(0), top(1), top(1)]):
        with pytest.raises(BadAnswer):
            read(answer_of(rows))


def test_two_choices_of_one_index_are_refused() -> None:
    answer = answer_of([top(0), top(1)])
    answer["choices"][1]["index"] = 0
    with pytest.raises(BadAnswer, match="index"):
        read(answer)
