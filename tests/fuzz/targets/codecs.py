"""Decoders of session and control messages: bytes to a message, the same from its own bytes, or `CodecError`."""

import random
from collections.abc import Callable, Iterator

from schemas import codec
from schemas.downlink import UnknownForm
from schemas.errors import CodecError
from schemas.messages import Verdict
from tests.fuzz.harness import Finding
from tests.fuzz.mutation import Bytes, mutate_cbor, mutate_json
from tests.support.golden import CASES, CODECS, CONTROL, payload_of


class CodecTarget:
    """Some codecs, by their names in the golden file; the first byte of an input selects one."""

    def __init__(
        self,
        names: tuple[str, ...],
        mutate_payload: Callable[[bytes, random.Random, Bytes], bytes],
        max_bytes: int,
    ) -> None:
        self.max_bytes = max_bytes
        self._names, self._mutate = names, mutate_payload

    def __call__(self, data: bytes) -> None:
        if not data:
            return
        decode, encode = CODECS[self._names[data[0] % len(self._names)]]
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
        yield from (bytes([number]) for number in range(len(self._names)))
        for message in CASES:
            if message["reads"] in self._names:
                yield bytes([self._names.index(message["reads"])]) + payload_of(message)


def codec_up() -> CodecTarget:
    return CodecTarget(("open", "draft", "close"), mutate_cbor, codec.MAX_OPEN_BYTES + 2)


def codec_down() -> CodecTarget:
    return CodecTarget(("verdict", "reply"), mutate_cbor, codec.MAX_VERDICT_BYTES + 2)


def control() -> CodecTarget:
    return CodecTarget(tuple(model.__name__ for model in CONTROL), mutate_json, 1 << 16)


def _check_sentence(text: str) -> None:
    if len(text) > 500 or not text.endswith(".") or not text.isprintable():
        raise Finding(f"no sentence for a log: {text[:200]!r}")
