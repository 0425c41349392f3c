"""Broker limits that were reached, as the broker tells them: its log and its counter, both below $SYS.

The clients concerned are told nothing: a publisher's message counts as taken although a queue was full, and a client
too many finds its connection closed without a word.
"""

import re
from dataclasses import dataclass
from typing import Final

from schemas.printable import printable_line

DROPPED: Final = "$SYS/broker/publish/messages/dropped"
NOTICES: Final = "$SYS/broker/log/N"
WARNINGS: Final = "$SYS/broker/log/W"
SHARED: Final = "$SYS/broker/shared_subscriptions/count"
SYS_TOPICS: Final = (DROPPED, NOTICES, WARNINGS, SHARED)

# Each edge has one. A message is held against every one of them that matches: a thousand take a millisecond and more.
MOST_SHARED: Final = 256

LONGEST: Final = 500  # of a line that is looked at
_LINES: Final = (
    (
        re.compile(r"Outgoing messages are being dropped for client (.+)\.$"),
        "queue",
        "The queue of {} is full: it is slower than what is sent to it, and messages to it are dropped.",
    ),
    (
        re.compile(r"Dropping too large outgoing PUBLISH for (\S+) "),
        "packet",
        "A message to {} was dropped because it is larger than that client takes: give all clients the same limit.",
    ),
    (
        re.compile(r"Client connection from (\S+) denied: max_connections exceeded"),
        "connections",
        "A client at {} was turned away: as many are connected as the broker's max_connections allows.",
    ),
)


@dataclass(frozen=True, slots=True)
class LimitReached:
    """A limit that the broker has reached.

    Attributes:
        limit: `queue`, `packet`, `connections` or `subscriptions`.
        who: The client, or its address; None where the broker only counts.
        sentence: The same for a person.
    """

    limit: str
    who: str | None
    sentence: str


@dataclass(slots=True)
class LimitWatch:
    """Takes what mosquitto publishes on `SYS_TOPICS`, and tells what is news."""

    _dropped: int = 0
    _shared: int = 0

    def take(self, topic: str, payload: bytes) -> LimitReached | None:
        """Take one message; return what it tells, or None."""
        text = payload[:LONGEST].decode(errors="replace")
        if topic == DROPPED:
            return self._take_dropped(_count(text, self._dropped))
        if topic == SHARED:
            return self._take_shared(_count(text, self._shared))
        return self._take_line(text)

    def _take_shared(self, count: int) -> LimitReached | None:
        grown = count > max(MOST_SHARED, self._shared)
        self._shared = count
        if not grown:
            return None
        return LimitReached(
            "subscriptions",
            None,
            f"There are {count} shared subscriptions, where each edge needs one: messages take longer for all. Set "
            "log_subscriptions, render and restart the broker, and its log says whose they are; revoke that device.",
        )

    def _take_dropped(self, count: int) -> LimitReached | None:
        # What was dropped before we came is told too. A broker that was restarted counts from zero again.
        new = count - self._dropped if count >= self._dropped else count
        self._dropped = count
        if new == 0:
            return None
        return LimitReached("queue", None, f"The broker has dropped {new} messages because a client's queue was full.")

    @staticmethod
    def _take_line(text: str) -> LimitReached | None:
        for pattern, limit, sentence in _LINES:
            found = pattern.search(text)
            if found is not None:
                who = printable_line(found[1])  # a client id is what its owner likes it to be
                return LimitReached(limit, who, sentence.format(who))
        return None


def _count(text: str, otherwise: int) -> int:
    # ASCII digits alone: int() takes more than the broker writes.
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else otherwise
