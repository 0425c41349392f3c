"""The writer's settings, and what it counts."""

from dataclasses import dataclass

__all__ = ["WriterCounters", "WriterSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterSettings:
    """How the writer trades delay for throughput, and where its bounds are.

    Attributes:
        batch_records: Most records in one transaction.
        flush_interval_s: Longest wait before a commit; also what a crash may lose.
        capacity: Records held in memory; at some 500 bytes each.
        spill_at: Records in memory from which on they go to the spool without waiting for the database.
        retry_s: Between attempts while the database or the spool's disk is away.
    """

    batch_records: int = 500
    flush_interval_s: float = 0.25
    capacity: int = 65_536
    spill_at: int = 49_152
    retry_s: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterCounters:
    """What has become of the records since the start.

    Attributes:
        written: Committed to the database, from the spool or directly.
        spooled: Written to the spool.
        replayed: Of those written, from the spool (one of an earlier run counted in).
        rejected: Refused by the database for what they hold.
        dropped: Lost, because memory and spool were full.
        queued: In memory now.
        away: Whether the database did not answer when last asked.
    """

    written: int
    spooled: int
    replayed: int
    rejected: int
    dropped: int
    queued: int
    away: bool
