"""Counters of a segment: what an edge counts of a session while it serves it, and the rates that follow.

Columns of the session log, its records, merges, rollups, totals and views derive from the fields of `SegmentCounters`.
A new counter is a field here, a migration in `fleet_edge.store.migrations`, and a column in `fleet_admin.reports`.
"""

from dataclasses import dataclass, fields
from operator import add, attrgetter
from typing import Final


def share(part: float, whole: float) -> float | None:
    """Return part / whole, or None of nothing."""
    return part / whole if whole else None


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentCounters:
    """What an edge has counted of a session in one segment, or a sum of that. Counters only rise.

    Every field is an int or a float, 0 by default: a log written before there was a counter has nothing of it.

    Attributes:
        tokens: Committed, those resumed from left out.
        rounds: Verdicts given, repeats left out.
        drafted: Draft tokens received and judged or flushed.
        tested: Of these, accepted or rejected.
        accepted: Of these, accepted.
        uplink_bytes: Payload of the drafts received, repeats counted in.
        downlink_bytes: Payload of the verdicts sent, repeats counted in.
        queue_ms: From a draft's arrival to the step that verified it, less `prefill_ms`; summed over rounds.
        compute_ms: Of those steps, each whole; summed over rounds.
        batch_sum: Sessions verified together in those steps, this one counted in; summed over rounds.
        prefill_ms: From a draft's arrival to the step that verified it, spent in steps that computed the session's own
            prompt, or its text anew after a resume or an eviction; summed over rounds.
        resampled: Of the rounds, those that asked for further samples: answered from memory, nothing was verified.
        prefill_tokens: Of the prompt and of the text, computed for what comes behind them; computed anew counts again.
        reused_tokens: Likewise needed, and taken over from what another session had computed, or an earlier one.
        streamed: Of `tokens`, written by the edge itself because the device has asked it to.
        guessed: Tokens that the edge has guessed of what it writes by itself, and computed with the token before them.
        guessed_right: Of these, those that it has written: so many steps it was spared.
        forced: Of `tokens`, those that the text's grammar left no choice about, corrections left out.
    """

    tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    tested: int = 0
    accepted: int = 0
    uplink_bytes: int = 0
    downlink_bytes: int = 0
    queue_ms: float = 0.0
    compute_ms: float = 0.0
    batch_sum: int = 0
    prefill_ms: float = 0.0
    resampled: int = 0
    prefill_tokens: int = 0
    reused_tokens: int = 0
    streamed: int = 0
    guessed: int = 0
    guessed_right: int = 0
    forced: int = 0

    def __add__(self, other: "SegmentCounters") -> "SegmentCounters":
        sums = map(add, _values(self), _values(other))
        return SegmentCounters(**dict(zip(SEGMENT_COUNTERS, sums, strict=True)))

    @property
    def verified(self) -> int:
        """Rounds in which something was verified."""
        return self.rounds - self.resampled

    @property
    def acceptance(self) -> float | None:
        return share(self.accepted, self.tested)

    @property
    def mean_batch(self) -> float | None:
        """Mean number of sessions verified in one step, over the rounds that were verified."""
        return share(self.batch_sum, self.verified)

    @property
    def uplink_bytes_per_token(self) -> float | None:
        """Draft payload for each committed token."""
        return share(self.uplink_bytes, self.tokens)

    @property
    def downlink_bytes_per_token(self) -> float | None:
        """Verdict payload for each committed token."""
        return share(self.downlink_bytes, self.tokens)

    @property
    def queue_ms_per_round(self) -> float | None:
        return share(self.queue_ms, self.rounds)

    @property
    def prefill_ms_per_round(self) -> float | None:
        """Mean wait for the session's own prompt."""
        return share(self.prefill_ms, self.rounds)

    @property
    def compute_ms_per_round(self) -> float | None:
        """Mean time of a step, over the rounds that were verified."""
        return share(self.compute_ms, self.verified)


SEGMENT_COUNTERS: Final = tuple(field.name for field in fields(SegmentCounters))
"""The counters' names."""

_values: Final = attrgetter(*SEGMENT_COUNTERS)
