from typing import Any

import pytest

from fleet_common.settings import SettingsError, load_settings
from fleet_device.pacing.adaptive import AdaptivePacing, make_pacing
from fleet_device.pacing.contract import EDGE_ONLY_TOKENS, FixedPacing, Pacing
from fleet_device.settings import DeviceSettings
from schemas.fields import MAX_TOKENS
from schemas.policy import MAX_TOP_K


def settings(**flags: Any) -> DeviceSettings:
    return load_settings(DeviceSettings, config=None, flags=flags)


def test_a_seed_that_is_set_stays_and_one_that_is_not_is_fresh_each_time() -> None:
    assert {settings(seed=5).policy().seed for _ in range(3)} == {5}
    assert len({settings().policy().seed for _ in range(3)}) == 3


@pytest.mark.parametrize(
    "extreme",
    [
        {"max_new_tokens": MAX_TOKENS},
        {"top_k": MAX_TOP_K, "seed": 2**64 - 1},
        {"temperature": 0.0, "top_p": 1.0, "mode": "coupled"},
        {"draft_length": 0},
    ],
    ids=repr,
)
def test_whatever_the_settings_allow_makes_a_policy(extreme: dict[str, Any]) -> None:
    found, policy = settings(**extreme), settings(**extreme).policy()
    assert (policy.mode, policy.temperature, policy.top_k, policy.top_p) == (
        found.mode, found.temperature, found.top_k, found.top_p,
    )  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": MAX_TOKENS + 1},
        {"top_k": MAX_TOP_K + 1},
        {"top_p": 0.0},
        {"temperature": float("nan")},
        {"seed": 2**64},
        {"draft_length": 65},
        {"draft_length": -1},
        {"draft_length": "many"},
        {"ahead": "perhaps"},
        {"device": "a/b"},
        {"device": "probe-edge-1"},
        {"drafter": "magic"},
        {"nonsense": 1},
        {"answer_s": 0},
    ],
    ids=repr,
)
def test_what_cannot_work_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError) as caught:
        settings(**wrong)
    assert repr(next(iter(wrong))) in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "pacing"),
    [
        ({"draft_length": 3}, FixedPacing(3)),
        ({"draft_length": "3", "ahead": "auto"}, FixedPacing(3)),
        ({"draft_length": 3, "ahead": True}, FixedPacing(3, ahead=True)),
        ({"draft_length": "auto"}, AdaptivePacing(edge_only=None)),
        ({"draft_length": "auto", "ahead": "no"}, AdaptivePacing(ahead=False, edge_only=None)),
        ({"draft_length": "auto", "ahead": "true"}, AdaptivePacing(ahead=True, edge_only=None)),
        ({"draft_length": "auto", "edge_only": "no"}, AdaptivePacing(edge_only=False)),
        ({"edge_only": "yes"}, FixedPacing(EDGE_ONLY_TOKENS, edge_only=True)),
    ],
    ids=repr,
)
def test_what_is_left_open_is_chosen(flags: dict[str, Any], pacing: Pacing) -> None:
    assert make_pacing(settings(**flags)) == pacing


def test_a_bad_draft_length_is_told_what_a_good_one_is() -> None:
    with pytest.raises(SettingsError, match="draft_length"):
        settings(draft_length="many")
    with pytest.raises(SettingsError, match="perhaps"):
        settings(ahead="perhaps")
