"""Offline policy: what becomes of a request for which no edge answers."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

INTERRUPTION_S: Final = 20.0
"""Longest interruption that a request rides out by default: a restart of broker or edge that takes 15 s, and the
reconnection of both ends, each of which tries again at least every 4 s."""

_ALONE_AFTER_S: Final = 2.0
"""Shorter with the policy `local`, which has something better to do than to wait."""


class OfflinePolicy(StrEnum):
    """What is done when no edge answers."""

    FAIL = "fail"  # the request ends with an error
    WAIT = "wait"  # it goes on where it was as soon as an edge is back
    LOCAL = "local"  # the draft model goes on alone; what it generates is marked as unverified


@dataclass(frozen=True, slots=True, kw_only=True)
class Outages:
    """What a request does in an outage.

    Attributes:
        policy: What becomes of it.
        rejoin: Whether an edge that is back verifies the rest of a generation that went on without one.
        revisable: Whether nobody reads the generation before its end, so that its unverified part can be replaced.
        after_s: Seconds without a broker, or without an edge that is online, after which the policy applies; None
            depends on the policy.
        answer_s: Seconds of silence of an edge that says it is online, after which it applies.
    """

    policy: OfflinePolicy = OfflinePolicy.WAIT
    rejoin: bool = False
    revisable: bool = False
    after_s: float | None = None
    answer_s: float = INTERRUPTION_S

    @property
    def absence_s(self) -> float:
        """Seconds without a broker, or without an edge that is online, after which the policy applies."""
        if self.after_s is not None:
            return self.after_s
        return _ALONE_AFTER_S if self.policy is OfflinePolicy.LOCAL else INTERRUPTION_S
