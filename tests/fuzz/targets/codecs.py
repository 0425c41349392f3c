"""Decoders of session and control messages: bytes to a message, the same from its own bytes, or `CodecError`."""

import json
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from schemas import codec
from schemas.control import (
    CommandRequest,
    CommandResponse,
    DesiredSettings,
    DeviceState,
    EdgeState,
    ReportedSettings,
    Telemetry,
    decode_json,
    encode_json,
)
from schemas.downlink import UnknownForm
from schemas.errors import CodecError
from schemas.messages import Verdict
from tests.fuzz.harness import Finding
from tests.fuzz.mutation import Bytes, mutate_cbor, mutate_json

Pair = tuple[Callable[[bytes], Any], Callable[[Any], bytes]]

UP: Final[tuple[Pair, ...]] = (
    (codec.decode_open, codec.encode_open),
    (codec.decode_draft, codec.encode_draft),
    (codec.decode_close, codec.encode_close),
)
DOWN: Final[tuple[Pair, ...]] = (
    (codec.decode_verdict, codec.encode_verdict),
    (codec.decode_reply, codec.encode_reply),
)
_STEERING: Final = (DesiredSettings, ReportedSettings, CommandRequest, CommandResponse)
_CONTROL_MESSAGES: Final = (DeviceState, EdgeState, Telemetry, *_STEERING)
CONTROL: Final[tuple[Pair, ...]] = tuple(
    (lambda payload, model=model: decode_json(model, payload), encode_json) for model in _CONTROL_MESSAGES
)
_GOLDEN: Final = Path(__file__).resolve().parents[3] / "docs" / "vectors" / "messages.json"


class CodecTarget:
    """Some decoders, each with its encoder in `pairs`; the first byte of an input selects one.

    `reads` has their names in the golden file, in the same order.
    """

    def __init__(
        self,
        pairs: tuple[Pair, ...],
        reads: tuple[str, ...],
        mutate_payload: Callable[[bytes, random.Random, Bytes], bytes],
        max_bytes: int,
    ) -> None:
        self.max_bytes = max_bytes
        self._pairs, self._reads, self._mutate = pairs, reads, mutate_payload

    def __call__(self, data: bytes) -> None:
        if not data:
            return
        decode, encode = self._pairs[data[0] % len(self._pairs)]
        try:
            message = decode(data[1:])
        except CodecError as error:
            _check_sentence(str(error))
            return
        if isinstance(message, Verdict) and isinstance(message.next, UnknownForm):
            return
        again = decode(encode(message))
        if isinstance(message, Verdict):  # times are rounded on their way
            again = again.model_copy(update={"queue_ms": message.queue_ms, "compute_ms": message.compute_ms})
        if again != message:
            raise Finding(f"{type(message).__name__} is another after its way")

    def close(self) -> None:
        """Hold nothing."""

    def mutate(self, data: bytes, rng: random.Random, plain: Bytes) -> bytes:
        if not data or rng.random() < 0.05:
            return plain(data)
        return data[:1] + self._mutate(data[1:], rng, plain)

    def cross(self, data: bytes, other: bytes, rng: random.Random) -> bytes:
        return data[: rng.randint(0, len(data))] + other[rng.randint(0, len(other)) :]

    def seeds(self) -> Iterator[bytes]:
        yield from (bytes([number]) for number in range(len(self._pairs)))
        for message in golden():
            if message["reads"] in self._reads:
                yield bytes([self._reads.index(message["reads"])]) + payload_of(message)


def golden() -> list[Mapping[str, Any]]:
    messages: list[Mapping[str, Any]] = json.loads(_GOLDEN.read_text(encoding="utf-8"))["messages"]["cases"]
    return messages


def payload_of(message: Mapping[str, Any]) -> bytes:
    return message["json"].encode() if "json" in message else bytes.fromhex(message["hex"])


def codec_up() -> CodecTarget:
    return CodecTarget(UP, ("open", "draft", "close"), mutate_cbor, codec.MAX_OPEN_BYTES + 2)


def codec_down() -> CodecTarget:
    return CodecTarget(DOWN, ("verdict", "reply"), mutate_cbor, codec.MAX_VERDICT_BYTES + 2)


def control() -> CodecTarget:
    return CodecTarget(CONTROL, [model.__name__ for model in _CONTROL_MESSAGES], mutate_json, 1 << 16)


def _check_sentence(text: str) -> None:
    if len(text) > 500 or not text.endswith(".") or not text.isprintable():
        raise Finding(f"no sentence for a log: {text[:200]!r}")
