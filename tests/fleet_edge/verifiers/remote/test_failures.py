from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from numpy.typing import NDArray
from starlette.exceptions import HTTPException

from fleet_edge.verifiers.contract import Item, SequenceFailed, TargetAway
from fleet_edge.verifiers.remote.verifier import RemoteVerifier
from tests.fleet_edge.verifiers.remote.serving import SCRIPT, SIZE, TOP, asking, server, steps_of
from tests.support.inference_server import Fault, InferenceServer
from tests.support.waiting import until

SESSIONS = 12


def expected(prefix: list[int]) -> NDArray[np.float64]:
    row = SCRIPT.logits(prefix).astype(np.float64)
    row -= np.log(np.exp(row).sum())
    best = np.argsort(-row, kind="stable")[:TOP]
    known = np.full(SIZE, -np.inf)
    known[best] = row[best]
    return known


def step(verifier: RemoteVerifier, number: int) -> None:
    items = [Item(key, (1 + (key + number) % (SIZE - 1), 2), 2) for key in range(SESSIONS)]
    texts = {item.sequence: [*verifier._tokens[item.sequence], *item.tokens] for item in items}
    rows = verifier.score(items)
    wanted = [expected(text[:end]) for text in texts.values() for end in (len(text) - 1, len(text))]
    np.testing.assert_allclose(rows, np.stack(wanted), atol=1e-5)


def opened(verifier: RemoteVerifier) -> RemoteVerifier:
    for key in range(SESSIONS):
        verifier.open(key)
    return verifier


def impatient(verifier: RemoteVerifier) -> Any:
    """Give up requests soon; not those of the start, which must succeed on a busy machine too."""
    settings = verifier._queries._settings.model_copy(update={"request_s": 0.3})
    return patch.object(verifier._queries, "_settings", settings)


def test_a_session_has_one_key_which_a_fork_shares() -> None:
    with server() as one, asking(one) as verifier:
        opened(verifier)
        for number in range(3):
            step(verifier, number)
        keys: dict[int, set[str]] = {}
        for body in one.questions:
            if body["session"]:  # a trial has none
                keys.setdefault(_prompt(body)[0], set()).add(body["session"])  # the first token is the session's own
        assert len(keys) == SESSIONS
        assert all(len(found) == 1 for found in keys.values())
        assert len(set.union(*keys.values())) == SESSIONS
        verifier.fork(99, 0, 2)
        verifier.score([Item(99, (3,), 1)])
        assert one.questions[-1]["session"] in keys[1]


def _prompt(body: dict[str, Any]) -> list[int]:
    prompt: list[int] = body["prompt"][0]
    return prompt


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=500),
        Fault(status=503),
        Fault(status=429),
        Fault(hangs=True),
        Fault(change=lambda _answer: "no answer"),
        Fault(change=lambda answer: answer | {"choices": []}),
        Fault(change=lambda answer: answer | {"padding": "x" * (1 << 20)}),
    ],
    ids=["500", "503", "429", "hangs", "text", "empty", "flood"],
)
def test_what_a_server_gets_wrong_once_it_is_asked_again(fault: Fault) -> None:
    """Behind a router, another server answers."""
    with server() as one, asking(one) as verifier:
        opened(verifier)
        step(verifier, 0)
        one.fault = fault
        with steps_of(1.0), impatient(verifier), pytest.raises(TargetAway):
            verifier.score([Item(0, (1,), 1)])
        one.fault = Fault()
        until(lambda: verifier.away() == "")
        step(verifier, 1)


def test_a_server_that_is_unwell_is_away() -> None:
    with server() as one, asking(one) as verifier:
        one.fault = Fault(unwell=True)
        until(lambda: verifier.away() != "")


def test_with_the_server_away_a_step_says_so_and_succeeds_when_it_is_back(free_port: int) -> None:
    with server(port=free_port) as one, asking(one) as verifier:
        opened(verifier)
        step(verifier, 0)
        one.kill(None, None, None)
        for number in range(2):
            with pytest.raises(TargetAway) as away:
                step(verifier, number)
            assert away.value.retry_s > 0
        assert "answers" in verifier.away() or "broke off" in verifier.away()
        assert verifier.computed(0) == 2  # nothing was computed
        with one:
            until(lambda: verifier.away() == "")
            step(verifier, 1)


def test_a_step_ends_in_time_though_the_server_does_not_answer() -> None:
    with server() as one, asking(one) as verifier:
        opened(verifier)
        one.fault = Fault(hangs=True)
        with steps_of(0.5), impatient(verifier), pytest.raises(TargetAway):  # without a bound it would never return
            step(verifier, 0)
        one.fault = Fault()


class FailsOn(InferenceServer):
    """A server that fails on requests with a certain token."""

    token = -1

    async def _faulty(self, body: dict[str, Any], answer: dict[str, Any]) -> object:
        if self.token in body["prompt"][-1]:
            raise HTTPException(500, "EngineCore encountered an issue")
        return await super()._faulty(body, answer)


def test_a_text_on_which_servers_fail_is_given_up_and_no_other() -> None:
    one = server()
    poisoned = FailsOn(one.verifier, one.words, max_model_len=200)
    with poisoned, asking(poisoned) as verifier:
        verifier.open(1)
        verifier.open(2)
        poisoned.token = 33
        items = [Item(1, (1, 33), 1), Item(2, (1, 2), 1)]
        given_up = None
        for _ in range(8):
            try:
                with steps_of(0.4):
                    verifier.score(items)
            except TargetAway:
                until(lambda: verifier.away() == "")
            except SequenceFailed as error:
                given_up = error.sequence
                break
        assert given_up == 1
        until(lambda: verifier.away() == "")
        assert verifier.score(items[1:]).shape == (1, SIZE)


def test_a_request_that_the_server_finds_fault_with_fails_its_sequence_alone() -> None:
    with server() as one, asking(one) as verifier:
        one.max_model_len = 5  # as if it had been restarted with less
        verifier.open(1)
        verifier.open(2)
        items = [Item(2, (1, 2), 1), Item(1, (1,) * 8, 1)]
        with pytest.raises(SequenceFailed, match="maximum") as failed:
            verifier.score(items)
        assert failed.value.sequence == 1
        assert (verifier.computed(1), verifier.computed(2)) == (0, 0)
        assert verifier.score(items[:1]).shape == (1, SIZE)


def test_another_model_at_the_same_address_is_not_taken_back(free_port: int) -> None:
    with server(port=free_port) as one, asking(one) as verifier:
        opened(verifier)
        one.kill(None, None, None)
        with pytest.raises(TargetAway):
            step(verifier, 0)
        one.model = "another/model"
        one.words = [f"x{token}" for token in range(SIZE)]
        with one:
            until(lambda: "is 'x" in verifier.away())
