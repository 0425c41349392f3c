"""Counting device: the real device on a connection whose bytes are counted while drafts and verdicts travel."""

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any, Final, Self

from benchmarks.bytes.variants import Variant
from fleet_device.client.agent import Agent
from fleet_device.drafters.scripted import WordCodec
from fleet_device.pacing.contract import FixedPacing
from fleet_link.paho_link import PahoLink
from fleet_link.settings import BrokerSettings
from schemas.topics import Topic
from schemas.vocabulary import Vocabulary
from tests.support.recorded_drafter import RecordedDrafter, RecordedText
from tests.support.relay import Relay

__all__ = ["TCP_IP_HEAD", "CountingDevice", "Traffic", "settled"]

TCP_IP_HEAD: Final = 52
"""Bytes of each segment's heads: IPv4 20, TCP 20, its time stamps 12."""

_SEGMENT: Final = 1448  # payload of a segment on Ethernet; on loopback one holds 64 KiB
_ACKNOWLEDGED: Final = 2  # full segments that one acknowledgement answers
_START_S: Final = 20.0
_QUIET_S: Final = 0.06  # longer than a delayed acknowledgement of TCP waits
_HALF: Final = 2  # bytes of a probability in full distributions: half precision, the least that is proposed anywhere


@dataclass(slots=True)
class Traffic:
    """What texts have cost, in bytes but for the first three.

    Attributes:
        tokens: Committed.
        tested: Draft tokens that were decided on.
        accepted: Of them, accepted.
        up: Payload of drafts, and of full distributions.
        down: Payload of verdicts.
        packets_up: MQTT packets from the device, acknowledgements counted in; over TLS, its records.
        packets_down: To the device.
        segments_up: TCP segments from the device.
        segments_down: To it.
    """

    tokens: int = 0
    tested: int = 0
    accepted: int = 0
    up: int = 0
    down: int = 0
    packets_up: int = 0
    packets_down: int = 0
    segments_up: int = 0
    segments_down: int = 0

    def add(self, other: "Traffic") -> None:
        """Add another text's."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    @property
    def wire_up(self) -> int:
        """From the device with the heads of TCP and IP, long packets cut as on Ethernet."""
        return self.packets_up + TCP_IP_HEAD * _segments(self.segments_up, self.packets_up, self.packets_down)

    @property
    def wire_down(self) -> int:
        """To the device, likewise."""
        return self.packets_down + TCP_IP_HEAD * _segments(self.segments_down, self.packets_down, self.packets_up)


def _segments(counted: int, sent: int, received: int) -> int:
    return max(counted, sent // _SEGMENT + received // _SEGMENT // _ACKNOWLEDGED)


def settled(relay: Relay) -> tuple[int, int, int, int]:
    """Return the bytes and segments up and down that a relay has counted, once nothing moves any more."""
    before: tuple[int, ...] = ()
    while (now := (relay.up, relay.down, *relay.segments)) != before:
        before = now
        time.sleep(_QUIET_S + relay.round_trip_s)
    return now


class CountingLink:
    """A link that marks when the first draft of a text goes out, and when the text is closed.

    So the opening of a session is left out, of which a text of any length has one.

    Args:
        link: To the broker, by way of the relay.
        relay: Counts.
        filling: Bytes that go before each draft; nobody reads them.
    """

    def __init__(self, link: PahoLink, relay: Relay, filling: int) -> None:
        self._link = link
        self._relay = relay
        self._filling = bytes(filling)
        self._began: tuple[int, ...] | None = None
        self.filled = 0
        self.counted: tuple[int, ...] = (0, 0, 0, 0)

    def publish(self, topic: str, payload: bytes, **options: Any) -> None:  # noqa: ANN401 - passed on
        """Send a message."""
        if f"/{Topic.DRAFT.value}" in topic:
            if self._began is None:
                self._began = self._settled()
            if self._filling:
                self.filled += len(self._filling)
                self._link.publish(f"{topic.rsplit('/', 2)[0]}/filling", self._filling, qos=0)
        elif topic.endswith(Topic.CLOSE.value) and self._began is not None:
            ended = self._settled()
            self.counted = tuple(now - then for now, then in zip(ended, self._began, strict=True))
            self._began = None
        self._link.publish(topic, payload, **options)

    def _settled(self) -> tuple[int, ...]:
        return settled(self._relay)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - all else is the link's
        return getattr(self._link, name)


class CountingDevice(AbstractContextManager["CountingDevice"]):
    """A device of a fleet, connected, that plays records.

    Args:
        broker: Where, and who the device is there.
        fleet: Topic level.
        name: The device's.
        variant: What it does.
        words: The vocabulary.
        token_s: Time of a draft token (seconds).
        round_trip_s: To the broker and back (seconds).
    """

    def __init__(
        self,
        broker: BrokerSettings,
        fleet: str,
        name: str,
        variant: Variant,
        words: tuple[str, ...],
        *,
        token_s: float,
        round_trip_s: float,
    ) -> None:
        self._relay = Relay(broker.port, round_trip_s=round_trip_s)
        self._link = PahoLink(broker.model_copy(update={"port": self._relay.port}).link(name, will=None))
        filling = (variant.length or 0) * len(words) * _HALF if variant.full_up else 0
        self._counting = CountingLink(self._link, self._relay, filling)
        self._drafter = RecordedDrafter(WordCodec(words), Vocabulary.of(words), token_s=token_s)
        counting: Any = self._counting
        self._agent = Agent(counting, fleet, name, self._drafter, FixedPacing(), time.monotonic)
        self._agent.pacing = variant.pacing()
        self._agent.attach()

    def __enter__(self) -> Self:
        self._link.start(timeout_s=_START_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._link.stop()
        self._relay.close()

    def write(self, text: RecordedText, *, tokens: int | None = None) -> Traffic:
        """Write a text; return what it cost."""
        self._drafter.play(text)
        filled = self._counting.filled
        done = self._agent.generate(text.prompt, policy=text.policy, max_new_tokens=tokens or len(text.tokens))
        counters, counted = done.counters, self._counting.counted
        return Traffic(
            len(done.tokens),
            counters.tested,
            counters.accepted,
            counters.uplink_bytes + self._counting.filled - filled,
            counters.downlink_bytes,
            *counted,
        )
