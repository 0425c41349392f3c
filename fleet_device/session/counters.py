"""Session counters of a device."""

from dataclasses import dataclass

__all__ = ["SessionCounters"]


@dataclass(slots=True)
class SessionCounters:
    """What the device counts of a session; times are the caller's to add.

    Attributes:
        streamed: Tokens that the edge has written by itself.
        suffix_drafted: Of those drafted, the ones that were taken from earlier text.
        suffix_tested: Of these, tested.
        suffix_accepted: Of these, accepted. The others are named as `Close` names them.
    """

    drafted: int = 0
    tested: int = 0
    accepted: int = 0
    rounds: int = 0
    uplink_bytes: int = 0
    downlink_bytes: int = 0
    draft_ms: float = 0.0
    wait_ms: float = 0.0
    streamed: int = 0
    suffix_drafted: int = 0
    suffix_tested: int = 0
    suffix_accepted: int = 0

    @property
    def acceptance(self) -> float | None:
        """Accepted of tested, or None before the first test."""
        return self.accepted / self.tested if self.tested else None
