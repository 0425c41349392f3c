"""What a device counts itself, so that it can be compared with what the edges counted."""

from dataclasses import dataclass
from typing import Self

from schemas.messages import Close

__all__ = ["DeviceCounters"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCounters:
    """What the device itself counted over the whole session, all segments together, from its Close.

    Attributes:
        tokens: Committed.
        rounds: Drafts judged.
        drafted: Tokens proposed.
        tested: Of these, accepted or rejected.
        accepted: Of these, accepted.
        uplink_bytes: Payload of all drafts sent, repeats counted in.
        downlink_bytes: Payload of all verdicts received, repeats counted in.
        draft_ms: Spent in the draft model.
        wait_ms: Spent waiting for verdicts.
        wall_ms: From Open to Close.
    """

    tokens: int
    rounds: int
    drafted: int
    tested: int
    accepted: int
    uplink_bytes: int
    downlink_bytes: int
    draft_ms: float
    wait_ms: float
    wall_ms: float

    @classmethod
    def of(cls, close: Close) -> Self:
        """Take the counters out of a device's Close."""
        return cls(
            tokens=close.tokens,
            rounds=close.rounds,
            drafted=close.drafted,
            tested=close.tested,
            accepted=close.accepted,
            uplink_bytes=close.uplink_bytes,
            downlink_bytes=close.downlink_bytes,
            draft_ms=close.draft_ms,
            wait_ms=close.wait_ms,
            wall_ms=close.wall_ms,
        )
