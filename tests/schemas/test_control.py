import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given, strategies as st

from schemas.control import (
    MAX_CONTROL_BYTES,
    MAX_RESULT,
    MAX_SETTINGS,
    Alert,
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
from schemas.errors import CodecError, MalformedMessage, MessageTooLarge

SINCE = datetime(2026, 1, 1, tzinfo=UTC)
DEVICE = DeviceState(presence=Presence.ONLINE, software="1", draft_model="toy", quantization="Q4_0", since=SINCE)
EDGE = EdgeState(presence=Presence.DRAINING, software="1", edge="edge-1", target="toy", vocabulary="6", since=SINCE)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"null",
        b"{",
        b"[]",
        b'{"sessions": -1, "tokens": 0}',
        b'{"sessions": true, "tokens": 0}',
        b'{"sessions": "1", "tokens": 0}',
        b'{"sessions": 1, "tokens": 0, "acceptance": NaN}',
        b'{"sessions": 1, "tokens": 0, "acceptance": 1.5}',
        b'{"sessions": 1, "tokens": 0, "draft_ms_per_token": Infinity}',
        b'{"sessions": 1e400, "tokens": 0}',
        b"[" * 10_000,
        b"\xff\xfe",
    ],
    ids=lambda payload: repr(payload[:50]),
)
def test_what_is_no_message_is_refused_in_a_short_sentence(payload: bytes) -> None:
    with pytest.raises(MalformedMessage) as caught:
        decode_json(Telemetry, payload)
    assert len(str(caught.value)) < 400


def test_an_edge_with_an_impossible_name_is_refused() -> None:
    with pytest.raises(MalformedMessage, match="edge"):
        decode_json(EdgeState, encode_json(EDGE).replace(b"edge-1", b"edge/1"))


@pytest.mark.parametrize("message", [DEVICE, EDGE], ids=lambda message: type(message).__name__)
def test_a_presence_of_a_newer_release_is_there_and_takes_nothing_new(message: DeviceState | EdgeState) -> None:
    payload = json.dumps(json.loads(encode_json(message)) | {"presence": "on-battery"}).encode()
    assert decode_json(type(message), payload) == message.model_copy(update={"presence": Presence.DRAINING})


@pytest.mark.parametrize("word", ["", "Some Where", "x" * 41, 1, None, ["online"]], ids=repr)
@pytest.mark.parametrize("message", [DEVICE, EDGE], ids=lambda message: type(message).__name__)
def test_a_presence_that_is_none_is_refused(message: DeviceState | EdgeState, word: object) -> None:
    payload = json.dumps(json.loads(encode_json(message)) | {"presence": word}).encode()
    with pytest.raises(MalformedMessage, match="presence"):
        decode_json(type(message), payload)


def test_a_message_above_its_bound_is_refused_unread() -> None:
    with pytest.raises(MessageTooLarge):
        decode_json(Telemetry, b" " * (MAX_CONTROL_BYTES + 1))


@given(st.binary(max_size=60))
def test_random_bytes_raise_nothing_but_the_codecs_own_error(payload: bytes) -> None:
    for model in (Alert, DeviceState, EdgeState, Telemetry, *MODELS):
        with pytest.raises(CodecError):
            decode_json(model, payload)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
MODELS = (DesiredSettings, ReportedSettings, CommandRequest, CommandResponse)
VALID: dict[type[Any], dict[str, Any]] = {
    DesiredSettings: {"id": "0" * 16, "values": {"top_k": 5}},
    ReportedSettings: {"id": "0" * 16, "values": {}},
    CommandRequest: {"id": "0" * 16, "command": "drain", "deadline": "2026-01-01T00:00:00Z"},
    CommandResponse: {"id": "0" * 16, "outcome": "ok", "sentence": "Done."},
}


@pytest.mark.parametrize("model", MODELS)
@given(data=st.data())
def test_whatever_comes_is_a_message_or_a_codec_error(model: type[Any], data: st.DataObject) -> None:
    fields = VALID[model] | data.draw(st.dictionaries(st.sampled_from([*model.model_fields, "new"]), JSON, max_size=3))
    try:
        read = decode_json(model, json.dumps(fields).encode())
    except CodecError:
        return
    assert decode_json(model, encode_json(read)) == read


@pytest.mark.parametrize(
    ("model", "change"),
    [
        (DesiredSettings, {"id": None}),
        (DesiredSettings, {"id": 12345678}),
        (DesiredSettings, {"id": "0" * 33}),
        (ReportedSettings, {"id": ""}),
        (DesiredSettings, {"values": {"model": ["a"]}}),
        (DesiredSettings, {"values": {"model": None}}),
        (DesiredSettings, {"values": {"": 1}}),
        (DesiredSettings, {"values": {"model": "a" * 301}}),
        (DesiredSettings, {"values": {f"key{number}": 1 for number in range(MAX_SETTINGS + 1)}}),
        (CommandRequest, {"id": "0" * 7}),
        (CommandRequest, {"id": "G" * 16}),
        (CommandRequest, {"deadline": "2026-01-01T00:00:00"}),
        (CommandResponse, {"result": "a" * (MAX_RESULT + 1)}),
        (CommandResponse, {"outcome": "Well!"}),
    ],
)
def test_what_is_out_of_bounds_is_no_message(model: type[Any], change: dict[str, Any]) -> None:
    assert decode_json(model, json.dumps(VALID[model]).encode())
    with pytest.raises(MalformedMessage):
        decode_json(model, json.dumps(VALID[model] | change).encode())


def test_the_longest_answer_fits_into_a_message_whatever_it_says() -> None:
    for character in ("\N{GRINNING FACE}", "\x01", '"'):
        response = CommandResponse(
            id="0" * 32,
            outcome=CommandOutcome.OK,
            sentence="a" * 500,
            result=character * MAX_RESULT,
        )
        assert len(encode_json(response)) <= MAX_CONTROL_BYTES


def test_an_outcome_of_a_later_release_is_no_success() -> None:
    fields = VALID[CommandResponse] | {"outcome": "half-done"}
    assert decode_json(CommandResponse, json.dumps(fields).encode()).outcome is CommandOutcome.FAILED


def test_names_and_texts_cannot_steer_a_terminal() -> None:
    wanted = DesiredSettings(id="0" * 8, values={"a\x1b[2J": "b\nc"}, who="d\re", at=datetime(2026, 1, 1, tzinfo=UTC))
    assert all(text.isprintable() for text in (*wanted.values, *map(str, wanted.values.values()), wanted.who))


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("0001-01-01T00:00:00+23:59", datetime(1970, 1, 1, tzinfo=UTC)),
        ("9999-12-31T23:59:59-23:59", datetime(9999, 12, 30, tzinfo=UTC)),
        ("2026-03-04T13:00:00+01:00", datetime(2026, 3, 4, 12, tzinfo=UTC)),
    ],
)
def test_times_fit_into_every_time_zone(written: str, read: datetime) -> None:
    found = decode_json(ReportedSettings, json.dumps(VALID[ReportedSettings] | {"at": written}).encode()).at
    assert found == read
    assert found.tzinfo is UTC
    assert found.astimezone(timezone(timedelta(hours=14))) == read
