"""What an edge counts of a session."""

from dataclasses import dataclass

__all__ = ["SegmentCounters"]


@dataclass(slots=True)
class SegmentCounters:
    """What the edge counts of a session, payload bytes as they arrived and were sent."""

    rounds: int = 0
    drafted: int = 0
    tested: int = 0
    accepted: int = 0
    uplink_bytes: int = 0
    downlink_bytes: int = 0
    queue_ms: float = 0.0
    compute_ms: float = 0.0
    batch_sum: int = 0

    @property
    def mean_batch(self) -> float:
        """Mean number of sessions in the steps that verified this one."""
        return self.batch_sum / self.rounds if self.rounds else 0.0

    def judged(self, *, accepted: int, tested: int) -> None:
        """Count a draft that was decided on."""
        self.rounds += 1
        self.accepted += accepted
        self.tested += tested
