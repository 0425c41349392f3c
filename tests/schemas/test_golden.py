"""The messages of protocol 1, byte by byte.

From the first release on, a release that changes what is written adds messages and leaves these alone. An independent
reader is `examples/reference_client.py`.
"""

from datetime import datetime
from enum import Enum
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from pydantic import BaseModel

from schemas import cbor, codec, control, downlink, fields, messages, policy, reasons, vocabulary
from tests.schemas.strategies import opens
from tests.support.golden import CASES, CODECS, GOLDEN, MESSAGES, payload_of

each_message = pytest.mark.parametrize("message", CASES, ids=lambda message: message["name"])


def spelled(value: Any) -> Any:
    match value:
        case BaseModel():
            fields = {name: getattr(value, name) for name in type(value).model_fields}
            if isinstance(value, policy.SamplingPolicy):  # a setting that does nothing is left out
                optional = {name: type(value).model_fields[name].default for name in ("grammar", *codec.OMITTED)}
                fields = {name: field for name, field in fields.items() if field != optional.get(name, ...)}
            return {name: spelled(field) for name, field in fields.items()}
        case Enum():
            return value.value
        case bytes() | datetime():
            return value.hex() if isinstance(value, bytes) else str(value)
        case tuple() | list():
            return [spelled(part) for part in value]
        case dict():
            return {name: spelled(part) for name, part in value.items()}
        case _:
            return value


@each_message
def test_a_message_is_read_to_its_fields_and_written_byte_by_byte(message: dict[str, Any]) -> None:
    decode, encode = CODECS[message["reads"]]
    decoded = decode(payload_of(message))
    assert spelled(decoded) == message["fields"]
    options = {"padding": message["padding"]} if "padding" in message else {}
    written = encode(decoded, **options)
    assert written == payload_of(message), f"now: {written.decode() if 'json' in message else written.hex()}"


def test_every_kind_mode_form_and_end_is_there() -> None:
    found = [CODECS[message["reads"]][0](payload_of(message)) for message in CASES]
    assert {type(message) for message in found} == set(MESSAGES)
    opened = {(message.policy.mode, message.resume is None) for message in found if isinstance(message, messages.Open)}
    assert len(opened) == 4
    judged = [message for message in found if isinstance(message, messages.Verdict)]
    assert {message.finish for message in judged} == set(reasons.Finish)
    assert {type(message.next) for message in judged} == {int, type(None), *downlink.FORMS}


def test_the_words_are_those_of_the_protocol() -> None:
    for name, words in ((case["name"], case["values"]) for case in GOLDEN["words"]["cases"]):
        (kind,) = (getattr(module, name) for module in (reasons, control, policy) if hasattr(module, name))
        assert set(words) == {member.value for member in kind}


def test_a_bound_stands_as_long_as_the_protocol() -> None:
    """If raised, an older peer could not read our messages; if lowered, we could not read its messages."""
    modules = (fields, messages, codec, control, downlink, cbor, policy, vocabulary)
    for name, expected in ((case["name"], case["value"]) for case in GOLDEN["bounds"]["cases"]):
        assert {getattr(module, name) for module in modules if hasattr(module, name)} == {expected}, name


@given(message=opens(), text=st.text(max_size=60), kind=st.sampled_from(policy.GrammarKind))
@settings(max_examples=50, deadline=None)
def test_a_grammar_is_read_as_it_was_written(message: Any, text: str, kind: Any) -> None:
    given_one = message.policy.model_copy(update={"grammar": policy.Grammar(kind=kind, text=text)})
    payload = codec.encode_open(message.model_copy(update={"policy": given_one}))
    assert codec.decode_open(payload).policy == given_one
