"""Guard: decide before decoding whether a device's message is accepted, and keep the devices' quotas.

The link's thread calls `accepts` for every message; everything else runs on the orchestrator's thread. A flood costs a
table lookup per message, and an answer now and then.
"""

import json
import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Final

from pydantic import AwareDatetime, BaseModel, Field, ValidationError

from fleet_edge.errors import DraftFault, OpenRefused
from fleet_edge.limits import GRAMMAR_S_PER_MIN, KeptStanding, QuarantineSettings, QuotaSettings, Standing, Strikes
from fleet_edge.session_log.quarantines import Quarantines
from schemas.errors import TopicError
from schemas.messages import Open
from schemas.reasons import Action, FaultCode, RefusalCode
from schemas.topics import Topic, parse

_WEIGHTS: Final[Mapping[FaultCode, float]] = {
    FaultCode.MALFORMED: 10.0,  # a sound device never sends one
    FaultCode.UNKNOWN_SESSION: 1.0,
    FaultCode.TOKENS_DIFFER: 1.0,
    FaultCode.TOO_LONG: 3.0,
    FaultCode.TOKEN: 10.0,
    FaultCode.COUNTS: 10.0,
    FaultCode.QUOTA: 1.0,
}
"""Strikes of a fault: none for the edge's own faults, few for those that a bad line or a restarted edge causes."""

MAX_TOP_K: Final = 1024
"""Largest `top_k` of a policy; 0, the whole vocabulary, is always allowed."""

_DEADLY_GRAMMAR_WEIGHT: Final = 160.0
"""Strikes for a grammar that has killed two processes: by default the second within seconds leads to quarantine."""

_SLOWED_WEIGHT: Final = 4.0
_NOTIFY_EVERY_S: Final = 1.0
_NOTIFY_QUARANTINED_EVERY_S: Final = 10.0
_MAX_STANDINGS: Final = 65_536
_IDLE_S: Final = 600.0
_ANSWERED: Final = frozenset({Topic.OPEN, Topic.DRAFT})
_UP: Final = frozenset({Topic.OPEN, Topic.DRAFT, Topic.CLOSE, Topic.STATE, Topic.TELEMETRY})


@dataclass(frozen=True, slots=True)
class OverQuota:
    """A device exceeds a quota; its messages on the topic are dropped unread for `retry_s` seconds."""

    device: str
    topic: Topic
    retry_s: float


@dataclass(frozen=True, slots=True)
class QuarantineBegun:
    """A device is quarantined for its strikes; `level` is how often in a row."""

    device: str
    for_s: float
    strikes: float
    level: int


Notice = OverQuota | QuarantineBegun


class DeviceGuard:
    def __init__(self, quotas: QuotaSettings, quarantine: QuarantineSettings, *, clock: Callable[[], float]) -> None:
        self._quotas = quotas
        self._quarantine = quarantine
        self._clock = clock
        self._lock = threading.Lock()  # both threads create standings and count strikes
        self._standings: dict[str, Standing] = {}
        self._channels: dict[bytes, tuple[Topic, Standing]] = {}
        self._notices: deque[Notice] = deque(maxlen=1000)

    # On the link's thread

    def accepts(self, topic: bytes, size: int, retained: bool) -> bool:
        """Decide before a message is decoded; `topic` is UTF-8, `size` counts the packet's bytes."""
        channel = self._channels.get(topic) or self._channel(topic)
        if channel is None:
            return True  # not a device's topic
        (kind, standing), now = channel, self._clock()
        if now < standing.quarantined_until:
            return self._while_quarantined(kind, standing, now)
        weight = _SLOWED_WEIGHT if standing.strikes.slowed(now) else 1.0
        wait_s = standing.messages[kind].try_spend(weight, now) or standing.uplink.try_spend(size, now)
        if wait_s == 0.0 or retained:
            standing.heard = now
            return True
        standing.dropped += 1
        self._strike(standing, _WEIGHTS[FaultCode.QUOTA], now)
        if kind in _ANSWERED and now - standing.notified >= _NOTIFY_EVERY_S and not standing.quarantined(now):
            standing.notified = now
            self._notices.append(OverQuota(standing.device, kind, wait_s))
        return False

    # On the orchestrator's thread

    def admit_open(self, device: str, message: Open) -> None:
        """Charge an Open to its device's quotas; raises `OpenRefused` if one is exceeded."""
        standing, now = self._standing(device), self._clock()
        if standing.quarantined(now):
            raise self.shut_out(device)
        quotas = standing.quotas
        if message.policy.top_k > MAX_TOP_K:
            raise OpenRefused(
                RefusalCode.QUOTA,
                f"The policy's top_k is {message.policy.top_k}; edges allow {MAX_TOP_K}, or 0 for the whole "
                "vocabulary.",
            )
        if (wait_s := standing.opens.wait_s(1.0, now)) > 0.0:
            raise _over(f"The device may open {quotas.opens_per_min:g} sessions a minute", wait_s)
        if (wait_s := standing.prompt_s.wait_s(0.0, now)) > 0.0:
            raise _over(f"The device's prompts may take {quotas.prompt_s_per_min:g} s a minute", wait_s)
        if (wait_s := standing.new_tokens.wait_s(1.0, now)) > 0.0:
            raise _over(f"The device may generate {quotas.new_tokens_per_min:g} tokens a minute", wait_s)
        standing.opens.try_spend(1.0, now)

    def admit_grammar(self, device: str) -> None:
        """Check that a device may have another grammar compiled; raises `OpenRefused`."""
        standing = self._standing(device)
        if (wait_s := standing.grammars.wait_s(0.0, self._clock())) > 0.0:
            raise _over(f"The device's grammars may take {GRAMMAR_S_PER_MIN:g} s a minute to compile", wait_s)

    def spend_grammar(self, device: str, seconds: float) -> None:
        self._standing(device).grammars.spend(seconds, self._clock())

    def strike_grammar(self, device: str) -> None:
        self._strike(self._standing(device), _DEADLY_GRAMMAR_WEIGHT, self._clock())

    def admit_draft(self, device: str) -> None:
        """Check that a device may still generate tokens; raises `DraftFault`."""
        standing = self._standing(device)
        wait_s = standing.new_tokens.wait_s(1.0, self._clock())
        if wait_s > 0.0:
            most = standing.quotas.new_tokens_per_min
            sentence = f"The device may generate {most:g} tokens a minute; it waits {wait_s:.1f} s."
            raise DraftFault(FaultCode.QUOTA, Action.WAIT, sentence, retry_s=wait_s)

    def spend(self, device: str, tokens: int) -> None:
        self._standing(device).new_tokens.spend(tokens, self._clock())

    def spend_prompts(self, device: str, seconds: float) -> None:
        self._standing(device).prompt_s.spend(seconds, self._clock())

    def kv_share(self, device: str) -> float:
        """Return the share of the KV memory that a device may hold while others need some."""
        return self._standing(device).quotas.kv_share

    def may_repeat(self, device: str, size: int) -> bool:
        """Count `size` bytes that are sent to a device again; False if that is too many."""
        return self._standing(device).repeats.try_spend(size, self._clock()) == 0.0

    def may_answer(self, device: str) -> bool:
        """Count a fault or refusal for a device; False if it has had too many."""
        return self._standing(device).answers.try_spend(1.0, self._clock()) == 0.0

    def strike(self, device: str, code: FaultCode) -> None:
        weight = _WEIGHTS.get(code, 0.0)
        if weight > 0.0:
            self._strike(self._standing(device), weight, self._clock())

    def quarantined_by_others(self, left_s: Mapping[str, float]) -> set[str]:
        """Set the quarantines by an administrator or other edges; return the devices newly quarantined.

        `left_s` has the remaining seconds by device; infinite until lifted.
        """
        now, new = self._clock(), set[str]()
        for device, seconds in left_s.items():
            standing = self._standing(device)
            if not standing.quarantined(now):
                new.add(device)
            standing.others_until = now + seconds
        for standing in self._all():
            if standing.device not in left_s:
                standing.others_until = 0.0
            standing.quarantined_until = max(standing.own_until, standing.others_until)
        return new

    def lift(self, device: str) -> None:
        """End our own quarantine of a device, and forget its strikes."""
        standing = self._standing(device)
        with self._lock:
            standing.own_until = 0.0
            standing.quarantined_until = standing.others_until
            standing.strikes = Strikes(self._quarantine, self._clock())

    def shut_out(self, device: str) -> OpenRefused:
        left_s = min(1e9, max(0.0, self._standing(device).quarantined_until - self._clock()))
        return OpenRefused(
            RefusalCode.QUARANTINED,
            f"The device is quarantined for another {left_s:.0f} s; 'fleet admin quarantined' shows its "
            "administrator the reason.",
            retry_s=left_s,
        )

    def quarantined(self) -> frozenset[str]:
        """Return the devices in quarantine. Thread-safe."""
        now = self._clock()
        return frozenset(each.device for each in self._all() if each.quarantined(now))

    def take_notices(self) -> list[Notice]:
        notices = []
        while self._notices:
            notices.append(self._notices.popleft())
        return notices

    def take_dropped(self) -> dict[str, int]:
        """Return the number of messages of each device dropped unread since the last call."""
        dropped = {}
        for standing in self._all():
            if (number := standing.dropped - standing.dropped_before) > 0:
                standing.dropped_before += number
                dropped[standing.device] = number
        return dropped

    def kept(self, most: int) -> dict[str, KeptStanding]:
        """Return the standings that must survive a restart, by device; of too many, those with strikes."""
        now = self._clock()
        found = {each.device: kept for each in self._all() if (kept := each.kept(now)) is not None}
        if len(found) > most:
            first = sorted(found.items(), key=lambda entry: (entry[1].level, entry[1].strikes, entry[1].used["opens"]))
            found = dict(first[-most:])
        return found

    def restore(self, kept: Mapping[str, KeptStanding], *, ago_s: float) -> None:
        now = self._clock()
        for device, each in kept.items():
            self._standing(device).restore(each, ago_s=ago_s, now=now)

    # Internal

    def _while_quarantined(self, topic: Topic, standing: Standing, now: float) -> bool:
        """Accept an Open now and then, so that the device learns how long the quarantine lasts."""
        if topic is Topic.OPEN and now - standing.notified >= _NOTIFY_QUARANTINED_EVERY_S:
            standing.notified = now
            return True
        standing.dropped += 1
        return False

    def _strike(self, standing: Standing, weight: float, now: float) -> None:
        with self._lock:
            if standing.quarantined(now):
                return
            for_s = standing.strikes.add(weight, now)
            if for_s == 0.0:
                return
            standing.own_until = now + for_s
            standing.quarantined_until = max(standing.own_until, standing.others_until)
        self._notices.append(QuarantineBegun(standing.device, for_s, self._quarantine.strikes, standing.strikes.level))

    def _channel(self, topic: bytes) -> tuple[Topic, Standing] | None:
        """Return the entry of a new topic; None if it is not a device's."""
        if len(self._channels) >= 4 * _MAX_STANDINGS:
            self._channels.clear()  # rebuilt on demand
        try:
            address = parse(topic.decode())
        except (TopicError, UnicodeDecodeError):
            return None
        if address.device is None or address.topic not in _UP:
            return None
        channel = self._channels[topic] = address.topic, self._standing(address.device)
        return channel

    def _standing(self, device: str) -> Standing:
        standing = self._standings.get(device)
        if standing is None:
            with self._lock:
                if len(self._standings) >= _MAX_STANDINGS:
                    self._forget_idle()
                standing = self._standings.setdefault(
                    device, Standing(device, self._quotas.of(device), self._quarantine, self._clock())
                )
        return standing

    def _all(self) -> list[Standing]:
        with self._lock:
            return list(self._standings.values())

    def _forget_idle(self) -> None:
        """Forget idle devices: anyone can use new names where names cost no certificate."""
        now = self._clock()
        self._standings = {
            name: each for name, each in self._standings.items() if each.quarantined(now) or now - each.heard < _IDLE_S
        }
        if len(self._standings) >= _MAX_STANDINGS:
            self._standings = {name: each for name, each in self._standings.items() if each.quarantined(now)}
        self._channels = {}


def _over(what: str, wait_s: float) -> OpenRefused:
    return OpenRefused(RefusalCode.QUOTA, f"{what}; ask again in {math.ceil(wait_s)} s.", retry_s=wait_s)


@dataclass(slots=True)
class SharedQuarantines:
    """Applies to the guard the quarantines that the session log knows of."""

    guard: DeviceGuard
    edge: str
    now: Callable[[], datetime]
    _own: dict[str, datetime] = field(default_factory=dict)  # beginning, by device

    def begun(self, quarantine: QuarantineBegun) -> datetime:
        """Record a quarantine of our own; return its beginning (UTC)."""
        at = self._own[quarantine.device] = self.now()
        return at

    def apply(self, quarantines: Quarantines) -> list[str]:
        """Quarantine and release devices as the session log says; return those newly quarantined."""
        for device, since in list(self._own.items()):
            lifted = quarantines.lifted.get(device)
            if lifted is not None and lifted >= since:
                self.guard.lift(device)
                del self._own[device]
        others = {
            device: float("inf")
            if quarantine.until_at is None
            else (quarantine.until_at - quarantines.at).total_seconds()
            for device, quarantine in quarantines.active.items()
            if quarantine.by != self.edge or device not in self._own  # ours may date from before a restart
        }
        return sorted(self.guard.quarantined_by_others(others))


_log = logging.getLogger(__name__)

_MOST: Final = 4096
"""Devices kept, those with strikes first."""


class _File(BaseModel, extra="forbid", allow_inf_nan=False):
    at: AwareDatetime
    devices: Annotated[dict[str, KeptStanding], Field(max_length=_MOST)]


@dataclass(frozen=True, slots=True)
class KeptStandings:
    """Saves the standings of a guard to a file, so that a restart restores neither full quotas nor zero strikes.

    Quarantines are in the session log.
    """

    guard: DeviceGuard
    path: Path
    now: Callable[[], datetime]

    def read(self) -> None:
        try:
            found = _File.model_validate_json(self.path.read_bytes())
        except FileNotFoundError:
            return
        except (OSError, ValidationError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is damaged"
            _log.warning("The quotas of all devices start full: %s cannot be read: %s.", self.path, reason)
            return
        ago_s = max(0.0, (self.now() - found.at).total_seconds())
        self.guard.restore(found.devices, ago_s=ago_s)

    def write(self) -> None:
        """Replace the file. It is not synced: a power failure may lose the latest."""
        kept = self.guard.kept(_MOST)
        content = {"at": self.now().isoformat(), "devices": {name: each.model_dump() for name, each in kept.items()}}
        new = self.path.with_suffix(".new")
        try:
            new.write_text(json.dumps(content), encoding="utf-8")
            new.replace(self.path)
        except OSError as error:
            _log.warning("The quotas of devices cannot be kept in %s: %s.", self.path, error.strerror or error)
