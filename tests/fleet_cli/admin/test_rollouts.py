import json

import pytest

from tests.support.command import Run, as_json, refused

ROW = {
    "rollout": "20260101T120000-ab",
    "host": "gateway-07",
    "kind": "device",
    "action": "rollout",
    "wanted": "0.2.0-bbbbbbbb",
    "found": "0.1.0-aaaaaaaa",
    "outcome": "waiting",
    "who": "ada",
}
DONE = {**ROW, "outcome": "went-back", "running": "0.1.0-aaaaaaaa", "sentence": "It \x1b[2J drafts\nnonsense."}


def test_what_is_recorded_is_read_again(admin: Run) -> None:
    assert admin("rollout", "record", given=json.dumps([ROW]).encode())[0] == 0
    assert admin("rollout", "record", "--stopped", given=json.dumps([DONE]).encode())[0] == 0
    [rollout] = as_json(admin("rollouts", "--json"))
    assert (rollout["outcomes"], rollout["machines"], rollout["who"]) == ({"went-back": 1}, 1, "ada")
    [machine] = as_json(admin("rollouts", ROW["rollout"], "--json"))
    found = (machine["name"], machine["outcome"], machine["sentence"])
    assert found == ("gateway-07", "went-back", "It \x1b[2J drafts nonsense.")
    _, table, _ = admin("rollouts", ROW["rollout"])
    assert "\x1b" not in table
    assert "drafts nonsense." in table
    [release] = as_json(admin("releases", "--json", "--drift"))
    assert (release["wanted"], release["running"], release["drift"]) == ("0.2.0-bbbbbbbb", "0.1.0-aaaaaaaa", True)
    assert "gateway-07" in admin("releases")[1]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (b"", "is no JSON array of machines"),
        (b"{}", "is no JSON array of machines"),
        (json.dumps([{**ROW, "kind": "toaster"}]).encode(), "at 0.kind: Input should be 'device' or 'edge'"),
        (json.dumps([{**ROW, "colour": "red"}]).encode(), "at 0.colour: Extra inputs are not permitted"),
        (json.dumps([{**ROW, "started_at": "2026-01-01T00:00:00"}]).encode(), "at 0.started_at"),
        (json.dumps([ROW] * 10_001).encode(), "at most 10000 items"),
        (b" " * 4_000_001, "has more than 4,000,000 bytes"),
    ],
)
def test_what_is_no_machine_ends_in_a_sentence(admin: Run, given: bytes, sentence: str) -> None:
    assert sentence in refused(admin("rollout", "record", given=given))
    assert as_json(admin("rollouts", "--json")) == []


def test_an_unknown_rollout_ends_in_a_sentence(admin: Run) -> None:
    assert refused(admin("rollouts", "r9")) == "fleet: There is no rollout r9.\n"
