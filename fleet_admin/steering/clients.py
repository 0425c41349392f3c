"""Connected clients as the broker sees them.

mosquitto 2.0 has no list of its clients: `$SYS` holds their number, and its log names each that comes or goes. So the
list begins with the states that the broker retains (it publishes a client's will when it loses it), and follows the log
below `$SYS/broker/log`. The number shows whether the list is complete. A log read from the broker's start is.
"""

import re
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

NUMBER_TOPIC: Final = "$SYS/broker/clients/connected"
LOG_TOPIC: Final = "$SYS/broker/log/N"

_STAMP: Final = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d): ")
_CAME: Final = re.compile(r"New client connected from (\S+):(\d+) as (\S+) \(")
_GONE: Final = re.compile(
    r"Client (\S+)(?: \[\S+\])? ((?:closed its connection|disconnected|been disconnected|has exceeded timeout).*)"
)
_LOST: Final = re.compile(r"(Bad socket read/write) on client (\S+):")
_STARTED: Final = re.compile(r"mosquitto version \S+ starting")
_MAX_CLIENTS: Final = 100_000
_MAX_LINE: Final = 500

CONNECTED: Final = "connected"
GONE: Final = "not connected"


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerClient:
    """A client of the broker; `since` is None if it came before this program."""

    client: str
    state: str
    since: datetime | None = None
    address: str | None = None
    sentence: str = ""


class BrokerClients:
    """Clients by name. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._named: dict[str, BrokerClient] = {}
        self._number: int | None = None

    def forget(self) -> None:
        """Start again after a lost connection, during which the log was not read."""
        with self._lock:
            self._named.clear()
            self._number = None

    def read_number(self, payload: bytes) -> None:
        text = payload[:20].decode(errors="replace")
        with self._lock:
            self._number = int(text) if text.isdecimal() else None

    def read_line(self, line: str, *, now: datetime | None = None) -> None:
        """Read a line of the broker's log; without `now`, its time is the line's, in this machine's time zone."""
        line = line[:_MAX_LINE].strip()
        stamp = _STAMP.search(line)
        at = now or (datetime.fromisoformat(stamp[1]).astimezone(UTC) if stamp else None)
        if came := _CAME.search(line):
            address, _, name = came.groups()
            self._keep(BrokerClient(client=name, state=CONNECTED, since=at, address=address))
        elif gone := _GONE.search(line):
            self._keep(BrokerClient(client=gone[1], state=GONE, since=at, sentence=f"Broker: {gone[2]}"))
        elif lost := _LOST.search(line):
            self._keep(BrokerClient(client=lost[2], state=GONE, since=at, sentence=f"Broker: {lost[1]}."))
        elif _STARTED.search(line):
            self.forget()

    def named(self) -> dict[str, BrokerClient]:
        with self._lock:
            return dict(self._named)

    @property
    def number(self) -> int | None:
        """Connected clients as the broker counts them; None if it has not said so."""
        return self._number

    def _keep(self, client: BrokerClient) -> None:
        with self._lock:
            # The broker's word for a connection that ended before it had a name.
            if client.client != "<unknown>" and (client.client in self._named or len(self._named) < _MAX_CLIENTS):
                self._named[client.client] = client
