import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from schemas.control import (
    MAX_CONTROL_BYTES,
    Alert,
    DeviceState,
    EdgeState,
    Presence,
    Telemetry,
    decode_json,
    encode_json,
)
from schemas.errors import CodecError, MalformedMessage, MessageTooLarge

SINCE = datetime(2026, 1, 1, tzinfo=UTC)
DEVICE = DeviceState(presence=Presence.ONLINE, software="1", draft_model="toy", quantization="Q4_0", since=SINCE)
EDGE = EdgeState(presence=Presence.DRAINING, software="1", edge="edge-1", target="toy", vocabulary="6", since=SINCE)
TELEMETRY = Telemetry(sessions=1, tokens=2, acceptance=0.5)


@pytest.mark.parametrize("message", [DEVICE, EDGE, TELEMETRY], ids=lambda message: type(message).__name__)
def test_what_is_encoded_is_decoded(message: BaseModel) -> None:
    assert decode_json(type(message), encode_json(message)) == message  # type: ignore[arg-type, type-var]


def test_an_operator_can_read_it() -> None:
    assert json.loads(encode_json(DEVICE))["presence"] == "online"
    assert "round_trip_ms" not in json.loads(encode_json(TELEMETRY))


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
    for model in (Alert, DeviceState, EdgeState, Telemetry):
        with pytest.raises(CodecError):
            decode_json(model, payload)
