"""Telemetry totals of a device since it started."""

from dataclasses import dataclass
from typing import Final

from fleet_device.client.agent import Generation
from fleet_device.pacing.session_pacing import RoundTrips
from schemas.control import Telemetry

# What one draft weighs in the smoothed round trip: about the last thirty tell.
_DRAFT_WEIGHT: Final = 1 / 32


@dataclass(slots=True)
class DeviceTotals:
    """Sums over ended sessions; added to by one thread at a time.

    Attributes:
        sessions: How many.
        tokens: Committed.
    """

    sessions: int = 0
    tokens: int = 0
    _tested: int = 0
    _accepted: int = 0
    _streamed: int = 0
    _unverified: int = 0
    _drafted: int = 0
    _drafts: int = 0
    _draft_ms: float = 0.0
    _round_trip_ms: float | None = None

    def add(self, generation: Generation) -> Telemetry:
        """Count an ended session and return the totals as they are published."""
        counters = generation.counters
        self.sessions += 1
        self.tokens += len(generation.tokens)
        self._tested += counters.tested
        self._accepted += counters.accepted
        self._streamed += counters.streamed
        self._unverified += generation.unverified
        self._drafted += counters.drafted
        self._drafts += generation.drafts
        self._draft_ms += counters.draft_ms
        self._smooth(generation.round_trips)
        return Telemetry(
            sessions=self.sessions,
            tokens=self.tokens,
            acceptance=self._accepted / self._tested if self._tested else None,
            mean_draft=self._drafted / self._drafts if self._drafts else None,
            draft_ms_per_token=self._draft_ms / self._drafted if self._drafted else None,
            round_trip_ms=self._round_trip_ms,
            streamed=self._streamed,
            unverified=self._unverified or None,
            plan=generation.choice and generation.choice.plan,
        )

    def _smooth(self, new: RoundTrips) -> None:
        if new.mean_ms is None:
            return
        before_ms = new.mean_ms if self._round_trip_ms is None else self._round_trip_ms
        kept = (1.0 - _DRAFT_WEIGHT) ** new.count
        self._round_trip_ms = kept * before_ms + (1.0 - kept) * new.mean_ms
