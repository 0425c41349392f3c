"""The messages of the golden file, byte by byte, and an independent reader of all that is written.

From the first release on, a release that changes what is written adds a golden file and rules of its own.
"""

import tomllib
from collections.abc import Callable, Mapping
from datetime import UTC
from enum import Enum
from pathlib import Path
from typing import Any, Final

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from schemas import cbor, codec, control, downlink, fields, messages, policy, reasons, vocabulary
from schemas.asyncapi import MESSAGES
from schemas.control import (
    Alert,
    AlertState,
    CommandOutcome,
    CommandRequest,
    CommandResponse,
    DesiredSettings,
    DeviceState,
    EdgeState,
    Presence,
    ReportedSettings,
    Telemetry,
    decode_json,
    encode_json,
)
from tests.schemas.golden.rules import READERS, Unreadable
from tests.schemas.strategies import LABEL, NAME, closes, drafts, opens, replies, verdicts

GOLDEN: Final = tomllib.loads((Path(__file__).parent / "golden" / "messages.toml").read_text(encoding="utf-8"))

STEERING: Final = (DesiredSettings, ReportedSettings, CommandRequest, CommandResponse)

CODECS: Final[Mapping[str, tuple[Callable[[bytes], Any], Callable[..., bytes]]]] = {
    "open": (codec.decode_open, codec.encode_open),
    "reply": (codec.decode_reply, codec.encode_reply),
    "close": (codec.decode_close, codec.encode_close),
    "draft": (codec.decode_draft, codec.encode_draft),
    "verdict": (codec.decode_verdict, codec.encode_verdict),
    **{
        model.__name__: (lambda payload, model=model: decode_json(model, payload), encode_json)
        for model in (Alert, DeviceState, EdgeState, Telemetry, *STEERING)
    },
}

each_message = pytest.mark.parametrize("message", GOLDEN["message"], ids=lambda message: message["name"])


def payload_of(message: Mapping[str, Any]) -> bytes:
    return message["json"].encode() if "json" in message else bytes.fromhex(message["hex"])


def fields_of(message: Mapping[str, Any]) -> dict[str, Any]:
    return message["fields"] | dict.fromkeys(message.get("none", ()))


def spelled(value: Any) -> Any:
    match value:
        case BaseModel():
            fields = {name: getattr(value, name) for name in type(value).model_fields}
            # A setting of the policy that does nothing is left out.
            closed = isinstance(value, policy.SamplingPolicy)
            return {name: spelled(field) for name, field in fields.items() if field is not None or not closed}
        case Enum():
            return value.value
        case bytes():
            return value.hex()
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
    assert spelled(decoded) == fields_of(message)
    options = {"padding": message["padding"]} if "padding" in message else {}
    written = encode(decoded, **options)
    assert written == payload_of(message), f"now: {written.decode() if 'json' in message else written.hex()}"


@each_message
def test_the_independent_reader_reads_it_to_the_same_fields(message: dict[str, Any]) -> None:
    assert READERS[message["reads"]](payload_of(message)) == fields_of(message)


STATES: Final = {
    "presence": st.sampled_from(Presence),
    "software": LABEL,
    "since": st.datetimes(timezones=st.just(UTC)),
}
SETTING = st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1, max_size=80)
VALUE = st.booleans() | st.integers(-1000, 1 << 63) | st.floats(-1e9, 1e9) | LABEL
VALUES = st.dictionaries(SETTING, VALUE, max_size=8)
MOMENT = st.datetimes(timezones=st.just(UTC))
VERSION = st.integers(1, (1 << 53) - 1)
COMMAND_ID = st.from_regex("[0-9a-f]{8,32}", fullmatch=True)
COUNT, SHARE = st.integers(0, 1 << 40), st.none() | st.floats(0, 1)
RANDOM: Final[Mapping[str, st.SearchStrategy[Any]]] = {
    "open": opens(),
    "reply": replies(),
    "close": closes(),
    "draft": drafts(),
    "verdict": verdicts(),
    "DeviceState": st.builds(DeviceState, draft_model=LABEL, quantization=LABEL, **STATES),
    "EdgeState": st.builds(EdgeState, edge=NAME, target=LABEL, vocabulary=LABEL, **STATES),
    "Alert": st.builds(
        Alert,
        id=LABEL.map(lambda text: text[:64]),
        fleet=st.none() | NAME,
        rule=LABEL.map(lambda text: text[:64]),
        subject=LABEL,
        device=st.none() | NAME,
        severity=st.sampled_from(("warning", "critical")),
        state=st.sampled_from(AlertState),
        sentence=LABEL,
        value=st.none() | st.floats(allow_nan=False, allow_infinity=False),
        since=STATES["since"],
        at=STATES["since"],
    ),
    "DesiredSettings": st.builds(DesiredSettings, version=VERSION, values=VALUES, who=LABEL, at=st.none() | MOMENT),
    "ReportedSettings": st.builds(
        ReportedSettings,
        version=VERSION,
        applied=VERSION,
        values=VALUES,
        refused=st.dictionaries(SETTING, LABEL, max_size=4),
        needs_restart=st.lists(SETTING, max_size=4),
        fixed=st.lists(SETTING, max_size=4),
        at=st.none() | MOMENT,
    ),
    "CommandRequest": st.builds(
        CommandRequest, id=COMMAND_ID, command=LABEL.filter(bool), arguments=VALUES, deadline=MOMENT, who=LABEL
    ),
    "CommandResponse": st.builds(
        CommandResponse,
        id=COMMAND_ID,
        outcome=st.sampled_from(CommandOutcome),
        sentence=LABEL,
        result=st.none() | LABEL,
        part=st.integers(0, 3),
        parts=st.integers(4, 32),
    ),
    "Telemetry": st.builds(
        Telemetry, sessions=COUNT, tokens=COUNT, acceptance=SHARE, draft_ms_per_token=SHARE, round_trip_ms=SHARE
    ),
}


@pytest.mark.parametrize("reads", CODECS)
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_whatever_is_written_the_independent_reader_reads(reads: str, data: st.DataObject) -> None:
    message = data.draw(RANDOM[reads])
    _, encode = CODECS[reads]
    read, found = READERS[reads](encode(message)), spelled(message)
    assert read == {name: found[name] for name in read}


def test_every_kind_mode_form_and_end_is_there() -> None:
    found = [CODECS[message["reads"]][0](payload_of(message)) for message in GOLDEN["message"]]
    assert {type(message) for message in found} == {model for models in MESSAGES.values() for model in models}
    opened = {(message.policy.mode, message.resume is None) for message in found if isinstance(message, messages.Open)}
    assert len(opened) == 4
    judged = [message for message in found if isinstance(message, messages.Verdict)]
    assert {message.finish for message in judged} == set(reasons.Finish)
    assert {type(message.next) for message in judged} == {int, type(None), *downlink.FORMS}


def test_the_words_are_those_of_the_golden_file() -> None:
    for name, words in GOLDEN["words"].items():
        (kind,) = (getattr(module, name) for module in (reasons, control, policy) if hasattr(module, name))
        assert set(words) == {member.value for member in kind}


def test_a_bound_stands_as_long_as_the_protocol() -> None:
    """If raised, an older peer could not read our messages; if lowered, we could not read its messages."""
    modules = (fields, messages, codec, control, downlink, cbor, policy, vocabulary)
    for name, expected in GOLDEN["bounds"].items():
        assert {getattr(module, name) for module in modules if hasattr(module, name)} == {expected}, name


@pytest.mark.parametrize(
    ("reads", "spoil"),
    [
        ("open", lambda fields: fields | {"policy": fields["policy"] | {"min_p": 0.1}}),
        ("open", lambda fields: fields | {"protocol": 2}),
        ("open", lambda fields: {key: value for key, value in fields.items() if key != "prompt"}),
        ("reply", lambda fields: fields | {"code": "Busy!"}),
        ("close", lambda fields: fields | {"tokens": 1.0}),
        ("draft", lambda fields: fields[:8]),
        ("draft", lambda fields: [*fields[:7], 1, *fields[8:]]),
        ("verdict", lambda fields: [*fields[:3], [4, b""], *fields[4:]]),
        ("verdict", lambda fields: [*fields[:5], float("nan"), *fields[6:]]),
    ],
)
def test_the_independent_reader_refuses_what_is_no_message(reads: str, spoil: Callable[[Any], Any]) -> None:
    """Otherwise the rules would prove nothing."""
    names = {
        "open": "open: residual, first",
        "reply": "refused",
        "draft": "draft: residual",
        "verdict": "verdict: sparse",
    }
    (golden,) = (message for message in GOLDEN["message"] if message["name"] == names.get(reads, reads))
    fields = cbor2.loads(payload_of(golden))
    READERS[reads](cbor2.dumps(fields))
    with pytest.raises(Unreadable):
        READERS[reads](cbor2.dumps(spoil(fields)))


@given(message=opens(), text=st.text(max_size=60), kind=st.sampled_from(policy.GrammarKind))
@settings(max_examples=50, deadline=None)
def test_a_grammar_is_read_as_it_was_written(message: Any, text: str, kind: Any) -> None:
    given_one = message.policy.model_copy(update={"grammar": policy.Grammar(kind=kind, text=text)})
    payload = codec.encode_open(message.model_copy(update={"policy": given_one}))
    assert codec.decode_open(payload).policy == given_one
    assert READERS["open"](payload)["policy"] == spelled(given_one)
