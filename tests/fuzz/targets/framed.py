"""What targets have in common whose inputs are sequences of frames."""

import random
from collections.abc import Iterator
from typing import Any, ClassVar

import cbor2

from tests.fuzz.frames import Frame
from tests.fuzz.mutation import Bytes, cross_frames, mutate_cbor, mutate_frames, mutate_json
from tests.support.memory_fleet import Device, MemoryFleet, run


class FramedTarget:
    """A target of frames, behind `head` bytes of which the first is mutated apart.

    `cbor` and `json` are the kinds of frames that hold such messages; `kinds` has the bits of a frame's kind.
    """

    max_bytes: ClassVar[int] = 1 << 13
    head: ClassVar[int] = 1
    cbor: ClassVar[frozenset[int]] = frozenset()
    json: ClassVar[frozenset[int]] = frozenset()

    def close(self) -> None:
        """Hold nothing."""

    def mutate(self, data: bytes, rng: random.Random, plain: Bytes) -> bytes:
        if self.head and (not data or rng.random() < 0.05):
            return bytes([rng.randrange(256)]) + data[1:]
        return data[: self.head] + mutate_frames(data[self.head :], rng, lambda frame: self._mutated(frame, rng, plain))

    def cross(self, data: bytes, other: bytes, rng: random.Random) -> bytes:
        return data[: self.head] + cross_frames(data[self.head :], other[self.head :], rng)

    @staticmethod
    def kind(op: int) -> int:
        return op & 7

    def _mutated(self, frame: Frame, rng: random.Random, plain: Bytes) -> Frame:
        kind = self.kind(frame.op)
        if kind in self.cbor:
            return frame._replace(payload=mutate_cbor(frame.payload, rng, plain))
        if kind in self.json:
            return frame._replace(payload=mutate_json(frame.payload, rng, plain))
        return frame._replace(payload=plain(frame.payload))


def on_any_topic(payload: bytes) -> tuple[str, bytes]:
    """Return the topic that a frame names, and the rest of it."""
    length = payload[0] if payload else 0
    return payload[1 : 1 + length].decode(errors="replace"), payload[1 + length :]


def loaded(payload: bytes, kind: type) -> Any:
    try:
        fields = cbor2.loads(payload)
    except Exception:  # noqa: BLE001 - whatever is wrong with it, the target is to say so
        return None
    return fields if isinstance(fields, kind) else None


def recorded(fleet: MemoryFleet, device: Device, rng: random.Random) -> Iterator[Any]:
    """Run a text, and return all messages that were sent."""
    messages: list[Any] = []
    accept = fleet.broker.accept

    def record(message: Any) -> int:
        messages.append(message)
        return accept(message)

    fleet.broker.accept = record  # type: ignore[method-assign]
    run(fleet, [device], rng)
    return iter(messages)
