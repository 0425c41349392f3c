"""Targets by name."""

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Final, Protocol

from tests.fuzz.mutation import Bytes
from tests.fuzz.targets.api import ApiTarget
from tests.fuzz.targets.codecs import codec_down, codec_up, control
from tests.fuzz.targets.device import DeviceTarget
from tests.fuzz.targets.edge import EdgeTarget
from tests.fuzz.targets.screen import ScreenTarget


class Target(Protocol):
    """A fuzz target; `max_bytes` limits its inputs."""

    max_bytes: int

    def __call__(self, data: bytes) -> None:
        """Run an input; raise whatever is not as documented."""

    def close(self) -> None:
        """Free what it holds."""

    def mutate(self, data: bytes, rng: random.Random, plain: Bytes) -> bytes:
        """Return an input like another."""

    def cross(self, data: bytes, other: bytes, rng: random.Random) -> bytes:
        """Return an input like two others."""

    def seeds(self) -> Iterator[bytes]:
        """Give inputs to begin with."""


TARGETS: Final[Mapping[str, Callable[[], Target]]] = {
    "codec-up": codec_up,
    "codec-down": codec_down,
    "control": control,
    "edge": EdgeTarget,
    "device": DeviceTarget,
    "api": ApiTarget,
    "screen": ScreenTarget,
}
