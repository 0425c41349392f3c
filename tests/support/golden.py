"""Messages of `docs/vectors` byte by byte, and the codec of each kind."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, get_args

from pydantic import BaseModel

from schemas import codec
from schemas.control import (
    Alert,
    ChatFormat,
    CommandRequest,
    CommandResponse,
    ControlMessage,
    DesiredSettings,
    DeviceState,
    EdgeState,
    ReportedSettings,
    Telemetry,
    decode_json,
    encode_json,
)
from schemas.messages import Close, Draft, Open, SessionReply, Verdict

Codec = tuple[Callable[[bytes], Any], Callable[..., bytes]]

CONTROL: Final[tuple[type[ControlMessage], ...]] = (
    DeviceState,
    EdgeState,
    Telemetry,
    DesiredSettings,
    ReportedSettings,
    CommandRequest,
    CommandResponse,
    Alert,
    ChatFormat,
)
MESSAGES: Final[tuple[type[BaseModel], ...]] = (
    *CONTROL,
    Open,
    Draft,
    Verdict,
    Close,
    *get_args(get_args(SessionReply)[0]),
)
"""Messages of which `docs/vectors` has every kind."""

CODECS: Final[Mapping[str, Codec]] = {
    "open": (codec.decode_open, codec.encode_open),
    "reply": (codec.decode_reply, codec.encode_reply),
    "close": (codec.decode_close, codec.encode_close),
    "draft": (codec.decode_draft, codec.encode_draft),
    "verdict": (codec.decode_verdict, codec.encode_verdict),
    **{model.__name__: (partial(decode_json, model), encode_json) for model in CONTROL},
}
"""By the name under which the vectors say what reads a message."""

GOLDEN: Final = json.loads((Path(__file__).parents[2] / "docs" / "vectors" / "messages.json").read_text("utf-8"))
CASES: Final[list[Mapping[str, Any]]] = GOLDEN["messages"]["cases"]


def payload_of(message: Mapping[str, Any]) -> bytes:
    return message["json"].encode() if "json" in message else bytes.fromhex(message["hex"])
