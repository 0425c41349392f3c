"""Remote device: the real device with a live draft model, behind a line of any length and width."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Final, Self

from benchmarks.latency.local import Timed
from benchmarks.latency.systems import DRAFT, System
from fleet_device.client.agent import Agent
from fleet_device.drafters.contract import Drafter
from fleet_device.pacing.contract import FixedPacing, Pacing
from fleet_link.paho_link import PahoLink
from fleet_link.settings import BrokerSettings
from schemas.policy import SamplingPolicy
from schemas.topics import Topic
from tests.support.relay import Relay

__all__ = ["Line", "RemoteDevice"]

_START_S: Final = 30.0
_HALF: Final = 2
"""Bytes of a probability, where full distributions are sent: half precision, the least that is proposed anywhere."""


class Line(AbstractContextManager["Line"]):
    """A line between device and broker.

    Args:
        port: The broker's.
        round_trip_ms: There and back.
        mbit_s: Its width each way, in megabits a second; 0 is none.
    """

    def __init__(self, port: int, *, round_trip_ms: float, mbit_s: float) -> None:
        self._relay = Relay(port, round_trip_s=round_trip_ms / 1e3, bytes_per_s=mbit_s * 1e6 / 8)

    @property
    def port(self) -> int:
        """Where it begins."""
        return self._relay.port

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._relay.close()


class _FillingLink:
    """A link that sends as many bytes before each draft as its tokens' full distributions would be.

    Nobody reads them: what it costs to decode and use them is left out.
    """

    def __init__(self, link: PahoLink, size: int) -> None:
        self._link = link
        self._filling = bytes(size)
        self.filled = 0

    def publish(self, topic: str, payload: bytes, **options: Any) -> None:  # noqa: ANN401 - passed on
        if f"/{Topic.DRAFT.value}" in topic:
            self.filled += len(self._filling)
            self._link.publish(f"{topic.rsplit('/', 2)[0]}/filling", self._filling, qos=0)
        self._link.publish(topic, payload, **options)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - all else is the link's
        return getattr(self._link, name)


class RemoteDevice(AbstractContextManager["RemoteDevice"]):
    """A device of a fleet, connected.

    Args:
        line: To the broker.
        fleet: Topic level.
        drafter: Its draft model; closed by whoever made it.
        name: The device's.
        full_up: Whether it sends full distributions as well.
    """

    def __init__(self, line: Line, fleet: str, drafter: Drafter, *, name: str, full_up: bool) -> None:
        self._link = PahoLink(BrokerSettings(port=line.port).link(name, will=None))
        self._filling = _FillingLink(self._link, DRAFT * drafter.vocabulary.size * _HALF) if full_up else None
        link: Any = self._filling or self._link
        self._agent = Agent(link, fleet, name, drafter, FixedPacing(), time.monotonic)
        self._agent.attach()

    def __enter__(self) -> Self:
        self._link.start(timeout_s=_START_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._link.stop()

    def write(
        self,
        system: System,
        pacing: Pacing,
        prompt: Sequence[int],
        *,
        policy: SamplingPolicy,
        tokens: int,
        limit_s: float,
    ) -> Timed:
        """Write a text; it ends after `limit_s` seconds where it is."""
        pieces: list[tuple[float, int]] = []
        self._agent.pacing = pacing
        filled, started = self._filled, time.monotonic()

        def take(new: Sequence[int]) -> bool:
            pieces.append((time.monotonic(), len(new)))
            return time.monotonic() - started > limit_s

        done = self._agent.generate(
            prompt,
            policy=policy.model_copy(update={"mode": system.mode}),
            max_new_tokens=tokens,
            on_tokens=take,
        )
        (first_at, head), (last_at, _) = pieces[0], pieces[-1]
        return Timed(
            text=done.tokens,
            first_s=first_at - started,
            seconds=last_at - first_at,
            after=len(done.tokens) - head,
            up_bytes=done.counters.uplink_bytes + self._filled - filled,
            down_bytes=done.counters.downlink_bytes,
        )

    @property
    def _filled(self) -> int:
        return 0 if self._filling is None else self._filling.filled
