"""Segment counters: what an edge counts of a session while it serves it, and the derived rates.

Columns of the session log, its records, merges, rollups, totals and views derive from the fields of `SegmentCounters`.
A new counter is a field here and a column in `fleet_admin.reports`; docs/extending.md says more.
"""

from dataclasses import dataclass, fields
from typing import Final


def share(part: float, whole: float) -> float | None:
    """Return part / whole; None if whole is 0."""
    return part / whole if whole else None


@dataclass(slots=True, kw_only=True)
class SegmentCounters:
    """Counts of a session in one segment, or a sum of such counts. Counters only rise.

    Attributes:
        tokens: Committed, without those resumed from.
        rounds: Verdicts given, without repeats.
        drafted: Draft tokens received and judged or voided.
        tested: Draft tokens accepted or rejected.
        uplink_bytes: Payload of received drafts, including repeats.
        downlink_bytes: Payload of sent verdicts, including repeats.
        queue_ms: From a draft's arrival to the step that verified it, without `prefill_ms`; sum over rounds.
        compute_ms: Duration of those steps; sum over rounds.
        batch_sum: Sessions verified in those steps; sum over rounds.
        prefill_ms: From a draft's arrival to the step that verified it, spent in steps that computed the session's own
            prompt, or its tokens again after a resume or an eviction; sum over rounds.
        resampled: Rounds that requested further samples, answered from memory.
        prefill_tokens: Tokens computed without logits, including repetitions.
        reused_tokens: Tokens needed likewise and reused from another session; once, however often they are evicted.
        edge_only: Tokens of edge-only decoding.
        speculated: Speculated tokens in edge-only decoding: of the edge's draft model, or forced by a grammar.
        speculated_accepted: Speculated tokens that were right, each of which saved a step.
        forced: Tokens forced by the grammar, without corrections.
        grammar_ms: Time for the grammar: compiling it before the grant, and its masks as part of the steps.
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
    edge_only: int = 0
    speculated: int = 0
    speculated_accepted: int = 0
    forced: int = 0
    grammar_ms: float = 0.0

    @property
    def verified(self) -> int:
        """Rounds with verification."""
        return self.rounds - self.resampled

    @property
    def acceptance(self) -> float | None:
        return share(self.accepted, self.tested)

    @property
    def mean_batch(self) -> float | None:
        return share(self.batch_sum, self.verified)

    @property
    def own_compute_ms(self) -> float:
        """Time of steps, each shared equally by its sessions."""
        return share(self.compute_ms, self.mean_batch or 0.0) or 0.0

    @property
    def uplink_bytes_per_token(self) -> float | None:
        return share(self.uplink_bytes, self.tokens)

    @property
    def downlink_bytes_per_token(self) -> float | None:
        return share(self.downlink_bytes, self.tokens)

    @property
    def queue_ms_per_round(self) -> float | None:
        return share(self.queue_ms, self.rounds)

    @property
    def prefill_ms_per_round(self) -> float | None:
        return share(self.prefill_ms, self.rounds)

    @property
    def compute_ms_per_round(self) -> float | None:
        return share(self.compute_ms, self.verified)


SEGMENT_COUNTERS: Final = tuple(field.name for field in fields(SegmentCounters))
