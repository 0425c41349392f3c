"""Guard: decides, before anything of a device's message is decoded, whether the edge takes it, and keeps the quotas.

The link's thread asks `accepts` for every message that comes; all else is called on the orchestrator's thread. What a
flood costs is then a look into a table for each of its messages, and an answer now and then.
"""

import math
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from fleet_edge.errors import DraftFault, OpenRefused
from fleet_edge.guard.quotas import QuotaSettings
from fleet_edge.guard.standing import KeptStanding, Standing
from fleet_edge.guard.strikes import FenceSettings, Strikes
from schemas.errors import TopicError
from schemas.messages import Open
from schemas.reasons import Action, FaultCode, RefusalCode
from schemas.topics import Topic, parse

_WEIGHTS: Final[Mapping[FaultCode, float]] = {
    FaultCode.MALFORMED: 10.0,  # no sound device of this release sends one, whatever its line
    FaultCode.UNKNOWN_SESSION: 1.0,
    FaultCode.DESYNC: 1.0,
    FaultCode.TOO_LONG: 3.0,
    FaultCode.TOKEN: 10.0,
    FaultCode.COUNTS: 10.0,
    FaultCode.QUOTA: 1.0,
}
"""Strikes that a fault counts; the edge's own count none. What a bad line or a restarted edge causes counts least."""

_DEADLY_GRAMMAR_WEIGHT: Final = 160.0
"""Strikes of a grammar that has ended a process: with the default, the second within seconds shuts its device out."""

_SLOWED_WEIGHT: Final = 4.0
_TELL_EVERY_S: Final = 1.0
_TELL_FENCED_EVERY_S: Final = 10.0
_MOST_STANDINGS: Final = 65_536
_IDLE_S: Final = 600.0
_ANSWERED: Final = frozenset({Topic.OPEN, Topic.DRAFT})
_UP: Final = frozenset({Topic.OPEN, Topic.DRAFT, Topic.CLOSE, Topic.STATE, Topic.TELEMETRY})


@dataclass(frozen=True, slots=True)
class OverQuota:
    """A device sends more than it may; what is over is dropped unread.

    Attributes:
        device: Which.
        topic: Of what.
        retry_s: Seconds until it may send again.
    """

    device: str
    topic: Topic
    retry_s: float


@dataclass(frozen=True, slots=True)
class FenceBegun:
    """A device is shut out for its strikes.

    Attributes:
        device: Which.
        for_s: Seconds.
        strikes: Whose number is too high.
        level: How often in a row.
    """

    device: str
    for_s: float
    strikes: float
    level: int


Notice = OverQuota | FenceBegun


@dataclass(frozen=True, slots=True)
class _Channel:
    """What is known of a topic that has been seen."""

    topic: Topic
    standing: Standing


class Guard:
    """Keeps the standing of all devices of an edge.

    Args:
        quotas: What devices may use.
        fence: When they are shut out.
        clock: Monotonic seconds.
    """

    def __init__(self, quotas: QuotaSettings, fence: FenceSettings, *, clock: Callable[[], float]) -> None:
        self._quotas = quotas
        self._fence = fence
        self._clock = clock
        self._lock = threading.Lock()  # standings are made, and strikes counted, on both threads
        self._standings: dict[str, Standing] = {}
        self._channels: dict[bytes, _Channel | None] = {}
        self._notices: deque[Notice] = deque(maxlen=1000)

    # On the link's thread

    def accepts(self, topic: bytes, size: int, retained: bool) -> bool:
        """Return whether a message is to be decoded.

        Args:
            topic: In UTF-8.
            size: Bytes of its packet.
            retained: Whether it is the broker's kept copy.
        """
        try:
            channel = self._channels[topic]
        except KeyError:
            channel = self._channel(topic)
        if channel is None:
            return True  # no device's: another part judges it
        standing, now = channel.standing, self._clock()
        if now < standing.fenced_until:
            return self._while_fenced(channel, now)
        weight = _SLOWED_WEIGHT if standing.strikes.slowed(now) else 1.0
        wait_s = standing.messages[channel.topic].take(weight, now) or standing.uplink.take(size, now)
        if wait_s == 0.0 or retained:
            standing.heard = now
            return True
        standing.dropped += 1
        self._strike(standing, _WEIGHTS[FaultCode.QUOTA], now)
        if channel.topic in _ANSWERED and now - standing.told >= _TELL_EVERY_S and not standing.fenced(now):
            standing.told = now
            self._notices.append(OverQuota(standing.device, channel.topic, wait_s))
        return False

    # On the orchestrator's thread

    def admit_open(self, device: str, message: Open) -> None:
        """Take an Open's share out of its device's quotas.

        Raises:
            OpenRefused: It is over one of them, or its device is shut out.
        """
        standing, now = self._standing(device), self._clock()
        if standing.fenced(now):
            raise self.shut_out(device)
        quotas = standing.quotas
        if message.policy.top_k > quotas.top_k:
            raise OpenRefused(
                RefusalCode.QUOTA,
                f"The policy's top_k is {message.policy.top_k}; this edge allows {quotas.top_k}, or 0 for the whole "
                "vocabulary.",
            )
        if (wait_s := standing.opens.wait_s(1.0, now)) > 0.0:
            raise _over(f"The device may open {quotas.opens_per_min:g} sessions a minute", wait_s)
        tokens = len(message.prompt) + len(message.resume or ())
        if (wait_s := standing.prompts.take(tokens, now)) > 0.0:
            raise _over(f"The device may send {quotas.prompt_tokens_per_min:g} prompt tokens a minute", wait_s)
        if (wait_s := standing.new_tokens.wait_s(1.0, now)) > 0.0:
            raise _over(f"The device may write {quotas.new_tokens_per_min:g} tokens a minute", wait_s)
        standing.opens.take(1.0, now)

    def admit_grammar(self, device: str) -> None:
        """Check that a device may have another grammar compiled.

        Raises:
            OpenRefused: Those before it have taken more than its quota.
        """
        standing = self._standing(device)
        if (wait_s := standing.grammars.wait_s(0.0, self._clock())) > 0.0:
            most = standing.quotas.grammar_s_per_min
            raise _over(f"The device's grammars may take {most:g} s a minute to compile", wait_s)

    def spend_grammar(self, device: str, seconds: float) -> None:
        """Count the time that a device's grammar took to compile."""
        self._standing(device).grammars.spend(seconds, self._clock())

    def strike_grammar(self, device: str) -> None:
        """Count a grammar that has ended a process against its device."""
        self._strike(self._standing(device), _DEADLY_GRAMMAR_WEIGHT, self._clock())

    def admit_draft(self, device: str) -> None:
        """Check that a device may still write.

        Raises:
            DraftFault: It has written more than its quota.
        """
        standing = self._standing(device)
        wait_s = standing.new_tokens.wait_s(1.0, self._clock())
        if wait_s > 0.0:
            most = standing.quotas.new_tokens_per_min
            sentence = f"The device may write {most:g} tokens a minute; it waits {wait_s:.1f} s."
            raise DraftFault(FaultCode.QUOTA, Action.WAIT, sentence, retry_s=wait_s)

    def spend(self, device: str, tokens: int) -> None:
        """Count tokens that a device has written."""
        self._standing(device).new_tokens.spend(tokens, self._clock())

    def most_sample_requests(self, device: str) -> int:
        """Return how often a device may ask for further samples after one rejection."""
        return self._standing(device).quotas.sample_requests

    def kv_share(self, device: str) -> float:
        """Return which part of the memory for keys and values a device may hold while others need some."""
        return self._standing(device).quotas.kv_share

    def may_repeat(self, device: str, size: int) -> bool:
        """Whether so many bytes may be sent to a device once more; what may is counted."""
        return self._standing(device).repeats.take(size, self._clock()) == 0.0

    def may_answer(self, device: str) -> bool:
        """Whether a device may be told of another fault or refusal; what may is counted."""
        return self._standing(device).answers.take(1.0, self._clock()) == 0.0

    def strike(self, device: str, code: FaultCode) -> None:
        """Count a fault against a device."""
        weight = _WEIGHTS.get(code, 0.0)
        if weight > 0.0:
            self._strike(self._standing(device), weight, self._clock())

    def fenced_by_others(self, left_s: Mapping[str, float]) -> set[str]:
        """Shut out those whom an administrator or another edge has fenced, and nobody else but our own.

        Args:
            left_s: For how many seconds, by device; infinite until it is lifted.

        Returns:
            Devices that were not shut out before.
        """
        now, new = self._clock(), set[str]()
        for device, seconds in left_s.items():
            standing = self._standing(device)
            if not standing.fenced(now):
                new.add(device)
            standing.others_until = now + seconds
        with self._lock:
            standings = list(self._standings.values())
        for standing in standings:
            if standing.device not in left_s:
                standing.others_until = 0.0
            standing.fenced_until = max(standing.own_until, standing.others_until)
        return new

    def lift(self, device: str) -> None:
        """End our own fence of a device, its strikes forgotten."""
        standing = self._standing(device)
        with self._lock:
            standing.own_until = 0.0
            standing.fenced_until = standing.others_until
            standing.strikes = Strikes(self._fence, self._clock())

    def shut_out(self, device: str) -> OpenRefused:
        """Return the refusal of a device that is shut out."""
        left_s = min(1e9, max(0.0, self._standing(device).fenced_until - self._clock()))
        return OpenRefused(
            RefusalCode.FENCED,
            f"The device is shut out of this edge for another {left_s:.0f} s; its administrator finds the reason with "
            "'fleet admin fenced'.",
            retry_s=left_s,
        )

    def fenced(self) -> frozenset[str]:
        """Return the devices that are shut out now. From any thread."""
        now = self._clock()
        with self._lock:
            return frozenset(name for name, each in self._standings.items() if each.fenced(now))

    def take_notices(self) -> list[Notice]:
        """Return what has happened since the last call."""
        notices = []
        while self._notices:
            notices.append(self._notices.popleft())
        return notices

    def take_dropped(self) -> dict[str, int]:
        """Return how many messages of each device were dropped unread since the last call."""
        with self._lock:
            standings = list(self._standings.values())
        dropped = {}
        for standing in standings:
            if (number := standing.dropped - standing.dropped_before) > 0:
                standing.dropped_before += number
                dropped[standing.device] = number
        return dropped

    def kept(self, most: int) -> dict[str, KeptStanding]:
        """Return what a restart of the edge must not change, by device; of too many, those with strikes first."""
        now = self._clock()
        with self._lock:
            standings = list(self._standings.values())
        found = {each.device: kept for each in standings if (kept := each.kept(now)) is not None}
        if len(found) > most:
            first = sorted(found.items(), key=lambda entry: (entry[1].level, entry[1].strikes, entry[1].used["opens"]))
            found = dict(first[-most:])
        return found

    def restore(self, kept: Mapping[str, KeptStanding], *, ago_s: float) -> None:
        """Go on where another run of the edge ended, `ago_s` seconds ago."""
        now = self._clock()
        for device, each in kept.items():
            self._standing(device).restore(each, ago_s=ago_s, now=now)

    # Within

    def _while_fenced(self, channel: _Channel, now: float) -> bool:
        """Let an Open through now and then, so that its device is told how long it is shut out."""
        standing = channel.standing
        if channel.topic is Topic.OPEN and now - standing.told >= _TELL_FENCED_EVERY_S:
            standing.told = now
            return True
        standing.dropped += 1
        return False

    def _strike(self, standing: Standing, weight: float, now: float) -> None:
        with self._lock:
            if standing.fenced(now):
                return
            for_s = standing.strikes.add(weight, now)
            if for_s == 0.0:
                return
            standing.own_until = now + for_s
            standing.fenced_until = max(standing.own_until, standing.others_until)
        self._notices.append(FenceBegun(standing.device, for_s, self._fence.strikes, standing.strikes.level))

    def _channel(self, topic: bytes) -> _Channel | None:
        """Make the entry of a topic that is new; None for one that is no device's."""
        if len(self._channels) >= 4 * _MOST_STANDINGS:
            self._channels.clear()  # they are found again
        try:
            address = parse(topic.decode())
        except (TopicError, UnicodeDecodeError):
            return None
        if address.device is None or address.topic not in _UP:
            return None
        channel = self._channels[topic] = _Channel(address.topic, self._standing(address.device))
        return channel

    def _standing(self, device: str) -> Standing:
        standing = self._standings.get(device)
        if standing is None:
            with self._lock:
                if len(self._standings) >= _MOST_STANDINGS:
                    self._forget_idle()
                standing = self._standings.setdefault(
                    device, Standing(device, self._quotas.of(device), self._fence, self._clock())
                )
        return standing

    def _forget_idle(self) -> None:
        """Make room: names without certificates cost nothing, and each new one has a standing."""
        now = self._clock()
        self._standings = {
            name: each for name, each in self._standings.items() if each.fenced(now) or now - each.heard < _IDLE_S
        }
        if len(self._standings) >= _MOST_STANDINGS:
            self._standings = {name: each for name, each in self._standings.items() if each.fenced(now)}
        self._channels = {}


def _over(what: str, wait_s: float) -> OpenRefused:
    return OpenRefused(RefusalCode.QUOTA, f"{what}; ask again in {math.ceil(wait_s)} s.", retry_s=wait_s)
