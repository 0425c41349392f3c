"""What every release has written is read for ever; what this one writes is read by every release of its protocol.

A golden file holds what one minor release writes, and a module of rules how it reads, without a line of `schemas`. When
a minor release writes anything new, it adds its own two files beside those that are there, and a line in `RULES`.
"""

import tomllib
from collections.abc import Callable, Mapping
from datetime import UTC
from enum import Enum
from pathlib import Path
from typing import Any, Final

import cbor2
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from schemas import bounds, cbor, codec, control, downlink, grammar, messages, policy, reasons, steering, vocabulary
from schemas.asyncapi import MESSAGES
from schemas.control import Alert, AlertState, DeviceState, EdgeState, Presence, Telemetry, decode_json, encode_json
from schemas.steering import CommandOutcome, CommandRequest, CommandResponse, DesiredSettings, ReportedSettings
from tests.schemas.golden import rules_0_1, rules_0_2
from tests.schemas.strategies import LABEL, NAME, closes, drafts, opens, replies, verdicts

FOLDER: Final = Path(__file__).parent / "golden"
RULES: Final[Mapping[str, Mapping[str, Callable[[bytes], Any]]]] = {
    "0.1": rules_0_1.READERS,
    "0.2": rules_0_2.READERS,
}
"""How each release of protocol 1 reads."""

GOLDEN: Final = {release: tomllib.loads((FOLDER / f"{release}.toml").read_text(encoding="utf-8")) for release in RULES}
LATEST: Final = list(RULES)[-1]

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

EVERY: Final = [(release, message) for release, golden in GOLDEN.items() for message in golden["message"]]
each_message = pytest.mark.parametrize(
    ("release", "message"), EVERY, ids=[f"{release}-{message['name']}" for release, message in EVERY]
)


def payload_of(message: Mapping[str, Any]) -> bytes:
    return message["json"].encode() if "json" in message else bytes.fromhex(message["hex"])


def fields_of(message: Mapping[str, Any]) -> dict[str, Any]:
    return message["fields"] | dict.fromkeys(message.get("none", ()))


def spelled(value: Any) -> Any:
    """Spell a decoded message as golden files do."""
    match value:
        case BaseModel():
            fields = {name: getattr(value, name) for name in type(value).model_fields}
            # A setting of the policy that does nothing is left out: an older release would not know it.
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


def younger_words(message: BaseModel, release: str) -> set[str]:
    """Return the fields whose words the release lacks: it reads others in their place."""
    words = {name: value for name, value in message if isinstance(value, Enum)}
    known = GOLDEN[release]["words"]
    return {name for name, word in words.items() if word.value not in known.get(type(word).__name__, [word.value])}


@each_message
def test_what_a_release_has_written_is_read_to_the_same_fields(release: str, message: dict[str, Any]) -> None:
    decode, _ = CODECS[message["reads"]]
    decoded = decode(payload_of(message))
    expected, found = fields_of(message), spelled(decoded)
    assert {name: found[name] for name in expected} == expected
    for name in set(found) - set(expected):  # younger than that release, so that it can say nothing of it
        assert release != LATEST
        assert getattr(decoded, name) == type(decoded).model_fields[name].get_default(call_default_factory=True)


@each_message
@pytest.mark.parametrize("reader", RULES)
def test_what_this_release_makes_of_it_is_read_by_every_releases_rules(
    release: str, message: dict[str, Any], reader: str
) -> None:
    decode, encode = CODECS[message["reads"]]
    decoded = decode(payload_of(message))
    if message["reads"] not in RULES[reader]:
        return  # younger, and on a topic that an older release does not subscribe to
    read = RULES[reader][message["reads"]](encode(decoded))
    expected = fields_of(message)
    shared = set(read) & set(expected) - younger_words(
        decoded, reader
    )  # all, but for fields that the younger of the two has added
    assert {name: read[name] for name in shared} == {name: expected[name] for name in shared}
    assert reader != release or shared == set(read) == set(expected)


@pytest.mark.parametrize("message", GOLDEN[LATEST]["message"], ids=lambda message: message["name"])
def test_the_latest_file_is_what_this_release_writes(message: dict[str, Any]) -> None:
    """Byte by byte: who changes the wire writes a file of the new release, and leaves this one alone."""
    decode, encode = CODECS[message["reads"]]
    options = {"padding": message["padding"]} if "padding" in message else {}
    written = encode(decode(payload_of(message)), **options)
    assert written == payload_of(message), f"now: {written.decode() if 'json' in message else written.hex()}"


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


@pytest.mark.parametrize(
    ("reads", "reader"), [(reads, reader) for reader, rules in RULES.items() for reads in CODECS if reads in rules]
)
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_whatever_this_release_writes_is_read_by_every_releases_rules(
    reads: str, reader: str, data: st.DataObject
) -> None:
    """A word that an older release lacks comes back as what it reads instead: such are left out of its messages."""
    message = data.draw(RANDOM[reads])
    assume(not younger_words(message, reader))
    _, encode = CODECS[reads]
    read = RULES[reader][reads](encode(message))
    found = spelled(message)
    assert read == {name: found[name] for name in read}


@pytest.mark.parametrize("release", GOLDEN)
def test_every_kind_mode_form_and_end_is_there(release: str) -> None:
    found = [CODECS[message["reads"]][0](payload_of(message)) for message in GOLDEN[release]["message"]]
    kinds, known = {type(message) for message in found}, {model for models in MESSAGES.values() for model in models}
    assert kinds <= known
    assert release != LATEST or kinds == known
    opened = {(message.policy.mode, message.resume is None) for message in found if isinstance(message, messages.Open)}
    assert len(opened) == 4
    judged = [message for message in found if isinstance(message, messages.Verdict)]
    assert {message.finish for message in judged} == set(reasons.Finish)
    sent = {type(message.next) for message in judged}
    assert sent <= {int, type(None), *downlink.FORMS}
    assert release != LATEST or sent == {int, type(None), *downlink.FORMS}


@pytest.mark.parametrize("release", GOLDEN)
def test_no_word_of_a_release_is_lost_or_means_another(release: str) -> None:
    for name, words in GOLDEN[release]["words"].items():
        (kind,) = (
            getattr(module, name) for module in (reasons, control, grammar, policy, steering) if hasattr(module, name)
        )
        assert set(words) <= {member.value for member in kind}
        assert release != LATEST or set(words) == {member.value for member in kind}


@pytest.mark.parametrize("release", GOLDEN)
def test_a_bound_stands_as_long_as_the_protocol(release: str) -> None:
    """Raised, an older peer would not read what we send; lowered, we would not read what it sends."""
    modules = (bounds, messages, codec, control, downlink, cbor, grammar, vocabulary, steering)
    for name, expected in GOLDEN[release]["bounds"].items():
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
def test_the_rules_refuse_what_the_release_refuses(reads: str, spoil: Callable[[Any], Any]) -> None:
    """Rules that take anything would prove nothing."""
    names = {
        "open": "open: residual, first",
        "reply": "refused",
        "draft": "draft: residual",
        "verdict": "verdict: sparse",
    }
    (golden,) = (message for message in GOLDEN["0.1"]["message"] if message["name"] == names.get(reads, reads))
    fields = cbor2.loads(payload_of(golden))
    rules_0_1.READERS[reads](cbor2.dumps(fields))
    with pytest.raises(rules_0_1.Unreadable):
        rules_0_1.READERS[reads](cbor2.dumps(spoil(fields)))


@given(message=opens(), text=st.text(max_size=60), kind=st.sampled_from(grammar.GrammarKind))
@settings(max_examples=50, deadline=None)
def test_a_grammar_is_no_news_to_0_2_and_is_not_passed_over_by_0_1(message: Any, text: str, kind: Any) -> None:
    given_one = message.policy.model_copy(update={"grammar": grammar.Grammar(kind=kind, text=text)})
    payload = codec.encode_open(message.model_copy(update={"policy": given_one}))
    assert codec.decode_open(payload).policy == given_one
    assert RULES["0.2"]["open"](payload)["policy"] == spelled(given_one)
    with pytest.raises(rules_0_1.Unreadable, match="must be understood"):
        RULES["0.1"]["open"](payload)
