from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from tests.fleet_device.api.client import chat, chunks, complete, error
from tests.fleet_device.api.conftest import Make
from tests.support.memory_device import ScriptedAgent, TalkingCodec

EMOJI = [bytes([byte]) for byte in "😀".encode()]
PIECES = [*EMOJI, b"a", "€".encode()[:2], "€".encode()[2:], b"", b"a"]
A, EURO, CONTROL = 4, 5, 7


class PartsOfCharacters(TalkingCodec):
    """Tokens that are parts of characters, one of the same bytes as another, and a control token."""

    control_texts = ("<|end|>",)

    def piece(self, token: int) -> bytes:
        return PIECES[token]

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return [CONTROL] if special and text in self.control_texts else [A]


def of_parts(make: Make, tokens: Sequence[int]) -> Starlette:
    codec = PartsOfCharacters([str(number) for number in range(len(PIECES))])
    return make(ScriptedAgent(batches=[[token] for token in tokens]), codec=codec)[0]


def joined(response: httpx.Response) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for chunk in chunks(response):
        for name, values in (chunk["choices"][0]["logprobs"] or {}).items():
            found.setdefault(name, []).extend(values or [])
    return found


def test_all_alternatives_of_a_completion_have_a_name_of_their_own(make: Make) -> None:
    app = of_parts(make, [A])
    [found] = complete(app, logprobs=9).json()["choices"][0]["logprobs"]["top_logprobs"]
    assert len(found) == 9
    assert found["<|end|>"] == -8.0
    assert "" not in found
    assert found["a"] == -5.0  # of two tokens with the same bytes, the likelier one


def test_offsets_count_whole_characters(make: Make) -> None:
    app = of_parts(make, [A, 0, 1, 2, 3, A, EURO, EURO + 1, A])
    body = complete(app, logprobs=0).json()["choices"][0]
    assert body["text"] == "a😀a€a"
    assert body["logprobs"]["text_offset"] == [0, 1, 1, 1, 1, 2, 3, 3, 4]
    assert joined(complete(app, logprobs=0, stream=True)) == body["logprobs"]


def test_entries_of_a_chat_have_the_bytes_and_control_tokens_a_name(make: Make) -> None:
    app = of_parts(make, [0, 1, 2, 3])
    content = chat(app, logprobs=True, top_logprobs=9).json()["choices"][0]["logprobs"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "😀"
    assert content[0]["top_logprobs"][CONTROL]["token"] == "<|end|>"


def test_an_echo_has_the_log_probabilities_of_all_tokens(make: Make) -> None:
    app = of_parts(make, [A, CONTROL])
    body = complete(app, prompt=[A, CONTROL, 0, 1, 2, 3], echo=True, logprobs=1).json()["choices"][0]
    told = body["logprobs"]
    assert body["text"] == "a😀a"
    # A client counts tokens, so those without a text are there too.
    assert told["tokens"] == ["a", "<|end|>", *(f"bytes:\\x{byte[0]:02x}" for byte in EMOJI), "a", "<|end|>"]
    assert told["token_logprobs"] == [None] + [-0.5] * 7
    assert told["top_logprobs"] == [None] + [{"bytes:\\xf0": -1.0}] * 7
    assert told["text_offset"] == [0, 1, 1, 1, 1, 1, 2, 3]


def test_an_echo_without_log_probabilities_is_the_text_alone(make: Make) -> None:
    app, backend = make()
    choice = complete(app, echo=True).json()["choices"][0]
    assert (choice["text"], choice["logprobs"]) == ("t1 t2 t1 t2 t3 ", None)
    assert backend.agent.edge_only == [False]


def test_an_echo_of_no_token_is_the_prompt(make: Make) -> None:
    app, backend = make()
    body = complete(app, echo=True, max_tokens=0, logprobs=0).json()
    [choice] = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("t1 t2 ", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5]
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (2, 0)
    assert [asked["max_new_tokens"] for asked in backend.agent.asked] == [1]
    assert backend.agent.edge_only == [True]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"echo": True, "stream": True}, "stream"),
        ({"prompt": ["t1", "t2"], "stream": True}, "stream"),
        ({"prompt": ["t1"] * 50}, "prompt"),  # more than the queue takes
        ({"prompt": ["t1", ""]}, "prompt"),
        ({"prompt": ["t1", [["t2"]]]}, "prompt"),
    ],
)
def test_what_cannot_be_echoed_is_refused(make: Make, fields: dict[str, Any], param: str) -> None:
    response = complete(make()[0], **fields)
    assert response.status_code == 400
    assert error(response)["param"] == param
