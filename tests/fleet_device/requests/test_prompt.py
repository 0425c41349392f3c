from typing import Any

import pytest

from fleet_device.errors import InvalidRequest
from fleet_device.requests.chat import ChatError, ChatMessage
from fleet_device.requests.generate import GenerateRequest
from fleet_device.requests.prompt import Prompt, TextOptions, prepare_request
from schemas.policy import Mode
from tests.support.memory_device import TalkingDrafter, settings

CODEC = TalkingDrafter().codec


def prepare(prompt: Any = "t1", **options: Any) -> GenerateRequest:
    defaults = settings(temperature=0.5, top_k=7, top_p=0.9, max_new_tokens=20, seed=4)
    return prepare_request(prompt, defaults, **options)(CODEC)


@pytest.mark.parametrize(
    ("prompt", "raw", "meant"),
    [
        ("t1 t2", False, "user: t1 t2 "),
        ("t1 t2", True, "t1 t2"),
        ([{"role": "system", "content": "t3"}, {"role": "user", "content": "t1"}], False, "system: t3 user: t1 "),
        ((ChatMessage("user", "t1"),), True, "user: t1 "),
    ],
)
def test_a_prompt_is_a_text_or_a_chat(prompt: Prompt, raw: bool, meant: str) -> None:
    assert list(prepare(prompt, raw=raw).prompt) == CODEC.encode(meant)


def test_a_prompt_may_be_tokens() -> None:
    assert prepare([3, 1, 2]).prompt == prepare((3, 1, 2)).prompt == (3, 1, 2)


def test_options_that_are_left_out_are_the_device_s_settings() -> None:
    request = prepare(temperature=None)
    policy = request.policy
    assert (policy.temperature, policy.top_k, policy.top_p, policy.seed) == (0.5, 7, 0.9, 4)
    assert (policy.mode, request.max_new_tokens, request.stop) == (Mode.RESIDUAL, 20, ())


def test_options_that_are_given_override_the_settings() -> None:
    request = prepare(
        max_new_tokens=0, temperature=0, top_k=0, top_p=1.0, mode="coupled", seed=2**64 - 1, stop=["a", "b"]
    )
    policy = request.policy
    assert (policy.temperature, policy.top_k, policy.top_p, policy.seed) == (0.0, 0, 1.0, 2**64 - 1)
    assert (policy.mode, request.max_new_tokens, request.stop) == (Mode.COUPLED, 0, ("a", "b"))
    assert prepare(stop="end").stop == ("end",)


def test_texts_without_a_seed_get_seeds_of_their_own() -> None:
    defaults = settings(seed=None)
    seeds = {prepare_request("t1", defaults)(CODEC).policy.seed for _ in range(3)}
    assert len(seeds) == 3


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 9}, "temperature"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"mode": "greedy"}, "mode"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop": 1}, "stop"),
    ],
)
def test_an_option_that_cannot_be_used_is_named(options: TextOptions, named: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"'{named}'.*\.$") as caught:
        prepare(**options)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        3,
        b"t1",
        {"role": "user"},
        [-1],
        [1, "t1"],
        [True],
        [{"role": "user"}],
        [{"role": 1, "content": "x"}],
        "",
        [],
        [{"role": "user", "content": ""}],
    ],
)
def test_a_prompt_that_is_none_is_refused_in_a_sentence(prompt: object) -> None:
    with pytest.raises(InvalidRequest, match=r"give .*\.$"):
        prepare(prompt)


def test_a_chat_is_rendered_only_when_its_turn_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(CODEC), "chat_template", None)
    encode = prepare_request("t1", settings())
    with pytest.raises(ChatError, match="no chat template"):
        encode(CODEC)
    assert prepare("t1", raw=True).prompt == (1,)
