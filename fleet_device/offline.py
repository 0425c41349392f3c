"""Offline policy: what becomes of a text for which no edge answers."""

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["OfflinePolicy", "Outages"]


class OfflinePolicy(StrEnum):
    """What is done when no edge answers."""

    FAIL = "fail"  # the text ends with an error
    WAIT = "wait"  # it goes on where it stands as soon as an edge is back
    LOCAL = "local"  # the draft model goes on alone; what it writes is marked as unverified


@dataclass(frozen=True, slots=True, kw_only=True)
class Outages:
    """What a text does in an outage.

    Attributes:
        policy: What becomes of it.
        rejoin: Whether an edge that is back verifies the rest of a text that went on without one.
        revisable: Whether nobody has read the text before its end, so that its unverified part can still be replaced.
        after_s: Seconds without a broker, or without an edge that is online, after which the policy applies.
        answer_s: Seconds of silence of an edge that says it is online, after which it applies.
    """

    policy: OfflinePolicy = OfflinePolicy.WAIT
    rejoin: bool = False
    revisable: bool = False
    after_s: float = 2.0
    answer_s: float = 15.0
