"""Session table: handles, owners and leases."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from fleet_edge.errors import DraftFault, OpenRefused
from fleet_edge.sessions.admission import SessionLimits
from fleet_edge.sessions.grammars import Constraint
from fleet_edge.sessions.machine import EdgeSession
from schemas.messages import Open
from schemas.reasons import Action, FaultCode, RefusalCode

HANDLES: Final = 1 << 16


MAX_SESSIONS: Final = 4096
"""Open sessions of an edge, so that their records take a bounded memory."""


@dataclass(slots=True)
class _Lease:
    session: EdgeSession
    expires: float


@dataclass(slots=True)
class SessionTable:
    """Open sessions of one edge.

    A session is lost after `lease_s` seconds of its device's silence, unless that waits for the edge. Choose
    `first_handle` at random, so that a late message for an earlier run or another edge does not hit a session here.
    """

    lease_s: float
    most: int = MAX_SESSIONS
    max_per_device: int = 8
    first_handle: int = 0
    _by_handle: dict[int, _Lease] = field(default_factory=dict)
    _by_name: dict[tuple[str, bytes], int] = field(default_factory=dict)
    _next: int = field(init=False)

    def __post_init__(self) -> None:
        self._next = self.first_handle % HANDLES

    def __len__(self) -> int:
        return len(self._by_handle)

    def __iter__(self) -> Iterator[EdgeSession]:
        return (lease.session for lease in list(self._by_handle.values()))

    def __contains__(self, session: object) -> bool:
        if not isinstance(session, EdgeSession):
            return False
        lease = self._by_handle.get(session.handle)
        return lease is not None and lease.session is session

    def by_name(self, device: str, session: bytes) -> EdgeSession | None:
        handle = self._by_name.get((device, session))
        return None if handle is None else self._by_handle[handle].session

    def add(
        self, message: Open, *, device: str, limits: SessionLimits, now: float, constraint: Constraint | None = None
    ) -> EdgeSession:
        """Open a session; one of the same name is replaced.

        Raises `OpenRefused` if the table is full, or the device has too many sessions.
        """
        old = self.by_name(device, message.session)
        if old is not None:
            self.remove(old)
        if len(self) >= self.most:
            raise OpenRefused(RefusalCode.BUSY, f"The edge already serves {self.most} sessions; try again later.")
        if sum(owner == device for owner, _ in self._by_name) >= self.max_per_device:
            raise OpenRefused(
                RefusalCode.BUSY,
                f"The device has {self.max_per_device} open sessions; close one, or wait until its lease ends.",
            )
        session = EdgeSession.from_open(
            message, handle=self._free_handle(), device=device, limits=limits, constraint=constraint
        )
        self._by_handle[session.handle] = _Lease(session, now + self.lease_s)
        self._by_name[device, session.session] = session.handle
        return session

    def find(self, *, device: str, handle: int, now: float) -> EdgeSession:
        """Return the session that a device's message names, and renew its lease.

        Raises `DraftFault` if it is not open, or another device's; the two look alike, so that nobody can probe.
        """
        lease = self._by_handle.get(handle)
        if lease is None or lease.session.device != device:
            raise DraftFault(
                FaultCode.UNKNOWN_SESSION,
                Action.RESUME,
                "The edge does not know this session; the device opens it again.",
            )
        lease.expires = now + self.lease_s
        return lease.session

    def renew(self, session: EdgeSession, *, now: float) -> None:
        self._by_handle[session.handle].expires = now + self.lease_s

    def remove(self, session: EdgeSession) -> None:
        if self._by_handle.pop(session.handle, None) is not None:
            self._by_name.pop((session.device, session.session), None)

    def shorten(self, device: str, *, expires: float) -> None:
        """Limit a device's leases, because the broker reports it offline."""
        for lease in self._by_handle.values():
            if lease.session.device == device:
                lease.expires = min(lease.expires, expires)

    def expired(self, now: float) -> list[EdgeSession]:
        return [lease.session for lease in self._by_handle.values() if lease.expires <= now]

    def _free_handle(self) -> int:
        # Ascending, so that a handle is not reused while messages of its last owner may arrive.
        while self._next in self._by_handle:
            self._next = (self._next + 1) % HANDLES
        handle, self._next = self._next, (self._next + 1) % HANDLES
        return handle
