from fleet_device.settings import OfflinePolicy
from tests.fleet_device.api.client import chat, chunks, complete, error
from tests.fleet_device.api.conftest import Make
from tests.support.memory_device import ScriptedAgent

BATCHES = ((1, 2), (3,), (4,))


def test_an_answer_says_whether_it_is_verified(make: Make) -> None:
    app, _ = make(ScriptedAgent(BATCHES, alone=(2,)))
    answer = complete(app, offline="local")
    assert answer.headers["x-fleet-verified"] == "false"
    assert (answer.json()["fleet"]["verified"], answer.json()["fleet"]["unverified_tokens"]) == (False, 1)
    app, _ = make(ScriptedAgent(BATCHES))
    answer = chat(app)
    assert answer.headers["x-fleet-verified"] == "true"
    assert (answer.json()["fleet"]["verified"], answer.json()["fleet"]["unverified_tokens"]) == (True, 0)


def test_each_chunk_of_a_stream_that_is_unverified_says_so(make: Make) -> None:
    app, _ = make(ScriptedAgent(BATCHES, alone=(1, 2)))
    *pieces, last = chunks(complete(app, stream=True, offline="local"))
    texts = [(chunk["choices"][0]["text"], chunk.get("fleet", {}).get("verified", True)) for chunk in pieces]
    assert [verified for _, verified in texts] == [True, False, False]
    assert (last["fleet"]["verified"], last["fleet"]["unverified_tokens"]) == (False, 2)


def test_the_policy_is_the_requests_or_the_settings(make: Make) -> None:
    app, backend = make(ScriptedAgent(BATCHES), offline="wait", offline_s=0.5, answer_s=7.0)
    for fields in ({}, {"offline": "local"}, {"offline": "fail"}):
        assert complete(app, **fields).status_code == 200
    assert [each.policy for each in backend.agent.outages] == [
        OfflinePolicy.WAIT,
        OfflinePolicy.LOCAL,
        OfflinePolicy.FAIL,
    ]
    assert {(each.after_s, each.answer_s) for each in backend.agent.outages} == {(0.5, 7.0)}
    assert error(complete(app, offline="never"))["param"] == "offline"


def test_nobody_there_is_told_at_once_unless_the_text_is_to_be_written_all_the_same(make: Make) -> None:
    app, backend = make(ScriptedAgent(BATCHES, alone=(0, 1, 2)))
    backend.missing = "No edge of fleet 'home' is online now."
    refused = complete(app)
    assert (refused.status_code, error(refused)["code"]) == (503, "edge_unavailable")
    assert not backend.agent.asked
    answer = complete(app, offline="local")
    assert (answer.status_code, answer.headers["x-fleet-verified"]) == (200, "false")
    assert answer.json()["model"] == backend.drafter.name
