from pathlib import Path
from typing import Any

import pytest

from fleet_device.settings import DeviceSettings
from fleet_link.configuration import SettingsError, load_settings
from schemas.bounds import MAX_TOKENS
from schemas.policy import MAX_TOP_K, Mode


def settings(**flags: Any) -> DeviceSettings:
    return load_settings(DeviceSettings, config=None, flags=flags)


def test_the_defaults_make_a_policy() -> None:
    policy = settings().policy()
    assert (policy.mode, policy.temperature, policy.top_k, policy.top_p) == (Mode.RESIDUAL, 0.7, 50, 0.95)


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
        {"device": "a/b"},
        {"drafter": "magic"},
        {"nonsense": 1},
        {"verdict_s": 0},
    ],
    ids=repr,
)
def test_what_cannot_work_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError) as caught:
        settings(**wrong)
    assert repr(next(iter(wrong))) in str(caught.value)


def test_models_lie_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEET_MODELS", "/srv/models")
    assert settings().models == Path("/srv/models")
